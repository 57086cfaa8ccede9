"""Plans, lists of specs: from text (the command line, plan files; nothing is ever evaluated) and for Large-Sparse."""

from __future__ import annotations

import ast
import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import ArgumentError, ToolkitError, check_choice
from hadamard_toolkit.runs.labels import label_of
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.sparsity.spec import Sparsity
from hadamard_toolkit.training.protocol import Protocol
from hadamard_toolkit.training.protocols import hadamard

if TYPE_CHECKING:
    from hadamard_toolkit.adapters.base import Adapter

GRID_FIELDS = ("backbone", "tasks", "adapters", "sparsity", "seeds", "protocol", "overrides")


def parse_adapter(text: str) -> Adapter:
    """An adapter from text: `Hadamard(placement="attention_heads")`, `LoRA`, `Stack(Hadamard(), LoRA(rank=4))`.

    Only names of registered adapters, literals and calls of the former are understood; everything else raises
    `ArgumentError`.
    """
    from hadamard_toolkit.adapters.base import REGISTRY, Adapter

    adapter = _read(_parse(text, "adapter"), text, "adapter", REGISTRY)
    if not isinstance(adapter, Adapter):
        raise ArgumentError(f"adapter={text!r} is not allowed; write an adapter, e.g. {_EXAMPLE['adapter']}")
    return adapter


def parse_sparsity(text: str) -> Sparsity | None:
    """A pruning from text: `Sparsity("snip", 0.5)`, or `None`."""
    found = _read(_parse(text, "sparsity"), text, "sparsity", {"Sparsity": Sparsity})
    if found is not None and not isinstance(found, Sparsity):
        raise ArgumentError(f"sparsity={text!r} is not allowed; write None or {_EXAMPLE['sparsity']}")
    return found


