# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Layer pruning: which layers' adapters can go, and is that better than chance?
#
# The Hadamard paper (Chen et al. 2023) drops the adapter from some layers and goes from 0.033 % to 0.022 % of the parameters: 8 of 12
# layers. Which ones, and by what rule? Three things make such a claim believable, and all are here:
#
# 1. layers are **chosen on held-out rows** (or by the vectors alone), and the choice is scored once on test rows;
# 2. its null is a **blind draw** of as many layers, not "the full adapter did not lose much";
# 3. "as good as all layers" is a test of **equivalence within a margin that is stated first**, over seeds and rows.
#
# Nothing is retrained before the section that says so: a removed layer gets W = 1, b = 0 and the backbone's own norm back.

# %%
import os

import pandas as pd

import hadamard_toolkit as ht
from hadamard_toolkit import studies

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")  # whose width the figures have
PLAN = None if "HADAMARD_STORE" in os.environ else f"{STORE}/spine.toml"  # None: all runs of the store
PLANS = "../data/reference_runs"
DEEP = f"{PLANS}/mpnet.toml"  # runs on 12 layers; None: those of the store
MARGIN = 0.03  # how much accuracy a smaller set may cost and still count as "as good"; stated before looking

store = ht.RunStore(STORE)
store = store.only(PLAN) if PLAN else store
trained = studies.mark_failed(studies.score_table(store), store)
# without the short runs that picked learning rates
trained = trained[(trained["label"] == "Hadamard()") & (trained["n"] > 50)]
six = store.load().query("backbone == 'minilm-l6'")["key"]
trained = trained[trained["key"].isin(six)].assign(task=trained["task"].str.removeprefix("embedded/"))
many = trained.groupby("task")["train_rows"].transform("nunique") > 1
trained["task"] += (", K = " + trained["train_rows"].astype(str)).where(many, "")
names = trained.set_index("key")["task"]
removals = studies.measured_table(store, "removal")
removals = removals[removals["key"].isin(names.index)].assign(task=removals["key"].map(names))
removals["metric"] = removals["key"].map(trained.set_index("key")["metric"])

# %% tags=["nbval-check-output"]
runs = removals.drop_duplicates(["key", "split"]).pivot_table(
    index="task", columns="split", values="n", aggfunc="max"
)
runs["seeds"] = removals.groupby("task")["seed"].nunique()
print("Hadamard runs on MiniLM (6 layers) whose 64 subsets of layers were scored: rows by split, and seeds")
print(runs.astype(int).to_string())
missing = trained.loc[~trained["key"].isin(removals["key"]), "task"].value_counts().sort_index()
print(f"trained but not measured: {', '.join(f'{task} ({n})' for task, n in missing.items()) or 'none'}")
failed = trained.groupby("task")["failed"].agg(["sum", "size"]).query("sum > 0")
told = ", ".join(f"{task} ({row['sum']} of {row['size']})" for task, row in failed.iterrows())
print(
    f"{trained['failed'].sum()} of {len(trained)} runs score no more than a point above one answer for all rows: {told or 'none'}"
)

# %% [markdown]
# ## How far did each layer move?
#
# $\lVert W_\ell - 1\rVert / \sqrt d$ and $\lVert b_\ell - \bar b_\ell\rVert / \sqrt d$: root mean square by layer, so that widths compare. The mean
# of $b$ is taken out: the norm behind the adapter subtracts it. A layer that moved little is the first to go by the `norm` rule.

# %%
importance = studies.layer_importance(studies.vector_table(store))
importance = importance[importance["key"].isin(removals["key"])].assign(task=importance["key"].map(names))
tasks = sorted(set(importance["task"]))
drawn = importance[(importance["vector"] != "both") & importance["task"].isin(tasks[:8])]
print(f"not drawn, as a figure tells eight tasks apart: {', '.join(tasks[8:]) or 'none'}")
figure = ht.plotting.importance_by_layer(drawn, venue=VENUE)
ht.plotting.save(
    figure,
    "layer_importance",
    table=drawn,
    profile="reference",
    caption="How far each layer's Hadamard vectors moved",
)
figure

# %% [markdown]
# ## What does one layer add to the others?
#
# Leave one out: score with all layers minus score without layer $\ell$, on test rows; mean over runs. It is blind to layers that stand in for
# one another, which is why the curves follow.

# %% tags=["nbval-check-output"]
drops = studies.leave_one_out(removals)
print((100 * drops.pivot_table(index="task", columns="layer", values="drop")).round(1).to_string())
print("points lost without the layer, of the task's metric")

