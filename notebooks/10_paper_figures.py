# %% [markdown]
# # Paper figures: everything that the store has to show
#
# What do the runs of this store say of the claims of the three papers, and which figures and tables do they give?
# Notebooks 05 to 09 draw theirs where the question is asked. The claims come first, then the figures about training
# itself: what a parameter buys, how training runs, what was learned, and what is left with few labels or few weights.
# The last table lists all of them. A run is trained once and drawn as often as one likes: nothing below trains anything.
#
# Every figure is written three times: as a vector PDF with embedded fonts for a paper, as a PNG for a page, and as
# a JSON that says which numbers it shows and where they come from. Tables are written in LaTeX and in Markdown. The
# same store gives the same bytes. `HADAMARD_VENUE` sets the width (an ACL column or page, the NeurIPS text block, a
# slide), `HADAMARD_STORE` draws your own runs in place of the committed ones, and `HADAMARD_FIGURES` names another
# folder.

# %%
import os

import pandas as pd
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit import studies
from hadamard_toolkit.runs.plan import load_plan
from hadamard_toolkit.runs.reference import REFERENCE

pd.options.display.width = 120
pd.options.display.max_colwidth = 120
store = ht.reference()
plans = {path.stem: load_plan(path) for path in sorted(REFERENCE.glob("*.toml"))}

# %% [markdown]
# ## What the papers claim, and what these runs say
#
# A row for each claim of the three papers, and for the controls without which a claim means little: what was
# compared on how many tasks and seeds, the mean difference in points with its 95 % interval over tasks, and the test
# behind the verdict. The margin is 2 points, stated in `PROTOCOL.md` before the runs. A claim *holds here* if its test
# comes out after Holm's correction. It *does not hold here* if the contrary comes out in a test that had a power of
# 0.8: the first is worse by more than the margin or, where it should be better, better by less than the margin. All
# else *cannot be told*. Power is the probability of the claim at the margin's distance, at the level that the
# correction leaves; a large difference between tasks makes it small, also where the mean is far on one side.

# %% tags=["nbval-check-output"]
claims = studies.paper_claims(store, plans)
shown = studies.claims_text(claims)
ht.plotting.save_table(
    shown,
    "claims",
    caption="Claims of the three papers and controls: difference in points [95 % interval over tasks], one-sided t "
    "tests over tasks with seeds averaged first, Holm's correction, power at a margin of 2 points",
    profile="reference",
)
shown

# %% tags=["nbval-check-output"]
own = claims[claims["paper"] != "control"]
verdict = own["verdict"].value_counts().reindex(["holds here", "does not hold here"], fill_value=0)
counted = (own["side"] == "counted") & (own["verdict"] == "holds here")
points = claims.set_index("compared")[["mean", "low", "high"]].astype(float)
gain = studies.intervals(100 * points)
Markdown(
    f"Of {len(own)} claims of the papers **{verdict.iloc[0]} hold here** ({counted.sum()} of them by counting), "
    f"{verdict.iloc[1]} do not, and {len(own) - verdict.sum()} cannot be told or have no runs. In points, the Hadamard "
    f"adapter less the head alone is {gain['Hadamard − head alone']}, less both norms with as many parameters "
    f"{gain['Hadamard − both norms']}, and less full fine-tuning {gain['Hadamard − full fine-tuning'].iloc[0]}."
)

# %% [markdown]
# The rates of the first ten rows were picked on held-out rows, task by task. Did the best one lie inside what was tried?

# %% tags=["nbval-check-output"]
for plan in ("fair", "wide"):
    rates = studies.picked_rates(store.only(plans[plan]))
    edge = rates[rates["edge"]]
    where = studies.listed(edge["label"] + " on " + edge["task"])
    print(f"{plan}: {len(edge)} of {len(rates)} picked rates at the edge of what was tried: {where}")

# %% [markdown]
# ## What a parameter buys
#
# Eight methods on six tasks with 300 training rows and five seeds, each at a learning rate that was picked on held-out
# rows of the task. A mark is the mean over tasks of what the method scores above the head alone on the same rows, the
# bar its 95 % interval over tasks. Parameters are those that a file of the adapter holds, without the head, on a
# logarithmic axis. To the right is dearer and up is better.

