"""State of a forward pass: kept by thread, gone when it ends, never shared by copies."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.gates import Gate
from hadamard_toolkit.adapters.passing import Passing
from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.life import logits, shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model

METHODS: dict[str, Adapter] = {
    "prompt": ht.PromptTuning(length=3),
    "pfeiffer": ht.Pfeiffer(bottleneck=4, gated="masked"),
    "mam": ht.MAM(length=2, bottleneck=4),
    "unipelt": ht.prompt_unipelt(2, bottleneck=4, length=2, rank=2, gated="masked"),
}


def in_lockstep(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Logits of `batches`, each in a thread of its own; every module waits for the other threads before it runs."""
    barrier = Barrier(len(batches), timeout=2)

    def wait(*_: object) -> None:
        barrier.wait()

    handles = [module.register_forward_pre_hook(wait) for module in model.modules()]
    try:
        with ThreadPoolExecutor(len(batches)) as threads:
            return list(threads.map(lambda batch: logits(model, **batch), batches))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_two_threads_may_run_one_model_at_once(architecture: str, method: str) -> None:
    model = tiny_model(architecture)
    shake(ht.attach(model, METHODS[method]))
    batches = [tiny_batch(), tiny_batch(rows=2, length=6, seed=1)]
    alone = [logits(model, **batch) for batch in batches]
    for expected, found in zip(alone, in_lockstep(model, batches), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_nothing_of_a_pass_is_left_behind(architecture: str) -> None:
    model = tiny_model(architecture)
    attachment = ht.attach(model, METHODS["unipelt"])
    logits(model)
    with pytest.raises(IndexError):
        logits(model, input_ids=torch.full((3, 9), 99))
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    assert [gate.current.input for gate in gates] == [None] * len(gates)
    assert not any(insertion._passing for insertion in attachment.insertions.values())


def test_a_copy_starts_empty() -> None:
    passing = Passing()
    passing["inputs"] = torch.ones(2)
    assert not copy.deepcopy(passing)
    assert not pickle.loads(pickle.dumps(passing))
    with ThreadPoolExecutor(1) as thread:
        assert not thread.submit(lambda: dict(passing)).result()
    assert passing.keys() == {"inputs"}


@pytest.mark.parametrize("adapter", [ht.LoRA(), ht.PromptTuning(), ht.MAM(2, 4)])
def test_a_replica_is_refused(adapter: Adapter) -> None:
    model = tiny_model("bert")
    attachment = ht.attach(model, adapter)
    replica = model.base_model._replicate_for_data_parallel()
    with pytest.raises(UnsupportedError, match=r"nn.DataParallel cannot replicate a model with an adapter"):
        replica(**tiny_batch())
    attachment.detach()
    assert not model.base_model._forward_pre_hooks
