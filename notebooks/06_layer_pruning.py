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
# The Hadamard adapter puts a weight vector $W$ and a bias vector $b$ behind the attention of every layer and trains
# them together with the LayerNorm that follows. Chen et al. (2023) report that some layers can do without: from
# 0.033 % to 0.022 % of the parameters of BERT-base, which by our count is 8 of 12 layers. Which layers are they,
# and by what rule are they found? This notebook asks it as *layer ablation*: the adapter is trained on all layers,
# then taken out of some, and the model is scored again without any further training. A removed layer gets $W = 1$,
# $b = 0$ and the backbone's own norm back, so it computes what it computed before.
#
# ![A rule keeps 4 of 6 layers; its null is the mean score of all 15 sets of 4 layers](pictures/layer_removal.svg)
#
# Three things make a claim about such a choice believable, and all of them are made below.
#
# 1. The layers are **chosen on held-out rows** (or from the vectors alone), and the choice is scored once, on test
#    rows.
# 2. Its null hypothesis is a **blind draw** of as many layers. That little is lost says nothing by itself: perhaps
#    any layers could go.
# 3. "As good as all layers" is a test of **equivalence within a margin that was stated first**, over seeds and
#    rows.

# %% [markdown]
# ## What was measured, and what there is to lose
#
# The runs are the committed ones: `Hadamard()` on MiniLM (6 layers), with three seeds on each of nine tasks. For
# every run all $2^6 = 64$ subsets of layers were scored, on held-out rows and on test rows. The table has the rows
# of one run, the mean test score with all layers and with none, and their difference `worth`. A run has `failed` if
# it scores at most a point above giving one answer to all rows. Where the adapter is worth nothing, nothing is lost
# by taking it out, and no layer is "redundant" there in any sense that matters; so keep the last column in mind
# wherever a layer seems to be free.

# %% tags=["nbval-check-output"]
import pandas as pd
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit import studies

MARGIN = 0.03  # accuracy that a smaller set may cost and still count as "as good"; stated before looking
pd.options.display.float_format = "{:.3f}".format
pd.options.display.max_colwidth = 80

store = ht.reference("spine")
removals = studies.removal_table(store, layers=6)
overview = studies.removal_overview(removals)
overview

# %% [markdown]
# ## How far did each layer move?
#
# The simplest guess at a layer's importance looks at no score at all: how far did training move its vectors from
# where they started? The figure shows the root mean square per coordinate,
#
# $$\frac{\lVert W_\ell - 1\rVert}{\sqrt d} \qquad\text{and}\qquad \frac{\lVert b_\ell - \bar b_\ell \mathbf 1\rVert}{\sqrt d} ,$$
#
# so that backbones of different width $d$ compare. The mean of $b$ is taken out because the LayerNorm behind the
# adapter subtracts it: adding a constant to $b$ changes nothing. Drawn are the tasks with at least one run that did
# not fail.

# %%
learned = removals[~removals.groupby("task")["failed"].transform("all")]
moved = studies.of_runs(studies.layer_importance(studies.vector_table(store)), learned)
ht.plotting.publish(
    ht.plotting.importance_by_layer(moved),
    "layer_importance",
    table=moved[moved["vector"] != "both"],
    caption="How far each layer's Hadamard vectors moved",
)

# %% [markdown]
# ## What does one layer add to the others?
#
# Leave one out: the score with all layers less the score without layer $\ell$, on test rows, mean over the seeds.
# The table is in points (hundredths of the task's metric). It has a blind spot: two layers that can stand in for
# one another both look worthless here, which is why the removal curves follow.

# %% tags=["nbval-check-output"]
drops = studies.leave_one_out(removals)
(100 * drops.pivot_table(index="task", columns="layer", values="drop")).map("{:+.1f}".format)

# %% [markdown]
# Could one have known these drops without removing anything? Three cheap scores of a layer cost at most one
# backward pass over the held-out rows. `norm` is the distance moved. The other two ask what the loss would do if
# layer $\ell$ went back by its change $\Delta_\ell$: to first order (Molchanov et al. 2017), and by the diagonal of
# the Fisher information (Theis et al. 2018),
#
# $$\text{taylor:}\;\Big|\sum_j \bar g_{\ell j} \Delta_{\ell j}\Big|, \qquad
# \text{fisher:}\; \tfrac12 \sum_j \overline{g_{\ell j}^2}\, \Delta_{\ell j}^2 ,$$
#
# where $g$ is the gradient of one row's loss at the trained values and the bar is the mean over rows. Spearman's
# $\rho$ compares the order of the six layers by each score with their order by the drop, run by run; if a score
# knew nothing, the mean of $\rho$ would be 0. The interval is for other tasks (a $t$ interval over the means of the
# tasks, `n` of them).

