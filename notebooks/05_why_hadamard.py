# %% [markdown]
# # Why a Hadamard adapter? What training does to self-attention outputs
#
# Chen et al. (2023) put a scale and a shift on the outputs of self-attention because of two observations: full fine-tuning
# changes the norms of these outputs, and a linear function from old to new fits about as well as a curve. An ablation then says
# which of W, b and the norm behind them matter. This notebook asks the three questions again, with what they need to be
# believed: the same texts before and after, padding left out, an untrained control, intervals, fits judged on texts they have
# not seen, and the norm alone as a cell of the grid.

# %% tags=["parameters"]
import os

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")  # whose width the figures have
PLAN = "../data/reference_runs/ablation.toml"  # the runs of the last section
SPINE = "../data/reference_runs/spine.toml"  # its last comparison on more tasks
METHODS = ["FullFineTuning", "Hadamard"]
CONTROL = "HeadOnly"

# %% tags=["nbval-check-output"]
import hadamard_toolkit as ht

store = ht.RunStore(STORE)
measured = ht.studies.measured_table(store, "attention")
measured["task"] = measured["task"].str.removeprefix("embedded/")
control = measured[measured["method"] == CONTROL]
measured = measured[measured["method"].isin(METHODS)]
print("runs measured, by method and task:")
print(measured.groupby(["method", "task"])["key"].nunique().unstack().fillna(0).astype(int).to_string())
print(
    f"per run: {measured['layer'].nunique()} layers, {measured['example'].nunique()} test texts, "
    f"{int(measured.drop_duplicates(['key', 'example'])['tokens'].sum() / measured['key'].nunique())} tokens on average"
)

# %% [markdown]
# ## Do the norms change?
#
# Let $A^{(l)}_t \in \mathbb R^d$ be the output of layer $l$'s self-attention at token $t$, behind $W_O$ and before residual and
# norm. Per text $i$ with tokens $T_i$ (no padding),
#
# $$n^{(l)}_i = \frac{1}{|T_i|}\sum_{t \in T_i} \lVert A^{(l)}_t \rVert_2 ,\qquad
# \Delta^{(l)} = \operatorname{mean}_i \left(n^{(l)}_{i,\text{after}} - n^{(l)}_{i,\text{before}}\right).$$
#
# Differences are paired by text. Two intervals: one for other seeds and other texts of the task (t over seeds and over texts, added in squares;
# with two seeds t is 12.7, so only a shift that is large beside the difference of the seeds is told from none), and one for
# these very trained models on other texts.

# %% tags=["nbval-check-output"]
shift = ht.studies.norm_shift(measured)
clear = (shift["low"] > 0) | (shift["high"] < 0)
here = (shift["here_low"] > 0) | (shift["here_high"] < 0)
marks = [" *" if other else " °" if own else "" for other, own in zip(clear, here, strict=True)]
shift["shown"] = [f"{p:+.0f} %{mark}" for p, mark in zip(shift["percent"], marks, strict=True)]
print(
    "change of the norm; the 95 % interval leaves zero out *: for other seeds and texts, °: for these models alone"
)
print(shift.pivot(index=["method", "task"], columns="layer", values="shown").to_string())
untouched = (control["before"] == control["after"]).all() if len(control) else None
print(f"\ncontrol ({CONTROL}, {control['key'].nunique()} runs): exactly no shift in any layer: {untouched}")

# %%
figure = ht.plotting.attention_norms(shift, venue=VENUE)
ht.plotting.save(
    figure,
    "attention_norms",
    table=shift.drop(columns="shown"),
    profile="reference",
    caption="Norm of self-attention outputs by layer before and after training; intervals for other seeds and texts",
)
figure

# %% [markdown]
# ## Do they still say the same?
#
# Norms may stay while directions change. Linear CKA compares the geometry of the texts' mean outputs before and after. The usual
# estimator is far too high when texts are few beside the width (here 80 beside 384); the debiased one, with the unbiased
# HSIC of Song et al. (2012), is about 0 for independent data. Its ceiling here is the same measure between two seeds of one method:
# two trainings do not agree better than that with each other.

