# %% [markdown]
# # Quickstart: the Hadamard adapter in ten minutes
#
# A pretrained encoder, a task, two vectors per layer. This tour trains the Hadamard adapter of
# [Chen et al. (2023)](https://doi.org/10.1145/3583780.3614904) on real text, looks at what it costs and what it gains, folds it
# into the backbone and keeps a record of the run. Everything runs on a CPU in seconds in the `smoke` profile; with
# `HADAMARD_PROFILE=paper` the same cells take the full training set, on a GPU where there is one.

# %% tags=["runs"]
import os

import torch

import hadamard_toolkit as ht
from hadamard_toolkit.runs.working import working_store

profile = os.environ.get("HADAMARD_PROFILE", "smoke")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"profile: {profile}, device: {device}")

# %% [markdown]
# ## A task and a backbone
#
# `ht.load_task` knows the eight GLUE tasks (local folder or hub) and an *embedded suite* that needs neither: sentences of
# four domains that people rated for sentiment (Hutto and Gilbert 2014). Here: is a tweet positive or negative?

# %% tags=["nbval-check-output"]
task = ht.load_task("embedded/tweets-polarity")
print(task.name, "|", task.kind, "|", " or ".join(task.labels), "| headline metric:", task.metric)
print({split: len(rows) for split, rows in task.splits.items()})
for row in task.splits["train"].select(range(3)):
    print(f"{task.labels[row['label']]:>8}: {row['text']}")

# %% [markdown]
# The backbone is a plain `transformers` model with a fresh classification head, seeded. `minilm-l6` has six layers of
# width 384; its weights are pinned by checksum.

# %%
model, tokenizer = ht.load_backbone("minilm-l6", labels=task.n_labels, seed=0)
print(type(model).__name__, f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Attach
#
# In every layer the self-attention output $A$ becomes
#
# $$A' = W \odot A + b,$$
#
# with one weight and one bias per coordinate, $W = 1$ and $b = 0$ at the start, so that the attached model *is* the base model
# until training moves it. The LayerNorm behind it trains too; everything else is frozen.

# %% tags=["nbval-check-output"]
batch = tokenizer(["What a day!", "I have seen better films."], padding=True, return_tensors="pt")
with torch.no_grad():
    before = model(**batch).logits
attachment = ht.attach(model, ht.Hadamard())
with torch.no_grad():
    print("identity at the start:", torch.equal(model(**batch).logits, before))
attachment.count()

# %% [markdown]
# Three counts, always by role: what trains, what a saved file holds, and what no sparsity mask forces to zero. Without the
# head, this is the paper's share of the backbone:

# %% tags=["nbval-check-output"]
backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
trained = attachment.count().drop(index="head")["trained"].sum()
print(f"{trained:,} of {backbone:,} parameters: {100 * trained / backbone:.4f} %")

# %% [markdown]
# ## Train in two stages
#
# Stage one trains the head alone. The backbone does not change meanwhile, so its features are computed once and reused.
# Stage two freezes the head and trains the vectors and the norm. Rows to select the best epoch on are held out of the
# training split; the test split is read once, at the end.

# %% tags=["runs"]
protocol = ht.protocols.hadamard() if profile == "paper" else ht.protocols.smoke(train_rows=256, epochs=4)

# %%
outcome = ht.train(attachment, task, tokenizer, protocol, seed=0)
{name: round(value, 2) for name, value in outcome.metrics["test"].items()}

# %% [markdown]
# How much of it is the adapter's, and how much is the head's? `enabled(False)` gives the bare backbone back for a moment.

# %%
rows = task.splits["test"].select(range(96))
inputs = tokenizer(list(rows["text"]), padding=True, truncation=True, return_tensors="pt").to(model.device)
labels = torch.tensor(list(rows["label"]), device=model.device)
model.eval()


def accuracy() -> float:
    with torch.no_grad():
        return (model(**inputs).logits.argmax(-1) == labels).float().mean().item()


with_adapter = accuracy()
with attachment.enabled(False):
    without = accuracy()
print(f"accuracy on {len(rows)} test rows: {without:.2f} without the adapter, {with_adapter:.2f} with it")

# %% [markdown]
# ## Save, reload, merge
#
# One folder holds adapter, norm and head. Because the adapter is linear it folds into the output projection,
# $W_O' = \operatorname{diag}(W)\,W_O$ and $b_O' = W \odot b_O + b$, and leaves a plain `transformers` model.

# %% tags=["nbval-check-output"]
import tempfile

with torch.no_grad():
    unmerged = model(**inputs).logits
    with tempfile.TemporaryDirectory() as folder:
        attachment.save(f"{folder}/adapter")
        fresh, _ = ht.load_backbone("minilm-l6", labels=task.n_labels, seed=1)
        ht.load_attachment(fresh, f"{folder}/adapter")
        reloaded = fresh.eval().to(model.device)(**inputs).logits
    merged = attachment.merge()(**inputs).logits
print("reloaded = trained:", torch.allclose(reloaded, unmerged, atol=1e-5))
print("merged = unmerged: ", torch.allclose(merged, unmerged, atol=1e-5))

# %% [markdown]
# `detach` takes everything off again, bit for bit.

# %% tags=["nbval-check-output"]
attachment.detach()
with torch.no_grad():
    print("as before:", torch.equal(model.cpu()(**batch).logits, before))

# %% [markdown]
# ## Runs and records
#
# For studies one wants many runs. A `RunSpec` says all there is to say about one, its key names its folder, and a key that
# is in the store is never trained again.

# %% tags=["runs"]
specs = [
    ht.RunSpec("minilm-l6", "embedded/tweets-polarity", adapter, protocol, seed=0)
    for adapter in (ht.HeadOnly(), ht.Hadamard())
]

# %%
store = working_store(profile)
ht.sweep(specs, store)
table = store.only(specs).load()
table[table["headline"] & (table["split"] == "test")][
    ["key", "task", "method", "seed", "metric", "value"]
].round(2)

# %% [markdown]
# Next: [01_hadamard_adapter](01_hadamard_adapter.ipynb) compares the two stages with the head alone, the norms alone and full
# fine-tuning, and looks at what the vectors learned.
