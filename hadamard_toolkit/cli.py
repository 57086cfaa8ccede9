"""`hadamard …`: a thin face over the same calls that a notebook makes."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.errors import ToolkitError, check_choice

if TYPE_CHECKING:
    import pandas as pd

# Imports of what needs torch or pandas stand inside the commands: `hadamard --help` must answer at once.

STORE = "runs"
DEFAULT_FETCH = ("minilm-l6", "embedded")
INTERRUPTED = 130  # what a shell gives for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    An error of the toolkit is one line on stderr and status 2; with `HADAMARD_DEBUG=1` it is raised.
    """
    options = _parser().parse_args(arguments)
    return guarded(lambda: options.command(options))


def guarded(command: Callable[[], int]) -> int:
    """The exit status of `command`, in which no error that is meant for people and no Ctrl-C leaves a traceback."""
    try:
        return int(command())
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hadamard", description="Train adapters, keep the runs, look at them."
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fetch = commands.add_parser("fetch", help="download and check pinned backbones and the embedded data")
    fetch.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"minilm-l6, mpnet-base, embedded (default: {' '.join(DEFAULT_FETCH)})",
    )
    fetch.set_defaults(command=_fetch)

    one = commands.add_parser("run", help="train one spec, unless the store has it")
    one.add_argument(
        "--backbone", default="minilm-l6", help="a name, hub id or folder (default: %(default)s)"
    )
    one.add_argument("--task", required=True, help="a task, such as sst2 or embedded/tweets-polarity")
    one.add_argument(
        "--adapter", default="Hadamard()", help="as in Python, such as 'LoRA(rank=4)' (default: %(default)s)"
    )
    one.add_argument(
        "--sparsity",
        default="None",
        help="how to prune it, such as 'Sparsity(\"snip\", 0.5)' (default: not at all)",
    )
    one.add_argument(
        "--protocol",
        default="hadamard",
        help="a preset, such as hadamard or 'unipelt(k=500)' (default: %(default)s)",
    )
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="change a field of the protocol; may be repeated",
    )
    one.add_argument(
        "--seed", type=int, default=0, help="seed of head, adapter, rows and batches (default: %(default)s)"
    )
    one.set_defaults(command=_run)

    runs = commands.add_parser("runs", help="list the runs of a store")
    form = runs.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="every metric as tidy CSV")
    form.add_argument("--json", action="store_true", help="every metric as JSON, one object per line")
    runs.set_defaults(command=_runs)

    many = commands.add_parser("sweep", help="do the runs of a plan file that the store lacks")
    many.add_argument("plan", metavar="PLAN.toml", help="a file of [[grid]] tables")
    many.add_argument(
        "--engine",
        default="inline",
        choices=("inline", "processes", "ray"),
        help="where runs happen (default: %(default)s)",
    )
    many.add_argument("--workers", type=int, help="runs at a time (default: one per GPU, or per two cores)")
    many.add_argument(
        "--bank",
        type=_bank_size,
        default="auto",
        metavar="N",
        help="runs trained in one pass at most: auto (where that is faster), or a number (default: auto; 1: none)",
    )
    many.add_argument(
        "--dry-run", action="store_true", help="only say what is missing, and how long it may take"
    )
    many.set_defaults(command=_sweep)

    packing = commands.add_parser("pack", help="put the finished runs of a plan into one file of the store")
    packing.add_argument("plan", metavar="PLAN.toml", help="the plan whose runs are packed")
    packing.add_argument(
        "--undo", action="store_true", help="put packed runs back into folders, byte for byte"
    )
    packing.set_defaults(command=_pack)

    pruner = commands.add_parser("pruner", help="prune the layers of a stored run by hand, in a browser")
    pruner.add_argument(
        "--run", metavar="KEY", help="key of the run, or how it begins (default: choose there)"
    )
    pruner.add_argument("--port", type=int, help="port on this machine (default: any free one)")
    pruner.add_argument("--no-browser", action="store_true", help="only say where it is")
    pruner.set_defaults(command=_pruner)

    measured = commands.add_parser(
        "measure", help="measure finished runs for the studies: gates, layers, sharing, …"
    )
    measured.add_argument(
        "measurement", metavar="NAME", help="one of hadamard_toolkit.measurements.MEASUREMENTS"
    )
    measured.add_argument("--plan", metavar="PLAN.toml", help="only the runs of this plan")
    for name in ("task", "method", "seed"):
        measured.add_argument(
            f"--{name}", action="append", help=f"only runs of this {name} (may be repeated)"
        )
    measured.set_defaults(command=_measure)

    figures = commands.add_parser(
        "figures", help="draw every paper figure again, from the store (checkout only)"
    )
    figures.add_argument("--store", metavar="DIR", help="folder of the runs (default: the reference runs)")
    figures.add_argument("--folder", metavar="DIR", help="where they go (default: figures/ of the checkout)")
    figures.add_argument("--venue", default="neurips", help="whose width they have (default: %(default)s)")
    figures.set_defaults(command=_figures)

    for command in (one, many):
        command.add_argument(
            "--keep",
            default="adapters",
            choices=("adapters", "vectors", "everything", "nothing"),
            help="runs whose trained weights are kept: all but whole backbones (default), those of vectors, all, none",
        )
    for command in (one, runs, many, packing, pruner, measured):
        command.add_argument(
            "--store", default=STORE, metavar="DIR", help="folder of the runs (default: %(default)s)"
        )

    doctor = commands.add_parser(
        "doctor", help="say what is installed, present and missing; status 1 if something is broken"
    )
    doctor.set_defaults(command=_doctor)
    return parser


