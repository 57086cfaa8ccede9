# %% [markdown]
# # Sparse adapters: does pruning at initialisation cost anything, and does the scorer matter?
#
# SparseAdapter ([He et al. 2022](https://aclanthology.org/2022.findings-emnlp.160/)) removes a share $s$ of an adapter's weights
# *before* training and trains what is left. Its abstract claims that sparse adapters hold their own up to $s = 80\,\%$, and that
# a wider and sparser adapter of the same budget, *Large-Sparse*, beats full fine-tuning. Two questions decide what that means:
#
# 1. Does pruning cost anything? Compare with the adapter unpruned, **and** with a dense one as small as what is left.
# 2. Does the *scorer* matter, the rule that says which weights go? Or only how many weights stay in which tensor? Compare each mask
#    with its shuffled self. For whole networks, Frankle et al. (2021) found that shuffling a mask within its tensors costs nothing:
#    the scores then say *how many* weights a tensor needs, not *which*. SparseAdapter does not report this control.
#
# One remark on words: `sparsity` is the share **removed** here, as in the paper. In the paper's code the option of that name is the
# share kept. Scores agree with that code to six digits of their cosine for one round and batches of one size. Four definitions
# differ: with several rounds, what was removed stays removed here and may come back there; a smaller last batch weighs as much
# as the others there; scores are float32 here and under fp16 autocast there; and their threshold rounds up and takes all ties,
# where exactly the share asked for goes here.

# %% tags=["runs"]
import os

import pandas as pd
import torch
from IPython.display import Markdown
from transformers import BertConfig

import hadamard_toolkit as ht
from hadamard_toolkit.runs.working import working_store

profile = os.environ.get("HADAMARD_PROFILE", "smoke")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"profile: {profile}, device: {device}")

# %% [markdown]
# ## The idea in one picture
#
# A bottleneck adapter projects the states down to a few coordinates with a matrix $D$ and up again with $U$. Pruning sets most
# entries of $D$ and $U$ to zero and keeps them there. The picture shows the answer that we will arrive at: accuracy against the
# share removed, as the difference to the unpruned adapter of the same seed (the grey line). It stands on *reference runs* that were
# made beforehand with a Pfeiffer adapter, 320 training rows and the epoch selected on held-out rows. Filled marks are the six scorers,
# hollow ones controls.

# %%
sparse = ht.studies.short_names(ht.studies.sparse_table(ht.reference("sparse", own=False)))
ht.plotting.score_against_sparsity(sparse, metric="Accuracy")

# %% [markdown]
# ## Six scores
#
# Entries with the lowest scores go. With $\theta$ the weights that may be pruned, $m$ the mask as a factor of them, and $L$ the mean
# loss over a few hundred training examples (evaluation mode, float32):
#
# | scorer | score of entry $i$ | looks at |
# | --- | --- | --- |
# | `random` | $\varepsilon_i \sim \mathcal N(0, 1)$ | nothing |
# | `erdos-renyi` | random within a tensor; tensor density $\propto \frac{n_\text{in} + n_\text{out}}{n_\text{in}\, n_\text{out}}$, at most 1 | shapes |
# | `magnitude` | $\lvert\theta_i\rvert$ | initial weights |
# | `synflow` | $\lvert\theta_i\, \partial R / \partial\theta_i\rvert$, $R$ = what the adapter makes of an all-ones input with weights $\lvert\theta\rvert$ | initial weights |
# | `snip` | $\lvert\partial L/\partial m_i\rvert = \lvert\theta_i\, \partial L/\partial\theta_i\rvert$ | weights and data |
# | `grasp` | $\theta_i\,(Hg)_i$ with $g = \partial L/\partial\theta$ and $H$ the Hessian; signed, the largest stay | weights and data |
#
# (Lee et al. 2019 for SNIP, Wang et al. 2020 for GraSP, Tanaka et al. 2020 for SynFlow, Mocanu et al. 2018 for Erdős–Rényi.)
# An adapter repeats one shape in every layer, so here Erdős–Rényi is random pruning with equal densities, and differs from
# `random` by sampling noise alone. Two of the six, then, are nulls by construction. The scope is global: one threshold for all tensors.
#
# ## The guard
#
# Most libraries start an adapter as the identity, with a zero up-projection. Then $\theta_i = 0$ on one side and, since nothing
# flows back through zeros, $\partial L / \partial\theta_i = 0$ on the other: **every** SNIP score is zero, and a mask would follow
# the order of the entries in memory. This is refused, with a message that names the tensors and the cure.

