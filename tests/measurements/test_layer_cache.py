"""A subset of layers through the cache is the same as from scratch, and the model is left as it was found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.adapters.parts import parts_of
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.measurements.layer_cache import BEGUN, LayerCache
from tests.adapters.life import shake
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_model

RESUMED = [name for name in ARCHITECTURES if name not in ("bart", "t5")]
ROWS = 7


def rows() -> dict[str, Tensor]:
    """Seven rows of five lengths, padded to nine tokens, in no order."""
    batch = tiny_batch(ROWS, 9, seed=3)
    batch["input_ids"][0] = torch.randint(3, 60, (9,), generator=torch.Generator().manual_seed(4))
    for row, length in enumerate((9, 4, 7, 9, 5, 6, 4)):
        batch["input_ids"][row, length:] = 0
        batch["input_ids"][row, length - 1] = 2
        batch["attention_mask"][row] = (torch.arange(9) < length).long()
    return batch


def adapter_for(architecture: str) -> Adapter:
    return ht.Hadamard(norm=None) if architecture == "albert" else ht.Hadamard(norm="both")


def trained(architecture: str, adapter: Adapter | None = None) -> ht.Attachment:
    attachment = ht.attach(tiny_model(architecture), adapter or adapter_for(architecture))
    shake(attachment)
    return attachment


def subsets(layers: int) -> list[tuple[int, ...]]:
    return [kept for size in range(layers + 1) for kept in itertools.combinations(range(layers), size)]


def whole_pass(model: PreTrainedModel, inputs: dict[str, Tensor]) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def from_scratch(architecture: str, attachment: ht.Attachment, kept: Sequence[int]) -> np.ndarray:
    """A fresh model with an attachment on the kept layers alone, which got the trained values of just these."""
    adapter = type(attachment.adapter)(**{**vars(attachment.adapter), "layers": tuple(kept)})
    fresh = ht.attach(tiny_model(architecture), adapter)
    own = fresh.named_parameters()
    fresh.load_state_dict({name: value for name, value in attachment.state_dict().items() if name in own})
    return whole_pass(fresh.model, rows())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_subset_equals_a_model_that_never_had_the_other_layers(architecture: str) -> None:
    attachment = trained(architecture)
    cache = LayerCache(attachment, rows(), batch_size=3)
    chosen = subsets(len(attachment.sites))
    for kept in [*chosen, *chosen[::-3]]:  # forwards, and again in another order, now from what is remembered
        np.testing.assert_allclose(
            cache.logits(kept), from_scratch(architecture, attachment, kept), rtol=0, atol=1e-6
        )
    assert cache.resumes is (architecture in RESUMED)
    answers = [cache.logits(kept) for kept in chosen]
    assert all(not np.allclose(one, other, atol=1e-5) for one, other in itertools.combinations(answers, 2))


ADAPTERS = [
    ht.Pfeiffer(bottleneck=4),
    ht.ParallelAdapter(bottleneck=4),
    ht.LoRA(rank=2),
    ht.IA3(),
    ht.PrefixTuning(length=2),
    ht.PromptTuning(length=2),
    ht.UniPELT(gated="masked"),
    ht.BitFit(),
    ht.FullFineTuning(),
    ht.Stack(ht.Hadamard(norm=None), ht.LayerNormTuning(norm="both")),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
def test_other_adapters_are_off_in_the_layers_that_are_not_kept(adapter: Adapter) -> None:
    """Against a model in which what belongs to a layer was set to its value at the start."""
    attachment = trained("bert", adapter)
    cache = LayerCache(attachment, rows(), batch_size=3)
    plain = tiny_model("bert")
    for kept in ((0, 1, 2), (0, 2), (1,), ()):
        fresh = ht.attach(tiny_model("bert"), adapter)
        fresh.load_state_dict(attachment.state_dict())
        off = [index for index in range(3) if index not in kept]
        with torch.no_grad():
            for tuning in fresh.tunings:
                if any(f"encoder.layer.{index}." in tuning.path for index in off):
                    fresh.named_parameters()[f"{tuning.role}.{tuning.label}"].copy_(
                        plain.get_parameter(tuning.path)
                    )
        labels = [label for label, insertion in fresh.insertions.items() if insertion.site.layer in off]
        with fresh.without(labels, []):
            expected = whole_pass(fresh.model, rows())
        np.testing.assert_allclose(cache.logits(kept), expected, rtol=0, atol=1e-6)
    if not isinstance(adapter, ht.PromptTuning):
        assert not np.allclose(cache.logits((0, 1, 2)), cache.logits((0, 2)), atol=1e-5)


def test_sites_of_one_layer_are_switched_one_by_one() -> None:
    attachment = trained("bert", ht.Hadamard())
    cache = LayerCache(attachment, rows())
    assert cache.places == tuple(itertools.product(range(3), ("attention_output", "attention_norm")))
    vectors_only = cache.logits([(0, "attention_output"), 1])
    fresh = ht.attach(
        tiny_model("bert"), ht.Stack(ht.Hadamard(layers=(0, 1), norm=None), ht.LayerNormTuning(layers=(1,)))
    )
    own = fresh.named_parameters()
    fresh.load_state_dict({name: value for name, value in attachment.state_dict().items() if name in own})
    np.testing.assert_allclose(vectors_only, whole_pass(fresh.model, rows()), rtol=0, atol=1e-6)


def test_a_flip_computes_from_the_lowest_changed_layer_on() -> None:
    attachment = trained("bert")
    cache = LayerCache(attachment, rows())
    cache.logits((0, 1, 2))
    ran: list[int] = []
    for index in range(3):
        site = attachment.sites(index, "attention_output")
        site.module.register_forward_hook(lambda *_, index=index: ran.append(index))
    cache.logits((0, 1))
    assert ran == [2]
    ran.clear()
    cache.logits((0, 2))
    assert ran == [1, 2]
    ran.clear()
    cache.logits((0, 1, 2))  # what layer 2 reads with 0 and 1 at work is still known
    assert ran == [2]
    ran.clear()
    cache.clear()
    cache.logits((0, 1, 2))
    assert ran[-3:] == [0, 1, 2]  # after the trial of shortcuts


def test_steps_are_one_batch_each_and_leave_room_for_other_questions() -> None:
    attachment = trained("bert")
    before = {name: value.clone() for name, value in attachment.state_dict().items()}
    cache, free = LayerCache(attachment, rows(), batch_size=2), LayerCache(attachment, rows())
    inputs = rows()
    steps = cache.steps((0, 2))
    for _ in range(-(-ROWS // 2)):
        assert next(steps) is None
        np.testing.assert_allclose(cache.logits((1,)), free.logits((1,)), rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            whole_pass(attachment.model, inputs), free.logits((0, 1, 2)), rtol=0, atol=1e-6
        )
    [last] = steps
    assert last is not None
    np.testing.assert_allclose(last, free.logits((0, 2)), rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in attachment.state_dict().items())
    abandoned = cache.steps((2,))
    next(abandoned)
    del abandoned
    np.testing.assert_allclose(cache.logits((2,)), free.logits((2,)), rtol=0, atol=1e-6)


def test_the_first_rows_are_told_before_the_others_and_not_computed_twice() -> None:
    attachment = trained("bert")
    cache, free = (
        LayerCache(attachment, rows(), batch_size=2, first=(5, 0, 2)),
        LayerCache(attachment, rows()),
    )
    passed: list[int] = []

    def count(module: object, args: tuple[Tensor, ...]) -> None:
        passed.append(len(args[0]))

    cache.logits(())  # with the trial of shortcuts
    attachment.sites(0, "query").module.register_forward_pre_hook(count)
    np.testing.assert_allclose(
        cache.logits((0, 2), first=True), free.logits((0, 2))[[5, 0, 2]], rtol=0, atol=1e-6
    )
    passed.clear()
    np.testing.assert_allclose(cache.logits((0, 2)), free.logits((0, 2)), rtol=0, atol=1e-6)
    assert sum(passed[: -(-(ROWS - 3) // 2)]) == ROWS - 3
    np.testing.assert_array_equal(cache.logits((0, 2), first=True), cache.logits((0, 2))[[5, 0, 2]])
    for wrong in ((0, 7), (1, 1), (-1,)):
        with pytest.raises(ArgumentError, match=r"first=.* is not allowed; name rows from 0 to 6"):
            LayerCache(attachment, rows(), first=wrong)


def test_work_that_was_left_is_gone_on_with() -> None:
    attachment = trained("bert")
    cache, free = LayerCache(attachment, rows(), batch_size=1), LayerCache(attachment, rows())
    cache.logits(())
    begun = cache.steps((0, 2))
    for _ in range(ROWS - 1):
        next(begun)
    [_, last] = cache.steps((0, 2))
    assert last is not None
    np.testing.assert_allclose(last, free.logits((0, 2)), rtol=0, atol=1e-6)
    held = set(cache._states)
    [late] = begun  # finished meanwhile: answers, and changes nothing
    np.testing.assert_array_equal(late, last)
    assert set(cache._states) == held
    cache.clear()
    old = cache.steps((1,))
    next(old)
    shake(attachment, seed=1)
    cache.clear()
    for _ in old:  # went on over the change of weights: of no use to later questions
        pass
    assert not cache._states
    np.testing.assert_allclose(
        cache.logits((1,)), LayerCache(attachment, rows()).logits((1,)), rtol=0, atol=1e-6
    )


def test_more_questions_may_be_begun_than_are_kept_half_way() -> None:
    attachment = trained("bert")
    cache, free = LayerCache(attachment, rows(), batch_size=3), LayerCache(attachment, rows())
    places = list(parts_of(attachment))
    questions = [[place] for place in places] + [[*places[:2], place] for place in places[2:]]
    assert len(questions) > BEGUN
    begun = [cache.steps(kept) for kept in questions]
    for work in begun:
        assert next(work) is None
    assert len(cache._begun) == BEGUN
    ran: list[int] = []
    attachment.sites(0, "query").module.register_forward_pre_hook(lambda module, args: ran.append(1))
    cache.logits(questions[-1])
    assert len(ran) == -(-ROWS // 3) - 1  # the latest is gone on with; the oldest has to begin anew
    for kept in questions:
        np.testing.assert_allclose(cache.logits(kept), free.logits(kept), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_prepared_is_where_every_later_question_starts(architecture: str) -> None:
    attachment = trained(architecture)
    depth = len(attachment.sites) - 1
    top = {depth, depth - 1}
    cache, free = LayerCache(attachment, rows(), batch_size=3), LayerCache(attachment, rows())
    cache.logits(top)
    for _ in cache.prepare((0,), depth):
        pass
    ran: list[int] = []
    for index in range(len(attachment.sites)):
        site = attachment.sites(index, "attention_output")
        site.module.register_forward_hook(lambda *_, index=index: ran.append(index))
    for kept in ((0,), (0, depth)):
        found = cache.logits(kept)
        assert (set(ran) == {depth}) is bool(cache.resumes)
        ran.clear()
        np.testing.assert_allclose(found, free.logits(kept), rtol=0, atol=1e-6)
        ran.clear()
    assert cache.resumes is (architecture in RESUMED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_reads_one_token_spares_the_last_layer_the_others(architecture: str) -> None:
    attachment = trained(architecture)
    cache = LayerCache(attachment, rows(), batch_size=3)
    cache.logits((0,))
    lengths: list[int] = []
    attachment.sites(-1, "ffn_hidden").module.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )
    cache.logits((0, 1))
    assert cache.narrows is (architecture not in ("bart", "t5", "gpt2", "llama", "modernbert"))
    assert (set(lengths) == {1}) is cache.narrows


def test_a_last_layer_that_mixes_tokens_behind_the_attention_is_not_narrowed() -> None:
    attachment = trained("bert")
    norm = attachment.sites(2, "attention_norm").module
    handle = norm.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    cache = LayerCache(attachment, rows(), batch_size=1)
    longest = [0, 3]  # without padding, which the mean would read
    np.testing.assert_allclose(
        cache.logits((0, 1, 2))[longest], whole_pass(attachment.model, rows())[longest], rtol=0, atol=1e-6
    )
    assert cache.resumes
    assert not cache.narrows
    handle.remove()


@pytest.mark.parametrize("memory", [0, ROWS * 9 * 16 * 4, 10**6])
def test_memory_is_bounded_and_answers_do_not_depend_on_it(memory: int) -> None:
    attachment = trained("bert")
    cache, free = LayerCache(attachment, rows(), memory=memory), LayerCache(attachment, rows())
    for kept in subsets(3):
        np.testing.assert_allclose(cache.logits(kept), free.logits(kept), rtol=0, atol=1e-6)
        for _ in cache.prepare(kept, 1):
            pass
        prepared, others = (
            sum(s.numel() * s.element_size() for states in held.values() for s in states)
            for held in (cache._prepared, cache._states)
        )
        assert prepared <= memory // 2
        assert prepared + others <= memory
    assert bool(cache._prepared) is (memory > ROWS * 9 * 16 * 4)
    cache.clear()
    assert not cache._prepared


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_the_model_is_left_as_it_was_found(architecture: str) -> None:
    attachment = trained(architecture)
    model = attachment.model
    model.train()
    model.get_submodule(attachment.sites(0, "attention_output").path).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def check() -> None:
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert not any("forward" in vars(module) for module in model.modules())
        assert not any(attachment.sites.layer(i)[1]._forward_hooks for i in range(len(attachment.sites)))
        assert not any(attachment.sites.layer(i)[1]._forward_pre_hooks for i in range(len(attachment.sites)))

    cache = LayerCache(attachment, rows())
    before = cache.logits((0,))
    check()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside")

    handle = attachment.sites(1, "ffn_hidden").module.register_forward_hook(fail)
    for kept in ((), (0, 1)):
        with pytest.raises(ZeroDivisionError, match="inside"):
            cache.logits(kept)
    check()
    handle.remove()
    np.testing.assert_allclose(cache.logits((0,)), before, rtol=0, atol=1e-6)
    attachment.detach()


def test_what_cannot_be_done_is_refused_by_name() -> None:
    attachment = trained("bert")
    with pytest.raises(ArgumentError, match="3 is not a layer of this model, which has layers 0 to 2"):
        LayerCache(attachment, rows()).logits((3,))
    with pytest.raises(
        ArgumentError, match="layer 0 carries 'attention_output', 'attention_norm', 'ffn_norm'"
    ):
        LayerCache(attachment, rows()).logits([(0, "query")])
    with pytest.raises(DataError, match="same number of rows"):
        LayerCache(attachment, {})
    with pytest.raises(ArgumentError, match="batch_size"):
        LayerCache(attachment, rows(), batch_size=0)
    with pytest.raises(
        UnsupportedError, match=r"shares .*LayerNorm.* between its layers.*Hadamard\(norm=None\)"
    ):
        LayerCache(trained("albert", ht.Hadamard()), rows())
    spans = ht.attach(ht.backbone_from_config(attachment.model.config, head="span"), ht.Hadamard())
    with pytest.raises(UnsupportedError, match="gives no logits per row"):
        LayerCache(spans, rows()).logits((0,))
    attachment.merge()
    with pytest.raises(ArgumentError, match="merged or detached"):
        LayerCache(attachment, rows())


def test_layers_that_carry_nothing_may_be_named() -> None:
    attachment = trained("bert", ht.Hadamard(layers=(0, 2)))
    cache = LayerCache(attachment, rows())
    assert {layer for layer, _ in parts_of(attachment)} == {0, 2}
    np.testing.assert_array_equal(cache.logits((0, 1, 2)), cache.logits((0, 2)))
    np.testing.assert_array_equal(cache.logits((-1,)), cache.logits((2,)))
