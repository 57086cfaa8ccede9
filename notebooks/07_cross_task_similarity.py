# %% [markdown]
# # How alike are the Hadamard vectors of different tasks?
#
# Chen et al. (2023) saw that Hadamard adapters trained on different tasks look alike and asked whether one could serve them all.
# Alike compared with what? Raw vectors are no evidence: $W$ starts at 1, so the cosine of any two is near 1. This notebook compares
# what was *learned*, $\Delta W = W - 1$ and $b$, and puts each similarity between two others: a **floor**, the same numbers with
# their coordinates permuted, and a **ceiling**, the same task trained from another seed. The last section asks the question that
# no cosine can answer: what happens if one task's vectors are put into another task's model?

# %% tags=["parameters"]
import os

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")  # whose width the figures have
PLAN = None if "HADAMARD_STORE" in os.environ else f"{STORE}/spine.toml"  # None: all runs of the store
MEASURE = "cosine"  # or "spearman"
OUTLIERS = 4  # coordinates to take out in the second reading

# %% tags=["nbval-check-output"]
import numpy as np
import pandas as pd

import hadamard_toolkit as ht

store = ht.RunStore(STORE)
store = store.only(PLAN) if PLAN else store
runs = store.load().query("method == 'Hadamard' and headline and split == 'test'")
group = [
    "backbone",
    "adapter",
    "protocol",
]  # only runs that differ in nothing but task and seed can be compared
seeds = runs.groupby([*group, "task"])["seed"].nunique()
usable = seeds[seeds >= 2].groupby(group).size()
chosen = runs.set_index(group).loc[[usable.idxmax()]].reset_index()
chosen = chosen[chosen.groupby("task")["seed"].transform("nunique") >= 2]


def label(names):
    return names.str.removeprefix("embedded/")


print(
    f"{chosen['label'].iloc[0]} on {chosen['backbone'].iloc[0]}, {chosen['train_rows'].iloc[0]} training rows"
)
print(f"{chosen['task'].nunique()} tasks, {len(chosen)} runs; seeds per task:")
print(chosen.groupby(label(chosen["task"]))["seed"].nunique().to_string())
others = seeds.groupby(group).size().drop(usable.idxmax())
print(f"left out: {int(others.sum())} tasks under {len(others)} other protocols")

# %% [markdown]
# ## Between floor and ceiling
#
# Per layer, for two runs $x, y \in \mathbb R^d$ of one vector,
#
# $$\cos(x, y) = \frac{\langle x, y\rangle}{\lVert x\rVert\,\lVert y\rVert}, \qquad
# x = W - 1 \quad\text{or}\quad x = b - \bar b\,\mathbf 1 .$$
#
# The mean of $b$ is projected out because the LayerNorm behind it subtracts it: $b + c\mathbf 1$ is the same model for every $c$.
# Only runs of *different* seeds are compared. Runs of one seed share the first weights of the head, so that a ceiling between seeds
# and a comparison within one would not measure the same thing. Intervals are for other *tasks* of this kind: Student's t over the
# pseudo-values of leaving each task out (jackknife), as the pairs of one task are not independent.

# %% tags=["nbval-check-output"]
vectors = ht.studies.vector_table(store)
vectors = vectors[vectors["key"].isin(chosen["key"])]
pairs = ht.studies.vector_similarity(vectors, outliers=OUTLIERS)
summary = ht.studies.similarity_summary(pairs)
contrast = ht.studies.similarity_contrast(summary)
whole = contrast[(contrast["layer"] == ht.studies.ALL_LAYERS) & (contrast["quantity"] != "gap")]
whole = whole.assign(
    shown=[f"{v:+.2f} [{a:+.2f}, {b:+.2f}]" for v, a, b in whole[["value", "low", "high"]].values]
)
print("mean over layers, with 95 % interval; between: other task; within: same task, other seed")
table = whole.pivot(index=["vector", "measure", "removed"], columns="quantity", values="shown")
print(table[["floor", "between", "within", "disattenuated"]].to_string())

# %% [markdown]
# The rows with `removed` > 0 leave out the coordinates that are largest over all runs: were the similarity the work of a few outlier
# dimensions, it would fall. `disattenuated` divides by the ceiling (Spearman 1904), so it estimates how alike the vectors would be
# without the noise of training; it is undefined, and left out, where a task is not more like itself than permuted coordinates are.