# %% tags=["nbval-check-output"]
task = ht.load_task("embedded/tweets-polarity")
model, tokenizer = ht.load_backbone("minilm-l6", labels=task.n_labels)
batches = ht.draw_batches(task, tokenizer, examples=320 if profile == "paper" else 16, seed=5, max_length=32)
attachment = ht.attach(model, ht.Pfeiffer())
try:
    ht.sparsify(attachment, scorer="snip", sparsity=0.8, batches=batches)
except ValueError as error:
    print(f"{type(error).__name__}: … Cause: {str(error).partition('Cause: ')[2][:60]}…")
    print("Cure:", str(error).partition("Cure: ")[2])
attachment = attachment.detach()

# %% [markdown]
# ## Where the masks fall
#
# Hence `init="normal"` below, $\mathcal N(0, 0.02^2)$ for both projections, as in the paper's code. What may be pruned is declared by
# each method: its projections. Biases, norms, scales, prefixes and the head stay dense unless asked for (`maskable="all"`). Here are
# four adapters and all six scorers at 80 % removed. A mask must keep $N - \operatorname{round}(s N)$ of $N$ entries: ties may not
# take more, and the caps of Erdős–Rényi may not leave fewer, so all six keep the same number.

# %% tags=["runs"]
SCORERS = ("random", "erdos-renyi", "magnitude", "synflow", "snip", "grasp")
adapters = {
    "Houlsby": ht.Houlsby(bottleneck=32, init="normal"),
    "Pfeiffer": ht.Pfeiffer(init="normal"),
    "LoRA": ht.LoRA(init="normal"),
    "MAM": ht.MAM(length=16, bottleneck=16, scale=2.0, init="normal"),
}

# %%
tables = []
for name, adapter in adapters.items():
    attachment = ht.attach(model, adapter)
    for scorer in SCORERS:
        masks = ht.sparsify(attachment, scorer=scorer, sparsity=0.8, batches=batches)
        facts = {"adapter": name, "scorer": scorer, "sparsity": 0.8}
        tables.append(masks.table(by="layer").reset_index().assign(**facts))
        masks.remove()
    attachment.detach()
density = pd.concat(tables, ignore_index=True).astype({"layer": int})
caption = "Where masks fall: share kept by layer, 80 % removed"
figure = ht.plotting.density_by_layer(density)
ht.plotting.publish(figure, "sparse_density_by_layer", table=density, caption=caption, profile=None)

# %% [markdown]
# The scorers that see no data spread their masks evenly: every layer starts with the same distribution, so nothing tells layers
# apart. SNIP and GraSP see gradients, and gradients differ by layer. The least and the largest share kept of a layer, over all four
# adapters:

# %% tags=["nbval-check-output"]
spread = density.groupby("scorer", sort=False)["density"].agg(["min", "max"])
ht.studies.as_text(spread, digits=2)

# %% [markdown]
# Keep this in mind for overlaps of masks ([notebook 08](08_mask_statistics.ipynb)): two global masks that favour the same layers
# share entries for that reason alone, so an overlap must be compared with chance *given* the density of each tensor.
#
# ## Controls
#
# One call makes all of them. `shuffled` permutes a mask within its tensors. `margins` does so but keeps how many entries each row and
# each column has, so that units and hidden coordinates stay as much in favour. `random` draws afresh with the same density per
# tensor. `uniform` has the overall density in every tensor. `reinitialised` is the same mask over other initial weights. And
# `dense` is the adapter at the width that has as many weights as are kept.

# %% tags=["nbval-check-output"]
attachment = ht.attach(model, adapters["Pfeiffer"])
masks = ht.sparsify(attachment, scorer="snip", sparsity=0.8, batches=batches)
controls = ht.controls(masks, seed=0)
print("dense:", controls.pop("dense"))
rows = {}
for name, control in {"SNIP itself": masks, **controls}.items():
    shared = sum(int((control.kept[tensor] & mask).sum()) for tensor, mask in masks.kept.items())
    rows[name] = {
        "kept": control.entries - control.removed,
        "of these kept by SNIP": round(shared / (masks.entries - masks.removed), 1),
        "density per tensor the same": bool((control.table()["kept"] == masks.table()["kept"]).all()),
        "weights as before": control.init_seed == masks.init_seed,
    }
attachment.detach()
pd.DataFrame.from_dict(rows, orient="index")

