# %% [markdown]
# # What do pruning masks have in common?
#
# A mask that is found before training (SparseAdapter, He et al. 2022) says which entries of an adapter a scorer would keep. Do masks of
# different tasks, seeds and scorers agree, and on *what*: on single weights, on units and hidden coordinates, or only on how many
# weights a layer deserves? Three illusions stand in the way. A global threshold concentrates masks in some tensors, and two masks
# that do so overlap for that reason alone. Within a tensor, scores favour some rows and columns, and masks overlap for that reason.
# And runs of one seed start from the same weights whatever their task, so that any scorer that looks at weights seems to find what
# tasks share.

# %% tags=["parameters"]
import os

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")  # whose width the figures have
PLANS = (
    None if "HADAMARD_STORE" in os.environ else ("sparse", "sparse_examples")
)  # None: all runs of the store
SPARSITY = 0.8  # share removed of the masks that are compared

# %% tags=["nbval-check-output"]
import pandas as pd

import hadamard_toolkit as ht
from hadamard_toolkit.runs.plan import load_plan

store = ht.RunStore(STORE)
if PLANS:
    store = store.only([spec for plan in PLANS for spec in load_plan(f"{STORE}/{plan}.toml")])
runs = ht.studies.mask_runs(store)
facts = pd.DataFrame([run.facts for run in runs])
print(f"{len(facts)} pruned runs in the store; of these without controls, seeds by adapter, task and scorer:")
plain = facts[facts["control"] == "none"]
count = plain.groupby(["adapter", "task", "scorer", "sparsity"])["init_seed"].nunique().unstack("sparsity")
print(count.fillna(0).astype(int).to_string())
adapter = plain.loc[plain["sparsity"] == SPARSITY, "adapter"].mode().iloc[0]
chosen = [run for run in runs if (run.adapter, run.sparsity) == (adapter, SPARSITY)]
print(f"\ncompared below: {adapter} at {100 * SPARSITY:.0f} % removed")

# %% [markdown]
# ## Where masks fall
#
# The share kept of each layer, and of the two sides of the bottleneck. The overall share is the same for all masks. One mask per scorer,
# task and seed: those that were scored on other examples of the same task come in below.

# %%
own = [run for run in chosen if run.control == "none" and run.data_seed in (None, run.init_seed)]
density = ht.studies.density_table(own)
density = density.rename(columns={"init_seed": "seed"})
density = density.assign(adapter=density["task"].str.removeprefix("embedded/"))
figure = ht.plotting.density_by_layer(density, venue=VENUE)
ht.plotting.save(
    figure,
    "mask_density_by_layer",
    table=density,
    profile="reference",
    caption="Share of an adapter's weights that pruning at initialisation keeps, by layer, scorer and task",
)
figure

# %% tags=["nbval-check-output"]
tensors = ht.studies.density_table(own, by="tensor")
side = tensors["tensor"].str.extract(r"\.(\w+)\.weight$")[0].rename("side")
shares = tensors.groupby(["scorer", side])[["kept", "entries"]].sum()
print("share kept of each side of the bottleneck, all layers, tasks and seeds")
print((shares["kept"] / shares["entries"]).unstack("side").round(3).to_string())

# %% [markdown]
# ## Overlap beyond chance
#
# $J = |A \cap B| / |A \cup B|$. For independent masks of densities $p$ and $q$ it is $pq/(p + q - pq)$ on average, but only if every tensor
# has those densities. Here the null keeps the number of entries of *each tensor*: what two masks share of a tensor is then
# hypergeometric, the sum over tensors close to normal, and
#
# $$\text{overlap beyond chance} = \frac{J - J_0}{1 - J_0},$$
#
# which is 0 for independent masks and 1 for the same. It is not the share of entries that two masks have in common for a reason: where
# that is 0.5, it is about 0.3. First scorer against scorer, in four cells:

# %%
overlaps = ht.studies.overlap_table(chosen)
figure = ht.plotting.overlap_matrices(overlaps, venue=VENUE)
ht.plotting.save(
    figure,
    "mask_overlap",
    table=overlaps,
    profile="reference",
    caption="Chance-corrected overlap of masks between scorers",
)
figure

# %% [markdown]
# ## The shared initialisation
#
# One scorer at a time. If masks knew something of tasks, masks of one task from *different* initialisations would overlap more than
# those of different tasks. If they know the initialisation, masks of different tasks from *one* initialisation overlap.
# (`random` and `erdos-renyi` masks look at nothing, but are drawn with the seed of the run: they show what a shared seed can do.)
# Where weights and task are both the same, the examples differ: two draws of 64 of the 320 training rows, and all 320. The printed mean
# pools pairs of two draws of 64 with pairs of 64 and all 320, which hold those 64. It is no ceiling for masks of 320 examples: two separate
# draws of 320 were never made.
#
# A second reading takes the third illusion out. Its null keeps the number of entries in *each row and each column* of each tensor, as the
# random mask of maximum entropy with these sums has it. What is above the first null and not above this one is a common liking for
# units of the bottleneck and for hidden coordinates, not for single weights.

