"""Prefix tuning (Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hadamard_toolkit.adapters.attention import Carried, attention_of, check_host
from hadamard_toolkit.adapters.base import Adapter, Declared, Insertion, SiteModule, register
from hadamard_toolkit.adapters.fields import Layers, all_layers, one_of, whole
from hadamard_toolkit.adapters.gates import GATED, Gate
from hadamard_toolkit.sites import Site, Sites, features


class PrefixNetwork(SiteModule):
    """tanh(W₁ e_i + b₁) [length, bottleneck], from which the prefixes of all layers are computed in training.

    It is never stored.
    """

    def __init__(self, length: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, bottleneck)
        # How many prefixes still compute themselves from this network.
        self.readers = 0

    def forward(self) -> Tensor:  # type: ignore[override]
        return torch.tanh(self.down(self.embedding))

    def stored(self) -> dict[str, Tensor]:
        return {}

    def released(self) -> None:
        """Note that one prefix has keys and values of its own now; after the last one, drop the parameters."""
        self.readers -= 1
        if not self.readers:
            del self.embedding, self.down


class Prefix(SiteModule):
    """Keys and values [length, width] in front of those of one self-attention.

    With a `network` they are this layer's part of W₂ tanh(W₁ e_i + b₁) + b₂, until folded keys and values are loaded. A
    gate, one number per example, scales both.
    """

    gates = ("gate.weight", "gate.bias")

    def __init__(self, length: int, width: int, network: PrefixNetwork | None, gate: Gate | None) -> None:
        super().__init__()
        # In a list, as it is a part of its own and no submodule of this one.
        self._network = [network] if network else []
        if network is None:
            self._hold(torch.randn(length, width) * 0.02, torch.randn(length, width) * 0.02)
        else:
            network.readers += 1
            self.up = nn.Linear(network.down.out_features, 2 * width)
        self.gate = gate

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Keys and values, each [length, width], without the gate."""
        if not self._network:
            return self.key, self.value
        keys, values = self.up(self._network[0]()).chunk(2, -1)
        return keys, values

    def stored(self) -> dict[str, Tensor]:
        keys, values = self()
        gate = {name: value for name, value in self.named_parameters() if name in self.gates}
        return {"key": keys, "value": values, **gate}

    def take_form(self, names: set[str]) -> None:
        if self._network and {"key", "value"} <= names:
            with torch.no_grad():
                self._hold(*self())
            self.key.requires_grad_(self.up.weight.requires_grad)
            self.value.requires_grad_(self.up.weight.requires_grad)
            self._network.pop().released()
            del self.up

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.key, self.value = nn.Parameter(keys.contiguous()), nn.Parameter(values.contiguous())


@dataclass(frozen=True, eq=False)
class _InAttention(Insertion):
    """Hang a `Prefix` on the attention module of `site`; its gate reads the input of that module."""

    architecture: str = field(kw_only=True)

    def connect(self) -> list[Any]:
        handles: list[Any] = [Carried(self.site.module, self, self.architecture)]
        if self.module.gate is not None:
            handles.append(self.site.module.register_forward_pre_hook(self._note_states, with_kwargs=True))
        return handles

    def _note_states(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The input of the whole module, since its key projection may read a table of positions too.
        self._passing["inputs"] = args[0] if args else kwargs["hidden_states"]

    def keys_and_values(self, like: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, width = like.shape
        keys, values = self.module()
        if self.module.gate is not None:
            opening = self.module.gate(self._passing.pop("inputs"))  # type: ignore[operator]
            keys, values = keys * opening, values * opening

        def split(rows: Tensor) -> Tensor:
            rows = rows.to(like.dtype).unflatten(-1, (heads, width)).transpose(-3, -2)
            return rows.expand(batch, -1, -1, -1)

        return split(keys), split(values)


@dataclass(frozen=True, eq=False)
class _Shared(Insertion):
    """A module that several parts share; it is not wired into the model itself."""

    def connect(self) -> list[Any]:
        return []


@register
@dataclass(frozen=True)
class PrefixTuning(Adapter):
    """softmax(Q [P_K; K]ᵀ / √d) [P_V; V] in every self-attention, P_K and P_V learned (Li and Liang 2021, section 4).

    Parameters
    ----------
    length: rows of P_K and P_V; their width is that of the key projection (fewer heads than the query's in llama).
    bottleneck: inner width of the network from which the prefixes of all layers are computed in training (section 4.3),
        [P_K; P_V]_i = W₂ tanh(W₁ e_i + b₁) + b₂, with e [length, hidden] ~ N(0, 1) and torch's linear initialisation.
        The network is not saved: a file, and an attachment loaded from one, hold the prefixes themselves, which then
        train directly. None trains P_K, P_V ~ N(0, 0.02²) directly from the start.
    gated: None, or a gate per layer (Mao et al. 2022) on both P_K and P_V that reads the input of the self-attention:
        `"original"` (its mean includes padding) or `"masked"`. The keys of a closed gate are zero and still draw
        attention: the prefix cannot vanish.
    layers: `"all"` or indices; in encoder-decoder models they include the decoder's self-attention.

    On BERT-base with 10: 184,320 parameters stored, 9,857,024 trained through the network. A prefix changes the outputs
    from the start and does not merge. It has no position, and every position of the input sees all of it, whatever
    padding, causal order or a local window hides.
    """

    length: int = whole(10)
    bottleneck: int | None = whole(512, optional=True)
    gated: str | None = one_of(None, GATED)
    layers: Layers = all_layers()

    def declare(self, sites: Sites) -> Iterator[Declared]:
        architecture = sites.model.config.model_type
        layers = sites.layers(self.layers)
        projections = [sites(layer, "key") for layer in layers]
        network = None
        if self.bottleneck is not None and projections:
            width = features(projections[0].module)[0]
            network = PrefixNetwork(self.length, width, self.bottleneck)
            yield _Shared(Site("prefix_network", None, "", sites.base, "module"), network)
        for layer, projection in zip(layers, projections, strict=True):
            path, attention = attention_of(sites, layer)
            check_host(attention, architecture)
            gate = Gate(features(projection.module)[0], self.gated) if self.gated else None
            prefix = Prefix(self.length, projection.width, network, gate)
            site = replace(
                projection, name="prefix", path=path, module=attention, side="module", projection_slice=None
            )
            yield _InAttention(site, prefix, architecture=architecture)