# %% [markdown]
# Could one have known without removing anything? Three scores cost at most one backward pass over held-out rows: the distance moved;
# the first-order change of the loss, and the diagonal Fisher information, when layer $\ell$ goes back by its $\Delta_\ell$,
#
# $$\text{Taylor:}\;\Big|\sum_j \bar g_{\ell j} \Delta_{\ell j}\Big|, \qquad \text{Fisher:}\; \tfrac12 \sum_j \overline{g_{\ell j}^2}\, \Delta_{\ell j}^2 ,$$
#
# with $g$ each row's gradient at the trained values (Molchanov et al. 2017; Theis et al. 2018). Spearman's $\rho$ of each with the drop over the
# six layers, run by run; under the null a mean of 0. The interval is for other tasks (t over task means).

# %% tags=["nbval-check-output"]
columns_of_rules = ["key", "layer", "rule", "value"]
both = importance[importance["vector"] == "both"].assign(rule="norm", value=lambda table: table["l2"])
gradients = studies.measured_table(store, "taylor")
gradients = gradients[gradients["key"].isin(removals["key"])]
cheap = [
    both[columns_of_rules],
    *(gradients.assign(rule=rule, value=gradients[rule])[columns_of_rules] for rule in ("taylor", "fisher")),
]
# a rule is compared where every run has its scores
cheap = pd.concat([table for table in cheap if set(removals["key"]) <= set(table["key"])], ignore_index=True)
ranked = cheap.merge(drops, on=["key", "layer"])
told = {}
for rule, rows in ranked.groupby("rule", sort=False):
    by_run = rows.groupby(["task", "key"])[["value", "drop"]].apply(
        lambda run: run["value"].corr(run["drop"], method="spearman")
    )
    told[rule] = studies.mean_over(by_run.dropna().rename("rho").reset_index(), "rho").iloc[0]
ranked = pd.DataFrame(told).T[["mean", "low", "high", "n"]].rename(columns={"n": "tasks"})
print(ranked.astype(float).round(3).to_string())

# %% [markdown]
# ## Removal curves
#
# Seven rules, none of which sees a test row: **greedy** backward elimination on held-out rows; **norm**, **taylor** and **fisher**, the layer
# with the least of these scores first; **consensus**, the mean greedy order of all *other* tasks; **first** and **last**. Behind them, in
# grey, all subsets of that size.
# Most sentences of SST-2's dev set are among the movies' texts, so neither has a say in the other's consensus.

# %%
related = [set(filter(lambda task: task.startswith(("sst2", "movies")), names))]
paths = studies.removal_paths(removals, cheap, apart=related)
curves = studies.removal_curves(removals, paths)
band = studies.subset_band(removals)
drawn = curves[~curves["rule"].isin(["first", "last"])]  # these two only in the table below
figure = ht.plotting.score_by_layers_kept(drawn, band, venue=VENUE)
ht.plotting.save(
    figure,
    "layer_removal_curves",
    table=drawn,
    profile="reference",
    caption="Score against the number of layers that keep their adapter",
)
figure

# %% [markdown]
# ## Better than chance?
#
# Three questions, each with a test and a family of its own (`p_holm`: Holm 1979, over all rules and sizes of the question).
#
# *Does the rule choose better than a blind draw?* With $S_t$ the layers kept in task $t$, $g_t = \mathrm{score}_t(S_t) - \operatorname{mean}_{|S| = |S_t|}
# \mathrm{score}_t(S)$, a one-sided t test of $g_1, \dots, g_T$; its interval is for other tasks. *Is this one subset better than the average of its
# size?* The same test for `consensus`, `first` and `last`, whose choice is common to all tasks: it says nothing of the rule. *Are these
# layers better than others kept as consistently?* A rule can choose task by task and yet alike, for reasons that tasks share. Here the layers are relabelled, one permutation $\pi$ for all runs,
#
# $$p = \frac{1}{720}\,\#\Big\{\pi : \textstyle\sum_r \mathrm{score}_r(\pi S_r) \ge \sum_r \mathrm{score}_r(S_r)\Big\} ,$$
#
# which holds for these runs alone and cannot see an order that all tasks share. A test that could never have been significant is not made.
#
# Accuracy and rank correlation are not averaged: the means are over the tasks with accuracy, and the intensity of tweets follows by itself.
# Tasks of which every run has failed have nothing to lose; the second reading leaves them out.

