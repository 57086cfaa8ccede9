# %% [markdown]
# # Why a Hadamard adapter? What training does to self-attention outputs
#
# Chen et al. (2023) put a scale and a shift on the outputs of self-attention because of two observations: full fine-tuning
# changes the norms of these outputs, and a linear function from old to new fits about as well as a curve. An ablation then says
# which of W, b and the norm behind them matter. This notebook asks the three questions again:
#
# 1. Do the norms of self-attention outputs change?
# 2. Is a line from old to new enough?
# 3. Which part earns its place: W, b, or the LayerNorm that trains beside them?
#
# And it asks them with what the answers need to be believed: the same texts before and after, padding left out, an untrained control,
# intervals, fits judged on texts that they have not seen, and the norm alone as a cell of the grid. Nothing is trained here; the
# runs and measurements were made beforehand, and `HADAMARD_STORE` reads your own instead.

# %%
from IPython.display import Markdown

import hadamard_toolkit as ht

PLAN = "../data/reference_runs/ablation.toml"  # the runs of the last section

# %% [markdown]
# ## The idea in one picture
#
# Everything below is about one place in each layer, `attention_output`: behind the output projection $W_O$, before the residual
# sum and the norm. If training mostly rescales and shifts what passes there, then two vectors at that very place are enough, and the
# rest of the backbone can stay frozen.

# %%
ht.plotting.sites(ht.Hadamard())

# %% [markdown]
# Three kinds of runs were measured on test texts: full fine-tuning, the Hadamard adapter, and as a control the head alone, which
# leaves the backbone as it is and so must show no shift at all. For each layer and text the measurement holds the outputs before and
# after training. The table counts the runs by task.

# %% tags=["nbval-check-output"]
store = ht.reference()
measured = ht.studies.short_names(ht.studies.measured_table(store, "attention"))
untrained = measured["method"] == "HeadOnly"
control, measured = measured[untrained], measured[~untrained]
measured.groupby(["method", "task"])["key"].nunique().unstack(fill_value=0)

# %% [markdown]
# ## Do the norms change?
#
# Let $A^{(l)}_t \in \mathbb R^d$ be the output of layer $l$'s self-attention at token $t$. Per text $i$ with tokens $T_i$
# (no padding),
#
# $$n^{(l)}_i = \frac{1}{|T_i|}\sum_{t \in T_i} \lVert A^{(l)}_t \rVert_2 ,\qquad
# \Delta^{(l)} = \operatorname{mean}_i \left(n^{(l)}_{i,\text{after}} - n^{(l)}_{i,\text{before}}\right).$$
#
# Differences are paired by text. There are two intervals. One is for other seeds and other texts of the task: Student's t over
# seeds and over texts, added in squares. With two seeds the factor of t is 12.7, so only a shift that is large beside the difference
# of the two is told from none. The other is for these very trained models on other texts.
#
# The table shows the change of the norm in per cent, by layer. The 95 % interval leaves zero out \*: for other seeds and texts; °:
# for these models alone.

# %% tags=["nbval-check-output"]
shift = ht.studies.norm_shift(measured)
ht.studies.shift_text(shift)

# %%
ht.plotting.publish(
    ht.plotting.attention_norms(shift),
    "attention_norms",
    table=shift,
    caption="Norm of self-attention outputs by layer before and after training; "
    "intervals for other seeds and texts",
)

# %% tags=["nbval-check-output"]
grown = ht.studies.shift_counts(shift)
told = [
    f"{row['grows_here']} of {row['cells']} layers and tasks with {method} (for other seeds too in "
    f"{row['grows']}), most by {row['most']:+.0f} % in layer {row['layer']} on {row['task']}"
    for method, row in grown.iterrows()
]
untouched = bool((control["before"] == control["after"]).all()) if len(control) else None
Markdown(
    f"The norm grows in {ht.studies.listed(told)}. It falls in {grown['falls_here'].sum()}. In the control "
    f"no norm moves at all: {untouched} ({control['key'].nunique()} run)."
)

# %% [markdown]
# ## Do they still say the same?
#
# Norms may stay while directions change. *Linear CKA* (centred kernel alignment) compares the geometry of the texts' mean outputs
# before and after: 1 means the same up to rotation and scale, 0 means unrelated. The usual estimator is far too high when texts are few
# beside the width (here 80 beside 384). The debiased one, with the unbiased HSIC of Song et al. (2012), is about 0 for
# independent data. Its ceiling here is the same measure between two seeds of one method: two trainings do not agree better than that
# with each other. Means over tasks:

# %% tags=["nbval-check-output"]
alike = ht.studies.cka_summary(measured)
columns = {"cka": "before/after", "cka_biased": "(biased)", "cka_seeds": "seed/seed"}
alike.groupby(["method", "layer"])[list(columns)].mean().rename(columns=columns).round(2)

