# %% [markdown]
# # The adapter zoo: what does a parameter buy?
#
# Every method of this library changes a frozen encoder in a few places and trains that change. The methods differ in *where* they
# sit, in *what* they compute there, and in how much they train: from a few thousand numbers to all of them. If one parameter were
# as good as another, a method that trains a hundred times as many would score higher in proportion. This notebook puts all
# methods on one model, counts what they cost, and draws score against trained parameters.
#
# In the `smoke` profile each method sees a few dozen tweets, twice. That shows that all of them train; **those scores mean
# nothing**, and no sentence below draws a conclusion from them. The scores that are drawn come from *reference runs* on SST-2, made
# beforehand with 1,000 training rows. `HADAMARD_PROFILE=paper` runs the cells on tweets at full size.

# %% tags=["runs"]
import os
from dataclasses import replace

import torch
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit.runs.working import working_store

profile = os.environ.get("HADAMARD_PROFILE", "smoke")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"profile: {profile}, device: {device}")

# %% [markdown]
# ## Where they sit and what they compute
#
# One layer of an encoder reads $x$, computes queries, keys and values, $Q = W_Q x$ and so on, lets the attention heads mix them,
# projects with $W_O$, adds the input again (the *residual*) and applies a LayerNorm. Then comes the feed-forward block
# $W_2\,\gamma(W_1 x)$, with residual and LayerNorm again. The drawing names the *sites* of a layer, the places where the library
# can insert something.

# %%
ht.plotting.sites()

# %% [markdown]
# Each method is a choice of sites and a formula. With $h$ for what a site would pass on unchanged:
#
# | method | at | computes |
# | --- | --- | --- |
# | HeadOnly | nowhere | $h$: the control of every table |
# | FullFineTuning | every weight | $\theta + \Delta\theta$ |
# | BitFit | every bias | $b + \Delta b$ |
# | LayerNormTuning | the attention LayerNorm | gain $+\,\Delta$, bias $+\,\Delta$ |
# | Hadamard | behind $W_O$, and its LayerNorm | $W \odot h + b$ |
# | IA3 | keys, values, feed-forward activations | $l \odot h$ |
# | LoRA | queries and values | $h + \frac{\alpha}{r} B A x$ |
# | Houlsby | behind both blocks | $h + U\,\sigma(D h)$ |
# | Pfeiffer | behind the feed-forward block | $h + U\,\sigma(D\,\mathrm{LN}(h))$, and LN once more |
# | ParallelAdapter | beside the feed-forward block | $h + s\,U\,\sigma(D x)$ |
# | PrefixTuning | keys and values | $[P_K; K],\ [P_V; V]$ |
# | PromptTuning | behind the first token's embedding | $[e_1; P; e_2 \dots e_n]$ |
# | MAM | as prefixes and the parallel adapter | both |
# | UniPELT | as Pfeiffer, prefixes and LoRA | each times a gate $g = \overline{\sigma(w \cdot x)}$ |
# | AdapterFusion | as Pfeiffer | $h + \sum_t \mathrm{softmax}_t(Q x \cdot K z_t)\,V z_t$ over adapters $z_t$ of other tasks |
#
# Here $\odot$ is the elementwise product, $A$ and $B$ are thin matrices whose product has rank $r$, and $D$ and $U$ project *down* to
# a narrow *bottleneck* and *up* again. Biases inside the bottlenecks are left out of the formulas. A table of its own says
# [which of them runs on which architecture](../docs/support.md). All methods have the library's defaults throughout. Those of MAM
# are its paper's for summarisation; the paper's GLUE runs are smaller (16 prefixes, width 16).
#
# Grouped into families, with one learning rate for each: a vector that starts at 1 and a whole backbone cannot share a rate. These
# rates are customary, not the result of a search. The library registers one more class, `Stack(a, b, …)`, which puts several of
# them on one model.

