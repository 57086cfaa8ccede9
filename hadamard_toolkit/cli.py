"""`hadamard …`: the calls that a notebook makes, from a shell."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

import hadamard_toolkit as ht
from hadamard_toolkit.cli_sweep import announce, do_sweep
from hadamard_toolkit.errors import ArgumentError, ToolkitError, check_choice

if TYPE_CHECKING:
    import pandas as pd

# The names of `ht` load on first use, and all else that needs torch or pandas is imported inside the commands:
# `hadamard --help` must answer at once.

FETCHED = ["minilm-l6", "embedded"]
INTERRUPTED = 130  # what a shell gives for Ctrl-C
TRAIN, LOOK, KEEP, MACHINE = "Train", "Look at runs", "Look after a store", "This machine"


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        raise typer.Exit(guarded(lambda: super(_Commands, self).invoke(ctx)))


app = typer.Typer(
    cls=_Commands,
    help="Train adapters, keep the runs, look at them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        app(arguments, prog_name="hadamard")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def guarded(command: Callable[[], int | None]) -> int:
    """The exit status of `command`; an error of the toolkit or Ctrl-C is one line on stderr.

    The status of an error is 2; with `HADAMARD_DEBUG=1` it is raised.
    """
    try:
        return int(command() or 0)
    except ToolkitError as error:
        if os.environ.get("HADAMARD_DEBUG", "0") not in ("", "0"):
            raise
        print(f"hadamard: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hadamard: interrupted; finished runs are kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# options of more than one command, and long ones ---------------------------------------------------------------

Store = Annotated[str, Option(envvar="HADAMARD_STORE", metavar="DIR", help="Folder of the runs.")]
Plan = Annotated[str, Argument(metavar="PLAN.toml", help="A file of grids of runs.")]
KEPT = Option(help="Whose trained weights are kept: all but whole backbones, those of vectors, all, none.")
Keep = Annotated[Literal["adapters", "vectors", "everything", "nothing"], KEPT]
Values = list[str] | None
SET = Option("--set", metavar="FIELD=VALUE", help="Change a field of the protocol; may be repeated.")
DRY_RUN = Option("--dry-run", help="Only say what is missing, and how long it may take.")
RUN = Option("--run", metavar="KEY", help="Key of the run, or its beginning (left out: choose there).")
ONLY = Option(help="Only runs with this value; may be repeated.")
FOLDER = Option(metavar="DIR", help="Where they go (left out: figures/ of the checkout).")
FIGURED = Option(envvar="HADAMARD_STORE", metavar="DIR", help="Folder of the runs (left out: the reference).")


def _show_version(wanted: bool) -> None:
    if wanted:
        from hadamard_toolkit.runs.environment import toolkit_version

        print(f"hadamard_toolkit {toolkit_version()}")
        raise typer.Exit


VERSION = Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")


@app.callback()
def _options(version: Annotated[bool, VERSION] = False) -> None: ...


# commands ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=MACHINE)
def fetch(
    names: Annotated[list[str], Argument(metavar="NAME", help="minilm-l6, mpnet-base, embedded.")] = FETCHED,
) -> None:
    """Download and check pinned backbones and the embedded data."""
    from hadamard_toolkit.doctor import EMBEDDED, damaged, pinned_files
    from hadamard_toolkit.downloads import fetch
    from hadamard_toolkit.pinned import PINNED, pinned_folder
    from hadamard_toolkit.tasks.vader import DISTRIBUTION

    for name in names:
        check_choice("NAME", name, (*PINNED, EMBEDDED))
    for name in names:
        for path in damaged(name):
            path.unlink()
        fetched = fetch(DISTRIBUTION) if name == EMBEDDED else pinned_folder(name)
        size = sum(path.stat().st_size for path in pinned_files(name)) / 1e6
        print(f"{name:<12} {size:6.1f} MB  SHA-256 checked  {fetched}")


@app.command(rich_help_panel=TRAIN)
def run(
    task: Annotated[str, Option(help="A task, such as sst2 or embedded/tweets-polarity.")],
    backbone: Annotated[str, Option(help="A name, hub id or folder.")] = "minilm-l6",
    adapter: Annotated[str, Option(help="As in Python, such as 'LoRA(rank=4)'.")] = "Hadamard()",
    sparsity: Annotated[str, Option(help="How to prune it: 'Sparsity(\"snip\", 0.5)'.")] = "None",
    protocol: Annotated[str, Option(help="A preset: hadamard, 'unipelt(k=500)', …")] = "hadamard",
    overrides: Annotated[Values, SET] = None,
    seed: Annotated[int, Option(help="Seed of head, adapter, rows and batches.")] = 0,
    keep: Keep = "adapters",
    store: Store = "runs",
) -> None:
    """Train one spec, unless the store has it."""
    from hadamard_toolkit.runs.labels import describe
    from hadamard_toolkit.runs.plan import parse_adapter, parse_overrides, parse_protocol, parse_sparsity
    from hadamard_toolkit.runs.record import is_subset
    from hadamard_toolkit.runs.run import rescue
    from hadamard_toolkit.training.progress import telling, visible

    runs = ht.RunStore(store, keep=keep)
    chosen = parse_protocol(protocol, parse_overrides(overrides or []))
    spec = ht.RunSpec(backbone, task, parse_adapter(adapter), chosen, parse_sparsity(sparsity), seed)
    known = runs.known(spec) in runs
    # to stderr, as the result alone goes to stdout
    log = nullcontext() if visible() else telling(lambda line: print(line, file=sys.stderr, flush=True))
    try:
        with log:
            finished = ht.run(spec, runs)
    except ToolkitError as error:
        if saved := rescue(error):
            print(f"hadamard: the trained run is saved in {saved}", file=sys.stderr)
        raise
    state = "was there already" if known else f"done in {finished.times['total']:.1f} s"
    print(f"{finished.key}  {state}: {finished.folder}")
    print(f"{spec.task}, {spec.backbone}, {describe(spec)}, seed {spec.seed}")
    for split, values in finished.metrics.items():
        scored = finished.info["rows"][split]
        note = ", subset" if is_subset(split, finished.info) else ""
        scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"  {split:<16} {scores}  (n = {scored['rows']}{note})")
    counts = finished.counts[finished.counts["stored"] > 0]
    print(f"  trained          {', '.join(f'{role} {n:,}' for role, n in counts['trained'].items())}")


@app.command(rich_help_panel=TRAIN)
def sweep(
    plan: Plan,
    engine: Annotated[Literal["inline", "processes", "ray"], Option(help="Where runs happen.")] = "inline",
    workers: Annotated[int | None, Option(help="Runs at a time; one per GPU, or per two cores.")] = None,
    bank: Annotated[str, Option(metavar="N", help="Runs trained in one pass at most, or auto.")] = "auto",
    minutes: Annotated[float | None, Option(help="Start nothing that would end later.")] = None,
    dry_run: Annotated[bool, DRY_RUN] = False,
    keep: Keep = "adapters",
    store: Store = "runs",
) -> int:
    """Do the runs of a plan file that the store lacks, in its order; status 1 if some failed."""
    from hadamard_toolkit.runs.labels import describe
    from hadamard_toolkit.runs.plan import load_plan
    from hadamard_toolkit.runs.prepared import use_prepared

    if use_prepared(plan):
        print(f"{plan} lies in a prepared folder, which is whole: backbones and rows come from there")
    runs, specs = ht.RunStore(store, keep=keep), load_plan(plan)
    missing = announce(plan, specs, runs, engine, workers)
    if not dry_run:
        size = int(bank) if bank.isdigit() else bank
        return do_sweep(specs, runs, engine, workers, bank=size, minutes=minutes)
    for spec in missing:
        print(f"  {spec.key}  {spec.backbone}  {spec.task}  {describe(spec)}  seed {spec.seed}")
    return 0


@app.command(rich_help_panel=TRAIN)
def prepare(
    plan: Plan, folder: Annotated[str, Argument(metavar="FOLDER", help="Where all that it needs goes.")]
) -> None:
    """Gather all that a plan needs in one folder, for a machine without a network."""
    from hadamard_toolkit.runs.prepared import PLAN, prepare

    files = prepare(plan, folder)
    for file, size in zip(files["file"], files["bytes"], strict=True):
        print(f"{size / 1e6:9.1f} MB  {file}")
    print(f"{files['bytes'].sum() / 1e6:9.1f} MB  in {len(files)} files, with their SHA-256 in a manifest")
    print(
        f"Copy {folder} to the other machine, which needs no network; there: hadamard sweep {folder}/{PLAN}"
    )


@app.command(rich_help_panel=LOOK)
def runs(
    as_csv: Annotated[bool, Option("--csv", help="Every metric as tidy CSV.")] = False,
    as_json: Annotated[bool, Option("--json", help="Every metric as JSON, one object per line.")] = False,
    store: Store = "runs",
) -> None:
    """List the runs of a store."""
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other")
    opened = ht.RunStore(store)
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        table, failed = opened.load(), opened.failed()
    for warning in skipped:
        print(f"hadamard: {warning.message}", file=sys.stderr)
    if as_csv:
        print(table.to_csv(index=False), end="")
    elif as_json:
        print(table.to_json(orient="records", lines=True), end="")
    else:
        _show_runs(table, failed, store)


def _show_runs(table: pd.DataFrame, failed: pd.DataFrame, folder: str) -> None:
    from tabulate import tabulate

    shown = table[table["headline"] & (table["split"] == "test")]
    shown = shown.sort_values(["task", "backbone", "label", "seed"])
    columns = {
        **{name: shown[name] for name in ("key", "task", "backbone")},
        "adapter": shown["label"],
        "metric": shown["metric"],
        "seed": shown["seed"],
        "test": shown["value"].map("{:.4f}".format),
        "n": shown["n"].astype(str) + shown["subset"].map({True: "*", False: ""}),
        "trained": shown["trained"].map("{:,}".format),
        "+head": shown["trained_with_head"].map("{:,}".format),
        "s": shown["seconds"].map("{:.0f}".format),
    }
    if len(shown):
        sides = ["left"] * 5 + ["right"] * 6
        print(tabulate(columns, "keys", "plain", colalign=sides, disable_numparse=True))
    starred = " (* a subset of the official data)" if shown["subset"].any() else ""
    print(f"{len(shown)} runs in {folder}{starred}")
    if len(failed):
        print(f"\n{len(failed)} failed:")
        for row in failed.itertuples():
            reason = " ".join(str(row.message).split())
            print(f"  {row.key}  {row.task}  {row.label}  seed {row.seed}  {row.error}: {reason}")


@app.command(rich_help_panel=KEEP)
def pack(
    plan: Plan,
    undo: Annotated[bool, Option("--undo", help="Put packed runs back into folders, byte for byte.")] = False,
    store: Store = "runs",
) -> None:
    """Put the finished runs of a plan into one file of the store."""
    from hadamard_toolkit.runs.pack import pack, unpack

    if undo:
        print(f"{len(unpack(plan, store))} runs back in folders of {store}")
    else:
        path = pack(plan, store)
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


@app.command(rich_help_panel=LOOK)
def pruner(
    key: Annotated[str | None, RUN] = None,
    port: Annotated[int | None, Option(help="Port on this machine; any free one.")] = None,
    no_browser: Annotated[bool, Option("--no-browser", help="Only say where it is.")] = False,
    store: Store = "runs",
) -> int:
    """Prune the layers of a stored run by hand, in a browser."""
    from hadamard_toolkit.widgets.app import serve

    return serve(store, key, port=port, browser=not no_browser)


@app.command(rich_help_panel=LOOK)
def measure(
    measurement: Annotated[str, Argument(metavar="NAME", help="A key of measurements.MEASUREMENTS.")],
    plan: Annotated[str | None, Option(metavar="PLAN.toml", help="Only the runs of this plan.")] = None,
    task: Annotated[Values, ONLY] = None,
    method: Annotated[Values, ONLY] = None,
    seed: Annotated[Values, ONLY] = None,
    store: Store = "runs",
) -> int:
    """Measure finished runs for the studies: gates, layers, sharing, …; status 1 if there is no such run."""
    from hadamard_toolkit.measurements import MEASUREMENTS, measure

    check_choice("measurement", measurement, MEASUREMENTS)
    whole = ht.RunStore(store)
    part = whole.only(plan) if plan else whole
    table = part.load().drop_duplicates("key")
    for name, wanted in (("task", task), ("method", method), ("seed", seed)):
        if wanted:
            table = table[table[name].astype(str).isin(wanted)]
    if len(table):
        whole.check_writable()
    for row in table.itertuples():
        try:
            result = f"{len(measure(measurement, part.run(str(row.key)), part))} rows"
        except (
            ArgumentError,
            ht.DataError,
            ht.UnsupportedError,
        ) as error:  # not of this run, or it is damaged
            result = f"left out: {error}"
        print(f"{row.key}  {row.task}  {row.label}  seed {row.seed}  {result}", flush=True)
    return int(table.empty)


@app.command(rich_help_panel=LOOK)
def figures(
    folder: Annotated[str | None, FOLDER] = None,
    venue: Annotated[str, Option(help="The venue whose width they have.")] = "neurips",
    store: Annotated[str | None, FIGURED] = None,
) -> None:
    """Draw every paper figure again, from the store (checkout only)."""
    from hadamard_toolkit.paths import CHECKOUT

    tool = CHECKOUT / "tools" / "figures.py"
    if not tool.is_file():
        raise ArgumentError("figures are made by the notebooks of a checkout, and this is none")
    for name in runpy.run_path(str(tool))["draw_all"](store, folder, venue):
        print(name, flush=True)


@app.command(rich_help_panel=MACHINE)
def doctor() -> int:
    """Say what is installed, present and missing; status 1 if something is broken."""
    from tabulate import tabulate

    from hadamard_toolkit.doctor import examine

    findings = examine()
    marks = {True: "ok", None: "--", False: "!!"}
    lines = [(marks[finding.ok], finding.topic, finding.text) for finding in findings]
    print(tabulate(lines, tablefmt="plain", disable_numparse=True))
    broken = [finding.topic for finding in findings if finding.ok is False]
    print(f"broken: {', '.join(broken)}" if broken else "nothing is broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
