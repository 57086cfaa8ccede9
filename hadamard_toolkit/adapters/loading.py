"""Attach a saved adapter to the backbone that it was trained on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from hadamard_toolkit.adapters.attachment import Attachment, attach
from hadamard_toolkit.adapters.base import adapter_from_dict
from hadamard_toolkit.adapters.files import read_config, read_state
from hadamard_toolkit.adapters.fingerprint import check_backbone
from hadamard_toolkit.adapters.masking import read_masks
from hadamard_toolkit.adapters.subspace import shapes_only
from hadamard_toolkit.errors import DataError


def load_attachment(
    model: PreTrainedModel, folder: str | Path, *, strict: bool = True, head: bool = True
) -> Attachment:
    """Attach what `Attachment.save` wrote to `folder`, with its masks and, unless `head=False`, its head and labels.

    With `strict`, the backbone must be the one it was trained on: the same weights, at the same precision or rounded to
    another, and the same settings in its config (its activation function, say).

    Raises `ArgumentError` for a folder that holds no attachment, `DataError` for another backbone and for files that
    are damaged, lack a tensor of the adapter or have one too many. The model is then unchanged.
    """
    config, state = read_config(folder), read_state(folder)
    if not head:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    with shapes_only():
        attachment = attach(model, adapter_from_dict(config["adapter"]), seed=config["seed"])
    try:
        if strict:
            check_backbone(folder, config["backbone"], model.config, attachment.untrained_base())
        _check_names(attachment, state, folder, head=head)
        if config.get("masks"):
            attachment.mask(*read_masks(Path(folder).expanduser()))
        attachment.load_state_dict(state)
        attachment.task = config.get("task")
        if head:
            attachment.name_labels(config.get("labels") or ())
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _check_names(attachment: Attachment, state: dict[str, Tensor], folder: str | Path, *, head: bool) -> None:
    needed = {name for name in attachment.stored_state() if head or not name.startswith("head.")}
    for wrong, verb in ((needed - set(state), "lacks"), (set(state) - needed, "has, and should not have,")):
        if wrong:
            way_out = "; load_attachment(…, head=False) leaves the model's own head"
            raise DataError(
                f"the file in folder={str(folder)!r} {verb} {len(wrong)} of the tensors of {attachment.adapter} on "
                f"this {type(attachment.model).__name__}, the first {sorted(wrong)[0]!r}"
                f"{way_out if all(name.startswith('head.') for name in wrong) else ''}"
            )