# %% tags=["nbval-check-output"]
alike = ht.studies.cka_summary(measured)
columns = {"cka": "before/after", "cka_biased": "(biased)", "cka_seeds": "seed/seed"}
means = alike.groupby(["method", "layer"])[list(columns)].mean().rename(columns=columns)
print(means.round(2).to_string())
print(f"\nmeans over tasks; {alike['n_seeds'].min()} to {alike['n_seeds'].max()} seeds per task")

# %% [markdown]
# ## Is a line enough?
#
# For every coordinate $j$ by itself, $A_{tj,\text{after}} \approx \sum_{k=0}^{K} c_{jk}\, A_{tj,\text{before}}^{\,k}$ with
# $K = 1, 2, 3$. The three are nested, so in the sample the cubic cannot lose; here they are fitted on one half of the texts, and
# $R^2$ (mean over coordinates) is that on the other half. "Unchanged" is $A_\text{after} = A_\text{before}$. Only what is above it needs an adapter,
# and only what a line leaves for a curve would need a stronger one. What no function of the one coordinate gets at depends on the
# others, or on the other tokens.

# %% tags=["nbval-check-output"]
fits = ht.studies.fit_summary(measured[measured["total"].notna()])
print("held-out R², mean over tasks")
print(
    fits.pivot_table(index=["method", "layer"], columns="fit", values="r2", sort=False).round(3).to_string()
)
curves = fits[fits["fit"].isin(["quadratic", "cubic"])]
for method, part in curves.groupby("method"):
    best = part.loc[part["gain"].idxmax()]
    surely = (part["gain_low"] > 0).sum()
    print(
        f"{method}: a degree more gains at most {best['gain']:+.4f} [{best['gain_low']:+.4f}, {best['gain_high']:+.4f}] of R² "
        f"({best['fit']}, {best['task']}, layer {best['layer']}); above zero in {surely} of {len(part)} comparisons (these models, other texts)"
    )

# %%
figure = ht.plotting.fit_comparison(fits, venue=VENUE)
ht.plotting.save(
    figure,
    "attention_fits",
    table=fits,
    profile="reference",
    caption="Held-out R² of polynomial fits from attention outputs before to after training; intervals for other texts",
)
figure

# %% [markdown]
# ## Which part earns its place?
#
# Every subset of {W, b, norm} trained by the same two stages. The empty one is the head alone, and the norm alone is the
# control that an adapter has to beat. The effect of a part is the paired difference of runs with and without it, same task and seed:
# beside nothing, beside both others, and on average over the four states of the others; last, W and b together beside the norm. Two intervals:
# for other seeds of these very tasks (the spread of seeds within tasks), and for other tasks (t over task means), which is what "the part helps"
# would need. With three tasks the second is wide; the norm alone and the whole adapter were also run on eight tasks (notebook 01's runs).

# %% tags=["nbval-check-output"]
grid = ht.studies.ablation_table(store.only(PLAN).load())
grid["task"] = grid["task"].str.removeprefix("embedded/")
cells = grid.groupby(["task", "cell"], sort=False)["score"].agg(["mean", "std", "count"])
cells["shown"] = [f"{m:.3f} ± {s:.3f} ({n:.0f})" if n > 1 else f"{m:.3f} (1)" for m, s, n in cells.values]
print(
    cells["shown"].unstack("task", sort=False).fillna("not run").to_string()
    if len(grid)
    else "none of the grid is run yet"
)
effects = ht.studies.component_effects(grid)
wanted = effects[
    effects["beside"].isin(["nothing", "average"])
    | effects["beside"].str.contains("+", regex=False)
    | (effects["part"] == "W + b")
]
others = ht.studies.component_effects(grid, over="task")
print(f"{wanted['low'].isna().sum()} comparisons have one pair per task, and so no interval over seeds")
print("points, with 95 % intervals for other seeds of these tasks, and for other tasks")
for row in wanted.itertuples():
    tasks = others.loc[row.Index]
    print(
        f"{row.part:<5} beside {row.beside:<10} {100 * row.effect:+5.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}] "
        f"[{100 * tasks['low']:+.1f}, {100 * tasks['high']:+.1f}] ({row.tasks} tasks, {row.runs} pairs)".replace(
            "[+nan, +nan]", "[none]"
        )
    )

