"""Exact to one entry, for any shapes, sparsity and scope; ties never cost more than was asked."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadamard_toolkit.sparsity.allocate import erdos_renyi, keep_best, keep_top, pools, share_out
from hadamard_toolkit.sparsity.maskable import ParameterSite

SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8
)  # vectors, matrices and more, one-entry tensors among them
SPARSITY = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.9, 0.999]))


@given(
    SHAPES,
    SPARSITY,
    st.sampled_from(["global", "tensor", "layer"]),
    st.sampled_from(["snip", "erdos-renyi"]),
    st.data(),
)
def test_realised_density_is_the_requested_one_to_one_entry(
    shapes_: list[tuple[int, ...]], sparsity: float, scope: str, scorer: str, data: st.DataObject
) -> None:
    shapes = {f"p{i}": shape for i, shape in enumerate(shapes_)}
    layers = data.draw(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=len(shapes), max_size=len(shapes)))
    places = {
        name: ParameterSite(layer, "site", "projections") for name, layer in zip(shapes, layers, strict=True)
    }
    coarse = data.draw(st.booleans())  # many ties
    noise = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = {name: noise.integers(0, 3, s) if coarse else noise.random(s) for name, s in shapes.items()}
    scores = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in values.items()}

    kept, _ = keep_best(scores, pools(scorer, sparsity, scope, shapes, places))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    removed = {name: sizes[name] - int(mask.sum()) for name, mask in kept.items()}
    assert list(kept) == list(shapes)
    assert sum(removed.values()) == round(sparsity * sum(sizes.values()))
    groups: dict[object, list[str]] = {}
    for name, place in places.items():
        alone = scope == "tensor" or (scope == "layer" and place.layer is None)
        groups.setdefault("all" if scope == "global" else name if alone else place.layer, []).append(name)
    for names in groups.values():
        entries = sum(sizes[name] for name in names)
        assert abs(sum(removed[name] for name in names) - sparsity * entries) < 1
        if scorer == "erdos-renyi":
            density = erdos_renyi({n: shapes[n] for n in names}, entries - sum(removed[n] for n in names))
            for name in names:
                assert abs(sizes[name] - removed[name] - density[name] * sizes[name]) < 1 + 1e-9
        else:  # nothing that stays scores lower than what goes
            stay = [v for n in names for v in scores[n][kept[n]].tolist()]
            gone = [v for n in names for v in scores[n][~kept[n]].tolist()]
            assert not stay or not gone or min(stay) >= max(gone)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_top_entries_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(0, len(values)))
    mask, tied = keep_top(scores, keep)
    order = sorted(range(len(values)), key=lambda place: -values[place])  # stable: among equals the first
    assert set(mask.nonzero().flatten().tolist()) == set(order[:keep])
    gone = [values[place] for place in order[keep:]]
    assert tied == (gone.count(values[order[keep - 1]]) if keep else 0)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12))
def test_shares_add_up_and_stay_within_one(ideal: list[float]) -> None:
    total = round(sum(ideal))
    shares = share_out(total, ideal)
    assert sum(shares) == total
    assert all(abs(share - value) < 1 + 1e-9 for share, value in zip(shares, ideal, strict=True))


@given(SHAPES, st.floats(0, 1))
def test_erdos_renyi_meets_its_budget_below_full(shapes_: list[tuple[int, ...]], share: float) -> None:
    shapes = {f"p{i}": shape for i, shape in enumerate(shapes_)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    keep = int(share * sum(sizes.values()))
    density = erdos_renyi(shapes, keep)
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in density.values())
    assert abs(sum(density[name] * sizes[name] for name in shapes) - keep) < 1e-6