# %%
NAMES = {
    "HeadOnly()": "head alone",
    "LayerNormTuning()": "attention norms",
    'LayerNormTuning(norm="both")': "both norms",
    "Hadamard()": "Hadamard",
    "BitFit()": "BitFit",
    "LoRA()": "LoRA",
    "Pfeiffer()": "Pfeiffer",
    "FullFineTuning()": "full fine-tuning",
}
family = {method: name for name, methods in studies.FAMILIES.items() for method in methods}
fair = studies.short_names(studies.picked_runs(store.only(plans["fair"])))
fair = fair.assign(family=fair["method"].map(family), method=fair["label"].map(NAMES))
fair = studies.in_order(fair, "method", NAMES.values()).rename(columns={"trained": "parameters"})
alone = fair[fair["method"] == "head alone"].set_index(["task", "seed"])["score"].rename("alone")
zoo = fair.join(alone, on=["task", "seed"])
zoo["score"] = 100 * (zoo["score"] - zoo["alone"])
zoo = zoo[["task", "method", "family", "seed", "parameters", "stored", "score"]]
ht.plotting.publish(
    ht.plotting.score_against_parameters(zoo, metric="Accuracy over the head alone (points)"),
    "adapter_zoo",
    table=zoo,
    caption="Eight methods on six tasks with 300 training rows: gain over the head alone against stored parameters",
)

# %% [markdown]
# The grey staircase is the best mean that so many parameters, or fewer, have reached. Bars are intervals of single
# methods; two methods are compared by the table above, task by task.
#
# Fourteen methods on SST-2 with 1,000 training rows, and every GLUE task that has runs, one run each
# ([notebook 02](02_adapter_zoo.ipynb)). The first row is what one answer for all rows would score: a method near it
# has learned nothing there, and `†` marks such a run. A dash stands for what no plan names, and "not run" for what a
# plan names and nobody ran. The learning rates were picked on two classification tasks,
# and a rate that suits those can be too high for a regression such as STS-B.

# %% tags=["nbval-check-output"]
runs = studies.method_scores(store.only([*plans["glue"], *plans["zoo"]]))
grid = studies.score_grid(runs, plans["glue"])
beside = runs[(runs["task"] != "sst2") & runs["task"].isin(grid.columns)]
ht.plotting.save_table(
    grid,
    "scores_glue",
    caption="1,000 training rows of each task, official dev set, metric of GLUE times 100: mean ± sd "
    "(seeds); †n: n runs score no more than a point above one answer for all "
    f"({beside['failed'].sum()} of {len(beside)} besides SST-2)",
    profile="reference",
)
grid

# %% tags=["nbval-check-output"]
Markdown(
    f"Besides SST-2, **{beside['failed'].sum()} of {len(beside)}** runs score no more than a point above "
    "one answer for all rows: 1,000 rows and this small backbone are not enough for most of GLUE, "
    "whatever the method."
)

# %% [markdown]
# ## Hadamard and its controls
#
# The same runs task by task: the head alone, the norms of the attention, both norms (exactly as many parameters as the
# Hadamard adapter with its norm), the Hadamard adapter and full fine-tuning. A gain over the head alone is what tuning
# inside the backbone brings; a gain over both norms is what $W$ and $b$ bring that as many other numbers would not.

# %%
CONTROLS = ["head alone", "attention norms", "both norms", "Hadamard", "full fine-tuning"]
scores = studies.in_order(studies.mark_failed(fair, store), "method", CONTROLS)
scores = scores[["task", "method", "seed", "metric", "score", "n", "constant"]]
ht.plotting.publish(
    ht.plotting.score_by_method(scores, metric="Accuracy"),
    "hadamard_against_controls",
    table=scores,
    caption="Hadamard against the head alone, norms with as many parameters and full fine-tuning; 300 training rows",
)

# %% [markdown]
# Then the course of training on three tasks, of the runs of [notebook 01](01_hadamard_adapter.ipynb). In the first stage the head is trained on the frozen backbone;
# in the second the head is frozen and the vectors and the norm are trained. The score is that on held-out rows, so
# a step upwards where the second stage begins is the adapter's own work. Methods with one stage have one line
# throughout.

# %%
METHODS = ["HeadOnly", "LayerNormTuning", "Hadamard", "FullFineTuning"]
spine = store.only(plans["spine"])
curves = studies.short_names(studies.history_table(spine))
curves = curves.query("task in ['sst2', 'tweets-polarity', 'tweets-intensity'] and split == 'validation'")
curves = studies.in_order(curves, "method", METHODS)
ht.plotting.publish(
    ht.plotting.training_curves(curves),
    "hadamard_training_curves",
    table=curves,
    caption="Two-stage training, scored on held-out rows",
)

# %% [markdown]
# And what the vectors learned on the four polarity tasks: the spread of $W - 1$ and of $b$ over coordinates, layer
# by layer. At the start of training both are zero everywhere. How alike these vectors are across tasks is the
# question of [notebook 07](07_cross_task_similarity.ipynb), and whether tasks can share them that of
# [notebook 09](09_shared_adapters.ipynb).