class _Version(argparse.Action):
    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> None:
        from hadamard_toolkit.runs.environment import toolkit_version

        print(f"hadamard_toolkit {toolkit_version()}")
        parser.exit()


def _fetch(options: argparse.Namespace) -> int:
    from hadamard_toolkit.doctor import EMBEDDED, damaged, pinned_files
    from hadamard_toolkit.downloads import fetch
    from hadamard_toolkit.pinned import PINNED, pinned_folder
    from hadamard_toolkit.tasks.vader import DISTRIBUTION

    names = options.names or DEFAULT_FETCH
    for name in names:
        check_choice("NAME", name, (*PINNED, EMBEDDED))
    for name in names:
        for path in damaged(name):
            path.unlink()
        place = fetch(DISTRIBUTION) if name == EMBEDDED else pinned_folder(name)
        size = sum(path.stat().st_size for path in pinned_files(name)) / 1e6
        print(f"{name:<12} {size:6.1f} MB  SHA-256 checked  {place}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from hadamard_toolkit.runs.labels import describe
    from hadamard_toolkit.runs.plan import parse_adapter, parse_overrides, parse_protocol, parse_sparsity
    from hadamard_toolkit.runs.record import is_subset
    from hadamard_toolkit.runs.rescue import rescue
    from hadamard_toolkit.runs.run import run
    from hadamard_toolkit.runs.spec import RunSpec
    from hadamard_toolkit.runs.store import RunStore
    from hadamard_toolkit.training.progress import telling, visible

    store = RunStore(options.store, keep=options.keep)
    spec = RunSpec(
        backbone=options.backbone,
        task=options.task,
        adapter=parse_adapter(options.adapter),
        protocol=parse_protocol(options.protocol, parse_overrides(options.overrides)),
        sparsity=parse_sparsity(options.sparsity),
        seed=options.seed,
    )
    known = store.known(spec) in store
    # to stderr, as the result alone goes to stdout
    log = nullcontext() if visible() else telling(lambda line: print(line, file=sys.stderr, flush=True))
    try:
        with log:
            finished = run(spec, store)
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
        measured = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"  {split:<16} {measured}  (n = {scored['rows']}{note})")
    counts = finished.counts
    parts = ", ".join(
        f"{role} {counts.loc[role, 'trained']:,}" for role in counts.index if counts.loc[role, "stored"]
    )
    print(f"  trained          {parts}")
    return 0


def _runs(options: argparse.Namespace) -> int:
    from hadamard_toolkit.runs.store import RunStore

    store = RunStore(options.store)
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        table, failed = store.load(), store.failed()
    for warning in skipped:
        print(f"hadamard: {warning.message}", file=sys.stderr)
    if options.csv:
        print(table.to_csv(index=False), end="")
    elif options.json:
        print(table.to_json(orient="records", lines=True), end="")
    else:
        _show_runs(table, failed, options.store)
    return 0


