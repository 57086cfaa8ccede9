"""AdapterFusion: its formula, its two phases, and what it refuses to fuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.fusion import Fusion
from hadamard_toolkit.errors import ArgumentError, DataError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.life import check_json, check_life, counts_on_bert_base, logits, shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_life(architecture: str, tmp_path: Path) -> None:
    """Before its adapters are loaded it is the identity; then gradients reach Q, K, V and the head alone."""
    check_life(architecture, ht.AdapterFusion(("a", "b"), bottleneck=16), tmp_path, identity=True)


def test_counts() -> None:
    fusion, single = 12 * 3 * 768 * 768, 894_528
    assert fusion == 21_233_664
    for tasks in (("a",), ("a", "b", "c")):
        stored = fusion + len(tasks) * single
        assert counts_on_bert_base(ht.AdapterFusion(tasks))["adapter"] == (fusion, stored, stored)


def test_exact_key_sets() -> None:
    state = ht.attach(tiny_model("bert"), ht.AdapterFusion(("rte", "sst2"), layers=(1,))).stored_state()
    site = "adapter.layers.1.ffn_residual"
    expected = {f"{site}.{name}" for name in ("query", "key", "value")}
    expected |= {
        f"{site}.tasks.{task}.{part}.{kind}"
        for task in ("rte", "sst2")
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert set(state) == expected | {"head.classifier.weight", "head.classifier.bias"}
    identity = state[f"{site}.value"]
    torch.testing.assert_close(identity, torch.eye(16), rtol=0, atol=1e-6)
    assert identity[0, 1] == pytest.approx(1e-6)


def test_it_is_the_formula() -> None:
    def by_hand(own: dict[str, Tensor], weights: dict[str, Tensor]) -> Changes:
        def output(layer: int, total: Tensor, _: Tensor) -> Tensor:
            norm = f"bert.encoder.layer.{layer}.output.LayerNorm"
            gain, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
            site = f"adapter.layers.{layer}.ffn_residual"
            x = F.layer_norm(total, (16,), gain, shift, 1e-12)
            outputs = []
            for task in ("a", "b", "c"):
                w = {name: own[f"{site}.tasks.{task}.{name}"] for name in ("down.weight", "up.weight")}
                bias = {name: own[f"{site}.tasks.{task}.{name}"] for name in ("down.bias", "up.bias")}
                inner = torch.tanh(x @ w["down.weight"].T + bias["down.bias"])
                outputs.append(0.5 * (inner @ w["up.weight"].T + bias["up.bias"]))
            q, k, v = (own[f"{site}.{name}"] for name in ("query", "key", "value"))
            mixed = torch.zeros_like(x)
            for row in range(x.shape[0]):
                for position in range(x.shape[1]):
                    z = torch.stack([out[row, position] for out in outputs])  # [tasks, width]
                    shares = torch.softmax((z @ k.T) @ (q @ x[row, position]), 0)
                    mixed[row, position] = shares @ (z @ v.T)
            return F.layer_norm(total + mixed, (16,), gain, shift, 1e-12)

        return {"output": output}

    adapter = ht.AdapterFusion(("a", "b", "c"), bottleneck=5, activation="tanh", scale=0.5)
    check_against(adapter, by_hand)


def _trained(folder: Path, architecture: str = "bert", seed: int = 1, **fields: object) -> Tensor:
    """Save a Pfeiffer adapter as if trained, with its head; gives its logits."""
    model = tiny_model(architecture)
    attachment = ht.attach(model, ht.Pfeiffer(**{"bottleneck": 4, **fields}))  # type: ignore[arg-type]
    shake(attachment, seed=seed)
    attachment.save(folder)
    return logits(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fusion_of_one_adapter_is_that_adapter(architecture: str, tmp_path: Path) -> None:
    expected = _trained(tmp_path / "one", architecture)
    model = tiny_model(architecture)
    fused = ht.fuse(model, {"one": tmp_path / "one"})
    single = ht.attach(tiny_model(architecture), ht.Pfeiffer(bottleneck=4))
    single.load_state_dict(ht.load_attachment(tiny_model(architecture), tmp_path / "one").state_dict())
    head = {name: value for name, value in single.state_dict().items() if name.startswith("head.")}
    fused.load_state_dict(head)  # the softmax over one adapter is one, and V begins as the identity
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)


def test_two_phases(tmp_path: Path) -> None:
    for seed in (0, 1):
        _trained(tmp_path / str(seed), seed=seed, init="normal")
    folders = {"rte": tmp_path / "0", "embedded/tweets-polarity": str(tmp_path / "1")}
    model = tiny_model("bert")
    attachment = ht.fuse(model, folders)
    assert attachment.adapter == ht.AdapterFusion(("rte", "embedded/tweets-polarity"), bottleneck=4)
    before = copy.deepcopy(attachment.state_dict())
    alone = ht.load_attachment(tiny_model("bert"), tmp_path / "0").state_dict()
    name = "layers.2.ffn_residual"
    loaded = before[f"adapter.{name}.tasks.rte.up.weight"]
    assert torch.equal(loaded, alone[f"adapter.{name}.up.weight"])

    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in attachment.state_dict().items():
        assert torch.equal(value, before[key]) == (".tasks." in key), key

    attachment.train_only("head")
    attachment.train_only("adapter")
    counts = attachment.count()["trained"]
    assert (counts["adapter"], counts["head"]) == (3 * 3 * 16 * 16, 0), "the adapters stay frozen"

    attachment.save(tmp_path / "fused")
    expected = logits(model)
    attachment.detach()
    for folder in ("0", "1"):
        (tmp_path / folder / "adapter_model.safetensors").unlink()
    ht.load_attachment(model, tmp_path / "fused")
    assert torch.equal(logits(model), expected), "a fusion's file holds its adapters"


def test_shares_follow_the_query(tmp_path: Path) -> None:
    fusion = Fusion(2, dict(ht.AdapterFusion(("a", "b"), bottleneck=1)._adapters(2)), reads_hidden=True)
    for task, bias in (("a", [1.0, 0.0]), ("b", [0.0, 1.0])):
        fusion.tasks[task].up.bias.data = torch.tensor(bias)
    fusion.query.data = fusion.key.data = 10 * torch.eye(2)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(fusion(x, x), 2 * x, rtol=0, atol=1e-4)


def test_half_an_adapter_is_not_fused(tmp_path: Path) -> None:
    """In an older file, too, which has no digest of its tensors."""
    _trained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    del config["files"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "format": 1}))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load(weights.read_bytes())
    weights.write_bytes(save({name: value for name, value in tensors.items() if "layers.1." not in name}))
    model = tiny_model("bert")
    with pytest.raises(DataError, match=r"lacks 4 tensors of Pfeiffer.*'adapter.layers.1.*tasks.a"):
        ht.fuse(model, {"a": tmp_path / "a"}, strict=False)
    assert not hasattr(model, "hadamard_attachment")


def test_what_it_refuses(tmp_path: Path) -> None:
    _trained(tmp_path / "a")
    _trained(tmp_path / "wider", bottleneck=5)
    _trained(tmp_path / "gated", gated="original")
    ht.attach(tiny_model("bert"), ht.LoRA()).save(tmp_path / "lora")
    model = tiny_model("bert")
    with pytest.raises(
        ArgumentError, match=r"wider.*holds Pfeiffer.*bottleneck=5.*is over Pfeiffer.*bottleneck=4"
    ):
        ht.fuse(model, {"a": tmp_path / "a", "b": tmp_path / "wider"})
    for folder, message in (
        ("gated", "without gates"),
        ("lora", "holds LoRA"),
        ("none", "no saved attachment"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ht.fuse(model, {"a": tmp_path / folder})
    with pytest.raises(ArgumentError, match="folders="):
        ht.fuse(model, {})
    with pytest.raises(DataError, match="trained on another backbone"):
        ht.fuse(tiny_model("bert", seed=3), {"a": tmp_path / "a"})
    assert not hasattr(model, "hadamard_attachment"), "a refusal leaves no trace"
    ht.fuse(tiny_model("bert", seed=3), {"a": tmp_path / "a"}, strict=False)
    attachment = ht.fuse(model, {"a": tmp_path / "a"})
    with pytest.raises(ArgumentError, match="task 'b' is not allowed; this fusion is over 'a'"):
        ht.load_adapters(attachment, {"b": tmp_path / "a"})
    attachment.detach()
    with pytest.raises(ArgumentError, match="holds no AdapterFusion"):
        ht.load_adapters(ht.attach(model, ht.HeadOnly()), {"a": tmp_path / "a"})


@pytest.mark.parametrize("tasks", [(), "sst2", ("a", "a"), ("a.b",), ("keys",), ("",), (3,)])
def test_bad_tasks(tasks: object) -> None:
    with pytest.raises(ArgumentError, match=r"tasks=.* is not allowed; give different names"):
        ht.AdapterFusion(tasks)  # type: ignore[arg-type]


def test_description_round_trips() -> None:
    check_json(ht.AdapterFusion(("sst2", "embedded/tweets-polarity"), bottleneck=4, layers=(0,)))
    with pytest.raises(ArgumentError, match="bottleneck=0"):
        ht.AdapterFusion(("a",), bottleneck=0)


def test_every_field_reaches_the_adapters_of_the_tasks() -> None:
    adapter = ht.AdapterFusion(
        ("a", "b"), bottleneck=5, activation="tanh", dropout=0.25, scale=2.0, layers=(1,)
    )
    [(label, insertion)] = ht.attach(tiny_model("bert"), adapter).insertions.items()
    assert label == "layers.1.ffn_residual"
    for single in insertion.module.tasks.values():
        assert (single.down.out_features, single.scale, single.dropout.p) == (5, 2.0, 0.25)
        assert torch.equal(single.activation(torch.ones(1)), torch.tanh(torch.ones(1)))
