# %% [markdown]
# # What do pruning masks have in common?
#
# SparseAdapter (He et al. 2022) prunes an adapter *before* it is trained. A **scorer** gives every weight a score,
# the weights with the lowest scores are set to zero for good, and the **mask** says which weights stay. If masks of
# different tasks agree, the mask says something about the backbone; if masks of one task agree and those of others
# do not, it says something about the task. So do masks of different tasks, seeds and scorers agree, and on *what*:
# on single weights, on whole units, or only on how many weights each layer deserves?
#
# ![Two masks, what they share, and what chance would share](pictures/mask_overlap.svg)
#
# Three illusions stand in the way of an answer.
#
# 1. One threshold for the whole adapter concentrates masks in some tensors, and two masks that do so overlap for
#    that reason alone.
# 2. Within a tensor, scores favour some rows and columns, and masks overlap for that reason too.
# 3. Runs of one seed start from the same weights, whatever their task. Any scorer that looks at weights then seems
#    to find something that tasks share.

# %% [markdown]
# ## Which masks there are
#
# Six scorers. `random` draws weights evenly; `erdos-renyi` draws each tensor's share by its shape; `magnitude`
# keeps the largest weights and `synflow` those on the strongest paths through the adapter. None of these four looks
# at data. `snip` and `grasp` do: they use the gradients of 320 training examples, and ask how much the loss, or the
# gradient, would change without a weight. The table counts seeds by the share of weights *removed*. Where it says
# 0, such a mask was not made: the second task was run at one sparsity and with one seed.

# %% tags=["nbval-check-output"]
import pandas as pd
from IPython.display import Markdown

import hadamard_toolkit as ht
from hadamard_toolkit import studies

SPARSITY = 0.8  # share removed of the masks that are compared
pd.options.display.float_format = "{:.3f}".format
pd.options.display.width = 120

store = ht.reference("sparse", "sparse_examples")
runs = studies.mask_runs(store)
masks = studies.masks_at(runs, SPARSITY)
studies.mask_overview(runs)

# %% [markdown]
# ## Where masks fall
#
# Of the adapter as a whole every mask keeps the same share. The figure shows how much of *each layer* it keeps, one
# mask per scorer, task and seed. A flat line treats all layers alike.

# %%
usual = studies.of_own_seed(masks)
density = studies.densities(usual)
ht.plotting.publish(
    ht.plotting.density_by_layer(density),
    "mask_density_by_layer",
    table=density,
    caption="Share of an adapter's weights that pruning at initialisation keeps, by layer, scorer and task",
)

# %% [markdown]
# The two scorers that look at data prefer the upper layers; the others are flat. A bottleneck adapter has two
# matrices in each layer, one that leads down into its few units and one that leads up again. How much is kept of
# each:

# %% tags=["nbval-check-output"]
studies.kept_by_side(usual)

# %% [markdown]
# SNIP keeps about twice as much of the way up as of the way down. Both preferences alone make two masks overlap,
# which is the first illusion.
#
# ## Overlap beyond chance
#
# The overlap of two masks $A$ and $B$ is measured by Jaccard's index $J = |A \cap B| / |A \cup B|$. For independent
# masks of densities $p$ and $q$ it is $J_0 = pq/(p + q - pq)$ on average, but only if every tensor has those
# densities. Here the null hypothesis keeps the number of entries of *each tensor*: what two masks share of a tensor
# is then hypergeometric, and the sum over tensors is close to normal.
#
# $$\text{overlap beyond chance} = \frac{J - J_0}{1 - J_0}$$
#
# is 0 for independent masks and 1 for identical ones. It is not the share of entries that two masks have in common
# for a reason: where that is 0.5, it is about 0.3. The matrices compare scorer with scorer in four cells, by
# whether two masks have the same initialisation and the same task.
#
# **Why some cells are blank.** A scorer that does not look at data has exactly one mask for one initialisation and
# one task. There is no second mask to compare it with, so the diagonal of the first panel is blank for four
# scorers. SNIP and GraSP have several masks there, as they were scored on different examples.

# %%
overlaps = studies.overlap_table(masks)
ht.plotting.publish(
    ht.plotting.overlap_matrices(overlaps),
    "mask_overlap",
    table=overlaps,
    caption="Chance-corrected overlap of masks between scorers",
)