def _show_runs(table: pd.DataFrame, failed: pd.DataFrame, place: str) -> None:
    shown = table[table["headline"] & (table["split"] == "test")].sort_values(
        ["task", "backbone", "label", "seed"]
    )
    columns = {
        "key": shown["key"],
        "task": shown["task"],
        "backbone": shown["backbone"],
        "adapter": shown["label"],
        "seed": shown["seed"],
        "metric": shown["metric"],
        "test": shown["value"].map("{:.4f}".format),
        "n": shown["n"].astype(str) + shown["subset"].map({True: "*", False: ""}),
        "trained": shown["trained"].map("{:,}".format),
        "+head": shown["trained_with_head"].map("{:,}".format),
        "s": shown["seconds"].map("{:.0f}".format),
    }
    if len(shown):
        _print_table(columns)
    starred = " (* a subset of the official data)" if shown["subset"].any() else ""
    print(f"{len(shown)} runs in {place}{starred}")
    if len(failed):
        print(f"\n{len(failed)} failed:")
        for row in failed.itertuples():
            reason = " ".join(str(row.message).split())
            print(f"  {row.key}  {row.task}  {row.label}  seed {row.seed}  {row.error}: {reason}")


NUMBERS = ("seed", "test", "n", "trained", "+head", "s", "score")


def _print_table(columns: dict[str, Any]) -> None:
    """Aligned columns, numbers to the right."""
    cells = {name: [name, *map(str, values)] for name, values in columns.items()}
    widths = {name: max(map(len, column)) for name, column in cells.items()}
    for row in zip(*cells.values(), strict=True):
        line = (
            cell.rjust(widths[name]) if name in NUMBERS else cell.ljust(widths[name])
            for name, cell in zip(cells, row, strict=True)
        )
        print("  ".join(line).rstrip())


def _bank_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _sweep(options: argparse.Namespace) -> int:
    from hadamard_toolkit.cli_sweep import announce, do_sweep
    from hadamard_toolkit.runs.labels import describe
    from hadamard_toolkit.runs.plan import load_plan
    from hadamard_toolkit.runs.store import RunStore

    store, specs = RunStore(options.store, keep=options.keep), load_plan(options.plan)
    missing = announce(options.plan, specs, store, options.engine, options.workers)
    if not options.dry_run:
        return do_sweep(specs, store, options.engine, options.workers, bank=options.bank)
    for spec in missing:
        print(f"  {spec.key}  {spec.backbone}  {spec.task}  {describe(spec)}  seed {spec.seed}")
    return 0


def _pack(options: argparse.Namespace) -> int:
    from hadamard_toolkit.runs.pack import pack, unpack

    if options.undo:
        print(f"{len(unpack(options.plan, options.store))} runs back in folders of {options.store}")
    else:
        path = pack(options.plan, options.store)
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _pruner(options: argparse.Namespace) -> int:
    from hadamard_toolkit.widgets.app import serve

    return serve(options.store, options.run, port=options.port, browser=not options.no_browser)


def _measure(options: argparse.Namespace) -> int:
    from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
    from hadamard_toolkit.measurements import MEASUREMENTS, measure
    from hadamard_toolkit.runs.store import RunStore

    check_choice("measurement", options.measurement, MEASUREMENTS)
    store = RunStore(options.store)
    part = store.only(options.plan) if options.plan else store
    table = part.load().drop_duplicates("key")
    for name in ("task", "method", "seed"):
        if wanted := getattr(options, name):
            table = table[table[name].astype(str).isin(wanted)]
    if len(table):
        store.check_writable()
    for row in table.itertuples():
        try:
            found = f"{len(measure(options.measurement, part.run(str(row.key)), part))} rows"
        except (ArgumentError, DataError, UnsupportedError) as error:  # not of this run, or it is damaged
            found = f"left out: {error}"
        print(f"{row.key}  {row.task}  {row.label}  seed {row.seed}  {found}", flush=True)
    return int(table.empty)


def _figures(options: argparse.Namespace) -> int:
    from hadamard_toolkit.figures import draw_all

    for name in draw_all(options.store, options.folder, options.venue):
        print(name, flush=True)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from hadamard_toolkit.doctor import examine

    findings = examine()
    width = max(len(finding.topic) for finding in findings)
    marks = {True: "ok", None: "--", False: "!!"}
    for finding in findings:
        print(f"{marks[finding.ok]}  {finding.topic:<{width}}  {finding.text}")
    broken = [finding.topic for finding in findings if finding.ok is False]
    print(f"broken: {', '.join(broken)}" if broken else "nothing is broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
