from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.errors import ArgumentError
from hadamard_toolkit.runs.labels import describe, label_of
from hadamard_toolkit.runs.plan import (
    load_plan,
    parse_adapter,
    parse_overrides,
    parse_protocol,
    parse_sparsity,
    plan_text,
)
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.training import protocols


def test_a_plan_that_was_written_is_read_as_the_same_specs(tmp_path: Path) -> None:
    protocol = protocols.hadamard(clip=None, precision="bf16", betas=(0.9, 0.98))
    sparse = Sparsity("snip", 0.5)
    specs = ht.RunSpec.grid(
        task=["sst2", "rte"], adapter=[ht.Hadamard(norm=None), ht.LoRA()], protocol=protocol, seed=range(3)
    )
    specs += ht.RunSpec.grid(
        task="rte", adapter=ht.LoRA(), protocol=protocols.unipelt(), sparsity=sparse, seed=4
    )
    text = plan_text(specs, "Two tasks\nand a sparse one")
    assert text.startswith("# Two tasks\n# and a sparse one\n\n[[grid]]\n")
    assert text.count("[[grid]]") == 3
    (tmp_path / "plan.toml").write_text(text)
    found = load_plan(tmp_path / "plan.toml")
    assert len(found) == len(specs)
    assert set(found) == set(specs)
    adapted = ht.RunSpec("minilm-l6", "rte", ht.LoRA(), protocols.hadamard(pretraining=(protocols.tapt(),)))
    with pytest.raises(ArgumentError, match="pretraining cannot be written"):
        plan_text([adapted], "")


@pytest.mark.parametrize(
    ("text", "adapter"),
    [
        ("Hadamard", ht.Hadamard()),
        ("Hadamard()", ht.Hadamard()),
        (
            ' Hadamard(placement="attention_heads", norm=None) ',
            ht.Hadamard(placement="attention_heads", norm=None),
        ),
        ("Hadamard(layers=(0, 2), vectors=['weight'])", ht.Hadamard(layers=(0, 2), vectors=("weight",))),
        ("LoRA(rank=4, alpha=8.0)", ht.LoRA(rank=4, alpha=8.0)),
        ("Stack(Hadamard(), LoRA(rank=2))", ht.Stack(ht.Hadamard(), ht.LoRA(rank=2))),
        ("Stack(adapters=(HeadOnly, LoRA))", ht.Stack(ht.HeadOnly(), ht.LoRA())),
    ],
)
def test_adapters_are_read_as_written(text: str, adapter: Any) -> None:
    assert parse_adapter(text) == adapter
    assert parse_adapter(label_of(adapter)) == adapter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hadamrd()", "adapter='Hadamrd' is not allowed; choose one of"),
        ("Hadamard(colour='red')", "colour"),
        ("Hadamard('all', 'attention_output', None, (), 5)", "does not fit: .*positional"),
        ("Hadamard(placement='nowhere')", "placement='nowhere'"),
        ("Hadamard(", "cannot be read"),
        ("", "cannot be read"),
        ("7", "write an adapter"),
        ("__import__('os').system('true')", "is neither a value nor a name"),
        ("Hadamard(layers=[x for x in (1, 2)])", "is neither a value nor a name"),
        ("Hadamard(layers=(1).__class__)", "is neither a value nor a name"),
        ("Hadamard(**{'norm': None})", r"without \* or \*\*"),
        ("Stack(*(Hadamard(),))", r"without \* or \*\*"),
        ("(lambda: 0)()", "is neither a value nor a name"),
        ("open('x')", "adapter='open' is not allowed"),
    ],
)
def test_text_that_is_no_adapter_is_refused_and_never_run(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_adapter(text)


def test_protocols_are_presets_with_changes() -> None:
    assert parse_protocol("hadamard") == protocols.hadamard()
    assert parse_protocol("unipelt(k=500)") == protocols.unipelt(k=500)
    assert parse_protocol("smoke(epochs=1)", {"betas": [0.8, 0.9]}) == protocols.smoke(
        epochs=1, betas=(0.8, 0.9)
    )
    with pytest.raises(ArgumentError, match=r"protocol='fast' is not allowed; choose one of .*'hadamard'"):
        parse_protocol("fast")
    with pytest.raises(ArgumentError, match="epocs"):
        parse_protocol("hadamard", {"epocs": 1})
    with pytest.raises(ArgumentError, match="epochs=0"):
        parse_protocol("hadamard", {"epochs": 0})
    with pytest.raises(ArgumentError, match="name a preset"):
        parse_protocol("3")


def test_pruning_is_read_as_written(tmp_path: Path) -> None:
    snip = Sparsity("snip", 0.5)
    assert parse_sparsity('Sparsity("snip", 0.5)') == parse_sparsity(label_of(snip)) == snip
    assert parse_sparsity("None") is None
    with pytest.raises(ArgumentError, match="write None or Sparsity"):
        parse_sparsity("0.5")
    with pytest.raises(ArgumentError, match="sparsity=1"):
        parse_sparsity("Sparsity('snip', 1.0)")
    pruned = PLAN.replace("seeds = [0, 1]", "seeds = [0, 1]\nsparsity = ['None', 'Sparsity(\"snip\", 0.5)']")
    specs = load_plan(written(tmp_path, pruned))
    assert len(specs) == 17
    assert {spec.sparsity for spec in specs} == {None, snip}
    assert {describe(spec) for spec in specs if spec.adapter == ht.Hadamard()} == {
        "Hadamard()",
        'Hadamard() Sparsity(scorer="snip", sparsity=0.5)',
    }


def test_overrides_are_literals_or_text() -> None:
    assert parse_overrides(
        ["epochs=3", "head=trained", "clip=None", "learning_rate = 1e-3", "betas=(0.9, 0.99)"]
    ) == {
        "epochs": 3,
        "head": "trained",
        "clip": None,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.99),
    }
    for bad in ("epochs", "=3"):
        with pytest.raises(ArgumentError, match="write field=value"):
            parse_overrides([bad])