# %% tags=["nbval-check-output"]
counted = removals[removals["metric"] == "accuracy"]
nothing = trained.groupby("task")["failed"].all()
learned = counted[~counted["task"].isin(nothing.index[nothing])]
readings = {"tasks with accuracy": counted, "those that learned": learned}
chances = {name: studies.better_than_chance(table, paths) for name, table in readings.items()}
for name, table in chances.items():
    print(
        f"\n{name}: {table['n_runs'].iloc[0]} runs of {table['n_tasks'].iloc[0]} tasks, test rows, sizes 4, 3 and 2 of 1 to 5 tested"
    )
    for question, rows in table[table["size"].isin([4, 3, 2])].groupby("question", sort=False):
        made = rows[rows["refused"] == ""].set_index(["size", "rule"]).sort_index(ascending=[False, True])
        print(f"{question} ({len(rows) - len(made)} of {len(rows)} could never be significant)")
        print(
            made[["score", "chance", "gain", "low", "high", "p", "p_holm"]]
            .round(3)
            .dropna(axis=1)
            .to_string()
        )
apart = curves[curves["key"].isin(removals.loc[removals["metric"] != "accuracy", "key"])]
for (task, rule), rows in apart[apart["size"] == 4].groupby(["task", "rule"], sort=False):
    if rule in ("greedy", "norm"):
        middle = band.set_index(["task", "size"]).loc[(task, 4), "mean"]
        print(
            f"{task}, 4 layers kept by {rule}: {rows['score'].mean():.3f}; mean of all subsets: {middle:.3f}"
        )

# %% [markdown]
# Do the tasks agree on an order? Kendall's $W$ is 1 when all remove their layers in the same order, and 0 when they have none in common. The
# consensus order of a task is made of the orders of all others, so any two of them agree by construction: it has no test.

# %% tags=["nbval-check-output"]
agreement = studies.rank_agreement(paths)
tested = agreement[agreement["refused"] == ""]
print(tested.drop(columns="refused").round(3).to_string(index=False))
for row in agreement[agreement["refused"] != ""].itertuples():
    print(f"{row.rule}: not tested, {row.refused}")

# %% [markdown]
# ## The smallest sufficient set
#
# Walk down the greedy path while "not worse than all layers by the margin" holds on held-out rows (one-sided 5 %, hierarchical bootstrap of the
# paired difference in accuracy over seeds and rows; for regression a t test over seeds). No row judges a path that it chose: greedy elimination
# runs on one half of the held-out rows and is judged on the other, and the halves swapped (for regression: chosen by the other seeds).
# Then test the set that was chosen, once, on test rows; bounds are for other rows and seeds of the task. With so few held-out rows the walk stops early: a set can be as good and not be *shown* to be. And where the adapter has learned
# next to nothing, nothing is lost by taking it out: the last line says what all layers are worth.

# %% tags=["nbval-check-output"]
smallest = studies.smallest_set(removals, paths, margin=MARGIN)
columns = ["task", "size", "kept", "held_out_low", "test", "test_low", "confirmed"]
seeds, held_out, tested = (smallest[f"n_{name}"].min() for name in ("seeds", "held_out", "test"))
print(f"margin {MARGIN}; differences to all layers and their one-sided 95 % bounds")
print(f"per task at least {seeds} seed(s), {held_out} held-out rows, {tested} test rows")
# layers by seed, 0 first, as digits: "12345; 01234"
short = smallest["kept"].str.replace(r"\d+: ", "", regex=True).str.replace(",", "")
print(smallest.assign(kept=short)[columns].round(3).to_string(index=False))
agreed = studies.smallest_set(removals, paths, margin=MARGIN, rule="consensus")
told = [f"{row.task} {row.size}" + (", confirmed" if row.confirmed else "") for row in agreed.itertuples()]
print(f"layers that must stay when all other tasks choose the order (consensus): {'; '.join(told)}")
bare = curves[(curves["rule"] == "greedy") & (curves["size"] == 0)]
worth = -100 * bare.groupby("task")["difference"].mean()
told = [f"{task} {points:+.1f}" for task, points in worth.items()]
print(f"points of all layers over none: {'; '.join(told)}")

# %%
shares = studies.kept_share(paths[paths["rule"] == "greedy"], smallest)
figure = None
if shares["confirmed"].any():
    figure = ht.plotting.layers_kept_by_task(shares)
    ht.plotting.save(
        figure,
        "layers_kept_by_task",
        table=shares,
        profile="reference",
        caption=f"Layers in the smallest set confirmed on test rows to lose less than {100 * MARGIN:.0f} points, by task",
    )
figure

