# %% [markdown]
# # Paper figures: everything that the store has to show
#
# Which figures and tables of a paper do the runs of this store give? The other notebooks read theirs where the question is asked; the ones
# of training itself (scores, curves, vectors) are drawn here, and all of them are shown at the end. `hadamard figures` runs this notebook
# and the studies before it, so that every figure is made again from the store: vector PDF with embedded fonts, PNG, and a JSON that
# says where the numbers come from; tables in LaTeX and Markdown beside them. The same store gives the same bytes.
#
# `VENUE` sets the width: an ACL column or page, the NeurIPS text block, a slide. `HADAMARD_STORE` draws your own runs instead,
# `HADAMARD_FIGURES` names another folder.

# %%
import os

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
PLANS = "../data/reference_runs"
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")

# %%
import json
from pathlib import Path

import pandas as pd

import hadamard_toolkit as ht
from hadamard_toolkit.runs.plan import load_plan

store = ht.RunStore(STORE)
print(f"{VENUE}: {ht.plotting.WIDTHS[VENUE]} inches")


def short(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(task=table["task"].str.removeprefix("embedded/"))


# %% [markdown]
# ## What a parameter buys
#
# Every method on SST-2 with 1,000 training rows, at learning rates picked on held-out rows ([notebook 02](02_adapter_zoo.ipynb)).

# %%
FAMILIES = {
    "own weights": ("HeadOnly", "LayerNormTuning", "BitFit", "FullFineTuning"),
    "vectors": ("Hadamard", "IA3"),
    "low rank": ("LoRA",),
    "bottleneck": ("Houlsby", "Pfeiffer", "ParallelAdapter"),
    "prompts": ("PrefixTuning", "PromptTuning"),
    "combined": ("MAM", "UniPELT"),
}
family = {method: name for name, methods in FAMILIES.items() for method in methods}
glue = store.only(f"{PLANS}/glue.toml")
runs = pd.concat([part.load() for part in (glue, store.only(f"{PLANS}/zoo.toml"))], ignore_index=True)
runs = runs.query("headline and split == 'test'").assign(family=runs["method"].map(family))
runs = runs.rename(columns={"trained": "parameters", "value": "score"})
columns = ["task", "method", "family", "seed", "parameters", "score", "n", "train_rows"]
zoo = runs.loc[runs["task"] == "sst2", columns].sort_values(columns[:4], ignore_index=True)
figure = ht.plotting.score_against_parameters(zoo, venue=VENUE, metric="Accuracy")
caption = "Every method on SST-2 with 1,000 training rows: score against trained parameters"
ht.plotting.save(figure, "adapter_zoo", table=zoo, profile="reference", caption=caption)
figure

# %% [markdown]
# As a table, with every task that has runs; a cell without runs says so. The first row is what one answer for all rows would score: a method
# near it has learned nothing there, and its cell is marked. The learning rates were picked on two classification tasks (`rates.toml`), and a rate that suits those
# can be too high for a regression such as STS-B.

# %% tags=["nbval-check-output"]
marked = ht.studies.mark_failed(runs, store)
cells = marked.groupby(["method", "task"]).agg(
    mean=("score", "mean"), std=("score", "std"), count=("score", "size"), failed=("failed", "sum")
)
cells = pd.Series(
    [
        (f"{100 * m:.1f} ± {100 * s:.1f} ({n:.0f})" if n > 1 else f"{100 * m:.1f} (1)")
        + (f" †{f:.0f}" if f else "")
        for m, s, n, f in cells.values
    ],
    cells.index,
)
planned = pd.DataFrame([(type(s.adapter).__name__, s.task) for s in load_plan(f"{PLANS}/glue.toml")])
table = cells.unstack("task").reindex(columns=list(dict.fromkeys(planned[1]))).astype(object)
table = table.reindex(
    [method for methods in FAMILIES.values() for method in methods if method in table.index]
)
for method, task in planned.drop_duplicates().itertuples(index=False):
    if method in table.index and pd.isna(table.loc[method, task]):
        table.loc[method, task] = "not run"
first = runs.drop_duplicates("task").set_index("task")["key"]
constant = {task: f"{100 * ht.studies.constant_score(store.run(first[task])):.1f}" for task in table.columns}
table = pd.concat([pd.DataFrame(constant, index=["one answer for all"]), table]).rename_axis("method")
beside = marked[(marked["task"] != "sst2") & marked["task"].isin(table.columns)]
caption = (
    "1,000 training rows of each task, official dev set, metric of GLUE times 100: mean ± sd (seeds); †n: n runs score no more "
    f"than a point above one answer for all ({beside['failed'].sum()} of {len(beside)} besides SST-2)"
)
ht.plotting.save_table(table.fillna("–"), "scores_glue", caption=caption, profile="reference")
print(table.fillna("–").to_string())

# %% [markdown]
# ## Hadamard and its controls
#
# Eight embedded tasks and SST-2 ([notebook 01](01_hadamard_adapter.ipynb)): scores, the course of the two stages, and what was learned.

# %%
spine = store.only(f"{PLANS}/spine.toml")
names = ["HeadOnly", "LayerNormTuning", "Hadamard", "FullFineTuning"]
scores = short(ht.studies.score_table(spine))
scores = scores.sort_values("method", key=lambda column: column.map(names.index), kind="stable")
scores = scores[["task", "method", "seed", "metric", "score", "n", "train_rows"]]
figure = ht.plotting.score_by_method(scores, venue=VENUE)
caption = "Hadamard against the head alone, the norms alone and full fine-tuning"
ht.plotting.save(figure, "hadamard_against_controls", table=scores, profile="reference", caption=caption)
figure

# %%
curves = short(ht.studies.history_table(spine))
curves = curves[curves["task"].isin(["sst2", "tweets-polarity", "tweets-intensity"])]
curves = curves[curves["split"] == "validation"]
curves = curves.sort_values("method", key=lambda column: column.map(names.index), kind="stable")
figure = ht.plotting.training_curves(curves, venue=VENUE)
caption = "Two-stage training, scored on held-out rows"
ht.plotting.save(figure, "hadamard_training_curves", table=curves, profile="reference", caption=caption)
figure

# %%
vectors = short(ht.studies.vector_table(spine))
vectors = vectors[vectors["task"].str.endswith("polarity")]
vectors = vectors.assign(task=vectors["task"].str.removesuffix("-polarity"))
figure = ht.plotting.vectors_by_layer(vectors, venue=VENUE)
caption = "Learned W − 1 and b of the Hadamard adapter, by layer and task"
ht.plotting.save(figure, "hadamard_vectors_by_layer", table=vectors, profile="reference", caption=caption)
figure

# %% [markdown]
# ## Few labels, few weights
#
# UniPELT and its variants with K rows ([notebook 03](03_unipelt_and_prompts.ipynb)); pruned adapters with their controls
# ([notebook 04](04_sparse_adapters.ipynb)).

# %%
METHODS = {
    ht.HeadOnly(): "HeadOnly",
    ht.FullFineTuning(): "full fine-tuning",
    ht.UniPELT(gated=None): "UniPELT, no gates",
    ht.UniPELT(): "UniPELT",
    ht.prompt_unipelt(): "PromptTuning + UniPELT",
    ht.ia3_prefix_bottleneck(): "(IA)³ + prefix + bottleneck",
    ht.stacked_unipelt(): "UniPELT × 3",
}
plan = {spec.key: spec for spec in load_plan(f"{PLANS}/unipelt.toml")}
few = ht.studies.score_table(store.only(plan.values())).rename(columns={"train_rows": "rows"})
few = few.assign(
    method=[METHODS.get(plan[key].adapter) for key in few["key"]],
    head=[plan[key].protocol.head for key in few["key"]],
)
few = few[few["task"].eq("sst2") & few["head"].ne("frozen-random") & few["method"].notna()]
few = few.sort_values("method", key=lambda column: column.map(list(METHODS.values()).index), kind="stable")
few = few[["task", "method", "rows", "seed", "score", "n"]]
figure = ht.plotting.score_against_rows(few, venue=VENUE, metric="Accuracy")
caption = "UniPELT, its variants and two controls on SST-2 with K training rows, by UniPELT's protocol with a smaller budget"
ht.plotting.save(figure, "unipelt_low_resource", table=few, profile="reference", caption=caption)
figure

# %%
sparse = short(ht.studies.sparse_table(store.only(f"{PLANS}/sparse.toml"))).drop(columns="key")
sparse = sparse[sparse["task"].isin(sparse.loc[sparse["sparsity"] == 0, "task"])]  # with what to compare
figure = ht.plotting.score_against_sparsity(sparse, venue=VENUE, metric="Accuracy")
caption = "Score against the share removed, with controls"
ht.plotting.save(figure, "sparse_score_against_sparsity", table=sparse, profile="reference", caption=caption)
figure

# %%
others = short(ht.studies.sparse_table(store.only(f"{PLANS}/sparse_others.toml"))).drop(columns="key")
kinds = others["adapter"].str.extract(r"^(\w+)(?:\(bottleneck=(\d+))?")
# other widths and shares of Houlsby adapters belong to Large-Sparse
chosen = ((kinds[0] != "Houlsby") | (kinds[1] == "32")) & others["control"].eq("none")
chosen &= others["sparsity"].isin([0.0, 0.4, 0.6, 0.8, 0.9])
others = others.assign(adapter=kinds[0])[chosen]
figure = ht.plotting.score_against_sparsity(others, venue=VENUE, metric="Accuracy")
caption = (
    "Score less that of the unpruned run of the same seed, against the share removed, four other adapters"
)
ht.plotting.save(figure, "sparse_other_adapters", table=others, profile="reference", caption=caption)
figure

# %% [markdown]
# ## What was run, and what was not
#
# The plan files name more runs than have been made. `hadamard sweep PLAN --store DIR` makes those that are missing. `refused`: a run that
# ended in an error that is part of the result, such as a scorer that cannot tell the weights of an adapter apart.

# %% tags=["nbval-check-output"]
coverage = []
for path in sorted(Path(PLANS).glob("*.toml")):
    specs = load_plan(path)
    part = store.only(specs)
    refused = set(part.failed()["key"])
    open_ones = [spec for spec in specs if spec not in part and spec.key not in refused]
    lacking = pd.Series([type(spec.adapter).__name__ for spec in open_ones], dtype=str).value_counts()
    coverage.append(
        {
            "plan": path.stem,
            "planned": len(specs),
            "done": len(specs) - len(open_ones) - len(refused),
            "refused": len(refused),
            "missing": len(open_ones),
            "of these": ", ".join(f"{name} {count}" for name, count in sorted(lacking.items())) or "none",
        }
    )
coverage = pd.DataFrame(coverage).set_index("plan")
caption = "Runs of the plan files: planned, done, refused and missing, the missing ones by method"
ht.plotting.save_table(coverage, "reference_runs", caption=caption, profile="reference")
print(coverage.to_string(max_colwidth=100))
runs = store.load().drop_duplicates("key")
print(
    f"\ndevices: {runs['device'].value_counts().to_dict()}, {runs['seconds'].sum() / 3600:.1f} hours in all"
)

# %% [markdown]
# ## All of them
#
# What lies in the folder now, from this notebook and the studies, and how many rows each figure stands on:

# %% tags=["nbval-check-output"]
folder = Path(os.environ.get("HADAMARD_FIGURES") or "../figures")
records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
print(
    pd.DataFrame(
        [(r["figure"], r["table"]["rows"], r["caption"]) for r in records if r["profile"] == "reference"],
        columns=["figure", "rows", "caption"],
    ).to_string(index=False)
)