PLAN = """
[[grid]]
tasks = ["sst2", "rte"]
adapters = ["Hadamard()", 'LoRA(rank=4)']
seeds = [0, 1]
protocol = "hadamard"
overrides = { epochs = 3 }

[[grid]]
backbone = ["minilm-l6", "mpnet-base"]
tasks = ["sst2"]
adapters = ["Hadamard"]
protocol = "hadamard(epochs=3)"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_plan_is_its_grids_without_repetition(tmp_path: Path) -> None:
    specs = load_plan(written(tmp_path, PLAN))
    assert len(specs) == 9  # eight of the first grid, and of the second the one on mpnet-base
    assert [spec.backbone for spec in specs].count("mpnet-base") == 1
    assert {spec.protocol for spec in specs} == {protocols.hadamard(epochs=3)}
    assert (specs[0].task, specs[0].adapter, specs[0].seed) == ("sst2", ht.Hadamard(), 0)
    assert (specs[1].seed, specs[2].adapter) == (1, ht.LoRA(rank=4))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds =", "seed =", "grid 1 of .*plan.toml: field of .*'seed' is not allowed"),
        ("LoRA(rank=4)", "LoRA(rang=4)", "grid 1 of .*rang"),
        ('tasks = ["sst2"]', "", "grid 2 of .*'tasks' is missing"),
        ("seeds = [0, 1]", "seeds = 2", "grid 1 of .*seeds=2 is not allowed; it must be a list"),
        ("seeds = [0, 1]", "seeds = []", r"grid 1 of .*seed=\[\]"),
        ("epochs = 3", "epochs = -3", "grid 1 of .*epochs=-3"),
        ("[[grid]]", "[grid]", "no valid TOML"),
        ("[[grid]]", "[[plan]]", r"a plan is a list of \[\[grid\]\] tables; it also has 'plan'"),
        ("[[grid]]\ntasks", 'title = "mine"\n[[grid]]\ntasks', "it also has 'title'"),
    ],
)
def test_bad_plan_is_refused_at_its_place(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in PLAN
    with pytest.raises(ArgumentError, match=message):
        load_plan(written(tmp_path, PLAN.replace(before, after)))


def test_absent_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nothing\.toml' cannot be read: No such file"):
        load_plan(tmp_path / "nothing.toml")
