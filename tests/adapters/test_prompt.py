"""Prompt tuning: where the vectors stand in every architecture, what heads see, and stock peft's layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from tests.adapters.by_formula import Changes, check_against
from tests.adapters.life import check_json, check_life, counts_on_bert_base, logits, spread
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config, tiny_model

ENCODER_DECODERS, DECODERS = ("bart", "t5"), ("gpt2", "llama")
Weights = dict[str, Tensor]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_life(architecture: str, tmp_path: Path) -> None:
    check_life(architecture, ht.PromptTuning(length=3), tmp_path)


def test_counts_and_keys() -> None:
    for init in ("uniform", "normal", "vocabulary"):
        assert counts_on_bert_base(ht.PromptTuning(init=init))["adapter"] == (7_680,) * 3
    for architecture, width in (("bert", 16), ("albert", 8), ("electra", 8), ("t5", 16)):
        attachment = ht.attach(tiny_model(architecture), ht.PromptTuning(length=4))
        assert list(attachment.named_parameters("adapter")) == ["adapter.prompt.weight"]
        assert attachment.parameters("adapter")[0].shape == (4, width), "the width of the word embeddings"


@pytest.mark.parametrize("position", ["auto", "behind-first", "front"])
def test_bert_with_a_prompt_is_the_formula(position: str) -> None:
    def by_hand(own: Weights, weights: Weights) -> Changes:
        def at(layer: int, words: Tensor, _: Tensor) -> Tensor:
            rows = own["adapter.prompt.weight"].expand(3, -1, -1)
            first = 0 if position == "front" else 1
            return torch.cat([words[:, :first], rows, words[:, first:]], 1)

        return {"embeddings": at}

    check_against(ht.PromptTuning(length=4, position=position), by_hand)


def _decoder_input(model: PreTrainedModel, ids: Tensor) -> Tensor:
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, ids[:, :-1]], 1)


def _by_hand(model: PreTrainedModel, prompt: Tensor, at: int, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states from embeddings that are put together outside, without the prompt's rows."""
    base: Any = model.base_model
    ids, mask = batch["input_ids"], batch["attention_mask"]
    encoder = base.encoder if model.config.is_encoder_decoder else base
    words = encoder.get_input_embeddings()(ids)
    rows = prompt.expand(len(ids), -1, -1)
    words = torch.cat([words[:, :at], rows, words[:, at:]], 1)
    wide = torch.cat([mask[:, :at], mask.new_ones(len(ids), len(prompt)), mask[:, at:]], 1)
    if not model.config.is_encoder_decoder:
        states: Tensor = base(inputs_embeds=words, attention_mask=wide).last_hidden_state
        return torch.cat([states[:, :at], states[:, at + len(prompt) :]], 1)
    memory = encoder(inputs_embeds=words, attention_mask=wide).last_hidden_state
    decoded = base.decoder(
        input_ids=_decoder_input(model, ids),
        encoder_hidden_states=memory,
        encoder_attention_mask=wide,
    )
    return decoded.last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("position", ["auto", "front", "behind-first"])
def test_states_are_those_of_embeddings_put_together_by_hand(architecture: str, position: str) -> None:
    model = tiny_model(architecture).double()
    attachment = ht.attach(model, ht.PromptTuning(length=4, position=position))
    spread(attachment)
    front = position == "front" or (position == "auto" and architecture in ENCODER_DECODERS + DECODERS)
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    decoder = {"decoder_input_ids": _decoder_input(model, batch["input_ids"])} if architecture == "t5" else {}
    with torch.no_grad():
        ours = model.base_model(**batch, **decoder).last_hidden_state
        with attachment.enabled(False):
            prompt = attachment.state_dict()["adapter.prompt.weight"]
            expected = _by_hand(model, prompt, 0 if front else 1, batch)
    assert ours.shape == expected.shape == (3, 9, 16)
    torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_stays_hidden(architecture: str) -> None:
    model = tiny_model(architecture).double()
    spread(ht.attach(model, ht.PromptTuning(length=3)))
    short = {name: rows[:1, :7] for name, rows in tiny_batch().items()}
    if architecture != "deberta":  # its relative positions depend on the padded length by themselves
        torch.testing.assert_close(logits(model)[:1], logits(model, **short), rtol=0, atol=1e-9)


