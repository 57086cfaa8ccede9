"""Declarations are values that can be copied and pickled; a module that does not fold says so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import Adapter, Insertion, SiteModule
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.sites import Sites
from tests.adapters.support import SWITCHED, defaults
from tests.architectures import tiny_batch, tiny_model


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


class Other(SiteModule):
    """Replaces what passes its site by what it reads elsewhere."""

    def forward(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        return inputs


@pytest.mark.parametrize("source", ["attention_output", "ffn_input"])
def test_a_module_reads_what_passed_its_source_in_the_same_pass(source: str) -> None:
    model = tiny_model("bert")
    sites = Sites(model)
    insertion = Insertion(sites(1, "ffn_output"), Other(), source=sites(1, source))
    seen = []
    handles = [
        *insertion.connect(),
        sites(1, "ffn_output").module.register_forward_hook(lambda *a: seen.append(a[2])),
    ]
    read = sites(1, source)
    if read.side == "input":
        handles.append(read.module.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    else:
        handles.append(read.module.register_forward_hook(lambda module, args, output: seen.append(output)))
    with torch.no_grad():
        model(**tiny_batch())
    passed, replaced = seen
    assert torch.equal(passed, replaced)
    for handle in handles:
        handle.remove()
