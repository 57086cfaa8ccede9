"""What stock peft reads is what we trained, and what it wrote is what we read."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.lora import TARGETS
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from tests.adapters.test_attachment import logits, shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config, tiny_model

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:Unsupported layer type:UserWarning"
    ),  # peft says so of every norm that it tunes
]

LINEAR_WITH_BIAS = ("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet", "distilbert", "bart")
PROMPTED = ("bert", "albert", "gpt2", "llama")  # the head reads the base model's pooler, or the last position
WRAPPABLE = tuple(name for name in ARCHITECTURES if name != "albert")
HADAMARD: list[Adapter] = [
    ht.Hadamard(),
    ht.Hadamard(layers=(0, 2), norm="both"),
    ht.Hadamard(vectors=("weight",), norm=None),
    ht.Hadamard(placement="attention_heads", vectors=("bias",), norm=None),
]
OTHERS: list[Adapter] = [
    ht.LoRA(rank=3, alpha=5, targets=TARGETS, dropout=0.1),
    ht.LoRA(rank=2, targets=("value",), layers=(1,)),
    ht.IA3(),
    ht.LayerNormTuning(norm="both"),
    ht.LayerNormTuning(layers=(0, 2)),
    ht.Stack(ht.LoRA(rank=2), ht.LayerNormTuning(norm="output", layers=(0, 1))),
]
CASES = [(name, adapter) for adapter in HADAMARD for name in LINEAR_WITH_BIAS]
CASES += [(name, adapter) for adapter in OTHERS for name in WRAPPABLE]


@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_there_and_back(architecture: str, adapter: Adapter, tmp_path: Path) -> None:
    """Equal logits in stock peft, loaded and merged; equal gradients there; and the same adapter when it comes back."""
    ours = tiny_model(architecture)
    attachment = ht.attach(ours, adapter)
    shake(attachment)
    expected = logits(ours)
    ht.export_peft(attachment, tmp_path / "peft")

    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    merged: PreTrainedModel = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)

    back = ht.import_peft(tiny_model(architecture), tmp_path / "peft")
    assert back.adapter == adapter
    torch.testing.assert_close(logits(back.model), expected, rtol=0, atol=1e-5)
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, attachment.state_dict()[name], msg=name)


def test_stock_peft_has_the_gradients_of_layernorm_tuning(tmp_path: Path) -> None:
    attachment = ht.attach(tiny_model("bert"), ht.LayerNormTuning(norm="both"))
    shake(attachment)
    ht.export_peft(attachment, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path, is_trainable=True).eval()
    for model in (attachment.model, theirs):
        model(**tiny_batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    own = dict(zip([t.path for t in attachment.tunings], attachment.parameters("norm"), strict=True))
    for path, parameter in own.items():
        module, _, kind = path.rpartition(".")
        twin = theirs.get_parameter(f"base_model.model.{module}.ln_tuning_layers.default.{kind}")
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=0, atol=1e-6, msg=path)


def left_padded() -> dict[str, Tensor]:
    """The tiny batch with its padding moved in front: what decoders need where nothing tells them of padding."""
    batch = tiny_batch()
    padding = int((batch["attention_mask"][0] == 0).sum())
    return {name: torch.stack([rows[0].roll(padding), *rows[1:]]) for name, rows in batch.items()}


def said_of_padding(architecture: str) -> Any:
    if architecture in ("gpt2", "llama"):
        return pytest.warns(UserWarning, match="reads the last position, be it padding")
    return nullcontext()


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [(name, ht.PromptTuning(4, position="front")) for name in PROMPTED]
    + [
        (name, ht.Stack(ht.PromptTuning(4, position="front"), ht.LayerNormTuning(norm="both")))
        for name in PROMPTED
        if name != "albert"
    ],
)
def test_prompts_there_and_back(architecture: str, adapter: Adapter, tmp_path: Path) -> None:
    """Equal logits and gradients in stock peft, and the same adapter when it comes back, from our file and theirs."""
    ours = tiny_model(architecture)
    attachment = ht.attach(ours, adapter)
    shake(attachment)
    with said_of_padding(architecture):
        ht.export_peft(attachment, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "ours").eval()
    theirs.requires_grad_(True)  # peft loads prompts for inference only

    batches = [left_padded()]
    if architecture in ("bert", "albert"):
        batches += [tiny_batch(), {**tiny_batch(), "token_type_ids": torch.ones(3, 9, dtype=torch.long)}]
    for batch in batches:
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            output = model(**batch, labels=torch.tensor([0, 1, 0]))
            output.loss.backward()
            found.append(output.logits.detach())
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
        twins = {
            name.replace(".modules_to_save.default", "").removeprefix("base_model."): parameter
            for name, parameter in theirs.named_parameters()
            if "original_module" not in name
        }
        paths = {f"norm.{tuning.label}": tuning.path for tuning in attachment.tunings}
        paths["adapter.prompt.weight"] = "prompt_encoder.default.embedding.weight"
        for name, parameter in attachment.named_parameters().items():
            twin = twins[paths.get(name, name.removeprefix("head."))]
            assert parameter.grad is not None
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=0, atol=1e-6, msg=name)

    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(ours)  # padded on the right: the toolkit finds the last token in any case
    for folder in ("ours", "theirs"):
        with said_of_padding(architecture):
            back = ht.import_peft(tiny_model(architecture), tmp_path / folder)
        assert back.adapter == adapter
        torch.testing.assert_close(logits(back.model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in PROMPTED])
def test_prompts_that_stock_peft_runs_otherwise_are_refused(architecture: str, tmp_path: Path) -> None:
    """Both ways; and the refusal is right: with the same prompt, stock peft fails there or gives other logits."""
    ours = tiny_model(architecture)
    attachment = ht.attach(ours, ht.PromptTuning(4, position="front"))
    prompt = attachment.state_dict()["adapter.prompt.weight"]
    reason = "does not take" if architecture in ("bart", "t5") else "counts positions"
    with pytest.raises(UnsupportedError, match=f"{type(ours).__name__}.*{reason}"):
        ht.export_peft(attachment, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, token_dim=prompt.shape[1], num_attention_heads=2
    )
    theirs = peft.get_peft_model(tiny_model(architecture), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    if architecture in ("bart", "t5"):
        with pytest.raises(NotImplementedError, match="Passing input embeddings"):
            logits(theirs)
    else:
        assert (logits(theirs) - logits(ours)).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UnsupportedError, match=reason):
        ht.import_peft(tiny_model(architecture), tmp_path / "theirs")


def trained_by_peft(architecture: str, config: Any, folder: Path) -> Tensor:
    """Write a stock peft adapter with random weights to `folder`; its logits."""
    theirs = peft.get_peft_model(tiny_model(architecture), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return logits(theirs)


@pytest.mark.parametrize(
    ("architecture", "config", "expected"),
    [
        (
            "bert",
            peft.LoraConfig(r=4, lora_alpha=2, target_modules=["query", "key"]),
            ht.LoRA(4, 2.0, ("query", "key")),
        ),
        (
            "bert",
            peft.LoraConfig(
                task_type="SEQ_CLS", r=4, target_modules=["value"], use_rslora=True, layers_to_transform=[1]
            ),
            ht.LoRA(4, 16.0, ("value",), layers=(1,)),
        ),
        (
            "bert",  # two ranks, two scales: the smaller one is padded, and its scale goes into B
            peft.LoraConfig(r=4, lora_alpha=2, target_modules=["query", "value"], rank_pattern={"value": 6}),
            ht.LoRA(6, 3.0, ("query", "value")),
        ),
        (
            "gpt2",
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True),
            ht.LoRA(4, 4.0, ("query", "key", "value")),
        ),
        (
            "bert",
            peft.IA3Config(task_type="SEQ_CLS"),
            ht.IA3(("key", "value", "attention_heads", "ffn_hidden")),
        ),
        ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), None),
        ("bert", peft.LNTuningConfig(target_modules=["output.LayerNorm"]), ht.LayerNormTuning("both")),
        (
            "bert",
            peft.PromptTuningConfig(
                task_type="SEQ_CLS", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
            ),
            ht.PromptTuning(3, position="front"),
        ),
    ],
)
def test_what_peft_itself_saved(
    architecture: str, config: Any, expected: Adapter | None, tmp_path: Path
) -> None:
    theirs = trained_by_peft(architecture, config, tmp_path)
    model = tiny_model(architecture)
    if expected is None:
        with pytest.raises(UnsupportedError, match="no LayerNormTuning does"):
            ht.import_peft(model, tmp_path)
        return
    attachment = ht.import_peft(model, tmp_path)
    assert attachment.adapter == expected
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "adapter", "message"),
    [
        ("bert", ht.BitFit(), r"BitFit\(\) has no export.*Hadamard, IA3, LayerNormTuning, LoRA, Prompt"),
        ("bert", ht.PromptTuning(), r"position='auto'.*behind \[CLS\].*position=\"front\""),
        (
            "bert",
            ht.Stack(ht.PromptTuning(position="behind-first"), ht.LayerNormTuning()),
            "position='behind",
        ),
        ("albert", ht.Stack(ht.PromptTuning(position="front"), ht.LayerNormTuning()), "depth steps"),
        ("bert", ht.Stack(ht.LoRA(), ht.IA3()), "has no export"),
        ("bert", ht.LoRA(gated="masked"), "no gates"),
        ("bert", ht.Hadamard(placement="attention_heads"), "columns"),
        ("bert", ht.Hadamard(vectors=()), "inserts no module"),
        ("gpt2", ht.Hadamard(), "cannot be wrapped"),
        ("albert", ht.LoRA(), "cannot be wrapped"),
        ("llama", ht.Hadamard(), "has no bias"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    architecture: str, adapter: Adapter, message: str, tmp_path: Path
) -> None:
    attachment = ht.attach(tiny_model(architecture), adapter)
    with pytest.raises(UnsupportedError, match=message):
        ht.export_peft(attachment, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.LoraConfig(r=2, target_modules=["query"], use_dora=True),
            "no place for 'bert.*lora_magnitude_vector",
        ),
        (
            peft.LoraConfig(r=2, target_modules=["query", "pooler.dense"]),
            "'bert.pooler.dense', which is no projection",
        ),
        (peft.LoraConfig(r=2, target_modules=["query"], bias="all"), "no LayerNormTuning does"),
        (
            peft.LoraConfig(r=2, target_modules=["query", "layer.1.attention.self.key"]),
            r"different targets.*1: \['key'",
        ),
        (peft.IA3Config(target_modules=["output.dense"], feedforward_modules=[]), "scales the output of"),
        (peft.GloraConfig(target_modules=["attention.output.dense"]), "no Hadamard adapter"),
        (peft.VeraConfig(target_modules=["query"]), "peft_type 'VERA' cannot be imported"),
        (
            peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
            "task_type 'FEATURE_EXTRACTION' cannot be imported",
        ),
    ],
)
def test_what_the_toolkit_cannot_say_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    trained_by_peft("bert", config, tmp_path)
    model = tiny_model("bert")
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match=message):
        ht.import_peft(model, tmp_path)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_bad_folders(tmp_path: Path) -> None:
    model = tiny_model("bert")
    with pytest.raises(ArgumentError, match=r"holds no peft adapter \(adapter_config.json is missing"):
        ht.import_peft(model, tmp_path)
    ht.attach(model, ht.LoRA(rank=2)).save(tmp_path / "own")
    with pytest.raises(ArgumentError, match="has no peft_type"):
        ht.import_peft(tiny_model("bert"), tmp_path / "own")

    trained_by_peft("bert", peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="albert"):
        ht.import_peft(tiny_model("albert"), tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[1]
    save_file({name: value for name, value in tensors.items() if name != first}, weights)
    with pytest.raises(DataError, match=r"lora_B.weight' is missing from the file"):
        ht.import_peft(tiny_model("bert"), tmp_path / "peft")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"adapter_model.safetensors in folder=.* cannot be read"):
        ht.import_peft(tiny_model("bert"), tmp_path / "peft")
    save_file({**tensors, first: torch.zeros(5, 2)}, weights)
    narrow = tiny_model("bert")
    with pytest.raises(DataError, match="shape"):
        ht.import_peft(narrow, tmp_path / "peft")
    assert not hasattr(narrow, "hadamard_attachment")
    weights.unlink()
    with pytest.raises(ArgumentError, match="never read"):
        ht.import_peft(narrow, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        ht.import_peft(narrow, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(DataError, match="no tensor of a layer"):
        ht.import_peft(narrow, tmp_path / "peft")


def test_prompts_of_other_heads_are_refused(tmp_path: Path) -> None:
    model = ht.backbone_from_config(tiny_config("bert"), head="span")
    attachment = ht.attach(model, ht.PromptTuning(position="front"))
    with pytest.raises(UnsupportedError, match="classification alone, not for BertForQuestionAnswering"):
        ht.export_peft(attachment, tmp_path / "peft")


def test_a_folder_keeps_what_else_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "note.txt").write_text("mine")
    attachment = ht.attach(tiny_model("bert"), ht.LoRA(rank=2))
    shake(attachment)
    for _ in range(2):
        ht.export_peft(attachment, "~/peft")
    assert {file.name for file in (tmp_path / "peft").iterdir()} == {
        "note.txt",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    back = ht.import_peft(tiny_model("bert"), "~/peft")
    torch.testing.assert_close(logits(back.model), logits(attachment.model), rtol=0, atol=1e-5)
