"""The same on a GPU as on the CPU: `make gpu`, or `python -m pytest -m gpu tests/gpu` where torch sees CUDA.

Tolerances: float32 without TF32 agrees to 1e-4 of a tensor's largest value (kernels add in another order); bfloat16
autocast keeps 8 bits of the mantissa, so a logit agrees to 5 % of the largest one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.measurements.layer_cache import LayerCache
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from tests.adapters.life import LABELS, shake
from tests.adapters.support import methods
from tests.architectures import ARCHITECTURES, tiny_basis, tiny_batch, tiny_model
from tests.runs.conftest import backbone_folder, data_root, make_spec
from tests.sparsity.tiny import ADAPTERS, attached, batches
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

__all__ = ["backbone_folder", "data_root", "make_spec"]  # fixtures

pytestmark = pytest.mark.gpu

EXACT, HALF = 1e-4, 5e-2
# transformers' own attention of DeBERTa fills with a float32 bound that bfloat16 cannot hold.
WITHOUT_AUTOCAST = ("deberta",)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    """CUDA without TF32; skips, with the reason, where torch sees no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


def attach(architecture: str, adapter: Adapter) -> ht.Attachment:
    try:
        attachment = ht.attach(tiny_model(architecture), adapter)
    except UnsupportedError as refused:
        pytest.skip(str(refused))
    shake(attachment)
    return attachment


def answer(attachment: ht.Attachment, device: str, *, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all that trains, on the CPU."""
    model = attachment.model.to(device)
    batch = {name: value.to(device) for name, value in {**tiny_batch(), "labels": LABELS}.items()}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        output = model(**batch)
    output.loss.backward()
    gradients = {
        name: parameter.grad.detach().cpu()
        for name, parameter in attachment.named_parameters().items()
        if parameter.grad is not None
    }
    for parameter in attachment.parameters():
        parameter.grad = None
    return output.logits.detach().float().cpu(), gradients


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    gap, size = float((found - wanted).abs().max()), max(float(wanted.abs().max()), 1e-3)
    assert gap <= tolerance * size, f"{what}: off by {gap:.2e} where the largest value is {size:.2e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", methods())
def test_logits_and_gradients_agree(method: str, architecture: str) -> None:
    attachment = attach(architecture, methods()[method])
    logits, gradients = answer(attachment, "cpu")
    on_gpu, gradients_on_gpu = answer(attachment, "cuda")
    assert_near(on_gpu, logits, EXACT, "logits")
    assert gradients_on_gpu.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():  # relative to the largest of all: some are zero but for rounding
        gap = float((gradients_on_gpu[name] - gradient).abs().max())
        assert gap <= EXACT * largest, f"gradient of {name}: off by {gap:.2e} of {largest:.2e}"
    if architecture in WITHOUT_AUTOCAST:
        return
    half, gradients_in_half = answer(attachment, "cuda", bf16=True)
    assert_near(half, logits, HALF, "logits in bfloat16")
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients_in_half.values())


@pytest.mark.parametrize("adapter", [ht.Hadamard(), ht.LoRA(), ht.IA3(), ht.BitFit()], ids=str)
def test_merged_saved_and_detached(adapter: Adapter, tmp_path: Path) -> None:
    model = tiny_model("bert")
    weights = copy.deepcopy(model.state_dict())
    attachment = ht.attach(model, adapter)
    shake(attachment)
    on_cpu, _ = answer(attachment, "cpu")
    on_gpu, _ = answer(attachment, "cuda")
    attachment.save(tmp_path / "saved")
    batch = {name: value.cuda() for name, value in tiny_batch().items()}
    merged = copy.deepcopy(attachment).merge()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits.cpu(), on_gpu, rtol=0, atol=1e-5)
    attachment.detach()
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in model.state_dict().items())
    reloaded = ht.load_attachment(tiny_model("bert"), tmp_path / "saved")
    torch.testing.assert_close(answer(reloaded, "cpu")[0], on_cpu, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["trained", "first-then-frozen"])
@pytest.mark.parametrize("adapter", [ht.Hadamard(), ht.LoRA(), ht.Pfeiffer(), ht.UniPELT()], ids=str)
def test_training_agrees(adapter: Adapter, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, six epochs end at the same losses and predictions, whatever the device."""
    protocol = Protocol(
        head=head, learning_rate=5e-3, epochs=6, head_epochs=4, batch_size=16, max_length=24, select="last"
    )
    outcomes = {}
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
                _forget_device()
            attachment = ht.attach(tiny_bert(**STILL), adapter)
            outcomes[device] = train(attachment, tiny_task(), tiny_tokenizer(), protocol)
        _forget_device()
    cpu, gpu = outcomes["cpu"], outcomes["cuda"]
    assert gpu.details["device"] == torch.cuda.get_device_name()
    assert cpu.details["device"].startswith("cpu")
    np.testing.assert_allclose(
        [row["loss"] for row in gpu.history], [row["loss"] for row in cpu.history], atol=2e-3
    )
    np.testing.assert_allclose(gpu.predictions["test"], cpu.predictions["test"], atol=2e-2)


def _forget_device() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:nothing stays of tensor")
@pytest.mark.parametrize("scorer", ["random", "magnitude", "erdos-renyi", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "fusion"])
def test_masks_agree(name: str, scorer: str) -> None:
    """At most one entry in a hundred, whose score is within rounding of the threshold, may differ."""
    kept = {}
    for device in ("cpu", "cuda"):
        attachment = attached(ADAPTERS[name])
        attachment.model.to(device)
        data = [{key: value.to(device) for key, value in batch.items()} for batch in batches()]
        masks = ht.sparsify(attachment, scorer=scorer, sparsity=0.5, batches=data)
        kept[device] = torch.cat([mask.flatten().cpu() for mask in masks.kept.values()])
    differing = float((kept["cpu"] != kept["cuda"]).float().mean())
    assert differing <= 0.01, f"{differing:.1%} of the entries differ"


def test_removed_layers_answer_as_on_the_cpu() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        attachment = ht.attach(tiny_bert(**STILL), ht.Hadamard())
        shake(attachment)
        attachment.model.to(device).eval()
        found[device] = LayerCache(attachment, tiny_batch(rows=12)).logits({0, 2})
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=1e-4)


def test_a_run_records_the_device_and_its_memory(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    spec = make_spec()
    run = ht.run(replace(spec, protocol=replace(spec.protocol, precision="bf16")), tmp_path / "store")
    record = ht.RunStore(tmp_path / "store").run(run.key)
    assert record.info["meta_info"]["device"]["device"] == "cuda"
    assert record.info["meta_info"]["device"]["device_name"] == torch.cuda.get_device_name()
    assert record.info["train_info"]["peak_memory"]["accelerator_bytes"] > 0


def test_subspaces_of_other_bases_train_in_one_bank(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """bf16 autocast rounds activations and not the vectors that the coefficients make."""
    spec = make_spec()
    protocol = replace(spec.protocol, precision="bf16")
    specs = [
        replace(spec, adapter=ht.Subspace(ht.Hadamard(norm=None), tiny_basis(seed), k=4), protocol=protocol)
        for seed in range(3)
    ]
    assert set(ht.sweep(specs, tmp_path / "store", bank=3)["status"]) == {"done"}
    for one in specs:
        assert ht.RunStore(tmp_path / "store").run(one.key).info["train_info"]["bank"] == 3


def test_two_processes_share_one_gpu(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    specs = [make_spec(seed=seed) for seed in range(3)]
    table = ht.sweep(specs, tmp_path / "store", engine="processes", workers=2)
    assert set(table["status"]) == {"done"}, table[["status", "reason"]].to_string()
