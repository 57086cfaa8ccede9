# %% [markdown]
# # Quickstart: the Hadamard adapter in ten minutes
#
# A *pretrained encoder* is a stack of layers that turns a sentence into vectors. *Fine-tuning* fits all of its millions of
# weights to a task. A *parameter-efficient* method freezes them and trains a small addition instead, an *adapter*. The smallest
# one of the papers behind this toolkit is the Hadamard adapter of
# [Chen et al. (2023)](https://doi.org/10.1145/3583780.3614904): two vectors per layer. How much does so little buy?
#
# This tour trains it on real text, looks at what it costs and what it gains, folds it into the backbone and keeps a record of
# the run. In the `smoke` profile everything runs on a CPU in seconds, on a few hundred rows: that shows how the toolkit works,
# and is no result. With `HADAMARD_PROFILE=paper` the same cells take the full training set, on a GPU where there is one. The
# last section shows results, from runs that were made beforehand.

# %% tags=["runs"]
import os
import tempfile

import torch
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit.runs.working import working_store

profile = os.environ.get("HADAMARD_PROFILE", "smoke")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"profile: {profile}, device: {device}")

# %% [markdown]
# ## The idea in one picture
#
# In every layer, *self-attention* mixes the vectors of the tokens. Call its output, behind the projection $W_O$, the matrix
# $A$, with one row per token $i$ and one column per coordinate $j$. The adapter multiplies and shifts each coordinate:
#
# $$A'_{ij} = W_j\,A_{ij} + b_j, \qquad\text{or}\qquad A' = W \odot A + b,$$
#
# where $\odot$ is the elementwise (Hadamard) product. At the start $W = 1$ and $b = 0$, so the adapted model *is* the pretrained
# model until training moves it. The LayerNorm that follows trains too; everything else stays frozen. The drawing shows one
# layer, and where in it the adapter sits.

# %%
ht.plotting.sites(ht.Hadamard())

# %% [markdown]
# ## A task and a backbone
#
# `ht.load_task` knows the eight GLUE tasks (from a local folder or the hub) and an *embedded suite* that needs neither: sentences
# of four domains whose sentiment people have rated (Hutto and Gilbert 2014). Here the question is whether a tweet is positive or
# negative.

# %% tags=["nbval-check-output"]
task = ht.load_task("embedded/tweets-polarity")
print({split: len(rows) for split, rows in task.splits.items()}, "| metric:", task.metric)
task.splits["train"].select_columns(["text", "label"]).select(range(3)).to_pandas()

# %% [markdown]
# The backbone is a plain `transformers` model with a fresh classification *head*, the linear layer that turns the first token's
# vector into one number per class. `minilm-l6` has six layers of width 384; its weights are pinned by checksum, and the head's
# first weights come from the seed.

