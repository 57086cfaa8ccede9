"""Which backbone it was: every value counts, and the same weights are known at other precisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.fingerprint import fingerprint, first_values
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.sites import Sites
from tests.adapters.life import shake
from tests.architectures import ARCHITECTURES, tiny_model


def saved(model: PreTrainedModel, folder: Path, adapter: object = None) -> Path:
    attachment = ht.attach(model, adapter or ht.Hadamard())  # type: ignore[arg-type]
    shake(attachment)
    attachment.save(folder)
    return folder


def as_format_one(folder: Path, model: PreTrainedModel) -> None:
    """Rewrite the config of `folder` as versions before format 2 did."""
    config = json.loads((folder / "adapter_config.json").read_text())
    backbone = {**config["backbone"], "fingerprint": first_values(Sites(model).base_parameters())}
    backbone.pop("name")
    old = {name: config[name] for name in ("adapter", "seed", "head", "masks")}
    (folder / "adapter_config.json").write_text(json.dumps({**old, "format": 1, "backbone": backbone}))


def test_every_value_counts(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert"), tmp_path / "saved")
    other = tiny_model("bert")
    with torch.no_grad():
        for parameter in other.bert.parameters():
            if parameter.ndim > 1:
                parameter[1:] *= 0.5  # all but the first row, where 32 values or more are the same
    with pytest.raises(DataError, match="another backbone"):
        ht.load_attachment(other, folder)
    one = tiny_model("bert")
    with torch.no_grad():
        one.bert.encoder.layer[2].output.dense.weight[-1, -1] += 1e-4
    with pytest.raises(DataError, match=r"another backbone .*strict=False"):
        ht.load_attachment(one, folder)
    assert not hasattr(one, "hadamard_attachment")
    ht.load_attachment(tiny_model("bert"), folder)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_weights_in_half_precision_are_recognised_both_ways(
    architecture: str, precision: torch.dtype, tmp_path: Path
) -> None:
    whole = saved(tiny_model(architecture), tmp_path / "whole")
    ht.load_attachment(tiny_model(architecture).to(precision), whole)
    half = saved(tiny_model(architecture).to(precision), tmp_path / "half")
    ht.load_attachment(tiny_model(architecture), half)
    ht.load_attachment(tiny_model(architecture).to(precision).float(), half)
    with pytest.raises(DataError, match="another backbone"):
        ht.load_attachment(tiny_model(architecture, seed=1).to(precision), whole)


def test_some_weights_may_stay_in_float32(tmp_path: Path) -> None:
    """As transformers keeps T5's second projections when it loads the rest in float16."""
    folder = saved(tiny_model("t5"), tmp_path / "saved", ht.IA3())
    mixed = tiny_model("t5").half()
    for name, module in mixed.named_modules():
        if name.endswith(".wo"):
            module.load_state_dict(tiny_model("t5").get_submodule(name).state_dict())
            module.float()
    ht.load_attachment(mixed, folder)


def test_two_half_precisions_cannot_be_compared(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert").half(), tmp_path / "saved")
    model = tiny_model("bert").bfloat16()
    with pytest.raises(
        DataError, match=r"a backbone in float16, and this one is in bfloat16: .*cannot be compared"
    ):
        ht.load_attachment(model, folder)
    assert not hasattr(model, "hadamard_attachment")


@pytest.mark.parametrize("adapter", [ht.FullFineTuning(), ht.Hadamard(norm="both"), ht.BitFit()])
def test_it_is_that_of_the_backbone_before_training(adapter: object, tmp_path: Path) -> None:
    model = tiny_model("albert")
    expected = fingerprint(Sites(model).base_parameters())
    folder = saved(model, tmp_path / "saved", adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["backbone"]["fingerprint"] == expected
    assert set(expected) == {"float32", "float16", "bfloat16"}
    ht.load_attachment(tiny_model("albert"), folder)


def test_older_files_are_compared_as_far_as_they_say(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert"), tmp_path / "saved")
    as_format_one(folder, tiny_model("bert"))
    with pytest.warns(UserWarning, match="older version.*first 32 values.*save it again"):
        ht.load_attachment(tiny_model("bert"), folder)
    with pytest.raises(DataError, match="another backbone"):
        ht.load_attachment(tiny_model("bert", seed=1), folder)
    ht.load_attachment(tiny_model("bert", seed=1), folder, strict=False)


def test_names_and_shapes_count_without_values() -> None:
    with torch.device("meta"):
        models = [
            ht.backbone_from_config(tiny_model("bert", **c).config) for c in ({}, {"intermediate_size": 33})
        ]
    first, second = (fingerprint(Sites(model).base_parameters()) for model in models)
    assert first["float32"] != second["float32"]


OTHER_FUNCTION = [
    ("bert", "hidden_act", "relu"),
    ("bert", "layer_norm_eps", 1e-3),
    ("bert", "num_attention_heads", 4),
    ("electra", "hidden_act", "relu"),
    ("t5", "decoder_start_token_id", 7),
    ("modernbert", "local_attention", 4),
    ("t5", "feed_forward_proj", "gelu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("llama", "rms_norm_eps", 1e-3),
]


@pytest.mark.parametrize(("architecture", "name", "value"), OTHER_FUNCTION)
def test_another_setting_of_the_config_is_another_backbone(
    architecture: str, name: str, value: object, tmp_path: Path
) -> None:
    folder = saved(tiny_model(architecture), tmp_path / "saved", ht.LoRA())
    other = tiny_model(architecture, **{name: value})
    assert fingerprint(Sites(other).base_parameters()) == fingerprint(
        Sites(tiny_model(architecture)).base_parameters()
    ), "the weights are the same"
    with pytest.raises(
        DataError,
        match=rf"another backbone: ({name}|dense_act_fn)=.* in its config, and this model has .*strict=False",
    ):
        ht.load_attachment(other, folder)
    assert not hasattr(other, "hadamard_attachment")
    ht.load_attachment(other, folder, strict=False)


def test_what_does_not_change_the_function_may_differ(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert"), tmp_path / "saved")
    other = tiny_model("bert", hidden_dropout_prob=0.3, classifier_dropout=0.2, initializer_range=0.5)
    other.load_state_dict(tiny_model("bert").state_dict())
    other.config.update(
        {"use_cache": False, "name_or_path": "elsewhere", "eos_token_id": 7, "id2label": {0: "no", 1: "yes"}}
    )
    ht.load_attachment(other, folder)


def test_files_that_do_not_know_the_settings_are_compared_by_their_weights(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert"), tmp_path / "saved")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["backbone"]["settings"].pop("hidden_act") == "gelu"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ht.load_attachment(tiny_model("bert", hidden_act="relu"), folder)
    config["backbone"]["settings"]["an_entry_of_later_versions"] = 1
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ht.load_attachment(tiny_model("bert"), folder)
    del config["backbone"]["settings"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ht.load_attachment(tiny_model("bert"), folder)


def test_the_adapters_of_a_fusion_are_of_one_backbone(tmp_path: Path) -> None:
    folder = saved(tiny_model("bert"), tmp_path / "saved", ht.Pfeiffer(bottleneck=2))
    with pytest.raises(DataError, match="hidden_act='gelu' in its config, and this model has 'relu'"):
        ht.fuse(tiny_model("bert", hidden_act="relu"), {"one": folder})
    ht.fuse(tiny_model("bert", hidden_act="relu"), {"one": folder}, strict=False)
