"""What the pruner says of a subset is what the model does without a cache, and costs what it is said to cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.runs.record import Run
from hadamard_toolkit.studies.layer_ablation import layer_importance
from hadamard_toolkit.widgets import evaluation as module
from hadamard_toolkit.widgets.evaluation import Evaluation, Score
from hadamard_toolkit.widgets.evidence import cost_table, evidence_table
from hadamard_toolkit.widgets.pruned_adapter import adapter_source, pruned_adapter
from hadamard_toolkit.widgets.pruning_state import Keep, PruningState, Range
from tests.adapters.life import shake
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer
from tests.widgets.test_pruning_state import events

SITES = ("attention_output", "attention_norm")


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    attachment = ht.attach(tiny_bert().eval(), ht.Hadamard())
    shake(attachment, scale=0.5)
    return Evaluation(attachment, tiny_task(), tiny_tokenizer(), rows=30, preview=8)


def test_a_score_is_that_of_the_model_alone(evaluation: Evaluation) -> None:
    model, tokenizer, task = evaluation.attachment.model, tiny_tokenizer(), tiny_task()
    rows = task.splits["test"].select(evaluation.positions)
    assert len(rows) == 30
    texts = tokenizer(list(rows["text"]), padding=True, return_tensors="pt")
    labels = np.array(rows["label"])

    def right() -> np.ndarray:
        with torch.no_grad():
            return (model(**texts).logits.argmax(1).numpy() == labels).astype(int)

    base = right()
    scores = []
    for size in range(4):
        for kept in itertools.combinations(range(3), size):
            off = tuple(layer for layer in range(3) if layer not in kept)
            with evaluation.attachment.enabled(not off, layers=off):
                now = right()
            score = evaluation.score(kept)
            assert score.value == pytest.approx(now.mean())
            assert score.full == pytest.approx(base.mean())
            assert (score.gained, score.lost) == ((now > base).sum(), (now < base).sum())
            assert score.changed == (now != base).sum()
            assert score.n == 30
            scores.append(score.value)
    assert len(set(scores)) > 2


def test_the_same_state_has_the_same_score(evaluation: Evaluation) -> None:
    state = PruningState.of(evaluation.places, evaluation.importance)
    there = state.apply(Range("0,2")).apply(Range("1")).apply(Range("0,2"))
    assert evaluation.score(there.kept) is evaluation.score((0, 2)) is evaluation.known(there.kept)
    fresh = Evaluation(evaluation.attachment, tiny_task(), tiny_tokenizer(), rows=30, preview=8)
    assert fresh.score(there.kept) == evaluation.score(there.kept)
    assert fresh.known((1,)) is None
    assert evaluation.preview((0, 2)).n == 8


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_same_state_has_the_same_score_whatever_came_before(
    evaluation: Evaluation, data: st.DataObject
) -> None:
    """Events, previews and look-ahead on the way to a state against a fresh evaluation of that state alone."""
    walked, fresh = (
        Evaluation(evaluation.attachment, tiny_task(), tiny_tokenizer(), rows=30, preview=8) for _ in range(2)
    )
    state = PruningState.of(walked.places, walked.importance)
    for event in data.draw(st.lists(events(state), max_size=6)):
        state = state.apply(event)
        asked = data.draw(st.sampled_from([walked.preview, walked.score, walked.prepare, walked.flips]))
        found = asked(state.kept)
        if not isinstance(found, Score):
            for _ in itertools.islice(found, data.draw(st.integers(0, 12))):  # left half way, or gone through
                pass
    told, expected = walked.score(state.kept), fresh.score(state.kept)
    assert told.loss == pytest.approx(expected.loss, abs=1e-6)
    assert replace(told, loss=0.0) == replace(expected, loss=0.0)
    np.testing.assert_allclose(walked.logits(state.kept), fresh.logits(state.kept), rtol=0, atol=1e-6)


def test_flips_scores_what_is_one_layer_away() -> None:
    attachment = ht.attach(tiny_bert(num_hidden_layers=6).eval(), ht.Hadamard())
    shake(attachment, scale=0.5)
    fresh = Evaluation(attachment, tiny_task(), tiny_tokenizer(), rows=30, preview=8)
    kept = {0, 1, 2, 3, 4}
    for _ in fresh.flips(kept):
        pass
    known = {layers for layers in subsets_of(range(6)) if fresh.known(layers) is not None}
    assert known == {tuple(sorted(kept ^ {layer})) for layer in range(6)}


@pytest.mark.parametrize("adapter", [ht.Hadamard(), ht.Hadamard(norm=None), ht.Hadamard(layers=(3, 5))])
def test_what_is_prepared_spares_flips_the_lowest_layers(adapter: Adapter) -> None:
    attachment = ht.attach(tiny_bert(num_hidden_layers=6).eval(), adapter)
    shake(attachment, scale=0.5)
    fresh, free = (
        Evaluation(attachment, tiny_task(), tiny_tokenizer(), rows=30, preview=8) for _ in range(2)
    )
    everything = frozenset(fresh.places)
    fresh.score(everything)
    for _ in fresh.prepare(everything):
        pass
    lowest = sorted({layer for layer, _ in everything})[:2]
    ran: list[int] = []
    for index in range(6):
        site = attachment.sites(index, "attention_output")
        site.module.register_forward_hook(lambda *_, index=index: ran.append(index))
    states = [frozenset(p for p in everything if p[0] not in off) for off in subsets_of(range(6))]
    states += [everything - {place} for place in everything]
    answers = [(fresh.preview(kept), fresh.score(kept), fresh.logits(kept))[-1] for kept in states]
    assert set(ran) == set(range(min(lowest[-1] + 1, 5), 6)), "the layers behind, at least the last"
    for kept, found in zip(states, answers, strict=True):
        np.testing.assert_allclose(found, free.logits(kept), rtol=0, atol=1e-6)


def subsets_of(layers: Iterable[int]) -> list[tuple[int, ...]]:
    held = tuple(layers)
    return [chosen for size in range(len(held) + 1) for chosen in itertools.combinations(held, size)]


def test_flipped_examples(evaluation: Evaluation) -> None:
    kept = next(kept for kept in ((), (0,), (1,), (2,)) if evaluation.score(kept).changed > 2)
    table = evaluation.flipped(kept, most=2)
    assert len(table) == 2
    assert (table["before"] != table["after"]).all()
    assert table["change"].is_monotonic_increasing
    assert (table["change"] < 0).all(), "the old class has become less likely"
    before, after = (torch.from_numpy(evaluation.logits(k)).softmax(1) for k in (range(3), kept))
    rows = [list(evaluation.positions).index(row) for row in table["row"]]
    expected = [(after[row] - before[row])[before[row].argmax()] for row in rows]
    np.testing.assert_allclose(table["change"], expected, rtol=1e-5)
    rows = tiny_task().splits["test"]
    for row in table.itertuples():
        assert row.text == rows[int(row.row)]["text"]  # type: ignore[arg-type]
        assert row.label == ("bad", "good")[rows[int(row.row)]["label"]]  # type: ignore[arg-type]
    assert evaluation.flipped(range(3)).empty


def test_long_texts_are_cut(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluation.flipped((), most=3)["text"]
    monkeypatch.setattr(module, "LONGEST_TEXT", len(whole[0]))
    assert evaluation.flipped((), most=3)["text"][0] == whole[0]
    monkeypatch.setattr(module, "LONGEST_TEXT", len(whole[0]) - 1)
    assert evaluation.flipped((), most=3)["text"][0] == f"{whole[0][:-2]}…"


def test_a_regression_shows_its_largest_changes() -> None:
    attachment = ht.attach(tiny_bert(head="regression").eval(), ht.Hadamard())
    shake(attachment)
    evaluation = Evaluation(attachment, tiny_task("regression"), tiny_tokenizer())
    table = evaluation.flipped((0,), most=5)
    gaps = np.abs(evaluation.logits((0,)) - evaluation.logits(range(3)))[:, 0]
    np.testing.assert_allclose(np.abs(table["change"]), np.sort(gaps)[::-1][:5], rtol=1e-6)
    assert evaluation.score((0,)).changed == 0
    assert evaluation.score((0,)).metric == "pearson"


def test_leave_one_out_and_greedy(evaluation: Evaluation) -> None:
    table = evaluation.leave_one_out()
    assert list(zip(table["layer"], table["site"], strict=True)) == list(itertools.product(range(3), SITES))
    for row in table.itertuples():
        without = frozenset(evaluation.places) - {(row.layer, row.site)}
        assert row.difference == evaluation.score(without).difference  # type: ignore[arg-type]
    order = list(evaluation.greedy())
    kept = {0, 1, 2}
    for gone in order:
        best = max(evaluation.score(kept - {layer}).value for layer in kept)
        assert evaluation.score(kept - {gone}).value == best
        kept -= {gone}
    assert not kept


def test_evidence_is_that_of_the_study() -> None:
    attachment = ht.attach(tiny_bert(), ht.Hadamard())
    shake(attachment)
    table = evidence_table(attachment)
    vectors = attachment.vectors()
    arrays = {kind: vectors[f"attention_output.{kind}"] for kind in ("weight", "bias")}
    study = layer_importance(arrays).pivot(index="layer", columns="vector", values="l2")
    own = table[table["site"] == "attention_output"].set_index("layer")
    np.testing.assert_allclose(own["weight"], study["weight"], rtol=1e-5)
    np.testing.assert_allclose(own["bias"], study["bias"], rtol=1e-5)
    np.testing.assert_allclose(own["importance"], study["both"], rtol=1e-5)
    plain = dict(tiny_bert().named_parameters())
    norm = table[(table["site"] == "attention_norm") & (table["layer"] == 1)].iloc[0]
    gain = attachment.state_dict()["norm.layers.1.attention_norm.weight"]
    before = plain["bert.encoder.layer.1.attention.output.LayerNorm.weight"]
    assert norm["weight"] == pytest.approx(float((gain - before.detach()).norm()), rel=1e-5)
    assert (table["density"] == 1).all()
    assert (table["trained"] == 32).all()


def test_evidence_adds_up_vectors_of_one_site() -> None:
    attachment = ht.attach(tiny_bert(), ht.Stack(ht.Hadamard(norm=None), ht.Hadamard(norm=None)))
    shake(attachment)
    state = attachment.state_dict()
    moved = [value - 1 for name, value in state.items() if ".layers.0." in name and name.endswith("weight")]
    [row] = evidence_table(attachment).query("layer == 0").to_dict(orient="records")
    assert len(moved) == 2
    assert row["weight"] == pytest.approx(float(torch.cat(moved).norm()), rel=1e-5)


def test_evidence_of_masks() -> None:
    attachment = ht.attach(tiny_bert(), ht.Pfeiffer(bottleneck=4))
    ht.sparsify(attachment, scorer="random", sparsity=0.5)
    table = evidence_table(attachment)
    masks = ht.Masks.of(attachment).table("layer")
    biases = 4 + 16
    for row in table.itertuples():
        entries, kept = masks.loc[row.layer, ["entries", "kept"]]
        assert row.density == pytest.approx((kept + biases) / (entries + biases))
    everything = [(row.layer, row.site) for row in table.itertuples()]
    cost = cost_table(attachment, everything)  # type: ignore[arg-type]
    counted = attachment.count().drop(index="head").sum()
    assert (cost["trained"], cost["stored"]) == (counted["trained"], counted["stored"])
    assert not cost["merges"]
    config = attachment.model.config
    matrices = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    assert cost["backbone"] == config.num_hidden_layers * matrices


@pytest.mark.parametrize(
    "adapter",
    [
        ht.Hadamard(),
        ht.Hadamard(norm="both", placement="attention_heads"),
        ht.LoRA(rank=2),
        ht.IA3(),
        ht.Pfeiffer(bottleneck=4),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_what_is_kept_costs_what_such_an_adapter_would(adapter: Adapter) -> None:
    attachment = ht.attach(tiny_bert(), adapter)
    for text in ("all", "0-1", "2"):
        places = evidence_table(attachment)[["layer", "site"]].itertuples(index=False)
        state = PruningState.of([tuple(place) for place in places]).apply(Range(text))
        alone = ht.attach(tiny_bert(), pruned_adapter(adapter, state)).count().drop(index="head").sum()
        cost = cost_table(attachment, state.kept)
        assert (cost["trained"], cost["stored"]) == (alone["trained"], alone["stored"])
        assert cost["merges"] == (not isinstance(adapter, ht.Pfeiffer))
    assert cost["of_full"] == pytest.approx(1 / 3)


def test_the_adapter_that_a_state_describes() -> None:
    everything = PruningState.of(list(itertools.product(range(3), SITES)))
    cases = {
        "all": ("ht.Hadamard()", ht.Hadamard()),
        "0,2": ("ht.Hadamard(layers=(0, 2))", ht.Hadamard(layers=(0, 2))),
        "none": ("ht.HeadOnly()", ht.HeadOnly()),
        "0,1:attention_norm": (
            "ht.Stack(ht.LayerNormTuning(layers=(0, 1)), ht.Hadamard(layers=(0,), norm=None))",
            ht.Stack(ht.LayerNormTuning(layers=(0, 1)), ht.Hadamard(layers=(0,), norm=None)),
        ),
        "1:attention_output": ("ht.Hadamard(layers=(1,), norm=None)", ht.Hadamard(layers=(1,), norm=None)),
    }
    for text, (source, adapter) in cases.items():
        found = pruned_adapter(ht.Hadamard(), everything.apply(Range(text)))
        assert found == adapter
        assert adapter_source(found) == source
        assert eval(source, {"ht": ht}) == found
    lora = PruningState.of(list(itertools.product(range(3), ("query", "value"))))
    with pytest.raises(UnsupportedError, match="only whole layers of it can be chosen"):
        pruned_adapter(ht.LoRA(), lora.apply(Keep(((0, "query"),))))
    with pytest.raises(UnsupportedError, match="no field `layers`"):
        pruned_adapter(ht.BitFit(), everything.apply(Range("0")))


def test_a_stored_run_is_scored_on_the_rows_that_it_held_out(run: Run) -> None:
    evaluation = Evaluation.of_run(run)
    assert evaluation.split == "validation"
    np.testing.assert_array_equal(evaluation.positions, run.predictions["validation"]["rows"])
    np.testing.assert_array_equal(evaluation.labels, run.predictions["validation"]["labels"])
    np.testing.assert_allclose(
        evaluation.logits(range(3)), run.predictions["validation"]["logits"], atol=1e-5
    )
    assert evaluation.score(range(3)).value == pytest.approx(run.metrics["validation"]["accuracy"])
    assert Evaluation.of_run(run, split="test").score(range(3)).value == pytest.approx(run.score)


def test_what_cannot_be_switched_is_refused() -> None:
    attachment = ht.attach(tiny_bert(), ht.HeadOnly())
    with pytest.raises(ArgumentError, match="nothing to switch"):
        Evaluation(attachment, tiny_task(), tiny_tokenizer())
    with pytest.raises(ArgumentError, match="split='dev' is not allowed"):
        Evaluation(attachment, tiny_task(), tiny_tokenizer(), split="dev")


def test_runs_without_the_predictions_that_are_shown_are_refused(run: Run) -> None:
    spans = replace(run, predictions={"test": {"rows": run.predictions["test"]["rows"]}})
    with pytest.raises(UnsupportedError, match="has no logits for 'test'"):
        Evaluation.of_run(spans)
    evaluation = Evaluation.of_run(run, split="test", rows=4)
    assert evaluation.score_of(run).value == evaluation.score(range(3)).value
    part = run.predictions["test"]
    some = {name: values[part["rows"] != evaluation.positions[0]] for name, values in part.items()}
    for predictions in ({"test": some}, {}):
        with pytest.raises(DataError, match="has no predictions for the rows shown here"):
            evaluation.score_of(replace(run, predictions=predictions))
