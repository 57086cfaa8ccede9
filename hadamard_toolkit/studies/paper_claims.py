"""The claims of the three papers, each with the runs that can say something of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from hadamard_toolkit.adapters.counting import parameter_counts
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.tuning import FullFineTuning
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.studies.claims import BETTER, NOT_WORSE, Claim, counted_claim, verdicts
from hadamard_toolkit.studies.gains import paired
from hadamard_toolkit.studies.picked import picked_runs
from hadamard_toolkit.studies.statistics import CORRELATIONS

CHEN, HE, PELT, CONTROL = "Chen et al. 2023", "He et al. 2022", "Mao et al. 2022", "control"
CHEN_PANG = "Chen, Pang and Yang 2024"
HADAMARD, FULL, BOTH_NORMS = "Hadamard()", "FullFineTuning()", 'LayerNormTuning(norm="both")'
PFEIFFER = 'Pfeiffer(init="normal")'
OTHERS = (
    'Houlsby(bottleneck=32, init="normal")',
    'LoRA(init="normal")',
    'MAM(length=16, bottleneck=16, scale=2.0, init="normal")',
    'AdapterFusion(tasks=("embedded/movies-polarity", "embedded/products-polarity"))',
)
SNIP = 'Sparsity(scorer="snip", sparsity=0.8)'
FIRST = "the two questions that the protocol asked before the runs"
ON = ("task", "seed")


def paper_claims(
    store: RunStore, plans: Mapping[str, Iterable[RunSpec]], *, margin: float = 0.02
) -> pd.DataFrame:
    """`verdicts` on the claims of the papers and their controls, from the runs of the plans of data/reference_runs.

    `plans` holds by name the runs of each plan, as `load_plan` gives them; a plan that is not there has no runs. Claims
    are corrected together in two families: the two questions that PROTOCOL.md asked of `fair.toml` before its runs,
    and all others. The parameter shares are counted on BERT-base.
    """

    def part(name: str) -> RunStore:
        return store.only(list(plans.get(name, ())))

    fair, sparse = picked_runs(part("fair")), _runs(part("sparse"))
    others, pelt = _runs(part("sparse_others")), _runs(part("unipelt"))
    claims = [
        *_of_fair(fair, _runs(part("mpnet_full"))),
        *_of_wide(_runs(part("wide"))),
        *_of_removal(_runs(part("removal")), fair),
        *_of_sparse(sparse, others),
        *_of_unipelt(pelt),
    ]
    return pd.concat([verdicts(claims, margin=margin), *_shares()], ignore_index=True)


def _of_fair(fair: pd.DataFrame, mpnet: pd.DataFrame) -> list[Claim]:
    """The Hadamard adapter against everything that was tuned as carefully."""
    scale, words = "MiniLM, 300 rows", "Hadamard − {}"
    asked = [
        ("at most 2 points below full fine-tuning", CHEN, "full fine-tuning", FULL, NOT_WORSE, FIRST),
        (
            "W and b do more than both norms, as many parameters",
            CONTROL,
            "both norms",
            BOTH_NORMS,
            BETTER,
            FIRST,
        ),
        (
            "W, b and norm do more than that norm alone",
            CONTROL,
            "attention norms",
            "LayerNormTuning()",
            BETTER,
            "",
        ),
        ("tuning inside does more than the head alone", CONTROL, "head alone", "HeadOnly()", BETTER, ""),
        *(
            (f"at most 2 points below {name}", CONTROL, name, f"{name}()", NOT_WORSE, "")
            for name in ("BitFit", "LoRA", "Pfeiffer")
        ),
    ]
    claims = [
        Claim(text, paper, words.format(name), scale, side, _pairs(fair, HADAMARD, label), family)
        for text, paper, name, label, side, family in asked
    ]
    far = Claim(
        "at most 2 points below full fine-tuning, 12 layers, all rows",
        CHEN,
        words.format("full fine-tuning"),
        "MPNet-base, GLUE",
        NOT_WORSE,
        _pairs(mpnet, HADAMARD, FULL),
    )
    return [*claims, far]


def _of_wide(wide: pd.DataFrame) -> list[Claim]:
    """W and b without a norm, on all tasks whose score is a share of right answers or an F1."""
    shares, scale, vectors = (
        wide[~wide["metric"].isin(CORRELATIONS)],
        "MiniLM, 500 rows",
        "Hadamard(norm=None)",
    )
    return [
        Claim("W and b alone do more than the head alone", CONTROL, "W and b − head alone", scale, BETTER,
              _pairs(shares, vectors, "HeadOnly()")),
        Claim("W and b alone are at most 2 points below both norms, twice the parameters", CONTROL,
              "W and b − both norms", scale, NOT_WORSE, _pairs(shares, vectors, BOTH_NORMS)),
    ]  # fmt: skip


def _of_removal(removal: pd.DataFrame, fair: pd.DataFrame) -> list[Claim]:
    """Four of six layers, trained again, against all six at the same rates."""
    same = ["task", "seed", "protocol"]
    whole = fair[fair["label"] == HADAMARD].set_index(same)["score"].rename("whole")
    costs = removal.join(whole, on=same).dropna(subset="whole")
    costs = costs.assign(gain=costs["score"] - costs["whole"])
    # chosen on held-out rows, mean over seeds; the first of equals
    held_out = costs.groupby(["task", "label"])["held_out"].mean()
    best = list(held_out.groupby("task").idxmax()) if len(held_out) else []
    chosen = costs[costs.set_index(["task", "label"]).index.isin(best)]
    scale, compared = "MiniLM, 300 rows", "four of six layers, retrained − all six"
    number = costs["label"].nunique()
    return [
        Claim("two of six layers cost at most 2 points, whichever they are", CHEN,
              f"{compared}; mean of {number} sets", scale, NOT_WORSE, costs),
        Claim("two of six layers cost at most 2 points, if chosen on held-out rows", CHEN,
              f"{compared}; the chosen set", scale, NOT_WORSE, chosen),
    ]  # fmt: skip


def _of_sparse(sparse: pd.DataFrame, others: pd.DataFrame) -> list[Claim]:
    """Adapters pruned at initialisation, and Large-Sparse."""
    scale, pruned = "MiniLM, 320 rows", f"{PFEIFFER} {SNIP}"
    shuffled = pruned.replace("0.8)", '0.8, control="shuffled")')
    of_others = [_pairs(others, f"{adapter} {SNIP}", adapter) for adapter in OTHERS]
    large = 'Houlsby(init="normal") Sparsity(scorer="snip", sparsity=0.875)'
    asked = [
        ("80 % pruned costs at most 2 points", HE, "Pfeiffer, SNIP − dense", NOT_WORSE,
         _pairs(sparse, pruned, PFEIFFER)),
        ("80 % pruned costs at most 2 points, four other adapters", HE, "SNIP − dense, mean of four", NOT_WORSE,
         pd.concat(of_others)),
        ("40 % pruned is better than dense", HE, "Pfeiffer, SNIP − dense", BETTER,
         _pairs(sparse, pruned.replace("0.8", "0.4"), PFEIFFER)),
        ("SNIP chooses better than its shuffled mask", CONTROL, "Pfeiffer at 80 %, SNIP − shuffled", BETTER,
         _pairs(sparse, pruned, shuffled)),
        ("Large-Sparse is better than full fine-tuning", HE, "Houlsby 64, 87.5 % pruned − full fine-tuning", BETTER,
         _pairs(others, large, FULL)),
    ]  # fmt: skip
    return [Claim(text, paper, words, scale, side, pairs) for text, paper, words, side, pairs in asked]


def _of_unipelt(runs: pd.DataFrame) -> list[Claim]:
    """UniPELT with few rows against full fine-tuning and its parts, and what was added to it in 2024."""
    unipelt, prompts = "UniPELT()", "Stack(adapters=(PromptTuning(), UniPELT()))"
    claims = []
    for k in (100, 500):
        few = runs[runs["train_rows"] == k]
        asked = [
            ("UniPELT is better than full fine-tuning", PELT, "UniPELT − full fine-tuning", unipelt, FULL),
            ("UniPELT is better than its parts", PELT, "UniPELT − LoRA", unipelt, "LoRA()"),
            ("prompt tuning helps UniPELT", CHEN_PANG, "prompts and UniPELT − UniPELT", prompts, unipelt),
        ]
        claims += [
            Claim(f"{text}, K = {k}", paper, words, f"MiniLM, {k} rows", BETTER, _pairs(few, first, second))
            for text, paper, words, first, second in asked
        ]
    adapted = runs[runs["label"].str.startswith(f"{unipelt} after ")]
    pairs = [_pairs(runs[runs["train_rows"] == 500], label, unipelt) for label in adapted["label"].unique()]
    words = "UniPELT after further pretraining − UniPELT"
    claims.append(Claim("DAPT and TAPT help", CHEN_PANG, words, "MiniLM, 500 rows", BETTER,
                        pd.concat(pairs) if pairs else pd.DataFrame()))  # fmt: skip
    return claims


def _shares() -> list[pd.DataFrame]:
    """The shares of BERT-base that the abstract gives, counted on its shape."""
    from transformers import BertConfig

    adapters = {"12": Hadamard(), "8": Hadamard(layers=tuple(range(4, 12))), "all": FullFineTuning()}
    counts = parameter_counts(adapters, BertConfig())["trained"]
    return [
        counted_claim(f"{100 * claimed:g} % of the parameters", CHEN, f"{counts[layers]:,} of {counts['all']:,}",
                      f"BERT-base, {layers} of 12 layers", counted=counts[layers] / counts["all"], claimed=claimed)
        for layers, claimed in (("12", 0.00033), ("8", 0.00022))
    ]  # fmt: skip


def _runs(store: RunStore) -> pd.DataFrame:
    """Runs as `picked_runs` gives them, those with a head that was drawn and never trained left out."""
    runs = picked_runs(store)
    return runs[runs["head_policy"] != "frozen-random"]


def _pairs(runs: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Differences of two labels by task and seed."""
    both = runs[runs["label"].isin([first, second])]
    return paired(both, {"": (first, second)}, "label", ON).get("", pd.DataFrame())
