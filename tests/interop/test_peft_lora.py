"""What peft's config says beside the tensors: read where it is the same function, refused by name where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hadamard_toolkit as ht
from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.test_attachment import logits
from tests.architectures import tiny_model
from tests.interop.test_peft import trained_by_peft

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_lora_that_changed_the_backbone_is_refused_by_name(init: str, tmp_path: Path) -> None:
    """And the refusal is right, and so is the way out that it names."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], init_lora_weights=init)
    model = tiny_model("bert")
    before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    theirs = peft.get_peft_model(model, config).eval()
    changed = model.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert not torch.equal(changed, before)
    theirs.save_pretrained(tmp_path / "untrained")
    theirs.peft_config["default"].init_lora_weights = True  # as peft asks for
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path / "trained")
    fresh = tiny_model("bert")
    for folder in ("untrained", "trained"):
        with pytest.raises(
            UnsupportedError, match=rf"init_lora_weights='{init}' changes .*path_initial_model_for"
        ):
            ht.import_peft(fresh, tmp_path / folder)
    assert not hasattr(fresh, "hadamard_attachment")
    if init == "pissa_niter_2":  # drawn at random: peft itself needs the first draw again
        return
    theirs.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ht.import_peft(fresh, tmp_path / "plain")
    torch.testing.assert_close(logits(fresh), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", False])
def test_a_lora_that_left_the_backbone_alone_comes_in(init: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=init)
    theirs = trained_by_peft("bert", config, tmp_path)
    model = tiny_model("bert")
    ht.import_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"init_lora_weights": "corda"}, "'corda' changes"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' changes"),
        ({"init_lora_weights": "of a later version"}, "'of a later version' changes"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\] is another function"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_of_a_later_version": True}, "use_of_a_later_version=True is another function"),
    ],
)
def test_a_lora_of_another_function_is_refused_by_name(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trained_by_peft("bert", peft.LoraConfig(r=2, target_modules=["query"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **entry}))
    with pytest.raises(UnsupportedError, match=message):
        ht.import_peft(tiny_model("bert"), tmp_path)
