# %% [markdown]
# # Can tasks share one adapter?
#
# Chen et al. (2023) found the Hadamard vectors of different tasks alike and left open whether tasks could share them. If they can,
# a task costs next to nothing. The test is not how alike the vectors are (notebook 07) but what a task scores with shared ones.
#
# Every scheme below puts its vectors into the pretrained backbone, leaves them there, and trains **a fresh head** on top, on the
# training rows of the task, as stage one of the protocol does; held-out rows select, test rows score.

# %% tags=["parameters"]
import os

STORE = os.environ.get("HADAMARD_STORE", "../data/reference_runs")
VENUE = os.environ.get("HADAMARD_VENUE", "neurips")  # whose width the figures have
PLAN = None if "HADAMARD_STORE" in os.environ else f"{STORE}/spine.toml"  # None: all runs of the store
MARGIN = 0.98  # of the score with own vectors
PERCENT = 0.011  # of the backbone's parameters per task

# %% [markdown]
# ## The schemes
#
# With $T$ tasks and vectors $v_1, \dots, v_T$ of one kind (W, b, or the trained norm), task $t$ gets
#
# $$\bar v = \frac 1T \sum_s v_s \;\text{("mean")}, \qquad
# \bar v_{-t} = \frac{1}{T-1}\sum_{s \ne t} v_s \;\text{("leave-one-out")}, \qquad v_t \;\text{("own")} .$$
#
# What is shared is stored once and counts $1/T$ per task, what is a task's own counts whole, heads are not counted. The
# norm that trains beside the vectors is half of the parameters, so it is stated and counted in each scheme. Controls: the vectors
# of one *random other task*, the mean with its coordinates *permuted* within each layer, the norm without vectors, and the *bare*
# backbone, which is HeadOnly. "Own" has its own vectors and the retrained head: it separates what sharing costs from what
# retraining the head brings, and is what the others are measured by. All runs that share have one seed, and so the same first weights of the head; what vectors of different seeds
# can share is not measured here.

# %% tags=["nbval-check-output"]
import pandas as pd

import hadamard_toolkit as ht

store = ht.RunStore(STORE)
store = store.only(PLAN) if PLAN else store
measured = ht.studies.measured_table(store, "sharing")
measured["task"] = measured["task"].str.removeprefix("embedded/")
runs = measured.drop_duplicates("key")
print(
    f"{len(runs)} runs of {runs['task'].nunique()} tasks, vectors shared by {runs['tasks'].iloc[0]} tasks of one protocol and seed"
)
print("seeds per task:", runs.groupby("task")["seed"].nunique().to_dict())
print(f"test rows: {runs['n'].min()} to {runs['n'].max()}")
what = measured.drop_duplicates("scheme").set_index("scheme")[
    ["weight", "bias", "norm", "parameters", "percent"]
]
print(what.assign(percent=what["percent"].map("{:.4f}".format)).to_string())

# %% [markdown]
# ## Score by task

# %% tags=["nbval-check-output"]
by_task = ht.studies.sharing_by_task(measured)
print(by_task.round(3).to_string())

# %% [markdown]
# ## What is left of the score with own vectors
#
# Seeds are averaged within their task, and tasks are the sample: intervals are for other tasks. The share is $\bar s / \bar u$, mean score over the
# mean score of "own", whose head is retrained as in every scheme that shares; over "unshared", as trained, sharing would be credited with
# what a new head brings. Fieller's interval holds every ratio $r$ that a paired t test of $s - r\,u$ does not reject. A score has a floor that sharing cannot
# take away: `gain` is the same share of what is above the bare backbone, and the more telling of the two. `p` is one-sided,
# of the null that the share is below the margin, with Holm's correction over schemes; with so few tasks it can only be small where
# all tasks agree. [none]: so few tasks leave no bounded interval.

# %% tags=["nbval-check-output"]
summary = ht.studies.sharing_summary(measured, margin=MARGIN)
second = {"all tasks": ht.studies.sharing_summary(measured, margin=MARGIN, reference="unshared")}


def in_words(table):
    shares = table[["share", "share_low", "share_high"]].values
    gains = table[["gain_share", "gain_share_low", "gain_share_high"]].values
    return (
        table[["score", "noninferior"]]
        .round(3)
        .assign(
            percent=table["percent"].map("{:.4f}".format),
            share=[
                f"{s:.3f} [{low:.3f}, {high:.3f}]".replace("[nan, nan]", "[none]") for s, low, high in shares
            ],
            gain=[
                f"{s:.2f} [{low:.2f}, {high:.2f}]".replace("[nan, nan]", "[none]") for s, low, high in gains
            ],
            p_holm=table["p_holm"].map("{:.3f}".format),
        )
    )


