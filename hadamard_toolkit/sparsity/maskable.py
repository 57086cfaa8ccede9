"""What may be pruned: declared by the adapter's parts, chosen by kind or by full name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.sparsity.spec import KINDS, Maskable


@dataclass(frozen=True)
class ParameterSite:
    """Where a maskable parameter sits: `layer` (None outside the layers), `site`, and its `kind`.

    Kinds: `projections` (weight matrices that the part declares), `biases` (of projections), `vectors` (Hadamard and
    (IA)³ vectors, scales), `prefixes` (prefixes and prompts), `norms`, `gates`, `backbone` (full fine-tuning, BitFit).
    """

    layer: int | None
    site: str
    kind: str


@dataclass(frozen=True)
class Target:
    """A parameter to be masked, and where it sits."""

    parameter: nn.Parameter
    site: ParameterSite


def targets(attachment: Attachment, maskable: Maskable = "projections") -> dict[str, Target]:
    """The parameters of `attachment` to be masked, by name.

    `maskable` is a kind, `"all"`, or a tuple of kinds and full names (as in `Attachment.named_parameters`). What is
    stored but does not train, what is not stored (the training-time network of prefixes) and the head cannot be masked.
    Raises `ArgumentError` for a choice that the attachment has nothing of.
    """
    everything = dict(_everything(attachment))
    choices = (maskable,) if isinstance(maskable, str) else maskable
    chosen = {name for choice in choices for name in _chosen(attachment, everything, choice)}
    if not chosen:
        raise ArgumentError(f"maskable={maskable!r}: {attachment.adapter} has nothing that can be masked")
    return {name: target for name, target in everything.items() if name in chosen}


def _chosen(attachment: Attachment, everything: dict[str, Target], choice: str) -> list[str]:
    if choice in everything:
        return [choice]
    kinds = KINDS if choice == "all" else (choice,)
    names = [name for name, target in everything.items() if target.site.kind in kinds]
    if names or (choice in ("all", *KINDS) and not everything):
        return names
    if choice in attachment.named_parameters():
        raise ArgumentError(
            f"maskable={choice!r} is not allowed: it belongs to the head, does not train, or is not stored"
        )
    check_choice("maskable", choice, ("all", *KINDS, "the full name of a parameter of the attachment"))
    present = [kind for kind in KINDS if any(t.site.kind == kind for t in everything.values())]
    raise ArgumentError(
        f"maskable={choice!r}: {attachment.adapter} has no {choice} that can be masked; it has {', '.join(present)}"
    )


def _everything(attachment: Attachment) -> Iterator[tuple[str, Target]]:
    seen: set[int] = set()  # a tied tensor has one mask, under its first name
    first_names = {id(p): name for name, p in reversed(attachment.named_parameters().items())}
    for insertion in attachment.insertions.values():
        part, stored = insertion.module, insertion.module.stored()
        for name, parameter in part.named_parameters():
            if name not in part.frozen and stored.get(name) is parameter and id(parameter) not in seen:
                seen.add(id(parameter))
                site = ParameterSite(insertion.site.layer, insertion.site.name, _kind(insertion, name))
                yield first_names[id(parameter)], Target(parameter, site)
    for tuning in attachment.tunings:
        parameter = attachment.named_parameters()[f"{tuning.role}.{tuning.label}"]
        if id(parameter) not in seen:
            seen.add(id(parameter))
            kind = "norms" if tuning.role == "norm" else "backbone"
            module = tuning.label.removeprefix(f"layers.{tuning.layer}.").rpartition(".")[0]
            yield first_names[id(parameter)], Target(parameter, ParameterSite(tuning.layer, module, kind))


def _kind(insertion: Insertion, name: str) -> str:
    part = insertion.module
    if name in part.gates:
        return "gates"
    if name in part.projections:
        return "projections"
    owner = part.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.LayerNorm):
        return "norms"
    if part.get_parameter(name).ndim >= 2:
        return "prefixes"
    return "biases" if isinstance(owner, nn.Linear) else "vectors"
