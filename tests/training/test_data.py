from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from datasets import DatasetDict

import hadamard_toolkit as ht
from hadamard_toolkit.errors import DataError
from hadamard_toolkit.tasks.base import in_memory
from tests.architectures import tiny_model
from tests.training.test_loop import shortly
from tests.training.tiny import tiny_task, tiny_tokenizer


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_the_batches_whatever_the_config_pads_with(
    architecture: str, side: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    predictions = []
    for batch in (1, 8):
        model = tiny_model(architecture, pad_token_id=5, eos_token_id=2)  # the tokenizer pads with 0
        protocol = ht.protocols.smoke(
            epochs=1,
            head_epochs=1,
            train_rows=8,
            validation_rows=8,
            test_rows=16,
            max_length=24,
            eval_batch_size=batch,
        )
        outcome = ht.train(ht.attach(model, ht.HeadOnly()), tiny_task(), tokenizer, protocol)
        predictions.append(outcome.predictions["test"])
    np.testing.assert_allclose(*predictions, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_rows_that_do_not_end_once_are_refused_before_the_first_step(architecture: str) -> None:
    task, steps = tiny_task(), 0
    rows = task.splits["test"].to_dict()
    rows["text"][7] += " [SEP] and so on"  # the end token, spelled out
    ends_twice = dataclasses.replace(task, splits=DatasetDict(task.splits | {"test": in_memory(rows)}))

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    attachment = ht.attach(tiny_model(architecture), ht.Hadamard())
    with pytest.raises(DataError, match=r"split 'test', row 7 has 2 end tokens '\[SEP\]'.*others have 1"):
        ht.train(attachment, ends_twice, tiny_tokenizer(), shortly(), on_step=count)
    endless = tiny_tokenizer()
    endless.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"no end token '\[SEP\]'"):
        ht.train(attachment, task, endless, shortly(), on_step=count)
    assert steps == 0
