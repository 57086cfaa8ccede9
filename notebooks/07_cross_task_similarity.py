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
# and a comparison within one would not measure the same thing. Intervals resample tasks.

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
# Tasks are ordered by hierarchical clustering of $b$ (average linkage on $1 - \cos$). Tasks that share texts are a limit of this
# set: the polarity and the intensity of tweets are two readings of the same sentences.

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
# the same kinship? And does the kinship follow what the tasks ask for, sentiment or something else?

# %% tags=["nbval-check-output"]
names = matrices["bias"].index
sentiment = names.str.contains("polarity|intensity|sst2")
design = pd.DataFrame((sentiment[:, None] & sentiment[None, :]).astype(float), names, names)
tests = {"W − 1 with b": (matrices["weight"], matrices["bias"])}
if 1 < sentiment.sum() < len(names):
    tests |= {f"{name} with 'both are sentiment'": (matrices[name], design) for name in matrices}
for name, (first, second) in tests.items():
    found = ht.studies.mantel(first, second).iloc[0]
    print(
        f"{name:<38} ρ = {found['value']:+.2f}, p = {found['p']:.4f} ({found['tasks']} tasks, {found['pairs']} pairs)"
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
# `hadamard_toolkit.measurements.transplant`.

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
# **Finding.** In numbers, with 95 % intervals. Those of the transplants resample target runs: with as few as there are, read them as
# little more than the range.

# %% tags=["nbval-check-output"]
import numpy as np

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
    "own": retrained[feeling & (retrained["kind"] == "own")],
    "other sentiment task": retrained[feeling & kin & (retrained["kind"] == "source")],
    "task of another kind": retrained[feeling & ~kin & (retrained["kind"] == "source")],
    "permuted": retrained[feeling & (retrained["kind"] == "permuted")],
}
generator = np.random.default_rng(0)
print("\nmean gain on sentiment targets with the head retrained:")
for name, rows in groups.items():
    by_target = rows.groupby("key")["gain"].mean().to_numpy()
    drawn = (
        generator.choice(by_target, (4000, len(by_target))).mean(axis=1)
        if len(by_target)
        else np.array([np.nan])
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    print(
        f"{name:<22} {by_target.mean():+.3f} [{low:+.3f}, {high:+.3f}] ({len(by_target)} targets, {len(rows)} models)"
    )