def padded_left() -> dict[str, Tensor]:
    """The tiny batch with the padding of its first row in front."""
    batch = tiny_batch()
    for rows in batch.values():
        rows[0] = rows[0].roll(2)
    return batch


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "positions", [("auto",), ("front",), ("behind-first",), ("front", "behind-first") * 2]
)
def test_behind_first_is_behind_the_first_token_that_is_no_padding(
    architecture: str, positions: tuple[str, ...]
) -> None:
    model = tiny_model(architecture).double()
    adapter = ht.Stack(*(ht.PromptTuning(length=2, position=position) for position in positions))
    attachment = ht.attach(model, adapter)
    spread(attachment)
    batch = padded_left()
    real = batch["attention_mask"].bool()
    decoder = {"decoder_input_ids": _decoder_input(model, batch["input_ids"])} if architecture == "t5" else {}
    with torch.no_grad():
        ours = model.base_model(**batch, **decoder)
    prompts = [value for name, value in attachment.state_dict().items() if "prompt" in name]
    front = architecture in ENCODER_DECODERS + DECODERS
    with attachment.enabled(False), torch.no_grad():
        base: Any = model.base_model
        encoder = base.encoder if model.config.is_encoder_decoder else base
        embedded, masks, kept = [], [], []
        for words, seen in zip(encoder.get_input_embeddings()(batch["input_ids"]), real, strict=True):
            rows, mask, own = list(words), seen.long().tolist(), [True] * 9
            in_front, padding = 0, mask.index(1)
            for prompt, position in zip(prompts, positions, strict=True):
                at = padding if model.config.is_encoder_decoder else 0
                if position == "behind-first" or (position == "auto" and not front):
                    at = padding + in_front + 1
                else:
                    in_front += 2
                rows[at:at], mask[at:at], own[at:at] = list(prompt), [1, 1], [False, False]
            embedded.append(torch.stack(rows))
            masks.append(mask)
            kept.append(own)
        given: dict[str, Tensor] = {
            "inputs_embeds": torch.stack(embedded),
            "attention_mask": torch.tensor(masks),
        }
        if "roberta" in architecture:  # it counts tokens, not columns
            given["position_ids"] = given["attention_mask"].cumsum(1) * given["attention_mask"]
        states = encoder(**given).last_hidden_state
    if model.config.is_encoder_decoder:
        torch.testing.assert_close(ours.encoder_last_hidden_state, states, rtol=0, atol=1e-12)
    else:
        expected = states[torch.tensor(kept)].view(3, 9, 16)
        torch.testing.assert_close(ours.last_hidden_state[real], expected[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", [("auto",), ("behind-first",), ("front", "behind-first", "front")])
def test_padding_on_the_left_changes_nothing_on_t5(positions: tuple[str, ...]) -> None:
    """Its positions are relative: a prompt must be as far from the tokens as without padding."""
    model = tiny_model("t5").double()
    spread(ht.attach(model, ht.Stack(*(ht.PromptTuning(length=2, position=place) for place in positions))))
    batch = padded_left()
    alone = {name: rows[:1, 2:] for name, rows in batch.items()}
    with torch.no_grad():
        padded, expected = (
            model.base_model(
                **inputs, decoder_input_ids=torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)
            )
            for inputs in (batch, alone)
        )
    torch.testing.assert_close(padded.last_hidden_state[:1], expected.last_hidden_state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("positions", [("front",), ("behind-first",), ("front", "front", "behind-first")])
def test_positions_that_are_given_count_from_the_first_token_that_is_no_padding(
    architecture: str, positions: tuple[str, ...]
) -> None:
    model = tiny_model(architecture).double()
    spread(ht.attach(model, ht.Stack(*(ht.PromptTuning(length=2, position=place) for place in positions))))
    batch = padded_left()
    alone = {name: rows[:1, 2:] for name, rows in batch.items()}
    # as `generate` counts them, with another number at the padding
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).masked_fill(
        batch["attention_mask"] == 0, 1
    )
    with torch.no_grad():
        padded = model.base_model(**batch).last_hidden_state
        expected = model.base_model(**alone).last_hidden_state
    torch.testing.assert_close(padded[:1, 2:], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "mpnet", "modernbert"])