# %% tags=["runs"]
SOURCES = ("embedded/movies-polarity", "embedded/products-polarity")
FAMILIES = {
    "control": (1e-2, [ht.HeadOnly()]),
    "own weights": (2e-3, [ht.LayerNormTuning(), ht.BitFit()]),
    "everything": (5e-5, [ht.FullFineTuning()]),
    "vectors": (5e-3, [ht.Hadamard(), ht.IA3()]),
    "low rank": (1e-3, [ht.LoRA()]),
    "bottleneck": (1e-3, [ht.Houlsby(), ht.Pfeiffer(), ht.ParallelAdapter()]),
    "prompts": (5e-3, [ht.PrefixTuning(), ht.PromptTuning()]),
    "combined": (1e-3, [ht.MAM(), ht.UniPELT(), ht.AdapterFusion(tasks=SOURCES)]),
}
zoo = {type(adapter).__name__: adapter for _, adapters in FAMILIES.values() for adapter in adapters}

# %% [markdown]
# ## What they cost: three counts
#
# *Trained* is what the optimiser moves, *stored* is what a saved file holds, *nonzero* is what no sparsity mask forces to zero. They
# differ where the method does. A prefix is trained through a network that is folded away before it is stored. A fusion stores the
# frozen adapters that it attends over. Without masks, stored and nonzero agree. The head is left out of all three. MiniLM, the
# backbone, has 22.7 million parameters in 6 layers of width 384.

# %% tags=["nbval-check-output"]
model, tokenizer = ht.load_backbone("minilm-l6")
counts = ht.parameter_counts(zoo, model.config)
ht.studies.as_text(counts[["trained", "stored", "nonzero", "% trained"]])

# %% [markdown]
# ## What they cost later: which of them merge
#
# A method that is linear where it sits can be folded into the weights behind it, and then costs nothing at inference. In exact
# arithmetic nothing changes; in floating point the folded weights are rounded once more. Parameters are moved at random here, so that
# there is something to fold, and the last hidden states are compared before and after. The others refuse, and say why. The last row is
# a stack: it merges if each of its parts does. In a stack the order matters where two parts share a site, since
# $W \odot (h + BAx) + b$ is not $(W \odot h + b) + BAx$.

# %% tags=["nbval-check-output"]
inputs = tokenizer(["What a day!", "I have seen better films, and worse."], padding=True, return_tensors="pt")
generator, merging = torch.Generator().manual_seed(0), {}
for name, adapter in {**zoo, "a stack": ht.Stack(ht.LoRA(), ht.IA3(), ht.Hadamard())}.items():
    attachment = ht.attach(model, adapter)
    with torch.no_grad():
        for parameter in attachment.parameters("adapter"):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        before = model.base_model(**inputs).last_hidden_state
        try:
            attachment.merge()
            same = torch.allclose(model.base_model(**inputs).last_hidden_state, before, atol=1e-4)
            merging[name] = f"merges; every state within 1e-4: {same}"
        except ht.UnsupportedError as error:
            merging[name] = str(error)
    attachment.detach()
for name, words in merging.items():
    print(f"{name:>15}: {words}")

# %% [markdown]
# What leaves the library need not merge: LoRA, (IA)³, LayerNorm tuning, prompts and Hadamard adapters go to stock `peft` with
# `ht.export_peft`, as a folder of its own format, and come back with `ht.import_peft`.
#
# ## One protocol
#
# One stage, head and adapter together, the same rows, batches and epochs. Two rows step out of line on purpose: the Hadamard adapter
# once more in its own two stages (first the head, then the adapter), and AdapterFusion, which needs adapters of other tasks first. So
# the sweep trains a Pfeiffer adapter for each of the two tasks that the fusion names, each as a run of its own. The smoke
# profile's larger steps were set by eye, so that something moves within a few dozen of them: one more reason not to read its scores.

# %% tags=["runs"]
TASK, paper = "embedded/tweets-polarity", profile == "paper"
tiny = {
    "batch_size": 4,
    "max_length": 24,
    "epochs": 2,
    "train_rows": 96,
    "validation_rows": 24,
    "test_rows": 40,
}
sizes = {"batch_size": 16, "max_length": 128, "epochs": 10} if paper else tiny
protocol = ht.Protocol(head="trained", weight_decay=0.0, warmup=0.1, **sizes)
pace = 1 if paper else 4
methods = {
    type(adapter).__name__: (adapter, replace(protocol, learning_rate=pace * rate))
    for rate, adapters in FAMILIES.values()
    for adapter in adapters
}
stages = {"head_learning_rate": 2e-2, "head_epochs": 30}
two_stages = replace(methods["Hadamard"][1], head="first-then-frozen", **stages)
methods["Hadamard, two stages"] = (ht.Hadamard(), two_stages)
specs = {
    (name, seed): ht.RunSpec("minilm-l6", TASK, adapter, how, seed=seed)
    for name, (adapter, how) in methods.items()
    for seed in (range(3) if paper else range(1))
}