# %%
shown = contrast[(contrast["measure"] == MEASURE) & (contrast["removed"] == 0)]
figure = ht.plotting.similarity_by_layer(shown, measure=MEASURE.capitalize(), venue=VENUE)
ht.plotting.save(
    figure,
    "similarity_by_layer",
    table=shown,
    profile="reference",
    caption="Similarity of Hadamard vectors between tasks by layer, with its ceiling and its floor",
)
figure

# %% [markdown]
# ## Which tasks are alike?
#
# Tasks are ordered by hierarchical clustering of $b$ (average linkage on $1 - \cos$). This is an order to read the matrices by and no
# finding: a task with more noise in its training is less like all others, whatever its kin. Tasks that share texts are a limit of
# this set: the polarity and the intensity of tweets are two readings of the same sentences.

# %%
everywhere = {"measure": MEASURE, "removed": 0, "layer": ht.studies.ALL_LAYERS}
matrices = {
    vector: ht.studies.similarity_matrix(summary, vector=vector, **everywhere)
    for vector in ("weight", "bias")
}
clusters = ht.studies.cluster_tasks(matrices["bias"])
cell = summary[(summary[list(everywhere)] == pd.Series(everywhere)).all(axis=1)]
cell = cell.assign(task_a=label(cell["task_a"]), task_b=label(cell["task_b"]))
order = list(label(pd.Series(clusters.attrs["order"])))
figure = ht.plotting.similarity_matrices(cell, order=order, measure=MEASURE.capitalize(), venue=VENUE)
ht.plotting.save(
    figure,
    "similarity_matrices",
    table=cell,
    profile="reference",
    caption="Similarity of Hadamard vectors between tasks, with each task's ceiling on the diagonal",
)
figure

# %% [markdown]
# Two tests on whole matrices, as their pairs are not independent (Mantel 1967: the tasks of one matrix are permuted). Do $W$ and $b$ see
# the same kinship? And does the kinship follow what the tasks ask for, sentiment or something else? Noise alone would say yes: a task
# whose runs agree less with each other is less like all others, in $W$ as in $b$. So both tests are on disattenuated similarity, without the
# tasks that have none. They are about other ways of pairing these tasks, not about other tasks; the least $p$ that any outcome could have
# had stands beside each.

# %% tags=["nbval-check-output"]
freed = {
    vector: ht.studies.similarity_matrix(summary, vector=vector, value="disattenuated", **everywhere)
    for vector in matrices
}
own = pd.DataFrame(
    {vector: pd.Series(matrix.values.diagonal(), matrix.index) for vector, matrix in freed.items()}
)
names = own.dropna().index
print("left out, not above the floor:", ", ".join(label(own.index.difference(names).to_series())) or "none")
freed = {vector: matrix.loc[names, names] for vector, matrix in freed.items()}
sentiment = names.str.contains("polarity|intensity|sst2")
both = np.outer(sentiment, sentiment) | np.eye(len(names), dtype=bool)
design = pd.DataFrame(both.astype(float), names, names)
tests = {"W − 1 with b": (freed["weight"], freed["bias"])}
if 1 < sentiment.sum() < len(names):
    tests |= {f"{name} with 'both are sentiment'": (freed[name], design) for name in freed}
for name, (first, second) in tests.items():
    found = ht.studies.mantel(first, second).iloc[0]
    print(
        f"{name:<34} ρ = {found['value']:+.2f}, p = {found['p']:.4f}, at least {found['p_floor']:.4f}"
        f" ({found['tasks']} tasks, {found['pairs']} pairs)"
    )
top = cell[cell["task_a"] != cell["task_b"]].nlargest(3, "disattenuated")
print("\nmost alike without the noise:")
print(
    top[["task_a", "task_b", "vector", "value", "ceiling", "disattenuated"]].round(2).to_string(index=False)
)
unreliable = cell[(cell["task_a"] == cell["task_b"]) & cell["ceiling"].isna()]
print(
    "not above the floor:",
    ", ".join(f"{t} ({v})" for t, v in unreliable[["task_a", "vector"]].values) or "none",
)