# %% tags=["nbval-check-output"]
scores = studies.layer_scores(store, removals)
ranked = studies.rank_correlation(scores, drops)
ranked[["rule", "mean", "low", "high", "n"]]

# %% tags=["nbval-check-output"]
better = studies.listed(ranked["rule"][ranked["low"] > 0], nothing="none of the three")
Markdown(f"Shown to rank the layers better than chance, in that its interval lies above 0: **{better}**.")

# %% [markdown]
# ## Removal curves
#
# A *rule* is an order in which layers go. Seven rules are compared, and none of them sees a test row.
#
# * `greedy`: backward elimination. Again and again it removes the layer whose loss costs the held-out score least.
# * `norm`, `taylor`, `fisher`: the layer with the least of these scores goes first.
# * `consensus`: the mean order in which `greedy` removed the layers in all *other* tasks. Most sentences of SST-2's
#   dev set are among the movies' texts, so these two tasks have no say in each other's consensus.
# * `first` and `last`: from the bottom up, and from the top down. They are judged below but not drawn.
#
# The grey band behind the lines holds the middle 90 % of *all* subsets of that size, which is what a blind draw
# would give.

# %%
apart = studies.tasks_sharing_texts(set(removals["task"]))
paths = studies.removal_paths(removals, scores, apart=apart)
curves = studies.removal_curves(removals, paths)
drawn = curves[~curves["rule"].isin(["first", "last"])]
ht.plotting.publish(
    ht.plotting.score_by_layers_kept(drawn, studies.subset_band(removals)),
    "layer_removal_curves",
    table=drawn,
    caption="Score against the number of layers that keep their adapter",
)

# %% [markdown]
# ## Better than chance?
#
# Three questions, each with its own test and its own family of tests: `p_holm` is corrected over all rules and
# sizes of one question (Holm 1979), so that the best of many lucky draws does not count as a finding.
#
# *Does the rule choose better than a blind draw?* Let $S_t$ be the layers that the rule keeps in task $t$. Its gain
# is
#
# $$g_t = \mathrm{score}_t(S_t) - \operatorname{mean}_{|S| = |S_t|} \mathrm{score}_t(S) ,$$
#
# and the test is a one-sided $t$ test of $g_1, \dots, g_T$ with an interval for other tasks. *Is this one subset
# better than the average of its size?* The same test for `consensus`, `first` and `last`, whose choice is common to
# all tasks: it judges a subset and says nothing of the rule. *Are these layers better than others kept as
# consistently?* A rule may choose task by task and yet choose alike everywhere, for reasons that tasks share. So
# here the layers are relabelled by one permutation $\pi$ for all runs $r$,
#
# $$p = \frac{1}{720}\,\#\Big\{\pi : \textstyle\sum_r \mathrm{score}_r(\pi S_r) \ge \sum_r \mathrm{score}_r(S_r)\Big\} .$$
#
# That holds for these runs alone. A test that could never have been significant, whatever came out, is `refused`
# and not made.
#
# Accuracy and rank correlation have no common unit, so the means are over the eight tasks with accuracy; the
# intensity of tweets is in the curves only. A task of which every run has failed has nothing to choose, so
# everything is read twice, with such tasks and without. The table has the clearest test of each question, the one
# with the smallest corrected $p$.

# %% tags=["nbval-check-output"]
readings = {
    "all tasks": removals[removals["metric"] == "accuracy"],
    "those that learned": learned[learned["metric"] == "accuracy"],
}
chances = {name: studies.better_than_chance(table, paths) for name, table in readings.items()}
clearest = pd.concat({name: studies.clearest_tests(chance) for name, chance in chances.items()})
clearest.droplevel(1)

# %% tags=["nbval-check-output"]
hits = {name: chance[chance["p_holm"] <= 0.05] for name, chance in chances.items()}
most = max(found["gain"].max() for found in hits.values())
Markdown(
    "Significant at 5 % after Holm's correction (rule, and layers kept): "
    + "; ".join(
        f"**{name}**, " + studies.listed(f"{row.rule} {row.size}" for row in found.itertuples())
        for name, found in hits.items()
    )
    + f"; of {sum(clearest['tests'] - clearest['refused'])} tests in all, and none gains more than "
    f"{100 * most:.1f} points."
)