# %% tags=["nbval-check-output"]
cells = ht.studies.overlap_cells(overlaps)
named = cells.assign(
    init=cells["same_init"].map({True: "same init", False: "other init"}),
    task=cells["same_task"].map({True: "same task", False: "other task"}),
    shown=[
        f"{mean:+.3f} ({n})" if n else "no pairs (0)"
        for mean, n in cells[["corrected", "pairs"]].itertuples(index=False)
    ],
)
named["margins"] = [
    f"{mean:+.3f}" if n else "no pairs"
    for mean, n in cells[["margin_corrected", "pairs"]].itertuples(index=False)
]
print("mean overlap beyond chance (pairs of masks), given the density of each tensor:")
print(named.pivot(index="scorer", columns=["init", "task"], values="shown").to_string())
print("\ngiven the rows and columns of each tensor as well:")
print(named.pivot(index="scorer", columns=["init", "task"], values="margins").to_string())
made = {
    run.key: run.data_seed not in (None, run.init_seed) for run in chosen
}  # 64 examples of their own draw
drawn = overlaps[overlaps["same_init"] & overlaps["same_task"] & overlaps["same_scorer"]]
drawn = drawn.assign(draws=drawn["key_a"].map(made).astype(int) + drawn["key_b"].map(made).astype(int))
print("\nsame init, same task, by the examples that the two masks were scored on:")
for (scorer, draws), part in drawn.groupby(["scorer_a", "draws"]):
    kind = "64 and all 320" if draws == 1 else "two draws of 64"
    print(f"{scorer:<6} {kind:<16} {part['corrected'].mean():+.3f} ({len(part)})")
naive = cells[~cells["same_init"] & ~cells["same_task"]].set_index("scorer")
print("\nother initialisation, other task, by the null without tensors and by the one with them:")
print(naive[["naive", "corrected"]].round(3).to_string())

# %%
figure = ht.plotting.overlap_by_cell(cells, venue=VENUE)
ht.plotting.save(
    figure,
    "mask_overlap_cells",
    table=cells,
    profile="reference",
    caption="Overlap of masks by shared initialisation and shared task",
)
figure

# %% [markdown]
# ## Dead units
#
# A unit of the bottleneck that lost all its inputs, or all its outputs, computes nothing, and what is kept of it is wasted. How many, and how
# many would chance leave, with as many entries kept in each tensor?

# %% tags=["nbval-check-output"]
dead = ht.studies.dead_units([run for run in chosen if run.control == "none"])
each = dead.groupby(["scorer", "key"])[["units", "dead", "expected"]].sum().groupby("scorer").mean()
print("units per adapter, dead ones and those expected by chance (mean over runs)")
print(each.round(2).to_string())
above = (dead["dead"] > dead["high"]).groupby(dead["scorer"]).mean()
print("\nshare of bottlenecks with more dead units than the 95 % interval of chance:")
print(above.round(2).to_string())

# %% [markdown]
# **Finding.** Of masks of one scorer, what overlaps beyond chance across tasks? Over scorers that look at data (SNIP and GraSP), with the range
# over the pairs at hand (pairs share masks, so no interval for other seeds or tasks follows), first given the densities of tensors, then
# given their rows and columns:

# %% tags=["nbval-check-output"]
aware = cells[cells["scorer"].isin(["snip", "grasp"])]
for (scorer, init, task), row in aware.set_index(["scorer", "same_init", "same_task"]).iterrows():
    if row["pairs"]:
        print(
            f"{scorer:<6} {'same' if init else 'other'} initialisation, {'same' if task else 'other'} task: "
            f"{row['corrected']:+.3f} [{row['least']:+.3f} to {row['most']:+.3f}], "
            f"{100 * row['above']:.0f} % of {row['pairs']:.0f} pairs above chance; "
            f"{row['margin_corrected']:+.3f} [{row['margin_least']:+.3f} to {row['margin_most']:+.3f}], "
            f"{100 * row['margin_above']:.0f} %"
        )
far = aware[~aware["same_init"] & (aware["pairs"] > 0)]
weights = (far["margin_above"] * far["pairs"]).sum() / far["pairs"].sum()
print(
    f"from other initialisations, {100 * (far['above'] * far['pairs']).sum() / far['pairs'].sum():.0f} % of {far['pairs'].sum()} pairs "
    f"are alike beyond densities and {100 * weights:.0f} % beyond rows and columns (2.5 % by chance)"
)