@pytest.mark.parametrize("head", ["span", "masked-lm"])
def test_heads_count_the_positions_they_know(architecture: str, head: str) -> None:
    model = ht.backbone_from_config(tiny_config(architecture), head=head)
    ht.attach(model, ht.PromptTuning(length=3))
    with torch.no_grad():
        outputs = model(**tiny_batch(), output_hidden_states=True)
    scores = outputs.start_logits if head == "span" else outputs.logits[..., 0]
    assert scores.shape == (3, 9)
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(3, 9, 16)}
    plain = model.base_model(**tiny_batch(), return_dict=False)
    assert plain[0].shape == (3, 9, 16)


def test_positions_and_token_types_follow_when_they_are_given() -> None:
    model = tiny_model("bert").double()
    spread(ht.attach(model, ht.PromptTuning(length=3)))
    types = torch.zeros(3, 9, dtype=torch.long)
    count = torch.arange(9).expand(3, -1)
    expected = logits(model)
    assert torch.equal(logits(model, token_type_ids=types, position_ids=count), expected)
    types[:, 5:] = 1
    assert not torch.allclose(logits(model, token_type_ids=types), expected)


def test_embeddings_may_be_given_in_place_of_tokens() -> None:
    model = tiny_model("bert").double()
    spread(ht.attach(model, ht.PromptTuning(length=3)))
    batch = tiny_batch()
    words = model.bert.embeddings.word_embeddings.weight[batch["input_ids"]]
    torch.testing.assert_close(
        logits(model, input_ids=None, inputs_embeds=words), logits(model), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "positions",
    [("front", "front"), ("behind-first",) * 2, ("behind-first", "front"), ("front", "behind-first")],
)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "bart"])
def test_two_prompts_enter_one_after_the_other(architecture: str, positions: tuple[str, str]) -> None:
    model = tiny_model(architecture).double()
    attachment = ht.attach(
        model,
        ht.Stack(*(ht.PromptTuning(length=n, position=p) for n, p in zip((2, 3), positions, strict=True))),
    )
    spread(attachment)
    first, second = (attachment.state_dict()[f"adapter.prompt{name}.weight"] for name in ("", "_2"))
    ours = logits(model)
    with attachment.enabled(False), torch.no_grad():
        ids, mask = tiny_batch().values()
        reader = model.base_model.encoder if architecture == "bart" else model.base_model
        rows = list(reader.get_input_embeddings()(ids).unbind(1))
        seen = list(mask.unbind(1))
        in_front = 0
        for prompt, position in zip((first, second), positions, strict=True):
            at = 0 if position == "front" else 1 + in_front
            in_front += len(prompt) if position == "front" else 0
            rows[at:at] = [row.expand(3, -1) for row in prompt]
            seen[at:at] = [mask[:, 0]] * len(prompt)
        embedded, wide = torch.stack(rows, 1), torch.stack(seen, 1)
        if architecture == "bart":
            memory = reader(inputs_embeds=embedded, attention_mask=wide)
            expected = model(
                input_ids=ids,
                attention_mask=wide,
                encoder_outputs=memory,
                decoder_input_ids=_decoder_input(model, ids),
            ).logits
        else:
            states = model.base_model(inputs_embeds=embedded, attention_mask=wide).last_hidden_state
            if architecture == "bert":
                expected = model.classifier(torch.tanh(model.bert.pooler.dense(states[:, 0])))
            else:  # the last token that is no padding, five rows later
                expected = model.score(states)[torch.arange(3), mask.sum(1) - 1 + 5]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "most"), [("bert", 36), ("roberta", 35), ("mpnet", 34), ("gpt2", 36)]
)
def test_inputs_that_leave_no_room_are_refused(architecture: str, most: int) -> None:
    model = tiny_model(architecture)
    ht.attach(model, ht.PromptTuning(length=4))
    fits = torch.full((1, most), 7)
    model(input_ids=fits)
    with pytest.raises(
        ArgumentError, match=rf"input of {most + 1} positions is too long: with 4 prompt.*at most {most}"
    ):
        model(input_ids=torch.full((1, most + 1), 7))
    model(input_ids=fits)  # the refusal leaves nothing behind


