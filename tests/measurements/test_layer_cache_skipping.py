"""What stands in for the layers that are not computed."""

from __future__ import annotations

import pytest

from hadamard_toolkit.measurements.layer_cache import LayerCache
from tests.measurements.test_layer_cache import ROWS, rows, trained


def test_preparing_beyond_the_last_layer_is_preparing_for_it() -> None:
    attachment = trained("bert")
    cache, other = (LayerCache(attachment, rows(), batch_size=3) for _ in range(2))
    ran: list[int] = []
    attachment.sites(-1, "ffn_output").module.register_forward_hook(lambda *_: ran.append(2))
    for each, depth in ((cache, 2), (other, 99)):
        each.logits((1, 2))
        ran.clear()
        steps = sum(1 for _ in each.prepare((0,), depth))
        assert (steps, ran) == (-(-ROWS // 3), [])
    assert cache._prepared.keys() == other._prepared.keys()


@pytest.mark.parametrize("architecture", ["bert", "deberta", "albert"])
def test_a_skipped_layer_returns_what_it_would_have(architecture: str) -> None:
    attachment = trained(architecture)
    cache = LayerCache(attachment, rows(), batch_size=3)
    forms: list[tuple[type, int]] = []
    for index in range(len(attachment.sites)):
        layer = attachment.sites.layer(index)[1]
        layer.register_forward_hook(
            lambda *given: forms.append(
                (type(given[-1]), len(given[-1]) if isinstance(given[-1], tuple) else 0)
            )
        )
    cache.logits((0, 1))
    (whole,) = set(forms)
    forms.clear()
    cache.logits((0, 1, 2))
    assert set(forms) == {whole}