# %% [markdown]
# ## The shared seed
#
# Is it true that runs of one seed are more alike for that reason alone? The same pairs of different tasks, by whether their seed is the same:

# %% tags=["nbval-check-output"]
across = pairs[
    (pairs[list(everywhere)] == pd.Series(everywhere)).all(axis=1) & (pairs["task_a"] != pairs["task_b"])
]
across = across.assign(
    seeds=(across["seed_a"] == across["seed_b"]).map({True: "same seed", False: "other seed"})
)
print(across.groupby(["vector", "seeds"])["value"].agg(["mean", "std", "count"]).round(3).to_string())

# %% [markdown]
# ## Transplants
#
# Similar vectors need not do the same, and different ones may. So: put the vectors of task A (with the norms trained beside them) into the
# model of task B and score B's test rows, with B's own head as it is, and with a head trained anew on B's training rows. Against:
# the bare backbone (gain 0), B's own vectors, and A's vectors with the coordinates of each layer permuted, which are as far
# from the identity in no learned direction. Target and source have the same seed. Measured with
# `hadamard_toolkit.measurements.cross_task_transfer`.

# %% tags=["nbval-check-output"]
transplants = ht.studies.measured_table(store, "transplant")
transplants = transplants[transplants["key"].isin(chosen["key"]) & (transplants["norms"] != "target")]
transplants = transplants.assign(task=label(transplants["task"]), source=label(transplants["source_task"]))
missing = sorted(set(label(chosen["task"])) - set(transplants["task"]))
print(f"targets: {transplants['key'].nunique()} runs, {transplants['n'].min()} test rows or more each")
print("not measured as targets:", ", ".join(missing) or "none")
bare = transplants[transplants["kind"] == "none"].set_index(["key", "head"])["score"]
gains = transplants[transplants["kind"] != "none"]
gains = gains.assign(gain=gains["score"] - gains.set_index(["key", "head"]).index.map(bare))
retrained = gains[gains["head"] == "retrained"]
sources = retrained[retrained["kind"].isin(["own", "source"])]
print("\ngain over the bare backbone, head retrained (rows: targets, columns: whose vectors)")
print(sources.pivot_table(index="task", columns="source", values="gain").round(2).to_string(na_rep=""))

# %%
figure = ht.plotting.transplant_gains(transplants, venue=VENUE)
ht.plotting.save(
    figure,
    "transplant_gains",
    table=transplants,
    profile="reference",
    caption="What the vectors of one task bring in the model of another",
)
figure

# %% [markdown]
# **Finding.** In numbers, with 95 % intervals for other tasks of this kind (one seed per target, so that seeds and tasks are told apart by
# neither). Accuracy and rank correlation have no common unit and are not averaged; one target alone has no interval.

# %% tags=["nbval-check-output"]
finding = contrast[(contrast[list(everywhere)] == pd.Series(everywhere)).all(axis=1)].set_index(
    ["vector", "quantity"]
)
for vector, name in (("bias", "b"), ("weight", "W − 1")):
    between, within, gap = (finding.loc[(vector, q)] for q in ("between", "within", "gap"))
    print(
        f"{name}: {MEASURE} of other tasks {between['value']:.2f} [{between['low']:.2f}, {between['high']:.2f}], of the same "
        f"task {within['value']:.2f}: short of the ceiling by {gap['value']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]"
    )
feeling = retrained["task"].str.contains("polarity|intensity")
kin = retrained["source"].str.contains("polarity|intensity")
groups = {
    "own": retrained["kind"] == "own",
    "other sentiment task": kin & (retrained["kind"] == "source"),
    "task of another kind": ~kin & (retrained["kind"] == "source"),
    "permuted": retrained["kind"] == "permuted",
}
print("\nmean gain on sentiment targets with the head retrained:")
for name, chosen_rows in groups.items():
    for mean in ht.studies.mean_over(retrained[feeling & chosen_rows], "gain", by="metric").itertuples():
        interval = f" [{mean.low:+.3f}, {mean.high:+.3f}]" if mean.n > 1 else ""
        print(
            f"{name:<22} {mean.metric:<9} {mean.mean:+.3f}{interval} (targets: {mean.n}, models: {mean.averaged})"
        )
