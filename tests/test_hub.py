"""The hub's road, on a stand-in that runs on this machine: a backbone and a GLUE task by their hub ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.architectures import tiny_config
from tests.hub_stand_in import REVISION, hub

VISITOR = '''
import json, os, shutil
from pathlib import Path
from hadamard_toolkit.backbones import backbone_provenance, load_backbone
from hadamard_toolkit.errors import ToolkitError
from hadamard_toolkit.runs.prepared import prepare, use_prepared
from hadamard_toolkit.tasks import load_task

model, tokenizer = load_backbone("someone/tiny", labels=3)
said = {
    "labels": model.num_labels,
    "embedding": model.get_input_embeddings().weight.detach().double().sum().item(),
    "ids": tokenizer("a")["input_ids"],
    "provenance": backbone_provenance("someone/tiny"),
    "errors": {},
}
for name in ("someone/pickled", "someone/absent", "someone/wordless"):
    try:
        load_backbone(name)
    except ToolkitError as error:
        said["errors"][name] = f"{type(error).__name__}: {error}"
task = load_task("mrpc", root=None)
said["rows"] = {split: rows.num_rows for split, rows in task.splits.items()}
said["first"] = task.splits["test"][0]
said["task"] = task.provenance
try:
    load_task("rte")
except ToolkitError as error:
    said["errors"]["rte"] = f"{type(error).__name__}: {error}"

# A plan of hub ids, prepared and then used without the hub's cache.
plan = Path(os.environ["HF_HOME"]).parent / "plan.toml"
plan.write_text("""[[grid]]
backbone = "someone/tiny"
tasks = ["mrpc"]
adapters = ["Hadamard()"]
protocol = "smoke"
""")
folder = plan.with_name("prepared")
said["files"] = prepare(plan, folder)["file"].tolist()
shutil.rmtree(os.environ["HF_HOME"])
use_prepared(folder / "plan.toml")
again, words = load_backbone("someone/tiny", labels=3)
copy = load_task("mrpc")
said["again"] = {
    "embedding": again.get_input_embeddings().weight.detach().double().sum().item(),
    "ids": words("a")["input_ids"],
    "provenance": backbone_provenance("someone/tiny"),
    "task": copy.provenance,
    "first": copy.splits["test"][0],
    "same rows": copy.content() == task.content(),
    "asked": os.path.exists(os.environ["HF_HOME"]),
}
print(json.dumps(said))
'''


def _model_repository(folder: Path) -> float:
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("bert"))
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return float(model.get_input_embeddings().weight.detach().double().sum())


def _glue_repository(folder: Path) -> None:
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        (folder / "mrpc").mkdir(parents=True, exist_ok=True)
        label = [-1] * count if split == "test" else [i % 2 for i in range(count)]
        texts = [f"{split} {i}" for i in range(count)]
        columns = {
            "sentence1": texts,
            "sentence2": texts,
            "label": label,
            "idx": pa.array(range(count), pa.int32()),
        }
        pq.write_table(pa.table(columns), folder / "mrpc" / f"{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"mrpc/{s}-*"} for s in ("train", "validation", "test")]
    header = json.dumps({"configs": [{"config_name": "mrpc", "data_files": files}]})  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{header}\n---\n")


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str], float]:
    """What a process says that met only the stand-in: its findings, the requests, the sum of the model's embeddings."""
    folder = tmp_path_factory.mktemp("hub")
    total = _model_repository(folder / "someone" / "tiny")
    (folder / "someone" / "pickled").mkdir()
    (folder / "someone" / "pickled" / "config.json").write_bytes(
        (folder / "someone" / "tiny" / "config.json").read_bytes()
    )
    (folder / "someone" / "pickled" / "pytorch_model.bin").write_bytes(b"never opened")
    _model_repository(folder / "someone" / "wordless")
    (folder / "someone" / "wordless" / "tokenizer.json").unlink()
    _glue_repository(folder / "nyu-mll" / "glue")
    with hub(folder) as (endpoint, seen):
        home = tmp_path_factory.mktemp("home") / "cache"
        offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
        environment = {key: value for key, value in os.environ.items() if key not in offline}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HADAMARD_DATA": str(home / "nothing"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        finished = subprocess.run(
            [sys.executable, "-c", VISITOR],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr + "\n".join(seen)
    return json.loads(finished.stdout.splitlines()[-1]), seen, total


def test_backbone_by_hub_id(visit: tuple[dict, list[str], float]) -> None:
    said, seen, total = visit
    assert said["labels"] == 3
    assert said["embedding"] == pytest.approx(total, abs=1e-9)
    assert said["ids"] == [3]
    assert "GET /someone/tiny/resolve/main/model.safetensors" in " ".join(seen).replace(REVISION, "main")
    assert said["provenance"]["source"] == "hub"
    assert said["provenance"]["revision"] == REVISION
    assert set(said["provenance"]["sha256"]) == {"model.safetensors"}


def test_hub_weights_that_would_need_unpickling_are_refused(visit: tuple[dict, list[str], float]) -> None:
    said, seen, _ = visit
    assert said["errors"]["someone/pickled"].startswith("DataError: backbone 'someone/pickled'")
    assert "safetensors" in said["errors"]["someone/pickled"]
    assert not [request for request in seen if request.startswith("GET") and "pytorch_model.bin" in request]


def test_a_hub_id_without_its_tokenizer_is_refused(visit: tuple[dict, list[str], float]) -> None:
    error = visit[0]["errors"]["someone/wordless"]
    assert error.startswith("DataError: backbone 'someone/wordless' has no ")
    assert "tokenizer" in error
    assert "tokenizer.json" in error


def test_a_hub_id_that_does_not_exist_is_refused(visit: tuple[dict, list[str], float]) -> None:
    error = visit[0]["errors"]["someone/absent"]
    assert error.startswith("ArgumentError: name='someone/absent' is not allowed")
    assert "'minilm-l6', 'mpnet-base'" in error


def test_glue_from_the_hub(visit: tuple[dict, list[str], float]) -> None:
    said, seen, _ = visit
    assert said["rows"] == {
        "train": 5,
        "test": 3,
    }  # the official validation rows; the unlabelled test is left alone
    assert said["first"] == {"sentence1": "validation 0", "sentence2": "validation 0", "label": 0, "idx": 0}
    assert said["task"]["source"] == "hub nyu-mll/glue"
    assert said["task"]["subset"] is True  # the stand-in has fewer rows than MRPC
    assert [file.partition("/mrpc/")[0] for file in said["task"]["files"]] == [f"nyu-mll/glue@{REVISION}"] * 2
    assert any("nyu-mll/glue" in request for request in seen)


def test_what_came_from_the_hub_can_be_prepared(visit: tuple[dict, list[str], float]) -> None:
    said, _, _ = visit
    assert f"backbones/someone%2Ftiny/{REVISION}/model.safetensors" in said["files"]
    assert {"tasks/mrpc/train.parquet", "tasks/mrpc/test.parquet", "plan.toml"} <= set(said["files"])
    again = said["again"]
    assert not again["asked"]
    assert again["same rows"]
    for fact in ("embedding", "ids", "provenance", "task", "first"):
        assert again[fact] == said[fact]


def test_a_task_in_no_place_names_every_place_tried(visit: tuple[dict, list[str], float]) -> None:
    error = visit[0]["errors"]["rte"]
    assert error.startswith("DataError: task 'rte' was not found")
    assert "HADAMARD_DATA" in error
    assert "nyu-mll/glue" in error