def parse_protocol(text: str, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """A protocol from the name of a preset, with changes in brackets or in `overrides`: `unipelt(k=500)`."""
    from hadamard_toolkit.training import protocols

    presets = {name: getattr(protocols, name) for name in protocols.__all__}
    protocol = _read(_parse(text, "protocol"), text, "protocol", presets)
    if not isinstance(protocol, Protocol):
        raise ArgumentError(f"protocol={text!r} is not allowed; name a preset, e.g. {_EXAMPLE['protocol']}")
    changes = {name: _tuples(value) for name, value in (overrides or {}).items()}
    for name in changes:
        check_choice("field of Protocol", name, [field.name for field in dataclasses.fields(Protocol)])
    return dataclasses.replace(protocol, **changes)


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["epochs=3", "head=trained"]` as a dictionary; a value that is no literal is text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(f"set={pair!r} is not allowed; write field=value, e.g. epochs=3")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def load_plan(path: str | Path) -> list[RunSpec]:
    """The specs of a plan file: every `[[grid]]` table is a grid of the lists in it.

        [[grid]]
        backbone = "minilm-l6"          # or a list; this is the default
        tasks = ["sst2", "rte"]
        adapters = ["Hadamard()", 'LoRA(rank=4)']
        sparsity = ["None", 'Sparsity("snip", 0.5)']    # ["None"] is the default
        seeds = [0, 1, 2]               # [0] is the default
        protocol = "hadamard"           # any preset
        overrides = { epochs = 3, train_rows = 1000 }

    A spec named twice is done once. `ArgumentError` names the file and the table that is wrong.
    """
    path = Path(path).expanduser()
    try:
        plan = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ArgumentError(f"plan={str(path)!r} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # TOML syntax, or not UTF-8
        raise ArgumentError(f"plan={str(path)!r} is no valid TOML: {error}") from None
    grids = plan.pop("grid", None)
    if plan or not isinstance(grids, list) or not grids:
        found = f"; it also has {', '.join(map(repr, plan))}" if plan else ""
        raise ArgumentError(f"plan={str(path)!r} is not allowed; a plan is a list of [[grid]] tables{found}")
    specs: list[RunSpec] = []
    for number, grid in enumerate(grids, start=1):
        try:
            specs += _grid(grid)
        except ToolkitError as error:
            raise ArgumentError(f"grid {number} of {path}: {error}") from error
    return list(dict.fromkeys(specs))


def plan_text(specs: Iterable[RunSpec], heading: str) -> str:
    """The plan file of `specs`: `load_plan` reads the same ones from it, in the order of its grids.

    `heading` becomes its comment. Runs that differ in the seed or the adapter alone stand in one grid.
    """
    seeds: dict[Any, list[int]] = {}
    for spec in specs:
        if spec.protocol.pretraining:
            raise ArgumentError("specs with pretraining cannot be written as a plan")
        fields = (spec.backbone, spec.task, spec.protocol, spec.sparsity, spec.adapter)
        seeds.setdefault(fields, []).append(spec.seed)
    adapters: dict[Any, list[str]] = {}
    for (*fields, adapter), of_adapter in seeds.items():
        adapters.setdefault((*fields, tuple(sorted(of_adapter))), []).append(label_of(adapter))
    grids = [
        {
            "backbone": backbone,
            "tasks": [task],
            "adapters": of_grid,
            "sparsity": ["None" if sparsity is None else label_of(sparsity)],
            "seeds": list(of_seed),
            "protocol": label_of(protocol, hadamard()).replace("Protocol", "hadamard", 1),
        }
        for (backbone, task, protocol, sparsity, of_seed), of_grid in adapters.items()
    ]
    # JSON's numbers, texts and lists are TOML's too.
    lines = [f"# {line}" for line in heading.splitlines()]
    for grid in grids:
        lines += ["", "[[grid]]", *(f"{name} = {json.dumps(value)}" for name, value in grid.items())]
    return "\n".join(lines) + "\n"


def _grid(grid: Mapping[str, Any]) -> list[RunSpec]:
    for name in grid:
        check_choice("field of [[grid]]", name, GRID_FIELDS)
    for name in ("tasks", "adapters", "protocol"):
        if name not in grid:
            raise ArgumentError(f"{name!r} is missing")
    for name in ("tasks", "adapters", "sparsity", "seeds"):
        if not isinstance(grid.get(name, []), list):
            raise ArgumentError(f"{name}={grid[name]!r} is not allowed; it must be a list")
    return RunSpec.grid(
        backbone=grid.get("backbone", "minilm-l6"),
        task=grid["tasks"],
        adapter=[parse_adapter(text) for text in grid["adapters"]],
        sparsity=[parse_sparsity(text) for text in grid.get("sparsity", ["None"])],
        protocol=parse_protocol(grid["protocol"], grid.get("overrides")),
        seed=grid.get("seeds", [0]),
    )


def _parse(text: str, argument: str) -> ast.expr:
    try:
        return ast.parse(str(text).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ArgumentError(
            f"{argument}={text!r} cannot be read; write it as in Python, e.g. {_EXAMPLE[argument]}"
        ) from None


_EXAMPLE = {
    "adapter": "Hadamard(layers=(0, 1))",
    "protocol": "hadamard(epochs=3)",
    "sparsity": 'Sparsity("snip", 0.5)',
}


def _read(node: ast.expr, text: str, argument: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of a literal, of a known name, or of a known name called with such values."""
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_read(item, text, argument, known) for item in node.elts)
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            unclear = ast.unparse(node)
            raise ArgumentError(
                f"{argument}={text!r} is not allowed: {unclear} is neither a value nor a name called with values"
            ) from None
    check_choice(argument, name.id, known)
    if not isinstance(node, ast.Call):
        node = ast.Call(name, [], [])
    if any(isinstance(item, ast.Starred) for item in node.args) or any(
        word.arg is None for word in node.keywords
    ):
        raise ArgumentError(f"{argument}={text!r} is not allowed: give values one by one, without * or **")
    values = [_read(item, text, argument, known) for item in node.args]
    fields = {str(word.arg): _read(word.value, text, argument, known) for word in node.keywords}
    try:
        return known[name.id](*values, **fields)
    except TypeError as error:  # a field it does not have
        raise ArgumentError(f"{argument}={text!r} does not fit: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def large_sparse_plan(
    budget: int,
    adapter: Adapter,
    *,
    task: str | Iterable[str],
    protocol: Protocol,
    sparsity: Sparsity,
    backbone: str = "minilm-l6",
    full_protocol: Protocol | None = None,
    sizes: Iterable[int] | None = None,
    biases: bool = False,
    seeds: Iterable[int] = (0,),
) -> list[RunSpec]:
    """Specs for `sweep`: per task and seed the small dense adapter, a sparse one per larger width, full fine-tuning.

    `budget`, `adapter`, `sizes` and `biases` as in `large_sparse`; of `sparsity` all is used but the share, which each
    width sets. `full_protocol` is that of full fine-tuning, whose learning rate is another one; None takes `protocol`.
    """
    from hadamard_toolkit.adapters.tuning import FullFineTuning
    from hadamard_toolkit.backbones import load_backbone
    from hadamard_toolkit.sparsity.budgets import dense_adapter, large_sparse

    model, _ = load_backbone(backbone)
    pairs = large_sparse(budget, adapter, model, sizes=sizes, biases=biases, maskable=sparsity.maskable)
    pairs = pairs[pairs["sparsity"] > 0]
    first = int(pairs["kept"].iloc[0]) if len(pairs) else budget
    rows: list[tuple[Adapter, Sparsity | None, Protocol]] = [
        (dense_adapter(adapter, model, first, maskable=sparsity.maskable), None, protocol)
    ]
    rows += [
        (wide, dataclasses.replace(sparsity, sparsity=share), protocol)
        for wide, share in zip(pairs["adapter"], pairs["sparsity"], strict=True)
    ]
    rows.append((FullFineTuning(), None, full_protocol or protocol))
    tasks = [task] if isinstance(task, str) else list(task)
    seeds = list(seeds)
    return [
        RunSpec(backbone, name, method, how, pruning, seed)
        for name in tasks
        for method, pruning, how in rows
        for seed in seeds
    ]
