"""Declarations are values: they can be copied, pickled and written down."""

from __future__ import annotations

import copy
import pickle

import pytest

from hadamard_toolkit.adapters.base import Adapter
from tests.adapters.support import SWITCHED, defaults


@pytest.mark.parametrize("adapter", [*defaults().values(), *SWITCHED.values()], ids=str)
def test_declarations_can_be_copied(adapter: Adapter) -> None:
    assert copy.deepcopy(adapter) == adapter
    assert pickle.loads(pickle.dumps(adapter)) == adapter