# %%
store = working_store(profile)
sweep = ht.sweep(specs.values(), store).assign(method=[name for name, _ in specs])
assert sweep["score"].notna().all(), sweep["reason"].tolist()
ht.studies.mean_sd(sweep, "method").to_frame("accuracy on a few tweets: mean ± sd (seeds)")

# %% [markdown]
# ## Scores worth reading
#
# Now SST-2 with 1,000 training rows, four epochs, the epoch selected on 150 held-out rows, and the official development set as test.
# These runs are in the reference store, from the plans `glue.toml` and `zoo.toml`.
#
# First the learning rates, for a comparison at one rate compares rates. Each method got the same budget: three rates on each of two
# tasks, 300 rows, one seed. The table shows the mean score on *held-out* rows; the best rate of each row is the one that is used.
# Where it lies at an edge of what was tried, a wider search might have found a better one.

# %% tags=["nbval-check-output"]
rates = ht.studies.rates_tried(ht.reference("rates", own=False))
rates["tried"] = [f"{rate:g}" for rate in rates["rate"]]
ht.studies.as_text(rates.sort_values("rate").pivot_table("score", "method", "tried", sort=False))

# %% tags=["nbval-check-output"]
edge = list(rates.query("best and edge")["method"])
Markdown(
    f"For {len(edge)} of {rates['method'].nunique()} methods the best rate is at an edge of the three that "
    f"were tried ({ht.studies.listed(edge)}): none of these is known to be tuned to the end."
)

# %% [markdown]
# With these rates, the score of each method against its number of trained parameters. The grey staircase is the best score that so
# many parameters, or fewer, have reached. If parameters bought accuracy, it would climb all the way.

# %%
costs = ht.studies.method_scores(ht.reference("glue", "zoo", own=False)).query("task == 'sst2'")
ht.plotting.score_against_parameters(costs, metric="Accuracy")

# %% tags=["nbval-check-output"]
ranked = costs.sort_values("score", ascending=False)
scores = ht.studies.mean_sd(ranked, "method", times=100, digits=1)
missing = ht.studies.listed(sorted(set(zoo) - set(scores.index)))
print(f"accuracy in % on {costs['n'].max()} development rows (runs); no runs of: {missing}")
scores.to_frame("accuracy")

# %% [markdown]
# ## What this shows, and what it does not

# %% tags=["nbval-check-output"]
paid = counts[counts["trained"] > 0]
best = costs[costs["parameters"] > 0].sort_values("score").groupby(costs["parameters"] < 22_713)
least, most = best.last().loc[True], best.last().loc[False]
spread = paid["trained"].max() / paid["trained"].min()
times, points = most["parameters"] / least["parameters"], 100 * (most["score"] - least["score"])
Markdown(
    f"**Finding.** The methods train from {paid['trained'].min():,} ({paid['trained'].idxmin()}) to "
    f"{paid['trained'].max():,} parameters ({paid['trained'].idxmax()}), a factor of {spread:,.0f}, and "
    f"{(paid['% trained'] < 1).sum()} of {len(paid)} train less than 1 % of the backbone. On SST-2 with "
    f"1,000 rows the best of those that train less than 0.1 % is {least['method']} with "
    f"{100 * least['score']:.1f} %, and the best of the others is {most['method']} with "
    f"{100 * most['score']:.1f} %: a factor of "
    f"{times:,.0f} in parameters for {points:.1f} points."
)

# %% [markdown]
# A count is exact; a score is not. These are one task, one backbone and one seed per method, so no spread is known, and on 872 rows a
# difference of two or three points between two methods is within what other rows would give. The rates come from a small
# search with the same budget for each, which favours methods that forgive a wrong rate. Methods that were not run say so above.