# %%
figure = None
if len(grid):
    figure = ht.plotting.ablation_grid(grid, venue=VENUE)
    ht.plotting.save(
        figure,
        "ablation_grid",
        table=grid,
        profile="reference",
        caption="Score with every subset of W, b and the attention norm; no interval, every seed is a mark",
    )
figure

# %% [markdown]
# **Finding.** In numbers, computed from the tables above:

# %% tags=["nbval-check-output"]
for method, part in shift.groupby("method"):
    grows, falls = (part["low"] > 0).sum(), (part["high"] < 0).sum()
    here_grows, here_falls = (part["here_low"] > 0).sum(), (part["here_high"] < 0).sum()
    top = part.loc[part["percent"].abs().idxmax()]
    print(
        f"{method}: in these models the norm grows in {here_grows} and falls in {here_falls} of {len(part)} layers and tasks (for other texts); for "
        f"other seeds too (of at least {part['n_seeds'].min()}) in {grows} and {falls}; most by "
        f"{top['percent']:+.0f} % [{100 * top['low'] / top['before']:+.0f}, {100 * top['high'] / top['before']:+.0f}] "
        f"({top['task']}, layer {top['layer']})"
    )
    line = fits[(fits["method"] == method) & (fits["fit"] == "linear")]
    deepest = line[line["layer"] == line["layer"].max()]
    print(
        f"  a line per coordinate explains {deepest['r2'].min():.2f} to {deepest['r2'].max():.2f} of the variance in the last "
        f"layer; the best curve adds {max(0.0, curves[curves['method'] == method]['gain'].max()):.4f} anywhere"
    )
# the same contrast on the tasks of notebook 01, accuracy only, where both were run
spine = ht.RunStore(STORE) if "HADAMARD_STORE" in os.environ else store.only(SPINE)
eight = ht.studies.score_table(spine).query(
    "metric == 'accuracy' and method in ['Hadamard', 'LayerNormTuning']"
)
eight = eight.pivot_table(index=["task", "seed"], columns="method", values="score").dropna()
named = effects["beside"].eq("average") | effects["part"].eq("W + b")
for row in effects[named].sort_values("effect", ascending=False).itertuples():
    tasks = others.loc[row.Index]
    name = "the adapter (W + b) over the norm alone" if row.part == "W + b" else f"{row.part} on average"
    verdict = "shown" if tasks["low"] > 0 else "not shown"
    print(
        f"{name}: {100 * row.effect:+.1f} points; other seeds of these {row.tasks} tasks [{100 * row.low:+.1f}, {100 * row.high:+.1f}], other tasks "
        f"[{100 * tasks['low']:+.1f}, {100 * tasks['high']:+.1f}]: {verdict} beyond these tasks".replace(
            "[+nan, +nan]", "[none]"
        )
    )
if {"Hadamard", "LayerNormTuning"} <= set(eight):
    gain = 100 * (eight["Hadamard"] - eight["LayerNormTuning"])
    row = ht.studies.mean_over(gain.rename("gain").reset_index(), "gain").iloc[0]
    print(
        f"the adapter over the norm alone, on the {row['n']} tasks with accuracy where both were run: {row['mean']:+.1f} points [{row['low']:+.1f}, "
        f"{row['high']:+.1f}] for other tasks ({row['averaged']} pairs)"
    )
