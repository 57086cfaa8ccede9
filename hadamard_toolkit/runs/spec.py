"""What a run is: one frozen value whose canonical JSON names its folder."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, Self

from hadamard_toolkit.errors import ArgumentError, check_choice, check_whole
from hadamard_toolkit.paths import folder_of
from hadamard_toolkit.sparsity.spec import Sparsity

if TYPE_CHECKING:
    from hadamard_toolkit.training.protocol import Protocol

SCHEMA = 1
FIELDS = ("backbone", "task", "adapter", "protocol", "sparsity", "seed")
WHOLE = 2**53  # up to here every whole float is exactly an integer


def plain(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON data: tuples become lists, array scalars numbers, and whole floats integers.

    The last rule keeps the promise that equal specs have equal keys: in Python `1e0 == 1`, in JSON text they differ.
    Anything that JSON cannot hold, NaN and infinity included, raises `ArgumentError` naming `where` it sits.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ArgumentError(f"{where}={value!r} is not allowed in a run spec; it must be finite")
        return int(value) if value.is_integer() and abs(value) < WHOLE else float(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict(), where)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), where)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item(), where)
    raise ArgumentError(f"{where}={value!r} cannot be written as JSON, so it cannot be part of a run spec")


def canonical_json(value: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces, shortest exact floats, ASCII only."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(spec: Mapping[str, Any]) -> str:
    """The key of a spec given as plain data: the first 16 hex digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(spec).encode("ascii")).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class RunSpec:
    """Everything that decides a run, and nothing else.

    `backbone` is a name, hub id or folder, which becomes its absolute path however it is spelled; `task` a name of the
    task registry, in any spelling; `adapter` any adapter of the toolkit; `protocol` a `Protocol`; `sparsity` None or a
    `Sparsity` (its fields as a dictionary do too); `seed` fixes head, adapter, rows and order of batches. Two specs are
    equal when their canonical JSON is; `key` is the hash of it.
    """

    backbone: str
    task: str
    adapter: Any
    protocol: Protocol
    sparsity: Sparsity | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("backbone", "task"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ArgumentError(f"{name}={value!r} is not allowed; it must be a name, given as text")
        check_whole("seed", self.seed, least=0, below=2**32)
        self._check_types()
        object.__setattr__(self, "task", _task_name(self.task))
        object.__setattr__(self, "_given", self.backbone)
        object.__setattr__(self, "backbone", _one_spelling(self.backbone))
        if self.sparsity is not None and not isinstance(self.sparsity, Sparsity):
            fields = plain(self.sparsity, "sparsity")
            if not isinstance(fields, dict):
                raise ArgumentError(
                    f"sparsity={self.sparsity!r} is not allowed; give Sparsity('snip', 0.5) or None"
                )
            object.__setattr__(self, "sparsity", Sparsity.from_dict(fields))
        # Once and here: a bad field is refused at the caller's line, and a dictionary that changes later moves no key.
        object.__setattr__(self, "_json", canonical_json(self._parts()))

    def _check_types(self) -> None:
        from hadamard_toolkit.adapters.base import Adapter  # here, so that reading a store needs no torch
        from hadamard_toolkit.training.protocol import Protocol

        examples = {"adapter": (Adapter, "Hadamard()"), "protocol": (Protocol, "protocols.hadamard()")}
        for name, (kind, example) in examples.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ArgumentError(f"{name}={value!r} is not allowed; give a {name} such as {example}")

    def _parts(self) -> dict[str, Any]:
        from hadamard_toolkit.adapters.base import adapter_to_dict

        return {
            "schema": SCHEMA,
            "backbone": self.backbone,
            "task": self.task,
            "adapter": plain(adapter_to_dict(self.adapter), "adapter"),
            "protocol": plain(self.protocol, "protocol"),
            "sparsity": plain(self.sparsity, "sparsity"),
            "seed": self.seed,
        }

    def as_given(self) -> Self:
        """This spec with the backbone spelled as the caller did, which is how earlier versions recorded a folder."""
        spec = copy.copy(self)
        object.__setattr__(spec, "backbone", self.__dict__["_given"])
        object.__setattr__(spec, "_json", canonical_json(spec._parts()))
        return spec

    def to_json(self) -> str:
        """The canonical JSON text that `key` is the hash of."""
        return str(self.__dict__["_json"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back: the fields above and `schema`."""
        return dict(json.loads(self.to_json()))

    @property
    def key(self) -> str:
        """16 hex digits, the same in every process and on every machine."""
        return key_of(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote; unknown fields and newer schemas are refused by name."""
        from hadamard_toolkit.adapters.base import adapter_from_dict
        from hadamard_toolkit.training.protocol import Protocol

        schema = data.get("schema")
        check_choice("schema", schema, (SCHEMA,))
        if unknown := sorted(set(data) - {"schema", *FIELDS}):
            raise ArgumentError(
                f"a run spec has no field {', '.join(map(repr, unknown))}; it has {', '.join(FIELDS)}"
            )
        if missing := [name for name in FIELDS if name not in data]:
            raise ArgumentError(f"a run spec needs the field {', '.join(map(repr, missing))}")
        fields = {name: data[name] for name in FIELDS}
        fields["adapter"] = adapter_from_dict(data["adapter"])
        fields["protocol"] = Protocol.from_dict(data["protocol"])
        return cls(**fields).as_given()  # another spelling would be another key than the recorded one

    @classmethod
    def grid(
        cls,
        *,
        backbone: str | Iterable[str] = "minilm-l6",
        task: str | Iterable[str],
        adapter: Any,
        protocol: Any,
        sparsity: Any = None,
        seed: int | Iterable[int] = 0,
    ) -> list[Self]:
        """Every combination of the values given, each field being one value or a list, tuple or range of them.

        Tasks vary slowest and seeds fastest, so that neighbours share backbone, task and cached features.
        A combination named twice appears once. An empty list raises `ArgumentError`.
        """
        fields = {"backbone": backbone, "task": task, "adapter": adapter, "protocol": protocol}
        fields |= {"sparsity": sparsity, "seed": seed}
        axes = {
            name: list(value) if isinstance(value, list | tuple | range) else [value]
            for name, value in fields.items()
        }
        if empty := [name for name, values in axes.items() if not values]:
            raise ArgumentError(f"{empty[0]}=[] is not allowed; a grid needs at least one value of it")
        specs = (cls(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
        return list(dict.fromkeys(specs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunSpec) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


def _one_spelling(backbone: str) -> str:
    """The absolute path of a folder, without links; names and hub ids are kept, and folders of other machines."""
    from hadamard_toolkit.pinned import PINNED

    folder = None if backbone in PINNED else folder_of(backbone)
    return str(folder.resolve()) if folder is not None else backbone


def _task_name(name: str) -> str:
    """The registered spelling, so that "SST-2" and "sst2" share a key. A name that is not registered here is kept:
    another machine's record stays readable, and running it is refused by `load_task`."""
    from hadamard_toolkit.tasks.registry import canonical

    try:
        return canonical(name)
    except ArgumentError:
        return name