# %% [markdown]
# Do the tasks at least agree on an order? Kendall's $W$ is 1 when all tasks remove their layers in the same order,
# and 0 when their orders have nothing in common. The orders of `consensus` are made of one another, so any two of
# them agree by construction; they have no test and no $W$.

# %% tags=["nbval-check-output"]
agreement = studies.rank_agreement(paths)
agreement[["rule", "order", "w", "p", "n_tasks", "n_runs"]]

# %% [markdown]
# The order by distance moved agrees far more across tasks than elimination by score does. That is the reason for
# the third question: a rule that makes the same choice everywhere is in effect *one* subset, and one subset can be
# good by luck.
#
# ## The smallest sufficient set
#
# How few layers are enough? Walk down the path of `greedy` while "not worse than all layers by the margin" holds on
# held-out rows. The bound is one-sided at 5 %, from a hierarchical bootstrap that draws seeds and rows (for
# regression, a $t$ test over seeds). No row judges a path that it helped to choose: elimination runs on one half of
# the held-out rows and is judged on the other, then the halves are swapped. The set where the walk ends is tested
# once more on test rows, and `test_low` is the lower bound of its difference to all layers. The `verdict` is
# `enough` where that test holds, `all layers stay` where nothing could go, and `nothing learned` where all layers
# together are worth no more than the margin. In such a row even the empty set would pass, and that says nothing
# about layers.

# %% tags=["nbval-check-output"]
shown = ["task", "size", "held_out_low", "test", "test_low", "worth", "verdict"]
smallest = studies.smallest_set(removals, paths, margin=MARGIN)
smallest[shown]

# %% [markdown]
# With so few held-out rows the walk stops early: a set can be as good as all layers and not be *shown* to be. The
# order that all other tasks agree on needs no held-out rows of the task itself, so there all of them judge, and the
# walk gets a little further:

# %% tags=["nbval-check-output"]
studies.smallest_set(removals, paths, margin=MARGIN, rule="consensus")[shown]

# %% [markdown]
# The sets of `greedy` that were confirmed, layer by layer. A task that learned nothing is not among them, whatever
# its bounds say.

# %%
shares = studies.kept_share(paths[paths["rule"] == "greedy"], smallest)
ht.plotting.publish(
    ht.plotting.layers_kept_by_task(shares),
    "layers_kept_by_task",
    table=shares,
    caption=f"Layers in the smallest set confirmed to lose less than {100 * MARGIN:.0f} points, by task",
) if shares["confirmed"].any() else Markdown("No smaller set was confirmed.")

# %% [markdown]
# ## Twelve layers: which four can go?
#
# The paper's backbones have 12 layers, and nobody scores $2^{12}$ subsets. On MPNet-base three runs were measured:
# the paths of the rules, and 20 subsets each of 6 and of 8 layers that were drawn blindly, the same for all runs.
# The table has the test scores with all layers (`full`), with the eight that `greedy` kept (`score`) and with none,
# and the four layers that went. SST-2 and the movies share texts, so these are not three independent tasks.

# %% tags=["nbval-check-output"]
deep = ht.reference("mpnet", own=False)
deep_removals = studies.removal_table(deep, layers=12).drop(columns="constant")  # far below these scores
deep_scores = studies.layer_scores(deep, deep_removals, rules=["norm"])
deep_paths = studies.removal_paths(deep_removals, deep_scores)
deep_curves = studies.removal_curves(deep_removals, deep_paths)
studies.kept_and_removed(deep_curves, size=8)

# %%
ht.plotting.publish(
    ht.plotting.score_by_layers_kept(
        deep_curves[deep_curves["rule"].isin(["greedy", "norm"])], studies.subset_band(deep_removals)
    ),
    "layer_removal_curves_mpnet",
    table=deep_curves,
    caption="Score against the number of layers that keep their adapter, MPNet-base",
)

