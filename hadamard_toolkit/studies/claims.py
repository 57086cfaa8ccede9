"""What runs say of a claim: a test against a stated margin, its power beside it, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hadamard_toolkit.errors import check_choice, check_range
from hadamard_toolkit.studies.frames import require_columns
from hadamard_toolkit.studies.statistics import greater, holm, mean_over, power_of, tost
from hadamard_toolkit.studies.text import intervals

NOT_WORSE, BETTER, EQUIVALENT, COUNTED = "not worse", "better", "equivalent", "counted"
SIDES = (NOT_WORSE, BETTER, EQUIVALENT)
HOLDS, FAILS, OPEN, NONE = "holds here", "does not hold here", "cannot be told", "no runs here"


@dataclass(frozen=True, eq=False)
class Claim:
    """A claim in words and the paired differences that it is judged by.

    `differences`: one row per pair of runs with the columns `task`, `seed` and `gain`, the score of the first less that
    of the second, in natural units (as `studies.gains` pairs them). `family` names the claims that are corrected
    together. `scale` says what was run: backbone and training rows.
    """

    claim: str
    paper: str
    compared: str
    scale: str
    side: str
    differences: pd.DataFrame
    family: str = ""


def verdicts(
    claims: Sequence[Claim], *, margin: float = 0.02, alpha: float = 0.05, least_power: float = 0.8
) -> pd.DataFrame:
    """One row per claim: the mean difference with its t interval over tasks, the test, its power, and the verdict.

    All differences of one task are averaged first; the n task means are the values that are tested, by one-sided t
    tests. `side` of a claim says of what, with μ the mean over tasks and m the margin:

    | side | the claim is tested by | its contrary by | power is the probability of the claim if |
    | --- | --- | --- | --- |
    | `"not worse"` | μ > −m | μ < −m | μ = 0 |
    | `"better"` | μ > 0 | μ < m | μ = m |
    | `"equivalent"` | −m < μ < m (`tost`) | μ < −m or μ > m | μ = 0 |

    The verdict follows from p after Holm's correction over the claims of one `family`, and from nothing else:

    * `"holds here"`: p of the claim is at most `alpha`. Its evidence is p, so its power plays no part.
    * `"does not hold here"`: the claim did not come out, the test had a power of at least `least_power`, and p of the
      contrary is at most `alpha`.
    * `"cannot be told"`: everything else, also where the interval lies far on one side but the power is too low, and
      with fewer than two tasks.
    * `"no runs here"`: there is not one pair.

    `power` is that of one test at alpha / (claims of its family with two tasks or more), with the standard deviation
    that was found: the first step of Holm, so the power after correction is at least that. That of `"equivalent"` is
    the lower bound 2 · power of one side − 1.

    Columns: `claim`, `paper`, `compared`, `scale`, `tasks`, `seeds` (of a task, as text), `mean`, `low`, `high`
    (two-sided, 1 − `alpha`), `margin`, `side`, `p`, `p_holm`, `power`, `verdict`. Scores are in natural units.

    Generalises to: other tasks like these, on the same backbone with as many rows.

    Simulated: 8 claims at the border over 6 tasks: one or more is said to hold in 0.05 of families; a true claim is
    said not to hold in 0.05 at most; claims come out as often as their power says or more.
    `pytest tests/studies/test_claims.py -k simulated`
    """
    check_range("margin", margin, above=0)
    check_range("alpha", alpha, above=0, below=0.5)
    check_range("least_power", least_power, above=0, below=1)
    units = [_units(claim) for claim in claims]
    families = [claim.family for claim in claims]
    testable = pd.Series(families, dtype=object)[[len(values) > 1 for values in units]].value_counts()
    rows: list[dict[str, Any]] = []
    for claim, values in zip(claims, units, strict=True):
        check_choice("side", claim.side, SIDES)
        row: dict[str, Any] = {name: getattr(claim, name) for name in ("claim", "paper", "compared", "scale")}
        row |= {"tasks": len(values), "seeds": "", "mean": np.nan, "low": np.nan, "high": np.nan}
        if len(values):
            found = mean_over(claim.differences, "gain", level=1 - alpha).iloc[0]
            row |= {name: found[name] for name in ("mean", "low", "high")}
            seeds = claim.differences.groupby("task")["seed"].nunique()
            row["seeds"] = " to ".join(dict.fromkeys(f"{count}" for count in (seeds.min(), seeds.max())))
        p, contrary = _tests(claim.side, values, margin)
        level = alpha / max(1, int(testable.get(claim.family, 0)))
        power = power_of(values, margin, alpha=level)
        power = max(0.0, 2 * power - 1) if claim.side == EQUIVALENT else power
        rows.append(
            {**row, "margin": margin, "side": claim.side, "p": p, "contrary": contrary, "power": power}
        )
    columns = [
        "claim",
        "paper",
        "compared",
        "scale",
        "tasks",
        "seeds",
        "mean",
        "low",
        "high",
        "margin",
        "side",
    ]
    table = pd.DataFrame(rows, columns=[*columns, "p", "contrary", "power"])
    for column in ("p", "contrary"):
        table[f"{column}_holm"] = table.groupby(families)[column].transform(lambda p: holm(p.to_numpy()))
    refuted = (table["contrary_holm"] <= alpha) & (table["power"] >= least_power)
    cases = [table["tasks"] == 0, table["p_holm"] <= alpha, refuted]
    table["verdict"] = np.select(cases, [NONE, HOLDS, FAILS], OPEN)
    return table[[*columns, "p", "p_holm", "power", "verdict"]]


def counted_claim(
    claim: str, paper: str, compared: str, scale: str, *, counted: float, claimed: float
) -> pd.DataFrame:
    """A row of `verdicts` for a claim about a number that is counted and not estimated: no test, no interval.

    It holds if `counted`, a share, is `claimed` after being rounded or cut off to the digits that `claimed` has.
    """
    digits = len(f"{claimed:.12f}".rstrip("0").partition(".")[2])
    places = 10**digits
    agrees = round(claimed * places) in (int(counted * places), round(counted * places))
    row = {
        "claim": claim,
        "paper": paper,
        "compared": compared,
        "scale": scale,
        "mean": counted,
        "side": COUNTED,
    }
    return pd.DataFrame([{**row, "verdict": HOLDS if agrees else FAILS}])


def claims_text(table: pd.DataFrame) -> pd.DataFrame:
    """`verdicts` (and `counted_claim`) as a table to show: differences in points, p after Holm, the test in words."""
    require_columns("table", table, "claim", "paper", "compared", "scale", "side", "verdict")
    counted = table["side"] == COUNTED
    points = 100 * table[["mean", "low", "high"]].astype(float)
    difference = intervals(points).where(table["mean"].notna(), "–")
    difference = difference.mask(counted, [f"{value:.4f} %" for value in points["mean"]])
    margin = (100 * table["margin"].astype(float)).map("{:g}".format)
    tested = table["side"].map({NOT_WORSE: "> −{}", BETTER: "> 0", EQUIVALENT: "within ±{}", COUNTED: "–"})
    sizes = [
        f"{scale}, {tasks:.0f} task{'s' * (tasks != 1)}, {seeds} seed{'s' * (seeds != '1')}"
        if tasks > 0
        else scale
        for scale, tasks, seeds in zip(table["scale"], table["tasks"], table["seeds"], strict=True)
    ]
    shown = {
        "claim": table["claim"],
        "paper": table["paper"],
        "compared": table["compared"],
        "scale": sizes,
        "difference": difference,
        "tested": [text.format(number) for text, number in zip(tested, margin, strict=True)],
        "p (Holm)": table["p_holm"].map(
            lambda p: "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
        ),
        "power": table["power"].map(lambda power: "–" if pd.isna(power) else f"{power:.2f}"),
        "verdict": table["verdict"],
    }
    return pd.DataFrame(shown).set_index("claim")


def _units(claim: Claim) -> np.ndarray:
    """The mean difference of every task."""
    if claim.differences.empty:
        return np.empty(0)
    require_columns("differences", claim.differences, "task", "seed", "gain")
    return claim.differences.groupby("task")["gain"].mean().to_numpy(dtype=float)


def _tests(side: str, values: np.ndarray, margin: float) -> tuple[float, float]:
    """p of the claim and p of its contrary, NaN for fewer than two tasks."""
    if len(values) < 2:
        return np.nan, np.nan
    within = tost(values, margin).iloc[0]
    below, above = greater(-margin - values), greater(values - margin)
    return {
        NOT_WORSE: (within["p_lower"], below),
        BETTER: (greater(values), within["p_upper"]),
        EQUIVALENT: (within["p"], min(1.0, 2 * min(below, above))),
    }[side]