# %% [markdown]
# ## Pruned stays pruned
#
# A `RunSpec` takes a `Sparsity`: scorer, share, scope, rounds, and the control to train in the mask's place. Examples for scoring
# are drawn from the rows that the run trains on, never from those it selects the epoch on. One run, here and now, on 96 rows; its
# score says nothing. But a mask is only worth its name if training cannot undo it: not through momentum, not through weight decay,
# not in the gradient. So restore the trained adapter (AdamW, decay 0.1) and look.

# %% tags=["runs"]
tiny = {"train_rows": 96, "validation_rows": 32, "test_rows": 32, "epochs": 1, "max_length": 32}
small = {} if profile == "paper" else {**tiny, "batch_size": 16, "learning_rate": 1e-3}
protocol = ht.protocols.sparse_adapter(**small)
pruning = ht.Sparsity("snip", 0.8, examples=16)
spec = ht.RunSpec("minilm-l6", "embedded/tweets-polarity", adapters["Pfeiffer"], protocol, pruning)

# %% tags=["nbval-check-output"]
store = working_store(profile)
run = ht.run(spec, store)
masks = store.masks(run.key)
trained = run.restore()[2].state_dict()
pruned = torch.cat([trained[tensor][~mask] for tensor, mask in masks.kept.items()])
print(f"kept: {masks.entries - masks.removed:,} of {masks.entries:,} entries ({masks.density:.3f})")
print(f"exactly zero after training: {int((pruned == 0).sum()):,} of {pruned.numel():,} pruned weights")

# %% [markdown]
# ## What does pruning cost?
#
# Back to the reference runs: all six scorers at four sparsities with the controls of SNIP at 80 %, from the plan
# [`sparse.toml`](../data/reference_runs/sparse.toml), with one learning rate for all. To claim that pruning is free, a scorer must lie
# within a margin of the unpruned adapter that was named beforehand; to claim that a scorer matters, its mask must beat its own
# shuffled, random and re-initialised versions; to claim that sparse beats small, it must beat the small dense adapter. The
# differences are paired by task and seed and in points of accuracy. What one seed gave, on both tasks, is one number; then
#
# $$\bar d \pm t_{0.975,\,R-1}\, \operatorname{sd}(d_1, \dots, d_R) / \sqrt R$$
#
# over the $R$ seeds (`n`; `averaged` counts the pairs). So the intervals hold for other seeds on these tasks, not for other tasks.

# %% tags=["nbval-check-output"]
gains = ht.studies.pruning_gains(sparse, 0.8).set_index("comparison")
gains["points"] = ht.studies.intervals(gains, times=100)
gains[["points", "n", "averaged"]]

# %% [markdown]
# ## Four other adapters
#
# By all six scorers, on the same tweets, from the plan [`sparse_others.toml`](../data/reference_runs/sparse_others.toml). Not all
# cells have the same seeds, and seeds differ by more than many cells do. So the figure shows differences to the unpruned run of
# the same seed, and a number where a cell has fewer seeds than others.

# %%
results = ht.reference("sparse_others", own=False)
# Houlsby adapters of other widths and shares belong to Large-Sparse below
others = ht.studies.short_names(ht.studies.sparse_table(results))
others = ht.studies.sparse_methods(others, [0.0, 0.4, 0.6, 0.8, 0.9], bottlenecks={"Houlsby": 32})
ht.plotting.score_against_sparsity(others, metric="Accuracy")

# %% [markdown]
# The same as a table: points gained (+) or lost (−) against the same adapter unpruned, mean over seeds.

# %% tags=["nbval-check-output"]
cost = ht.studies.pruning_cost(others)
points = 100 * cost.pivot_table(index=["adapter", "scorer"], columns="sparsity", values="cost")
ht.studies.as_text(points, digits=1)

# %% tags=["nbval-check-output"]
unpruned = 100 * others[others["sparsity"] == 0].groupby("adapter")["score"].mean()
constant = 100 * ht.studies.constant_score(results.run(others["key"].iloc[0]))
counted = [f"{name} {n}" for name, n in cost["adapter"].value_counts().items()]
whole = [f"{name} {score:.1f}" for name, score in unpruned.items()]
refused = [f"{n} by {error}" for error, n in results.failed()["error"].value_counts().items()]
Markdown(
    f"The pruned runs behind it: {ht.studies.listed(counted)}. Accuracy unpruned in per cent: "
    f"{ht.studies.listed(whole)}; one answer for all rows: {constant:.1f}. Refused: "
    f"{ht.studies.listed(refused)}, all of them AdapterFusion with SynFlow."
)

