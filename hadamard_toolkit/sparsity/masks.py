"""`Masks`: which entries of an adapter stay, how they were chosen, and the density by layer and site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.attachment import Attachment, attach
from hadamard_toolkit.adapters.base import adapter_from_dict
from hadamard_toolkit.adapters.masking import read_masks, write_masks
from hadamard_toolkit.errors import ArgumentError, check_choice
from hadamard_toolkit.sparsity.maskable import ParameterSite

BY = ("tensor", "layer", "site")


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks by parameter name. While they are applied to `attachment`, removed entries are zero and stay zero.

    Attributes
    ----------
    kept: bool tensors on the CPU, True where an entry stays.
    places: layer, site and kind of each masked parameter.
    provenance: JSON-able: `scorer`, `sparsity`, `scope`, `rounds`, `maskable`, `seed` (of the mask), `init_seed` (of
        the weights), `data_seed`, `batches`, `examples` and `sha256` of the batches, `warmup_steps`, `adapter`.
    """

    kept: dict[str, Tensor]
    places: dict[str, ParameterSite]
    provenance: dict[str, Any] = field(default_factory=dict)
    attachment: Attachment | None = field(default=None, repr=False)

    @classmethod
    def of(cls, attachment: Attachment) -> Masks:
        """The masks applied to `attachment`; `ArgumentError` if there are none."""
        if attachment.masking is None:
            raise ArgumentError("this attachment has no masks")
        return cls._from_record(attachment.masking.kept, attachment.masking.record, attachment)

    @classmethod
    def _from_record(
        cls, kept: dict[str, Tensor], record: Mapping[str, Any], attachment: Attachment | None
    ) -> Masks:
        places = {name: ParameterSite(**record["places"][name]) for name in kept}
        return cls(kept, places, dict(record["provenance"]), attachment)

    def _record(self) -> dict[str, Any]:
        return {"places": {name: asdict(p) for name, p in self.places.items()}, "provenance": self.provenance}

    # what they are ---------------------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """The number of entries that have a mask."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def removed(self) -> int:
        """The number of them that are removed."""
        return self.entries - sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def density(self) -> float:
        """The share of them that stays."""
        return 1 - self.removed / self.entries

    @property
    def init_seed(self) -> int:
        """The seed of the adapter's initial weights."""
        return int(self.provenance["init_seed"])

    @property
    def data_seed(self) -> int | None:
        """The seed that drew the batches; None where they came without one, or none were needed."""
        seed = self.provenance.get("data_seed")
        return None if seed is None else int(seed)

    def arrays(self) -> dict[str, np.ndarray]:
        """The masks as bool arrays, for the studies."""
        return {name: mask.numpy().copy() for name, mask in self.kept.items()}

    def table(self, by: str = "tensor") -> pd.DataFrame:
        """Realised density: columns `entries`, `kept` and `density`, one row per tensor, layer or site.

        By tensor the index is `name`, and `layer`, `site`, `kind` and `shape` stand beside it.
        """
        check_choice("by", by, BY)
        sites = self.places.values()
        tensors = pd.DataFrame(
            {
                "name": list(self.kept),
                "layer": pd.array([site.layer for site in sites], dtype="Int64"),
                "site": [site.site for site in sites],
                "kind": [site.kind for site in sites],
                "shape": [tuple(mask.shape) for mask in self.kept.values()],
                "entries": [mask.numel() for mask in self.kept.values()],
                "kept": [int(mask.sum()) for mask in self.kept.values()],
            }
        )
        if by == "tensor":
            table = tensors.set_index("name")
        else:
            table = tensors.groupby(by, dropna=False)[["entries", "kept"]].sum()
        return table.assign(density=table["kept"] / table["entries"])

    def report(self) -> dict[str, Any]:
        """JSON-able: `entries`, `kept`, `density`, `requested` sparsity, `tied` and `emptied`.

        `tied` counts removed entries whose score a kept one has too: their order decided. `emptied` lists tensors,
        layers and sites of which nothing stays.
        """
        emptied = {by: self.table(by).query("kept == 0").index.dropna().to_list() for by in BY}
        return {
            "entries": self.entries,
            "kept": self.entries - self.removed,
            "density": self.density,
            "requested": self.provenance.get("sparsity"),
            "tied": self.provenance.get("tied", 0),
            "emptied": {by: names for by, names in emptied.items() if names},
        }

    # on an attachment ------------------------------------------------------------------------------------------

    def apply(self, attachment: Attachment) -> Masks:
        """Apply these masks to `attachment`, matched by name. Raises `DataError` where they do not fit."""
        attachment.mask(self.kept, self._record())
        return Masks.of(attachment)

    def attach(self, model: PreTrainedModel) -> Attachment:
        """Attach the adapter that the masks belong to, its weights drawn with `init_seed`, and apply the masks."""
        attachment = attach(model, adapter_from_dict(self.provenance["adapter"]), seed=self.init_seed)
        try:
            self.apply(attachment)
        except BaseException:
            attachment.detach()
            raise
        return attachment

    def remove(self) -> None:
        """Lift the masks: removed entries take the values they had when they were removed, bit for bit.

        After `load_attachment` these are the initial values of its seed. Trained entries stay as they are.
        """
        if self.attachment is None or self.attachment.masking is None:
            raise ArgumentError("these masks are not applied to an attachment")
        self.attachment.unmask()

    # files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `masks.safetensors` (one bit per entry) and `masks.json` into `folder`; other files there stay."""
        write_masks(Path(folder).expanduser(), self.kept, self._record())

    @classmethod
    def load(cls, folder: str | Path) -> Masks:
        """What `save`, or `Attachment.save`, wrote to `folder`."""
        kept, record = read_masks(Path(folder).expanduser())
        return cls._from_record(kept, record, None)