# %%
model, tokenizer = ht.load_backbone("minilm-l6", labels=task.n_labels, seed=0)
print(type(model).__name__, f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Attach
#
# `ht.attach` freezes the backbone and puts the adapter at its sites. Two claims from above can be checked at once: the outputs are
# the same to the last bit, and few parameters train. They are counted three times, by *role*: what trains, what a saved file
# holds, and what no sparsity mask forces to zero (all of it here; masks are the subject of
# [notebook 04](04_sparse_adapters.ipynb)). Rows of roles that this adapter does not have are left out.

# %% tags=["nbval-check-output"]
batch = tokenizer(["What a day!", "I have seen better films."], padding=True, return_tensors="pt")
with torch.no_grad():
    before = model(**batch).logits
    attachment = ht.attach(model, ht.Hadamard())
    print("identity at the start:", torch.equal(model(**batch).logits, before))
counts = attachment.count().query("stored > 0")
counts

# %% tags=["nbval-check-output"]
backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
trained = counts.drop(index="head")["trained"].sum()
Markdown(
    f"Without the head, **{trained:,} of {backbone:,}** parameters train: {100 * trained / backbone:.4f} %."
)

# %% [markdown]
# The paper's 0.033 % is the same sum for BERT-base, a backbone twice as deep and twice as wide
# ([notebook 01](01_hadamard_adapter.ipynb) counts it).
#
# ## Train in two stages
#
# Stage one trains the head alone. The backbone does not change meanwhile, so its output vectors are computed once and reused.
# Stage two freezes the head and trains the vectors and the norms. After each epoch the model is scored on rows that were held out of
# the training split, and the best epoch is kept; the test rows are read once, at the end.

# %% tags=["runs"]
protocol = ht.protocols.hadamard() if profile == "paper" else ht.protocols.smoke(train_rows=256, epochs=4)

# %%
outcome = ht.train(attachment, task, tokenizer, protocol, seed=0)
{name: round(value, 2) for name, value in outcome.metrics["test"].items()}

# %% [markdown]
# How much of this is the adapter's, and how much is the head's? Within `attachment.enabled(False)` the model is the bare backbone
# again, under the same trained head. Both are scored on the very test rows that `ht.train` has scored.

# %%
rows = task.splits["test"].select(outcome.rows["test"])
options = {"padding": True, "truncation": True, "max_length": protocol.max_length, "return_tensors": "pt"}
inputs = tokenizer(list(rows["text"]), **options).to(model.device)
labels = torch.tensor(list(rows["label"]), device=model.device)
model.eval()
with torch.no_grad():
    unmerged = model(**inputs).logits
    with attachment.enabled(False):
        bare = model(**inputs).logits
share = [float((logits.argmax(-1) == labels).float().mean()) for logits in (unmerged, bare)]
Markdown(
    f"On the same {len(rows)} test rows the accuracy is **{share[0]:.2f}** with the adapter and "
    f"**{share[1]:.2f}** without it."
)

# %% [markdown]
# ## Save, reload, merge
#
# One folder holds adapter, norms and head. And because the adapter is linear, it can be folded into the output projection $W_O$ that
# precedes it:
#
# $$W_O' = \operatorname{diag}(W)\,W_O, \qquad b_O' = W \odot b_O + b .$$
#
# What is left is a plain `transformers` model that costs nothing extra at inference.

# %% tags=["nbval-check-output"]
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    attachment.save(f"{folder}/adapter")
    fresh, _ = ht.load_backbone("minilm-l6", labels=task.n_labels, seed=1)
    ht.load_attachment(fresh, f"{folder}/adapter")
    reloaded = fresh.eval().to(model.device)(**inputs).logits
    merged = attachment.merge()(**inputs).logits
print("reloaded = trained:", torch.allclose(reloaded, unmerged, atol=1e-5))
print("merged = unmerged: ", torch.allclose(merged, unmerged, atol=1e-5))

# %% [markdown]
# `detach` takes everything off again, and leaves the model as it was, bit for bit.

# %% tags=["nbval-check-output"]
attachment.detach()
with torch.no_grad():
    print("as before:", torch.equal(model.cpu()(**batch).logits, before))

# %% [markdown]
# ## Runs and records
#
# A study needs many runs. A `RunSpec` says all there is to say about one: backbone, task, adapter, protocol and seed. Its *key*, a
# hash of all that, names the run's record in a store, and a key that is in the store is never trained again. So a sweep that was
# interrupted goes on where it stopped.

# %% tags=["runs"]
specs = [
    ht.RunSpec("minilm-l6", "embedded/tweets-polarity", adapter, protocol, seed=0)
    for adapter in (ht.HeadOnly(), ht.Hadamard())
]

# %%
store = working_store(profile)
ht.sweep(specs, store)
ht.studies.score_table(store.only(specs))[["key", "task", "method", "seed", "metric", "score", "n"]].round(2)

# %% [markdown]
# ## Numbers to read
#
# The repository holds a few hundred finished runs, the *reference runs*. `ht.reference` opens the ones of a plan. Here are those of
# this task, with 300 training rows and three seeds: the Hadamard adapter against its controls. **HeadOnly** trains nothing but
# the head, **LayerNormTuning** the norms but no vectors, **FullFineTuning** everything.

# %%
reference = ht.reference("spine", own=False)
methods = ["HeadOnly", "LayerNormTuning", "Hadamard", "FullFineTuning"]
scores = ht.studies.short_names(ht.studies.score_table(reference)).query("task == 'tweets-polarity'")
scores = ht.studies.in_order(scores, "method", methods)
ht.plotting.score_by_method(scores, metric="Accuracy")

# %% tags=["nbval-check-output"]
shown = ht.studies.mean_sd(scores, "method", times=100, digits=1)
constant = ht.studies.constant_score(reference.run(scores["key"].iloc[0]))
Markdown(
    f"**Finding.** Accuracy in per cent on {scores['n'].max()} test tweets, mean ± sd (seeds): "
    + "; ".join(f"{method} {text}" for method, text in shown.items())
    + f". One answer for all tweets would score {100 * constant:.1f}."
)

# %% [markdown]
# So two vectors per layer and the norms behind them come close to training everything, on this task, with one small backbone and
# few training rows. The standard deviation is over seeds: it covers other draws of training rows and first weights, not other
# tasks. [01_hadamard_adapter](01_hadamard_adapter.ipynb) asks the same question of nine tasks, with intervals.