# %% [markdown]
# Two notes on AdapterFusion, which is attention over trained adapters of other tasks. Its query and key only enter through a
# softmax, which an all-ones input with positive weights saturates, so SynFlow has nothing to rank them by and is refused. And its value
# matrices start as the identity with $10^{-6}$ everywhere else, so by magnitude they go first, whatever they would have been good
# for: at initialisation, a scorer that sees $\lvert\theta\rvert$ alone sees the initialisation, and nothing else.
#
# The budget is short, six epochs of 320 rows. Where a score sits at that of one answer for all rows, the pruned adapter has not begun
# to learn within it; whether it would with more steps is another question. Does the choice of the weights matter beyond Pfeiffer?
# Scorer minus `random` at the same share, adapter and seed, in points, with intervals for other seeds (number of seeds).

# %% tags=["nbval-check-output"]
against = {f"{scorer} − random": (scorer, "random") for scorer in SCORERS[1:]}
paired = {"column": "scorer", "over": "seed", "by": "adapter", "on": ("adapter", "sparsity", "seed")}
ht.studies.interval_table(ht.studies.gains(cost, against, **paired), "adapter", "comparison", times=100).T

# %% [markdown]
# ## Large-Sparse: more width, the same budget
#
# He et al. widen the adapter and prune harder. Which (bottleneck, sparsity) pairs keep exactly as many weights as the dense adapter of
# width 64? From BERT-base's configuration alone; `other` are biases, which nobody prunes and which grow with the width. With
# `biases=True` they count, and the sparsity makes room for them. `ht.large_sparse_plan` makes the specs of the whole comparison.

# %% tags=["nbval-check-output"]
budget = 24 * 2 * 64 * 768
pairs = ht.large_sparse(budget, ht.Houlsby(init="normal"), BertConfig(), sizes=(64, 128, 256, 512))
ht.studies.as_text(pairs.drop(columns="adapter"))

# %% [markdown]
# And on MiniLM: Houlsby adapters that all keep 73,728 weights, width 8 dense, then wider (the default width is 64) and sparser,
# pruned by SNIP. Full
# fine-tuning, which trains everything, stands beside them. Accuracy in per cent on tweets, mean ± standard deviation (seeds).

# %% tags=["nbval-check-output"]
runs = results.load().query("headline and split == 'test'").sort_values("nonzero")
equal = (runs["method"] == "Houlsby") & runs["nonzero_adapter"].between(73_728, 80_000)
short = {r' Sparsity\(scorer="snip", sparsity=(.*)\)': r" pruned by \1", r', init="normal"|init="normal"': ""}
budgeted = runs[equal | (runs["method"] == "FullFineTuning")].replace({"label": short}, regex=True)
ht.studies.mean_sd(budgeted, ["label", "nonzero"], "value", times=100, digits=1).to_frame("accuracy")

# %% [markdown]
# ## What this shows, and what it does not

# %% tags=["nbval-check-output"]
text = gains["points"]
hard = cost[cost["sparsity"] >= 0.8].replace({"scorer": {"snip": "sees data", "grasp": "sees data"}})
hard = hard.groupby(["adapter", "sparsity", "seed", "scorer"], as_index=False)["score"].mean()
seeing = ht.studies.gains(hard, {"sees data": ("sees data", "random")}, **paired).set_index("adapter")
by_adapter = ht.studies.intervals(seeing, times=100)
Markdown(
    f"**Finding.** With 80 % of a Pfeiffer adapter removed by SNIP, accuracy moves by "
    f"{text['snip − unpruned']} points; against its own masks shuffled by "
    f"{text['snip − its masks shuffled']}, and against the small dense adapter by "
    f"{text['snip − small dense adapter']} (95 % intervals for other seeds, n = {gains['n'].max()}). "
    f"At 80 and 90 %, the scorers that see data are {by_adapter['LoRA']} points above random for LoRA and "
    f"{by_adapter['Houlsby']} for Houlsby (n = {seeing['n'].max()})."
)

# %% [markdown]
# An interval that holds 0 leaves the question open; it does not say that pruning is free, nor that the scorer is idle. What the
# runs do suggest is that the answer depends on the adapter: where there are few weights to begin with, as in LoRA, it matters which
# of them stay, within this budget. Not shown: other tasks (most of these runs are on one), longer training, other backbones.
# Certain without any training is the rest: masks keep exactly what was asked, pruned weights stay zero, four of the six scorers put the
# same density in every layer, and only the two that see data move it.
