# %% [markdown]
# # How alike are the Hadamard vectors of different tasks?
#
# Chen et al. (2023) saw that Hadamard adapters trained on different tasks look alike, and asked whether one of them
# could serve all tasks. Alike compared with what? The raw vectors are no evidence. $W$ starts at 1 everywhere and
# moves little, so the cosine of any two of them is near 1, whatever was learned. This notebook compares what was
# *learned*, $\Delta W = W - 1$ and $b$, and it places every similarity on a line between two others:
#
# * the **floor**: the same numbers with the coordinates of each vector shuffled. It is what two vectors of this
#   kind share by chance;
# * the **ceiling**: the same task trained again from another seed. Training is noisy, so even one task is not
#   perfectly like itself;
# * **between** tasks lies the similarity in question. Near the floor, tasks learn different things; near the
#   ceiling, the same thing.
#
# The last part asks what no cosine can answer: what happens if the vectors of one task are put into the model of
# another?

# %% tags=["nbval-check-output"]
import pandas as pd
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit import studies

pd.options.display.float_format = "{:.3f}".format
pd.options.display.width = 120

store = ht.reference("spine")
chosen = studies.comparable_runs(store)
vectors = studies.of_runs(studies.vector_table(store), chosen)
pairs = studies.short_names(studies.vector_similarity(vectors, outliers=4))
summary = studies.similarity_summary(pairs)
contrast = studies.similarity_contrast(summary)
Markdown(
    f"Compared: {len(chosen)} runs of `{chosen['label'].iloc[0]}` on {chosen['backbone'].iloc[0]}, each "
    f"trained on {chosen['train_rows'].iloc[0]} rows, of **{chosen['task'].nunique()} tasks with "
    f"{chosen['seed'].nunique()} seeds** each."
)

# %% [markdown]
# Only runs that differ in nothing but task and seed can be compared, so the runs above share backbone, adapter and
# protocol. Of the nine tasks in the store SST-2 is not among them, as its runs saw more training rows.
#
# ## Between floor and ceiling
#
# In each layer, for the vectors $x, y \in \mathbb R^d$ of two runs,
#
# $$\cos(x, y) = \frac{\langle x, y\rangle}{\lVert x\rVert\,\lVert y\rVert}, \qquad
# x = W - 1 \quad\text{or}\quad x = b - \bar b\,\mathbf 1 .$$
#
# The mean of $b$ is taken out because the LayerNorm behind it subtracts it: $b + c\mathbf 1$ is the same model for
# every $c$. Only runs of *different* seeds are compared, between tasks as within one. Runs of one seed share the
# first weights of the head, and a ceiling between seeds would then not measure the same thing as a comparison
# within one.

# %%
cell = studies.one_cell(summary)
ht.plotting.publish(
    ht.plotting.number_line(cell),
    "similarity_line",
    table=cell,
    caption="Similarity of Hadamard vectors between tasks on a line from floor to ceiling",
)

# %% [markdown]
# The same in numbers, with 95 % intervals for other *tasks* of this kind. Pairs that share a task are not
# independent, so the interval is a jackknife: every task is left out in turn, and Student's $t$ is taken over the
# pseudo-values. `between` is the similarity of different tasks, `within` that of one task with itself under another
# seed. Two more readings guard against artefacts:
#
# * `removed` = 4 leaves out the four coordinates that are largest over all runs. BERT-like models have a few
#   outlier dimensions that dominate a cosine; were the similarity their work, it would fall here. Spearman's rank
#   correlation guards against the same.
# * `disattenuated` divides by the ceiling (Spearman 1904). It estimates how alike the vectors would be without the
#   noise of training, and is left out where a task is not more like itself than shuffled coordinates are.

# %% tags=["nbval-check-output"]
studies.contrast_table(contrast)

# %% [markdown]
# The choice of measure hardly matters, and neither do the outliers. Layer by layer:

# %%
by_layer = studies.one_cell(contrast, layer=None)
ht.plotting.publish(
    ht.plotting.similarity_by_layer(by_layer),
    "similarity_by_layer",
    table=by_layer,
    caption="Similarity of Hadamard vectors between tasks by layer, with its ceiling and its floor",
)

# %% [markdown]
# ## Which tasks are alike?
#
# The matrices show every pair of tasks; the framed diagonal is a task with itself. Tasks are ordered by
# hierarchical clustering of $b$ (average linkage on $1 - \cos$). The order makes the matrices easier to read and is
# no finding: a task whose training is noisier is less like *all* others, whatever its kin. One pair is special: the
# polarity and the intensity of tweets are two readings of the same sentences.

