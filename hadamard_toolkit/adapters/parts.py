"""The parts of an attachment by layer and site, and the attachment with only some of them switched on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.wiring import HOME
from hadamard_toolkit.errors import ArgumentError, UnsupportedError

# The site of parameters that a method tunes wherever they are (BitFit, full fine-tuning).
BACKBONE = "backbone"

# The index of a layer and the name of a site.
LayerSite = tuple[int, str]


@dataclass
class Part:
    """The labels of an attachment's modules and tuned parameters at one site of one layer."""

    insertions: list[str] = field(default_factory=list)
    tunings: list[str] = field(default_factory=list)


def parts_of(attachment: Attachment) -> dict[LayerSite, Part]:
    """The parts of `attachment` in the layers of its model, by layer and site and sorted by layer.

    A site is that of an adapter's module, of a norm that trains (`attention_norm`, `ffn_norm`), or `"backbone"` for
    parameters that are tuned wherever they are. Prompt vectors, embeddings and the pooler are outside the layers and
    not among the parts.

    Raises `UnsupportedError` where several layers share a tuned parameter (the norms of ALBERT), `ArgumentError` for a
    merged attachment.
    """
    if not hasattr(attachment.model, HOME):
        raise ArgumentError("this attachment is merged or detached: no part of it can be switched off")
    sites, parts = attachment.sites, dict[LayerSite, Part]()
    for label, insertion in attachment.insertions.items():
        if insertion.site.layer is not None:
            layer_site = (insertion.site.layer, insertion.site.name)
            parts.setdefault(layer_site, Part()).insertions.append(label)
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
        parts.setdefault((layer, site), Part()).tunings.append(tuning.label)
    return {layer_site: parts[layer_site] for layer_site in sorted(parts, key=lambda pair: pair[0])}


def chosen_sites(attachment: Attachment, kept: Iterable[int | LayerSite]) -> frozenset[LayerSite]:
    """The sites that `kept` names: a layer means all its sites, `(layer, site)` one of them.

    A layer that carries nothing has no sites. Raises `ArgumentError` for unknown layers and sites.
    """
    parts, chosen = parts_of(attachment), set[LayerSite]()
    for item in kept:
        layer, site = item if isinstance(item, tuple) else (item, None)
        [layer] = attachment.sites.layers([layer])
        if site is not None and (layer, site) not in parts:
            here = ", ".join(repr(other) for at, other in parts if at == layer) or "nothing"
            raise ArgumentError(f"kept={item!r} is not allowed: layer {layer} carries {here}")
        chosen |= {(at, other) for at, other in parts if at == layer and site in (None, other)}
    return frozenset(chosen)


@contextmanager
def only(attachment: Attachment, kept: Collection[LayerSite]) -> Iterator[None]:
    """In the block, of the parts in layers only those at `kept` are on; the head stays as it is."""
    off = [part for layer_site, part in parts_of(attachment).items() if layer_site not in kept]
    with attachment.without(
        [label for part in off for label in part.insertions],
        [label for part in off for label in part.tunings],
    ):
        yield