print(in_words(summary).to_string())
first = summary.iloc[0]
print(
    f"\n{first['tasks']} tasks, {first['runs']} runs; {first['incomplete']} runs without every scheme left out; shares of the score of "
    f"{first['reference']!r}"
)

# %%
figure = ht.plotting.sharing_tradeoff(summary, by_task, venue=VENUE)
ht.plotting.save(
    figure,
    "sharing",
    table=summary.reset_index(),
    profile="reference",
    caption="Cost and score of shared Hadamard vectors, beside own vectors with the head retrained; intervals for other tasks",
)
figure

# %% [markdown]
# ## Only tasks that ask the same
#
# A mean over everything includes tasks that have little to say to each other, some of them at chance. The second pool was set by a rule that
# looks at no score: tasks with the same labels (here negative or positive, in four domains). Fewer tasks share, so that each pays more:
# $1/4$ of the vectors instead of $1/8$. Rows that depend on no one else ("own", "bare") are those of above.

# %% tags=["nbval-check-output"]
pools = {"all tasks": summary}
if any(store.has(key, "measured/sharing_alike.json") for key in measured["key"]):
    alike = ht.studies.measured_table(store, "sharing_alike")
    alike["task"] = alike["task"].str.removeprefix("embedded/")
    alone = measured[measured["key"].isin(alike["key"]) & measured["scheme"].isin(["own", "bare"])]
    print(
        f"{alike['key'].nunique()} runs of {alike['task'].nunique()} tasks, vectors shared by {alike['tasks'].iloc[0]} tasks"
    )
    alike = pd.concat([alike, alone], ignore_index=True)
    by_task_alike = ht.studies.sharing_by_task(alike)
    print(by_task_alike.round(3).to_string(), "\n")
    pools["same labels"] = ht.studies.sharing_summary(alike, margin=MARGIN)
    second["same labels"] = ht.studies.sharing_summary(alike, margin=MARGIN, reference="unshared")
    print(in_words(pools["same labels"]).to_string())
else:
    print("not measured yet in this store")

# %%
figure = None
if "same labels" in pools:
    figure = ht.plotting.sharing_tradeoff(pools["same labels"], by_task_alike, venue=VENUE)
    ht.plotting.save(
        figure,
        "sharing_alike",
        table=pools["same labels"].reset_index(),
        profile="reference",
        caption="Cost and score of Hadamard vectors shared by tasks with the same labels; intervals for other tasks",
    )
figure

# %% [markdown]
# **Finding.** The goal was at most 0.011 % of the backbone's parameters per task at 98 % of the score. What was reached, in both pools, of the
# score with own vectors and a head retrained as for all others; and of the unshared score, whose head is as it was trained ("another task" is
# the vectors of one other task, drawn at random, and not a set that all share):

# %% tags=["nbval-check-output"]
for pool, table in pools.items():
    goal = ht.studies.goal_reached(table, share=MARGIN, percent=PERCENT)
    first = table.loc["unshared"]
    unshared = second[pool]
    budget = PERCENT / first["percent"] * first["parameters"]
    print(
        f"{pool} (n = {first['tasks']} tasks, {first['runs']} runs, 95 % intervals for other tasks): at most {PERCENT} % ({budget:,.0f} parameters) at "
        f"{100 * MARGIN:.0f} % of {first['reference']!r}"
    )
    print(
        f"  met as a point estimate by: {', '.join(goal['met']) or 'none'}; shown (Holm) by: {', '.join(goal['shown']) or 'none'}"
    )
    for scheme in dict.fromkeys(["mean", "leave-one-out", *goal["within"]]):
        row = table.loc[scheme]
        print(
            f"  {scheme:<24} {row['percent']:.4f} %: {100 * row['share']:5.1f} % of its score [{100 * row['share_low']:.1f}, "
            f"{100 * row['share_high']:.1f}], {100 * row['gain_share']:.0f} % of its gain over the bare backbone (of the unshared score "
            f"{100 * unshared.loc[scheme, 'share']:.1f} %, {100 * unshared.loc[scheme, 'gain_share']:.0f} % of the gain)"
        )