# %% [markdown]
# ## The shared initialisation
#
# Now one scorer at a time. If masks knew something of their task, masks of one task from *different*
# initialisations would overlap more than those of different tasks. If what they know is the initialisation, masks
# of different tasks from *one* initialisation overlap. The random scorers look at nothing, but they draw with the
# seed of the run: they show what a shared seed alone can do, namely everything. In brackets stand the pairs of
# masks; `no pairs` means the same as a blank above.

# %% tags=["nbval-check-output"]
cells = studies.overlap_cells(overlaps)
studies.overlap_grid(cells)

# %% [markdown]
# A second null hypothesis takes the second illusion out as well. It keeps the number of entries in *each row and
# each column* of every tensor, like a random mask of maximum entropy with these sums. A row or a column belongs to
# one unit of the bottleneck or to one hidden coordinate. So what is above the first null and not above this one is
# a common liking for units and coordinates, not an agreement on single weights.

# %% tags=["nbval-check-output"]
studies.overlap_grid(cells, "margin_corrected")

# %%
ht.plotting.publish(
    ht.plotting.overlap_by_cell(cells),
    "mask_overlap_cells",
    table=cells,
    caption="Overlap of masks by shared initialisation and shared task",
)

# %% [markdown]
# Does the null without tensors mislead? The same numbers under one density for the whole adapter: for SNIP and
# GraSP everything looks more alike, also across tasks and initialisations, for no reason but the layers that they
# favour.

# %% tags=["nbval-check-output"]
studies.overlap_grid(cells, "naive")

# %% [markdown]
# Where initialisation *and* task are the same, SNIP and GraSP differ by their examples alone: two draws of 64 of
# the 320 rows, or 64 and all 320, which hold those 64. This mean is therefore no ceiling for masks of 320 examples;
# two separate draws of 320 were never made.
#
# ## Dead units
#
# A unit of the bottleneck that lost all its inputs, or all its outputs, computes nothing, and what is kept of it is
# wasted. `dead` is the mean number of such units per adapter, `expected` what chance would leave with as many
# entries kept in each tensor, and `above` the share of bottlenecks with more dead units than the 95 % interval of
# chance.

# %% tags=["nbval-check-output"]
dead = studies.dead_by_scorer(masks)
dead

# %% tags=["nbval-check-output"]
worst = dead["dead"].idxmax()
Markdown(
    f"**{worst}** leaves most units dead: {dead['dead'][worst]:.1f} of {dead['units'][worst]:.0f} on "
    f"average, where chance leaves {dead['expected'][worst]:.1f}; scorers without any: "
    f"{studies.listed(dead.index[dead['dead'] == 0])}."
)

# %% [markdown]
# ## Finding
#
# Of the masks of one scorer that looks at data, SNIP or GraSP: what do they share once neither the seed nor the
# densities explain it?

# %% tags=["nbval-check-output"]
aware = cells[cells["scorer"].isin(["snip", "grasp"])]
beyond = studies.alike_beyond(aware)
same = aware.query("same_init and not same_task")["corrected"]
far = aware.query("not same_init and not same_task")["corrected"]
Markdown(
    f"Masks of different tasks overlap by {same.min():.3f} to {same.max():.3f} beyond chance when they "
    f"start from the same weights, and by {far.min():.3f} to {far.max():.3f} when they do not; of "
    f"{beyond['pairs']} pairs from different weights **{100 * beyond['densities']:.0f} %** are alike "
    f"beyond the densities of tensors and **{100 * beyond['margins']:.0f} %** beyond those of rows and "
    "columns (2.5 % by chance): what is common is a liking for units and coordinates, not for weights."
)

# %% [markdown]
# **What this does not show.** There are two tasks, one of them with one seed, and the pairs share masks; so these
# are means and ranges over the pairs at hand, and no interval for other seeds or tasks follows. The tests are about
# two given masks. In simulations they find a planted overlap of 0.05 of the entries in 99 of 100 pairs, and one of
# 0.01 in 17 of 100, so an agreement on very few weights could have been missed. All masks are of one adapter
# (Pfeiffer) on one backbone, at one sparsity.
