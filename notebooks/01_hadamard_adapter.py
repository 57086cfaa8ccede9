# %% [markdown]
# # The Hadamard adapter: what do its two stages learn?
#
# The Hadamard adapter (Chen et al. 2023) multiplies and shifts each self-attention output, coordinate by coordinate:
#
# $$A'_{ij} = W_j\,A_{ij} + b_j .$$
#
# It trains 0.033 % of BERT-base, in two stages: first the classification head on the frozen backbone, then, with that head
# frozen, $W$, $b$ and the LayerNorm behind them. Is that better than the head alone? Better than the norms alone, which are
# most of the same parameters? How far from training everything? Each question needs its own row, so every table here has four
# methods: **HeadOnly**, **LayerNormTuning**, **Hadamard** and **FullFineTuning**.

# %%
import os
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformers import BertConfig

import hadamard_toolkit as ht

profile = os.environ.get("HADAMARD_PROFILE", "smoke")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"profile: {profile}, device: {device}")

# %% [markdown]
# ## What it costs
#
# Counted on BERT-base from its configuration alone (the meta device holds shapes, no weights), heads left out. The paper's
# 0.033 % is the adapter with *one* LayerNorm per layer on all 12 layers, its 0.022 % the same on 8 of 12.

# %% tags=["nbval-check-output"]
variants = {
    "Hadamard, no norm": ht.Hadamard(norm=None),
    "Hadamard (the default: attention norm)": ht.Hadamard(),
    "Hadamard on 8 of 12 layers": ht.Hadamard(layers=tuple(range(4, 12))),
    "Hadamard, both norms": ht.Hadamard(norm="both"),
    "LayerNormTuning, attention norm": ht.LayerNormTuning(),
    "FullFineTuning": ht.FullFineTuning(),
}
rows = []
for name, adapter in variants.items():
    with torch.device("meta"):
        bert = ht.backbone_from_config(BertConfig())
    total = sum(parameter.numel() for parameter in bert.base_model.parameters())
    trained = ht.attach(bert, adapter).count().drop(index="head")["trained"].sum()
    rows.append({"method": name, "trained": f"{trained:,}", "% of the backbone": f"{100 * trained / total:.4f}"})
pd.DataFrame(rows).set_index("method")

# %% [markdown]
# ## Where it sits
#
# `placement="attention_output"` (the default) is behind the output projection $W_O$, `"attention_heads"` in front of it. In front,
# $W$ is the value scaling of (IA)³ and $b$ the value bias of BitFit; behind, $b$ is BitFit's output bias. Either way it is linear
# and merges. One more consequence of the algebra: behind $W_O$ comes a residual sum and a LayerNorm, which subtracts the
# mean, so a constant added to all of $b$ changes nothing. Studies of $b$ must project that direction out.

# %% tags=["nbval-check-output"]
model, tokenizer = ht.load_backbone("minilm-l6")
inputs = tokenizer(["It works.", "Does it, though?"], padding=True, return_tensors="pt")
for placement in ("attention_output", "attention_heads"):
    attachment = ht.attach(model, ht.Hadamard(placement=placement, norm=None))
    with torch.no_grad():
        for name, vector in attachment.named_parameters("adapter").items():
            vector.add_(torch.linspace(-0.1, 0.1, vector.numel()) if name.endswith("weight") else 0.3)
        attached = model(**inputs).logits
        merged = attachment.merge()(**inputs).logits
    attachment.detach()
    print(f"{placement:>16}: merged = unmerged within 1e-5: {torch.allclose(attached, merged, atol=1e-5)}")

# %% [markdown]
# ## Train it
#
# Three tasks of different kinds: polarity of tweets (two classes), intensity of product reviews (regression), and whether sentence
# B follows A in an editorial or a review (pairs). In the smoke profile these runs are small and short: they show that the
# machinery works, **not** how good a method is; for that see the reference runs below.
#
# All methods share the protocol; only the head policy of full fine-tuning differs (head and backbone together, at a smaller
# learning rate), as nobody trains it in two stages.

# %%
tasks = ["embedded/tweets-polarity", "embedded/products-intensity", "embedded/next-sentence"]
two_stages = ht.protocols.hadamard(train_rows=1000) if profile == "paper" else ht.protocols.smoke()
one_stage = ht.protocols.full_fine_tuning(**({"train_rows": 1000} if profile == "paper" else ht.protocols.SMOKE))
methods = {
    ht.HeadOnly(): two_stages,
    ht.LayerNormTuning(): two_stages,
    ht.Hadamard(): two_stages,
    ht.FullFineTuning(): one_stage,
}
specs = [
    ht.RunSpec("minilm-l6", task, adapter, protocol, seed=seed)
    for task in tasks
    for adapter, protocol in methods.items()
    for seed in (range(3) if profile == "paper" else range(1))
]
store = ht.RunStore(os.environ.get("HADAMARD_STORE") or tempfile.mkdtemp())
ht.sweep(specs, store)
runs = store.load()
headline = runs[runs["headline"] & (runs["split"] == "test")]
headline.pivot_table(index="task", columns="method", values="value")[[type(a).__name__ for a in methods]].round(2)
