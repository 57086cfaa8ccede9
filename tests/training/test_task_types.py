from __future__ import annotations

from datasets import DatasetDict

import hadamard_toolkit as ht
from hadamard_toolkit.tasks.base import Task
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer


def test_a_pair_is_learned_from_its_second_text_too() -> None:
    said = {
        name: rows.add_column("before", ["it was so"] * len(rows))
        for name, rows in tiny_task(train=128, test=60).splits.items()
    }
    task = Task("pairs", DatasetDict(said), ("before", "text"), "classification", ("bad", "good"), "accuracy")
    protocol = Protocol(
        learning_rate=5e-2, epochs=8, head_learning_rate=2e-2, head_epochs=6, batch_size=16, max_length=24
    )
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    outcome = train(ht.attach(model, ht.Hadamard()), task, tiny_tokenizer(), protocol)
    assert outcome.metrics["test"]["accuracy"] > 0.75  # the first text says nothing, and alone gives 0.5