# %% [markdown]
# ## Twelve layers: which four can go?
#
# The paper's backbones have 12 layers, and of $2^{12}$ subsets nobody scores all. On MPNet-base these were: the paths of the rules, and 20
# subsets each of 6 and of 8 layers drawn blindly, the same for all runs. Among 20 drawn subsets p cannot go below 1/21, so that of eight tests
# none could be significant after the correction: that test is not made. The test over tasks has three of them. Head, adapter and rows as above; the learning rate was picked on held-out rows. SST-2 and the
# movies share texts, so they are not two independent tasks.

# %% tags=["nbval-check-output"]
deep = ht.RunStore(PLANS).only(DEEP) if DEEP else ht.RunStore(STORE)
of_twelve = deep.load().query("backbone == 'mpnet-base'")["key"]
deep_removals = studies.measured_table(deep, "removal")
deep_removals = deep_removals[deep_removals["key"].isin(of_twelve)]
deep_removals = deep_removals.assign(task=deep_removals["task"].str.removeprefix("embedded/"))
norms = studies.layer_importance(studies.vector_table(deep)).query("vector == 'both'")
norms = norms[norms["key"].isin(deep_removals["key"])].assign(rule="norm", value=norms["l2"])
deep_paths = studies.removal_paths(deep_removals, norms[columns_of_rules])
deep_curves = studies.removal_curves(deep_removals, deep_paths)
ends = deep_curves[(deep_curves["rule"] == "greedy") & deep_curves["size"].isin([0, 8, 12])]
kept = ends.pivot_table(index=["task", "seed"], columns="size", values="score")[[12, 8, 0]]
gone = deep_paths[(deep_paths["rule"] == "greedy") & deep_paths["size"].between(8, 11)]
kept["greedy removed"] = gone.groupby(["task", "seed"])["removed"].apply(
    lambda layers: ", ".join(map(str, sorted(layers)))
)
print("test score with 12, 8 and 0 layers kept by greedy elimination, and the four that went")
print(kept.round(3).to_string())

# %%
figure = ht.plotting.score_by_layers_kept(
    deep_curves[deep_curves["rule"].isin(["greedy", "norm"])], studies.subset_band(deep_removals), venue=VENUE
)
ht.plotting.save(
    figure,
    "layer_removal_curves_mpnet",
    table=deep_curves,
    profile="reference",
    caption="Score against the number of layers that keep their adapter, MPNet-base",
)
figure

# %% tags=["nbval-check-output"]
deep_chance = studies.better_than_chance(deep_removals, deep_paths)
for question, rows in deep_chance.groupby("question", sort=False):
    made = rows[rows["refused"] == ""].set_index(["size", "rule"]).sort_index(ascending=[False, True])
    print(f"{question} ({len(rows) - len(made)} of {len(rows)} could never be significant)")
    if len(made):
        print(made[["score", "full", "chance", "gain", "low", "high", "p", "p_holm"]].round(3).to_string())
print(f"means over {deep_chance['n_runs'].iloc[0]} runs of {deep_chance['n_tasks'].iloc[0]} tasks, test rows")
[four] = deep_chance.query("test == 'tasks' and rule == 'greedy' and size == 8").to_dict("records")
of_eight = deep_curves[(deep_curves["rule"] == "greedy") & (deep_curves["size"] == 8)]
lost = 100 * studies.mean_over(of_eight, "difference").iloc[0][["mean", "low", "high"]].astype(float)
print(
    f"without 4 of 12 layers: {lost['mean']:+.1f} points [{lost['low']:+.1f}, {lost['high']:+.1f}] (95 %, for other tasks, from "
    f"{len(of_eight)} runs of {four['n_tasks']} tasks); against the mean of blind draws {100 * four['gain']:+.1f} points "
    f"[{100 * four['low']:+.1f}, {100 * four['high']:+.1f}], p = {four['p']:.3f}, Holm {four['p_holm']:.3f}"
)
deep_smallest = studies.smallest_set(deep_removals, deep_paths, margin=MARGIN)
told = [f"{row.task} {row.size} ({row.ended})" for row in deep_smallest.itertuples()]
print(f"layers that must stay, and why the walk ended: {'; '.join(told)}")

# %% [markdown]
# ## Retrained without them
#
# After the fact is one thing; training with fewer layers from the start, `Hadamard(layers=…)`, is another. Both on the same test rows, in
# points of accuracy against the adapter on all layers that was trained from the same seed:

# %% tags=["nbval-check-output"]
everything = ht.RunStore(STORE if PLAN is None else PLANS)
retrained = studies.score_table(everything.only(f"{PLANS}/layers.toml") if PLAN else everything)
whole = studies.score_table(everything.only(f"{PLANS}/ablation.toml") if PLAN else everything)
retrained = retrained[retrained["label"].str.contains("layers=")]
if retrained.empty:
    print("no run of Hadamard(layers=...) is in this store: retrained subsets are missing here")