# %% [markdown]
# Full fine-tuning replaces what the upper layers say, and two seeds of it agree on the replacement. The Hadamard adapter leaves the
# geometry close to what it was.
#
# ## Is a line enough?
#
# For every coordinate $j$ by itself, $A_{tj,\text{after}} \approx \sum_{k=0}^{K} c_{jk}\, A_{tj,\text{before}}^{\,k}$ with
# $K = 1, 2, 3$. The three are nested, so in the sample the cubic cannot lose. Here they are fitted on one half of the texts, and
# $R^2$ (the share of variance explained, mean over coordinates) is that on the other half. `unchanged` is
# $A_\text{after} = A_\text{before}$. Only what is above it needs an adapter, and only what a line leaves for a curve would need a stronger
# one. What no function of the one coordinate gets at depends on the other coordinates, or on the other tokens. Means over tasks:

# %% tags=["nbval-check-output"]
fits = ht.studies.fit_summary(measured[measured["total"].notna()])
fits.pivot_table(index=["method", "layer"], columns="fit", values="r2", sort=False).round(3)

# %%
ht.plotting.publish(
    ht.plotting.fit_comparison(fits),
    "attention_fits",
    table=fits,
    caption="Held-out R² of polynomial fits from attention outputs before to after training; "
    "intervals for other texts",
)

# %% tags=["nbval-check-output"]
curves = fits[fits["fit"].isin(["quadratic", "cubic"])].sort_values("gain").groupby("method").last()
line = fits[(fits["fit"] == "linear") & (fits["layer"] == fits["layer"].max())].groupby("method")["r2"]
told = [
    f"a line explains {line.min()[method]:.2f} to {line.max()[method]:.2f} of the variance in the last layer "
    f"with {method}, where a degree more gains at most {best['gain']:+.4f} [{best['gain_low']:+.4f}, "
    f"{best['gain_high']:+.4f}] of R² anywhere ({best['task']}, layer {best['layer']})"
    for method, best in curves.iterrows()
]
Markdown(f"In numbers: {ht.studies.listed(told)}. The intervals are for these models on other texts.")

# %% [markdown]
# So a curve adds nothing to a line, in either method. But a line explains full fine-tuning only in the lower layers: in the last
# ones it does no better than the mean. What full fine-tuning does there is no function of the single coordinate at all.
#
# ## Which part earns its place?
#
# Every subset of {W, b, norm} trained by the same two stages. The empty one is the head alone, and the norm alone is the control that
# an adapter has to beat. Accuracy, mean ± standard deviation (seeds):

# %% tags=["nbval-check-output"]
grid = ht.studies.short_names(ht.studies.ablation_table(store.only(PLAN).load()))
ht.studies.mean_sd_table(grid, "cell", "task")

# %%
ht.plotting.publish(
    ht.plotting.ablation_grid(grid),
    "ablation_grid",
    table=grid,
    caption="Score with every subset of W, b and the attention norm; no interval, every seed is a mark",
)

# %% [markdown]
# The effect of a part is the paired difference of runs with and without it, same task and seed: beside nothing, beside both others,
# and on average over the four states of the others; last, W and b together beside the norm. Effects are in points, with two 95 %
# intervals: for other seeds of these very tasks (from the spread of seeds within tasks), and for other tasks (t over task means), which
# is what "the part helps" would need. With three tasks the second is wide.

# %% tags=["nbval-check-output"]
effects = ht.studies.effects_text(grid)
effects.query("beside in ['nothing', 'average'] or beside.str.contains('[+]') or part == 'W + b'")

# %% [markdown]
# The last contrast, the whole adapter against the norm alone, was also run on more tasks: the seven with accuracy of
# [notebook 01](01_hadamard_adapter.ipynb).

# %% tags=["nbval-check-output"]
spine = ht.studies.score_table(ht.reference("spine")).query("metric == 'accuracy'")
eight = ht.studies.gains(spine, {"adapter − norm": ("Hadamard", "LayerNormTuning")})
[wider], (tasks, pairs) = ht.studies.intervals(eight, times=100), eight.loc[0, ["n", "averaged"]]
Markdown(
    f"On {tasks} tasks with accuracy the adapter is {wider} points above the norm alone (95 % interval for "
    f"other tasks, {pairs} pairs of runs)."
)

# %% [markdown]
# ## What this shows, and what it does not

# %% tags=["nbval-check-output"]
average = effects.xs("average", level="beside")
told = [
    f"{part} brings {row['other seeds']} points for other seeds and {row['other tasks']} for other tasks"
    for part, row in average.iterrows()
]
Markdown(
    f"**Finding.** On average over the states of the other parts, {ht.studies.listed(told)} (three tasks, "
    f"95 % intervals). The whole adapter over the norm alone, for other tasks: "
    f"{effects.loc[('W + b', 'norm'), 'other tasks']} points on these three, {wider} on {tasks} tasks."
)

# %% [markdown]
# The first observation of the paper holds here: norms grow, and by far most under full fine-tuning. The second holds in the sense that
# no curve beats a line, though under full fine-tuning the line itself explains little in the upper layers. In the ablation the norm
# is the most useful part, then b, then W; reviews of the paper name the same two first. Only for the norm and for W does the interval for
# other tasks leave zero out, and for W the effect is small. The measurements are from one small backbone, 80 texts and two seeds per
# task, full fine-tuning on one task only; the ablation has three tasks and three seeds.
