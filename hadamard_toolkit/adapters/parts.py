"""The parts of an attachment by layer and site, and the attachment with only some of them at work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.errors import ArgumentError, UnsupportedError

BACKBONE = (
    "backbone"  # the site of parameters that a method tunes wherever they are (BitFit, full fine-tuning)
)

LayerSite = tuple[int, str]  # layer and site


@dataclass
class Part:
    """What an attachment has at one site of one layer: labels of its modules there, and of tuned parameters."""

    insertions: list[str] = field(default_factory=list)
    tunings: list[str] = field(default_factory=list)


def parts_of(attachment: Attachment) -> dict[LayerSite, Part]:
    """Everything that `attachment` does to the layers of its model, by layer and site, in that order.

    A site is that of an adapter's module, the norm that trains beside it (`attention_norm`, `ffn_norm`), or
    `"backbone"` for parameters that are tuned wherever they are. What is outside the layers (prompt vectors,
    embeddings, pooler) has no place here and stays on.

    Raises `UnsupportedError` where one tuned parameter serves several layers (the norms of
    ALBERT), `ArgumentError` for a merged attachment.
    """
    if not hasattr(attachment.model, "hadamard_attachment"):
        raise ArgumentError("this attachment is merged or detached: no part of it can be switched off")
    sites, found = attachment.sites, dict[LayerSite, Part]()
    for label, insertion in attachment.insertions.items():
        if insertion.site.layer is not None:
            place = (insertion.site.layer, insertion.site.name)
            found.setdefault(place, Part()).insertions.append(label)
    owners: dict[int, int] = {}
    parameters = attachment.named_parameters()
    for tuning in attachment.tunings:
        layer = sites.layer_of(tuning.path) if tuning.layer is None else tuning.layer
        if layer is None:
            continue
        if owners.setdefault(id(parameters[f"{tuning.role}.{tuning.label}"]), layer) != layer:
            raise UnsupportedError(
                f"{type(attachment.model).__name__} shares {tuning.path} between its layers, so it cannot be "
                "off in some of them; an adapter without norms, such as Hadamard(norm=None), can"
            )
        site = BACKBONE if tuning.layer is None else tuning.label.split(".")[2]
        found.setdefault((layer, site), Part()).tunings.append(tuning.label)
    return {place: found[place] for place in sorted(found, key=lambda place: place[0])}


def chosen_sites(attachment: Attachment, kept: Iterable[int | LayerSite]) -> frozenset[LayerSite]:
    """The places that `kept` names: a layer means all its sites, `(layer, site)` one.

    A layer that carries nothing may be named; it has no places. Unknown ones raise `ArgumentError`.
    """
    places, chosen = parts_of(attachment), set[LayerSite]()
    for item in kept:
        layer, site = item if isinstance(item, tuple) else (item, None)
        [layer] = attachment.sites.layers([layer])
        if site is not None and (layer, site) not in places:
            here = ", ".join(repr(other) for at, other in places if at == layer) or "nothing"
            raise ArgumentError(f"kept={item!r} is not allowed: layer {layer} carries {here}")
        chosen |= {place for place in places if place[0] == layer and site in (None, place[1])}
    return frozenset(chosen)


@contextmanager
def only(attachment: Attachment, kept: Collection[LayerSite]) -> Iterator[None]:
    """In the block, those parts in layers that stand at `kept` are at work and no others; the head stays as it is."""
    off = [part for place, part in parts_of(attachment).items() if place not in kept]
    with attachment.without(
        [label for part in off for label in part.insertions],
        [label for part in off for label in part.tunings],
    ):
        yield