def test_what_a_prompt_cannot_work_with_is_refused() -> None:
    model = tiny_model("gpt2")
    ht.attach(model, ht.PromptTuning(length=2))
    cache = model(**tiny_batch(), use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):  # as older and newer transformers call it
        with pytest.raises(UnsupportedError, match=r"a prompt needs the whole sequence.*use_cache=False"):
            model(input_ids=torch.full((3, 1), 5), **{name: cache})
    with pytest.raises(UnsupportedError, match=r"attention_mask \[batch, positions\]"):
        model(input_ids=torch.full((1, 4), 5), attention_mask=torch.ones(1, 1, 4, 4))


def test_initial_values() -> None:
    model = tiny_model("bart", scale_embedding=True, max_position_embeddings=500)
    states = {
        init: ht.attach(copy.deepcopy(model), ht.PromptTuning(length=400, init=init)).state_dict()
        for init in ("uniform", "normal", "vocabulary")
    }
    uniform, normal, drawn = (state["adapter.prompt.weight"] for state in states.values())
    assert uniform.abs().max() <= 0.5
    assert float(uniform.std()) == pytest.approx(12**-0.5, rel=0.02)
    assert float(normal.std()) == pytest.approx(0.02, rel=0.03)
    table = model.model.shared.weight.detach() * 4  # this model scales what it looks up by √16
    assert all((row == table).all(1).any() for row in drawn)
    assert len({tuple(row.tolist()) for row in drawn}) > 40


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_stock_peft_has_the_same_logits_and_gradients(architecture: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    attachment = ht.attach(ours, ht.PromptTuning(length=4, position="front"))
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = peft.get_peft_model(theirs, config).eval()
    twin = theirs.prompt_encoder["default"].embedding.weight
    twin.data.copy_(attachment.parameters("adapter")[0].data)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0])}
    mine, other = ours(**batch), theirs(**batch)
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(attachment.parameters("adapter")[0].grad, twin.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length=0 is not allowed"),
        ({"init": "zero"}, "init='zero' is not allowed; choose one of 'uniform', 'normal', 'vocabulary'"),
        ({"position": "end"}, "position='end' is not allowed"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ht.PromptTuning(**fields)  # type: ignore[arg-type]


def test_description_round_trips() -> None:
    check_json(ht.PromptTuning(length=3, init="vocabulary", position="front"))


@pytest.mark.parametrize("adapter", [ht.PromptTuning(length=40), ht.Stack(*[ht.PromptTuning(length=20)] * 2)])
def test_a_prompt_that_leaves_no_room_is_refused_when_it_is_attached(adapter: Adapter) -> None:
    model = tiny_model("bert")
    names = list(model.state_dict())
    with pytest.raises(
        ArgumentError, match=r"adds 40 positions to the input of this Bert.*which has 40: no room"
    ):
        ht.attach(model, adapter)
    assert list(model.state_dict()) == names
    ht.attach(model, ht.PromptTuning(length=39))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_embedded_input_with_padding_in_front_is_read_as_its_tokens_are(architecture: str) -> None:
    model = tiny_model(architecture).double()
    spread(ht.attach(model, ht.PromptTuning(length=2)))
    batch = padded_left()
    positions = {}
    if architecture == "roberta":  # without tokens it cannot tell where the padding is
        seen = batch["attention_mask"]
        positions["position_ids"] = seen.cumsum(1) * seen + 1
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        words = model(**batch, **positions).logits
        vectors = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], **positions).logits
    torch.testing.assert_close(vectors, words, rtol=0, atol=1e-9)