# %% tags=["nbval-check-output"]
of_eight = deep_curves.query("rule == 'greedy' and size == 8")
[lost] = studies.intervals(studies.mean_over(of_eight, "difference"), times=100)
deep_chance = studies.better_than_chance(deep_removals, deep_paths)
[row] = deep_chance.query("test == 'tasks' and rule == 'greedy' and size == 8").to_dict("records")
Markdown(
    f"Without 4 of 12 layers the score changes by **{lost}** points (95 %, for other tasks, from "
    f"{row['n_tasks']} tasks with one run each). Against the mean of blind draws the choice gains "
    f"{studies.interval_text(row['gain'], row['low'], row['high'], times=100)} points, "
    f"$p$ = {row['p']:.3f}, Holm {row['p_holm']:.3f}."
)

# %% [markdown]
# Three tasks can show a large effect only, and all relabelling tests are refused here: among 20 drawn subsets $p$
# cannot go below 1/21, which no correction for eight tests would let pass.
#
# ## Retrained without them
#
# Removing layers from a trained adapter is one thing; training with fewer layers from the start,
# `Hadamard(layers=…)`, is another. Both are compared on the same test rows, in points of accuracy against the
# adapter on all layers that was trained from the same seed. `gap` is how much better the retrained subset does than
# the same subset after the fact.

# %% tags=["nbval-check-output"]
subsets = studies.retrained_subsets(
    studies.score_table(ht.reference("layers")), studies.score_table(ht.reference("ablation")), removals
)
(100 * subsets.groupby("kept")[["after_the_fact", "retrained", "gap"]].mean()).map("{:+.1f}".format)

# %% tags=["nbval-check-output"]
by_run = 100 * subsets.groupby(["task", "seed"])["gap"].mean()
Markdown(
    f"Over {len(by_run)} pairs of task and seed, retraining with the layers that stay gives back "
    f"**{by_run.mean():+.1f}** points on average (from {by_run.min():+.1f} to {by_run.max():+.1f})."
)

# %% [markdown]
# ## Try it
#
# Every switch gives one layer, or one site of it, back to the backbone; the head stays as it was trained. Scores
# are on held-out rows with a 95 % interval of the difference to the unpruned adapter. The same panel runs as an
# app: `hadamard pruner`. On a page without a kernel the switches do nothing, so this is what one would see:
#
# ![The layer pruner: a switch per layer and site, and the score of what is kept](pictures/pruner.png)

# %%
first = removals.query("task == 'tweets-polarity'")["key"].iloc[0]
pruner = ht.LayerPruner(store.run(first), reference=store)
pruner

# %% [markdown]
# What the switches do can be said in code. The preset `"paper"` keeps two thirds of the layers, those that moved
# most:

# %% tags=["nbval-check-output"]
pruner.preset("paper")
pruner.settle()
pruner.scores()[["n", "full", "value", "difference", "low", "high"]]

# %%
pruner.figure()

# %% [markdown]
# ## Finding

# %% tags=["nbval-check-output"]
at_four = {
    name: chance.query("test == 'tasks' and size == 4").set_index("rule") for name, chance in chances.items()
}
kept = studies.of_runs(curves.query("rule == 'greedy' and size == 4"), readings["all tasks"])
[lost] = studies.intervals(studies.mean_over(kept, "difference"), times=100)
greedy, norm = at_four["all tasks"].loc["greedy"], at_four["those that learned"].loc["norm"]
gain = [studies.interval_text(row.gain, row.low, row.high, times=100) for row in (greedy, norm)]
said = ["is" if row.p_holm <= 0.05 else "is not shown to be" for row in (greedy, norm)]
Markdown(
    "Taking the adapter out of 2 of 6 layers, chosen by greedy elimination, changes accuracy by "
    f"**{lost}** points ({greedy.n_tasks} tasks, {greedy.n_runs} runs), and that choice {said[0]} better "
    f"than a blind draw ({gain[0]} points, Holm {greedy.p_holm:.3f}), while removing the layers that "
    f"moved least {said[1]} better on the {norm.n_tasks} tasks that learned ({gain[1]} points, Holm "
    f"{norm.p_holm:.3f})."
)

# %% [markdown]
# **What this does not show.** The intervals are 95 % $t$ intervals for other tasks like these, with three seeds a
# task, on one backbone of six layers; they do not speak of other backbones. In simulated studies of nine tasks, an
# order that all tasks share and that is worth 3.5 points at four layers is found in 99 of 100 after Holm's
# correction; a gain of half a point, such as those above, can easily be missed, so "not shown to be better" is not
# "as good as chance". The rule that removes what moved least chooses much alike in all tasks, so its gain may be
# that of one good subset.