# %%
clusters = studies.cluster_tasks(studies.similarity_matrix(summary, vector="bias"))
ht.plotting.publish(
    ht.plotting.similarity_matrices(cell, order=clusters.attrs["order"]),
    "similarity_matrices",
    table=cell,
    caption="Similarity of Hadamard vectors between tasks, with each task's ceiling on the diagonal",
)

# %% [markdown]
# Two questions about whole matrices. Do $W$ and $b$ see the same kinship? And does the kinship follow what tasks
# ask for, sentiment or something else? As the pairs of a matrix are not independent, both are answered by Mantel's
# test (1967): it permutes the tasks of one matrix, rows and columns together, and counts how often the two then
# agree at least as well, by Spearman's $\rho$. Noise alone would make both answers "yes", since a noisy task is
# less like all others in $W$ as in $b$. So the tests use disattenuated similarities, without the tasks that have
# none. `p_floor` is the least $p$ that any outcome could have had.

# %% tags=["nbval-check-output"]
sentiment = sorted(task for task in set(cell["task_a"]) if task.endswith(("polarity", "intensity")))
kinship = studies.kinship_tests(summary, sentiment)
kinship

# %% tags=["nbval-check-output"]
closest = cell[cell["task_a"] != cell["task_b"]].nlargest(1, "disattenuated").iloc[0]
Markdown(
    "Left out, as no more alike to itself than shuffled coordinates: "
    f"**{studies.listed(kinship.attrs['left_out'])}**. Most alike without the noise: {closest['task_a']} "
    f"and {closest['task_b']} ({closest['disattenuated']:.2f} in "
    f"{'b' if closest['vector'] == 'bias' else 'W − 1'})."
)

# %% [markdown]
# With seven tasks the second test cannot go below 1/21, so one significant result there is weak evidence, and the
# tests speak of other ways of pairing these tasks, not of other tasks.
#
# Was it necessary to leave out runs of one seed? The same pairs of different tasks, by whether the two runs share
# their seed:

# %% tags=["nbval-check-output"]
studies.seed_effect(studies.one_cell(pairs))

# %% [markdown]
# The means hardly differ, so a shared seed makes these vectors no more alike; leaving those pairs out costs little
# and is safe.
#
# ## Transplants
#
# Vectors that are alike need not do the same, and different ones may. So the vectors of task A, with the norms
# trained beside them, are put into the model of task B and score B's test rows: once with B's head as it is, and
# once with a head trained anew on B's training rows. Three comparisons give the gain a scale: the bare backbone
# (gain 0), B's own vectors, and A's vectors with the coordinates of each layer shuffled, which are as far from the
# identity but in no learned direction. Target and source have the same seed.

# %%
transfers = studies.transfer_table(store, chosen["key"])
ht.plotting.publish(
    ht.plotting.transplant_gains(transfers),
    "transplant_gains",
    table=transfers,
    caption="What the vectors of one task bring in the model of another",
)

# %% [markdown]
# On the tasks that ask for a sentiment, whose vectors help? Means over targets, with the head retrained; the
# intervals are for other tasks of this kind. Accuracy and rank correlation have no common unit and are not
# averaged; a single target has no interval.

# %% tags=["nbval-check-output"]
gains = studies.transfer_gains(transfers, sentiment)
gains

# %% [markdown]
# ## Finding

# %% tags=["nbval-check-output"]
b = studies.one_cell(contrast).query("vector == 'bias'").set_index("quantity")
helped = gains.query("metric == 'accuracy'").set_index("vectors")
kin, other = studies.intervals(helped.loc[["the same kind", "another kind"]], times=100)
Markdown(
    f"The biases of different tasks have a cosine of **{b['value']['between']:.2f}**, well above the "
    f"floor ({b['value']['floor']:.2f}) and short of the {b['value']['within']:.2f} of one task with "
    f"itself by {b['value']['gap']:.2f} [{b['low']['gap']:.2f}, {b['high']['gap']:.2f}]; and on "
    f"{helped['n'].iloc[0]} sentiment targets the vectors of another sentiment task gain **{kin}** "
    f"points of accuracy over the bare backbone, where those of another kind of task gain {other}."
)

# %% [markdown]
# **What this does not show.** All intervals are 95 % and for other tasks like these eight, small ones that share a
# backbone, with three seeds; for the transplants each target has one seed, so what is due to the task and what to
# its seed cannot be told apart. Four of the five sentiment tasks differ in their texts alone, so "the same kind" is
# a narrow one. Gains are over a bare backbone whose head was retrained in the same way, so that what a new head
# brings is not counted.