else:
    on = ["task", "seed", "train_rows"]
    retrained = retrained.assign(
        kept=retrained["label"].str.extract(r"layers=\((.*?),?\)")[0].str.replace(" ", "")
    )
    whole = whole[whole["label"] == "Hadamard()"].set_index(on)["score"].rename("all")
    fact = studies.measured_table(store, "removal").query("split == 'test'")
    fact = fact[fact["key"].isin(names.index)].merge(trained[["key", "train_rows"]], on="key")
    full = fact[fact["kept"].str.len() == fact["kept"].str.len().max()]
    fact = fact.merge(full[["key", "score"]], on="key", suffixes=("", "_all"))
    fact["after the fact"] = fact["score"] - fact["score_all"]
    both = retrained.merge(fact[[*on, "kept", "after the fact"]], on=[*on, "kept"]).join(whole, on=on)
    both["retrained"] = both["score"] - both["all"]
    by_set = both.dropna(subset="retrained").groupby("kept")[["after the fact", "retrained"]]
    told = (100 * by_set.mean()).round(1).assign(runs=by_set.size())
    print(told.sort_index(key=lambda kept: -kept.str.len()).to_string())
    gap = (
        100
        * (both["retrained"] - both["after the fact"]).groupby([both["task"], both["seed"]]).mean().dropna()
    )
    print(
        f"retrained minus after the fact: {gap.mean():+.1f} points, mean over {len(gap)} pairs of task and seed"
        f" (from {gap.min():+.1f} to {gap.max():+.1f})"
    )

# %% [markdown]
# ## With your hands
#
# Every switch gives one layer (or one site of it) back to the backbone; the head stays as trained. Scores are on held-out
# rows, with a 95 % interval against the unpruned adapter. On a page without a kernel, the figure shows what one would see.
# The same as an app: `hadamard pruner`.

# %%
runs = store.load().query("label == 'Hadamard()' and task == 'embedded/tweets-polarity'")
pruner = ht.LayerPruner(store.run(runs.sort_values(["seed", "key"])["key"].iloc[0]), reference=store)
pruner

# %% tags=["nbval-check-output"]
pruner.preset("paper")
pruner.settle()
shown = pruner.scores()[["task", "split", "n", "full", "value", "difference", "low", "high"]].round(2)
print(f"kept: {pruner.state.range_text}")
print(shown.to_string(index=False))

# %%
pruner.figure()

# %% [markdown]
# ## Finding

# %% tags=["nbval-check-output"]
for name, table in readings.items():
    chance = chances[name].query("test == 'tasks' and size == 4").set_index("rule")
    kept = curves[(curves["rule"] == "greedy") & (curves["size"] == 4) & curves["key"].isin(table["key"])]
    lost = 100 * studies.mean_over(kept, "difference").iloc[0][["mean", "low", "high"]].astype(float)
    print(
        f"{name} (n = {chance['n_tasks'].iloc[0]}, {chance['n_runs'].iloc[0]} runs; 95 % intervals for other tasks): without 2 of 6 layers, chosen by "
        f"greedy elimination, the score changes by {lost['mean']:+.1f} points [{lost['low']:+.1f}, {lost['high']:+.1f}]."
    )
    for rule in ("greedy", "norm"):
        row, order = chance.loc[rule], agreement.set_index("rule").loc[rule]
        verdict = "better than" if row["p_holm"] <= 0.05 else "not shown to be better than"
        print(
            f"  4 layers kept by {rule}: {verdict} a blind draw ({100 * row['gain']:+.1f} points [{100 * row['low']:+.1f}, "
            f"{100 * row['high']:+.1f}], p = {row['p']:.3f}, Holm {row['p_holm']:.3f}); its orders of {order['n_tasks']} tasks agree with W = "
            f"{order['w']:.2f}"
        )
    best = chances[name].query("test == 'tasks' and rule == 'consensus'").sort_values("p_holm").iloc[0]
    print(
        f"  the subset that the other tasks agree on: at its clearest ({best['size']} layers) {100 * best['gain']:+.1f} points above the average "
        f"subset of its size, Holm {best['p_holm']:.3f}"
    )
alike = agreement.query("p <= 0.05")["rule"]
print(
    f"Rules whose orders agree over tasks (p <= 0.05): {', '.join(alike) or 'none'}. Where they do, a choice that is better than a blind draw may be one "
    "good subset found by whatever the tasks share: relabelling, above, does not show more."
)
