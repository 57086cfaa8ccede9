"""Write docs/benchmarks.md and docs/bank_cost.svg from data/benchmarks: python tools/benchmark_report.py"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from hadamard_toolkit.paths import CHECKOUT, atomic_write
from hadamard_toolkit.plotting import style
from hadamard_toolkit.plotting.panels import legend_handles
from hadamard_toolkit.plotting.style import frame, looks, new_figure

DATA, DOCS = CHECKOUT / "data" / "benchmarks", CHECKOUT / "docs"
KINDS = {
    "training_speed": (
        "Training and inference beside the peers",
        "MiniLM on rows of SST-2. Contestants take turns; `seconds` are medians, with the least and the most.",
    ),
    "bank_speed": (
        "Runs trained together (banks)",
        "`runs` trained in one pass, 0 for one without a bank. `ratio`: how many times faster than the same runs one "
        "after another. `floor_share`: the arithmetic of the frozen linear layers at the rate of a large matrix "
        "product, as a share of the step.",
    ),
    "routing_speed": (
        "One batch over several adapters",
        "`ht.route`, rows in turn over saved adapters, against the plain backbone and stock peft's `adapter_names` "
        "(LoRA).",
    ),
    "prefix_speed": (
        "Layers below the adapters computed once",
        'Seconds of an epoch after the first, `Protocol(frozen_prefix="cached")`.',
    ),
}
GLUE_WORK = (
    2e17  # operations: eight tasks, five seeds, a base-size backbone, the floor that was estimated beforehand
)


def report() -> str:
    """The Markdown of docs/benchmarks.md."""
    parts = [
        "# Benchmarks\n\nMeasured by `make benchmark` and `make gpu`, kept in `data/benchmarks`; this page is written "
        "by `tools/benchmark_report.py`. Compare ratios within a table, not times between tables: each table is one "
        "process on one machine.\n"
    ]
    for kind, (title, words) in KINDS.items():
        for path, facts in _files(kind):
            versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers"))
            about = [facts["device"]["device_name"], f"{facts['system']['cores']} cores", versions]
            about += [facts[name] for name in ("date", "note") if name in facts]
            table = pd.DataFrame(facts["rows"])
            parts.append(f"## {title}: {about[0]}\n\n{words} {'; '.join(about)} ([numbers](../{path})).\n")
            parts.append(table.to_markdown(index=False, floatfmt=".3g") + "\n")
            if kind == "bank_speed" and facts["device"]["device"] == "cuda":
                parts.append(
                    "![Time of a step and of one run's share of it, by runs in the bank](bank_cost.svg)\n"
                )
                parts.append(_glue(facts) + "\n")
    return "\n".join(parts)


def _files(kind: str) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(DATA.glob(f"{kind}_*.json"))
    return [(path.relative_to(CHECKOUT), json.loads(path.read_text("utf-8"))) for path in paths]


def _glue(facts: dict[str, Any]) -> str:
    """How long the largest plan would take at the measured rate."""
    base = max(
        (row for row in facts["rows"] if row["shape"] == "mpnet" and row["method"] == "Hadamard"),
        key=lambda row: row["floor_share"],
    )
    rate = base["floor_share"] * facts["matrix_rate"][base["precision"]]
    minutes = GLUE_WORK / rate / 60
    return (
        "Two-stage Hadamard on a base-size backbone, all eight GLUE tasks with five seeds, was estimated at "
        f"{GLUE_WORK:.0e} operations: 8 minutes at 400 TFLOP/s. The best step of that size measured here "
        f"({base['runs']} runs of {base['batch']} × {base['tokens']} tokens) reaches {rate / 1e12:.0f} TFLOP/s, so it "
        f"would take {minutes:.0f} minutes in one process, {minutes / 8:.1f} times the floor; twice the floor was the "
        "goal. A step is bound by launches: it takes hardly longer for 8 runs than for one."
    )


def drawing() -> str:
    """The SVG: milliseconds of a step and of one run's share of it against the number of runs."""
    [(_, facts)] = [pair for pair in _files("bank_speed") if pair[1]["device"]["device"] == "cuda"]
    rows = pd.DataFrame(facts["rows"])
    rows["case"] = [
        f"{row.shape_}, {row.batch} × {row.tokens}, {row.precision}, {row.method}"
        for row in rows.rename(columns={"shape": "shape_"}).itertuples()
    ]
    rows = rows[rows.groupby("case")["runs"].transform("size") > 2]
    drawn = looks(rows["case"].unique())
    stream = io.StringIO()
    with style(), mpl.rc_context({"svg.fonttype": "path"}):
        figure = new_figure()
        panels = figure.subplots(1, 3)
        for axis, (column, title) in zip(
            panels,
            {
                "step_ms": "Step, ms",
                "per_run_ms": "Share of one run, ms",
                "peak_gib": "Peak memory, GiB",
            }.items(),
            strict=True,
        ):
            for case, part in rows.groupby("case", sort=False):
                banks = part[part["runs"] > 0]
                look = drawn[case]
                axis.plot(
                    banks["runs"], banks[column], color=look.colour, marker=look.marker, linestyle=look.line
                )
                axis.axhline(part[column].iloc[0], color=look.colour, linewidth=0.6, linestyle=":")
            axis.set_xscale("log", base=2)
            if column == "step_ms":
                axis.set_ylim(0, 1.15 * rows[column].max())
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64]))
            axis.xaxis.set_major_formatter(lambda size, _: f"{size:.0f}")
            axis.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_title(title)
            axis.set_xlabel("Runs in the bank")
            axis.grid(axis="y")
        name = facts["device"]["device_name"]
        frame(
            figure,
            1.7,
            handles=legend_handles(drawn),
            note=f"{name}. Medians over epochs. Dotted: one run without a bank.",
        )
        figure.savefig(stream, format="svg", metadata={"Creator": None, "Date": None})
    return stream.getvalue()


if __name__ == "__main__":
    atomic_write(DOCS / "benchmarks.md", report())
    atomic_write(DOCS / "bank_cost.svg", drawing())
