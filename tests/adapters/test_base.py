"""Declarations are values that can be copied and pickled; a module that does not fold says so."""

from __future__ import annotations

import copy
import pickle

import pytest

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter
from hadamard_toolkit.errors import UnsupportedError
from tests.adapters.support import SWITCHED, defaults
from tests.architectures import tiny_model


@pytest.mark.parametrize("adapter", [*defaults().values(), *SWITCHED.values()], ids=str)
def test_declarations_can_be_copied(adapter: Adapter) -> None:
    assert copy.deepcopy(adapter) == adapter
    assert pickle.loads(pickle.dumps(adapter)) == adapter


def test_a_module_that_cannot_fold_refuses_to() -> None:
    insertions = ht.attach(tiny_model("bert"), ht.Houlsby(bottleneck=2, layers=(0,))).insertions
    for name, insertion in insertions.items():
        site = name.rpartition(".")[2]
        with pytest.raises(UnsupportedError, match=f"Bottleneck at {site} is not linear in its input"):
            insertion.module.fold(insertion.site)
    assert len(insertions) == 2