# %%
vectors = studies.short_names(studies.vector_table(spine))
vectors = vectors[vectors["task"].str.endswith("-polarity")]
vectors["task"] = vectors["task"].str.removesuffix("-polarity")
ht.plotting.publish(
    ht.plotting.vectors_by_layer(vectors),
    "hadamard_vectors_by_layer",
    table=vectors,
    caption="Learned W − 1 and b of the Hadamard adapter, by layer and task",
)

# %% [markdown]
# ## Few labels
#
# UniPELT combines LoRA, prefix tuning and a bottleneck adapter and lets gates weigh them. Its variants and two
# controls with $K$ training rows ([notebook 03](03_unipelt_and_prompts.ipynb)), by the protocol of the UniPELT
# paper with a smaller budget. With few rows a run depends on which rows it was given: the small dots are the seeds,
# and where they lie apart an order of methods means little.

# %%
UNIPELTS = {
    ht.HeadOnly(): "HeadOnly",
    ht.FullFineTuning(): "full fine-tuning",
    ht.UniPELT(gated=None): "UniPELT, no gates",
    ht.UniPELT(): "UniPELT",
    ht.prompt_unipelt(): "PromptTuning + UniPELT",
    ht.ia3_prefix_bottleneck(): "(IA)³ + prefix + bottleneck",
    ht.stacked_unipelt(): "UniPELT × 3",
}
few = studies.low_resource_table(store, plans["unipelt"], UNIPELTS)
ht.plotting.publish(
    ht.plotting.score_against_rows(few, metric="Accuracy"),
    "unipelt_low_resource",
    table=few,
    caption="UniPELT, its variants and two controls on SST-2 with K training rows",
)

# %% [markdown]
# ## Few weights
#
# Adapters that were pruned before training ([notebook 04](04_sparse_adapters.ipynb)): the score against the share
# of weights removed, a line per scorer. All scores are differences to the unpruned run of the same seed, so that 0
# means nothing was lost. The hollow marks are controls, which keep as many weights as the mask but choose them in
# another way. Only a mask that beats its controls has chosen anything.

# %%
sparse = studies.short_names(studies.sparse_table(store.only(plans["sparse"]))).drop(columns="key")
sparse = sparse[sparse["task"].isin(sparse["task"][sparse["sparsity"] == 0])]  # tasks with an unpruned run
ht.plotting.publish(
    ht.plotting.score_against_sparsity(sparse, metric="Accuracy"),
    "sparse_score_against_sparsity",
    table=sparse,
    caption="Score against the share removed, with controls",
)

# %% [markdown]
# Four other adapters, as differences to the unpruned run of the same seed:

# %%
others = studies.short_names(studies.sparse_table(store.only(plans["sparse_others"]))).drop(columns="key")
others = studies.sparse_methods(others, [0.0, 0.4, 0.6, 0.8, 0.9], bottlenecks={"Houlsby": 32})
ht.plotting.publish(
    ht.plotting.score_against_sparsity(others, metric="Accuracy"),
    "sparse_other_adapters",
    table=others,
    caption="Score less that of the unpruned run of the same seed, four other adapters",
)

# %% [markdown]
# ## What was run, and what was not
#
# The plan files name more runs than have been made, and a figure is only as complete as its plan. `refused` counts
# runs that ended in an error that is part of the result, such as a scorer that cannot tell the weights of an
# adapter apart. `hadamard sweep PLAN --store DIR` makes the runs that are missing.

# %% tags=["nbval-check-output"]
coverage = studies.plan_coverage(store, plans)
ht.plotting.save_table(
    coverage,
    "reference_runs",
    caption="Runs of the plan files: planned, done, refused and missing, the missing ones by method",
    profile="reference",
)
coverage

# %% [markdown]
# ## All of them
#
# What lies in the folder now, from this notebook and the studies before it, and how many rows each figure stands
# on:

# %% tags=["nbval-check-output"]
figures = studies.figure_list(os.environ.get("HADAMARD_FIGURES") or "../figures")
figures.reset_index()

# %% [markdown]
# ## Finding

# %% tags=["nbval-check-output"]
done = store.load().drop_duplicates("key")
total = coverage[["planned", "done", "refused", "missing"]].sum()
Markdown(
    f"**{len(figures)} figures** and three tables stand on {len(done)} runs, "
    f"{done['seconds'].sum() / 3600:.1f} hours of training on {studies.listed(done['device'].unique())}; "
    f"of {total['planned']} planned runs {total['missing']} are missing and {total['refused']} were "
    "refused."
)

# %% [markdown]
# **What this does not show.** A catalogue shows what could be asked. Whether a difference in these figures is more
# than luck is asked in the notebook that the section names, with intervals, controls and the number of seeds. Runs
# that two plans share are counted once among the runs and in each plan that names them.
