from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hadamard_toolkit import cli, doctor
from hadamard_toolkit.errors import ToolkitError
from hadamard_toolkit.runs import environment
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from tests.runs.conftest import backbone_folder, data_root, make_spec

__all__ = ["backbone_folder", "data_root", "make_spec"]  # fixtures of the runs serve here too
TINY = [
    "--set",
    "epochs=1",
    "--set",
    "head_epochs=2",
    "--set",
    "train_rows=48",
    "--set",
    "validation_rows=16",
]
TINY += ["--set", "max_length=24", "--set", "test_rows=30", "--protocol", "smoke"]


@pytest.fixture
def command(
    make_spec: Callable[..., RunSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`command("runs", …)` runs the command line in this process: (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


COMMANDS = {
    "fetch": (),
    "run": ("backbone", "task", "adapter", "sparsity", "protocol", "set", "seed", "keep", "store"),
    "runs": ("csv", "json", "store"),
    "sweep": ("engine", "workers", "bank", "minutes", "dry-run", "keep", "store"),
    "prepare": (),
    "pack": ("undo", "store"),
    "pruner": ("run", "port", "no-browser", "store"),
    "measure": ("plan", "task", "method", "seed", "store"),
    "figures": ("store", "folder", "venue"),
    "doctor": (),
}


def test_help_shows_commands_in_groups(command: Callable[..., tuple[int, str, str]]) -> None:
    text = command("--help")[1]
    named = [line.split()[1] for line in text.splitlines() if re.match(r"│ [a-z]", line)]
    assert set(named) >= set(COMMANDS)
    titles = [text.index(f" {title} ") for title in ("Train", "Look at runs", "Look after a store")]
    assert (
        titles[0] < text.index("sweep ") < titles[1] < text.index("pruner ") < titles[2] < text.index("pack ")
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_help(command: Callable[..., tuple[int, str, str]], name: str) -> None:
    status, text, _ = command(name, "--help")
    assert status == 0
    options = set(re.findall(r"^│ [* ]*--([a-z-]+)", text, flags=re.MULTILINE))
    assert options == {*COMMANDS[name], "help"}
    assert ("HADAMARD_STORE" in text) == ("store" in options)


def test_a_shell_completes_commands_and_choices(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_HADAMARD_COMPLETE", "complete_bash")
    for line, wanted in (
        ("hadamard sw", ["sweep"]),
        ("hadamard sweep p.toml --engine ", ["inline", "processes", "ray"]),
    ):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        assert command()[:2] == (0, "\n".join(wanted) + "\n")


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["run"], ["run", "--task"], ["runs", "--csv", "--json"], ["sweep", "p", "--engine=gpu"]],
)
def test_a_wrong_call_has_the_status_2(
    command: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    assert command(*arguments)[0] == 2


def test_the_store_of_the_environment_is_the_default(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("of_the_environment", "named"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HADAMARD_STORE", str(tmp_path / "of_the_environment"))
    assert command("runs")[1] == f"0 runs in {tmp_path / 'of_the_environment'}\n"
    assert command("runs", "--store", tmp_path / "named")[1] == f"0 runs in {tmp_path / 'named'}\n"
    monkeypatch.setenv("HADAMARD_STORE", "")
    monkeypatch.chdir(tmp_path)
    assert "store='runs' is not there" in command("runs")[2]


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_is_quick_and_needs_no_torch(option: str, repository: Path) -> None:
    code = f"""
import sys
from hadamard_toolkit.cli import main
try:
    main(["{option}"])
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "pandas", "transformers"}} & set(sys.modules), "a heavy import"
"""
    begun = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert time.perf_counter() - begun < 2  # 0.1 s on an idle core
    wanted = "hadamard_toolkit " + environment.toolkit_version() if option == "--version" else "fetch"
    assert wanted in answer.stdout


def test_run_then_runs(
    command: Callable[..., tuple[int, str, str]], backbone_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    wanted = ["run", "--backbone", backbone_folder, "--task", "SST-2", "--seed", 4, "--store", store, *TINY]
    wanted += ["--adapter", "Hadamard(layers=(0, 2))"]
    status, out, err = command(*wanted)
    (key,) = RunStore(store).keys()
    run = RunStore(store).run(key)
    assert (run.spec.seed, run.spec.task, run.spec.protocol.epochs, run.spec.adapter.layers) == (
        4,
        "sst2",
        1,
        (0, 2),
    )
    assert status == 0
    assert out.startswith(f"{key}  done in ")
    lines = err.splitlines()  # a log must not stay silent for the length of a training
    assert [line.partition(":")[0] for line in lines] == [
        *("stage one", "stage one, epoch 1 of 2", "stage one, epoch 2 of 2"),
        *("stage two", "stage two, epoch 1 of 1"),
    ]
    assert "eval_accuracy 0." in lines[-1]
    assert f"accuracy {run.score:.4f}" in out
    assert "(n = 30, subset)" in out
    assert "adapter 64, norm 64, head 34" in out
    assert command(*wanted)[1].startswith(f"{key}  was there already")

    status, out, _ = command("runs", "--store", store)
    head, row, total = out.splitlines()
    assert (status, total) == (0, f"1 runs in {store} (* a subset of the official data)")
    assert row.startswith(key)
    assert f"{run.score:.4f}  30*" in row
    assert head.index("adapter") == row.index("Hadamard(layers=(0, 2))")
    assert head.index("test") + 4 == row.index(f"{run.score:.4f}") + 6  # numbers end where their title ends

    rows = list(csv.DictReader(io.StringIO(command("runs", "--store", store, "--csv")[1])))
    assert {(r["split"], r["metric"]) for r in rows} >= {("test", "accuracy"), ("validation", "loss")}
    lines = command("runs", "--store", store, "--json")[1].splitlines()
    assert [json.loads(line)["key"] for line in lines] == [key] * len(rows)


def test_runs_names_failures_and_damage(
    command: Callable[..., tuple[int, str, str]], backbone_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (store / "notes").mkdir(parents=True)
    status, _, err = command(
        "run",
        "--backbone",
        backbone_folder,
        "--task",
        "sst2",
        "--store",
        store,
        *TINY,
        "--adapter",
        "Hadamard(layers=(9,))",
    )
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("hadamard: layers=(9,) is not allowed")
    status, out, err = command("runs", "--store", store)
    assert status == 0
    assert "1 failed:" in out
    assert "ArgumentError: layers=(9,) is not allowed" in out
    assert "notes" in err


def test_notes_that_cannot_be_read_do_not_hide_the_runs(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "0123456789abcdef.json").write_text("")
    status, out, err = command("runs", "--store", tmp_path)
    assert (status, out) == (0, f"0 runs in {tmp_path}\n")
    assert err.startswith("hadamard: skipped ")
    assert "0123456789abcdef.json" in err


@pytest.mark.parametrize("what", [["runs"], ["measure", "gates"], ["pruner"]])
def test_a_store_that_is_not_there_is_not_an_empty_one(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, what: list[str]
) -> None:
    status, out, err = command(*what, "--store", tmp_path / "typo")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "typo' is not there" in err


def test_a_run_that_its_store_cannot_take_is_saved_elsewhere(
    command: Callable[..., tuple[int, str, str]],
    backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, real = tmp_path / "store", RunStore.add

    def full(self: RunStore, done: Run) -> Run:
        if self.folder == store:
            raise OSError(28, "No space left on device")
        return real(self, done)

    monkeypatch.setattr(RunStore, "add", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = ["run", "--backbone", backbone_folder, "--task", "sst2", "--adapter", "HeadOnly", *TINY]
    status, out, err = command(*one, "--store", store)
    saved, reason = err.splitlines()[-2:]
    folder = Path(saved.removeprefix("hadamard: the trained run is saved in "))
    assert (status, out) == (2, "")
    assert RunStore(folder.parent).run(folder.name).spec.task == "sst2"
    assert "could not be written" in reason
    assert "No space left on device" in reason

    store.rmdir()
    store.write_text("a file in the way")
    status, out, err = command(*one, "--store", store / "runs")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "store is a file, and a store is a folder" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "name='sst3' is no known task"),
        (["--task", "sst2", "--adapter", "exit()"], "adapter='exit' is not allowed"),
        (["--task", "sst2", "--protocol", "quick"], "protocol='quick' is not allowed"),
        (["--task", "sst2", "--set", "epochs"], "write field=value"),
        (["--task", "sst2", "--set", "epochs=few"], "epochs='few'"),
        (["--task", "sst2", "--seed", "-1"], "seed=-1 is not allowed"),
        (["--task", "sst2", "--backbone", "no/such"], "name='no/such' is not allowed"),
    ],
)
def test_errors_are_one_line_and_status_2(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = command("run", "--store", tmp_path / "store", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hadamard: ")
    assert message in err


def test_debug_shows_where_an_error_came_from(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAMARD_DEBUG", "1")
    with pytest.raises(ToolkitError, match="no known task"):
        command("run", "--task", "sst3")


def test_interrupt_has_its_own_status(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert command("doctor") == (130, "", "hadamard: interrupted; finished runs are kept\n")


def test_sweep_follows_its_plan(
    command: Callable[..., tuple[int, str, str]], backbone_folder: Path, tmp_path: Path
) -> None:
    plan, store = tmp_path / "plan.toml", tmp_path / "store"
    overrides = (
        "epochs = 1, head_epochs = 2, train_rows = 48, validation_rows = 16, max_length = 24, test_rows = 30"
    )
    plan.write_text(f"""
[[grid]]
backbone = "{backbone_folder}"
tasks = ["sst2"]
adapters = ["Hadamard(layers=(9,))", "HeadOnly()"]
seeds = [0, 1]
protocol = "smoke"
overrides = {{ {overrides} }}
""")
    status, out, _ = command("sweep", plan, "--store", store, "--dry-run")
    assert status == 0
    assert out.splitlines()[0].endswith("4 runs, 0 in " + str(store) + ", 4 missing")
    assert out.splitlines()[1] == "no estimate: nothing like these runs is recorded yet"
    assert len(out.splitlines()) == 6
    assert not store.exists()

    status, out, _ = command("sweep", plan, "--store", store, "--minutes", "1e-9")
    assert (status, out.splitlines()[-2:]) == (0, ["4 left", "4 of 4 runs left; the same command goes on"])
    status, _, err = command("sweep", plan, "--store", store, "--minutes", "0")
    assert (status, err) == (2, "hadamard: minutes=0.0 is not allowed; it must be > 0\n")

    status, out, _ = command("sweep", plan, "--store", store)
    assert status == 1
    assert "[1/4] " in out
    assert "failed: ArgumentError: layers=(9,) is not allowed" in out
    assert out.splitlines()[-1] == "2 done, 2 failed"
    plan.write_text(plan.read_text().replace('"Hadamard(layers=(9,))", ', ""))
    status, out, _ = command("sweep", plan, "--store", store)
    assert (status, out.splitlines()[-1]) == (0, "2 present")
    plan.write_text(plan.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3]"))
    first, second, *rest = command("sweep", plan, "--store", store, "--dry-run")[1].splitlines()
    assert first.endswith(f"4 runs, 2 in {store}, 2 missing")
    assert re.fullmatch(r"about \d+ s on this machine \(2 from runs with another seed\)", second)
    assert len(rest) == 2
