from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hadamard_toolkit as ht
from tests.training.test_loop import STILL, go, shortly
from tests.training.tiny import tiny_bert, tiny_task

WORKER = """
import json
import sys
import numpy as np
import torch
import hadamard_toolkit as ht
from hadamard_toolkit.training.loop import train
from hadamard_toolkit.training.protocol import Protocol
from tests.training.tiny import tiny_bert, tiny_task, tiny_tokenizer

attachment = ht.attach(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ht.Hadamard())
protocol = Protocol.from_dict(json.loads(sys.argv[2]))
outcome = train(attachment, tiny_task(train=78, test=37), tiny_tokenizer(), protocol)
if torch.distributed.get_rank() == 0:
    np.savez(sys.argv[1], plain="forward" not in vars(attachment.model), **outcome.predictions)
assert outcome.details["processes"] == 2
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_and_predict_as_one_does(tmp_path: Path, repository: Path) -> None:
    protocol = shortly(eval_batch_size=10, train_rows=64, validation_rows=13, schedule="constant")
    script, result = tmp_path / "worker.py", tmp_path / "two.npz"
    script.write_text(WORKER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(result), json.dumps(protocol.to_dict())),
        ],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = np.load(result)
    attachment = ht.attach(tiny_bert(**STILL), ht.Hadamard())
    one = go(attachment, tiny_task(train=78, test=37), protocol).predictions
    assert two["plain"]  # accelerate left no patch on the model
    for name in ("validation", "test"):
        assert np.ptp(one[name], axis=0).min() > 0.1
        assert np.abs(one[name] - two[name]).max() < 1e-3
