"""The HTML that the pruner shows: plain functions of values, in the colours of the notebook's own theme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from hadamard_toolkit.widgets.evaluation import Score

STYLE = """<style>
.hadamard-pruner {color: var(--jp-ui-font-color1, #1f1f1f); font-family: var(--jp-ui-font-family, sans-serif)}
.hadamard-pruner .widget-html-content {line-height: 1.4}
.hadamard-pruner h3 {margin: 4px 0 0; font-size: 16px; font-weight: 600}
.hadamard-pruner h4 {margin: 8px 0 0; font-size: 13px; font-weight: 600}
.hadamard-pruner p {margin: 2px 0; max-width: 75em}
.hadamard-pruner table.hp {border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px}
.hadamard-pruner table.hp caption {text-align: left; padding: 2px 8px 2px 0; color: var(--jp-ui-font-color2, #5f5f5f)}
.hadamard-pruner table.hp th, .hadamard-pruner table.hp td {padding: 3px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--jp-border-color2, #d0d0d0); background: none; color: inherit}
.hadamard-pruner table.hp th {font-weight: 600}
.hadamard-pruner table.hp .words {text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5em}
.hadamard-pruner .stale {color: var(--jp-ui-font-color2, #5f5f5f); font-style: italic}
.hadamard-pruner .scroll {overflow-x: auto; max-width: 100%; container-type: inline-size}
@container (max-width: 620px) {
  .hadamard-pruner table.hp-scores, .hadamard-pruner table.hp-scores :is(caption, tbody, tr) {display: block}
  .hadamard-pruner table.hp-scores thead {display: none}
  .hadamard-pruner table.hp-scores tr {border-bottom: 1px solid var(--jp-border-color2, #d0d0d0); padding: 4px 0}
  .hadamard-pruner table.hp-scores td {display: flex; justify-content: space-between; border: 0; padding: 1px 0}
  .hadamard-pruner table.hp-scores td::before {content: attr(data-name); padding-right: 1em;
    color: var(--jp-ui-font-color2, #5f5f5f)}
}
.hadamard-pruner .bars {display: grid; grid-template-columns: 4.2em 60px 4.4em; column-gap: 6px; align-items: center;
  font-size: 12px; font-variant-numeric: tabular-nums; line-height: 15px}
.hadamard-pruner .bars .track {height: 8px; background: var(--jp-layout-color3, #d8d8d8)}
.hadamard-pruner .bars .bar {height: 8px; background: var(--jp-brand-color1, #1976d2)}
.hadamard-pruner .bars.off .bar {background: var(--jp-ui-font-color3, #8a8a8a)}
.hadamard-pruner .error {border-left: 4px solid var(--jp-error-color1, #c62828); padding: 4px 8px; margin: 4px 0}
.hadamard-pruner textarea.hp {width: 100%; box-sizing: border-box; font-family: var(--jp-code-font-family, monospace);
  font-size: 12px; background: var(--jp-layout-color1, #fff); color: inherit;
  border: 1px solid var(--jp-border-color1, #bdbdbd)}
.hadamard-pruner button.hp {font: inherit; padding: 2px 10px; color: inherit; cursor: pointer;
  background: var(--jp-layout-color2, #eee); border: 1px solid var(--jp-border-color1, #bdbdbd)}
.hadamard-pruner .hp-controls, .hadamard-pruner .hp-row {flex-flow: row wrap; align-items: center}
.hadamard-pruner .hp-row {border-bottom: 1px solid var(--jp-border-color2, #e0e0e0); padding: 4px 0}
.hadamard-pruner .jupyter-button.hp-pruned {text-decoration: line-through; font-style: italic; box-shadow: none}
.hadamard-pruner .jupyter-button:focus-visible {outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 1px}
</style>"""
_COPY = (
    "const t=this.parentElement.querySelector('textarea');t.select();"
    "(navigator.clipboard?navigator.clipboard.writeText(t.value):Promise.reject())"
    ".catch(()=>document.execCommand('copy'));this.textContent='Copied'"
)


def number(value: float, *, sign: bool = False) -> str:
    """Four decimals with a true minus sign; `—` for NaN."""
    if value != value:
        return "—"
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text.replace("-", "−")


def short(value: float) -> str:
    """Three significant digits."""
    return "—" if value != value else (f"{value:#.3g}" if value and abs(value) < 100 else f"{value:.0f}")


def difference(score: Score) -> str:
    """Pruned minus unpruned with its interval, or a note that no prediction changed."""
    if math.isnan(score.low):
        return "no prediction changed"
    interval = f"[{number(score.low, sign=True)}, {number(score.high, sign=True)}]"
    return f"{number(score.difference, sign=True)} {interval}"


def flipped(score: Score) -> str:
    """How many rows changed their class, of how many, and how many of them became right and wrong."""
    if score.metric in ("pearson", "spearman"):
        return f"— of {score.n}"
    return f"{score.changed} of {score.n} (+{score.gained} / −{score.lost})"


def evidence(rows: Sequence[Mapping[str, Any]], largest: Mapping[str, float], *, kept: bool) -> str:
    """Bars of one part, one group per task: ‖W − 1‖ and |b| (or the norm of all), effect of leaving it out, density."""
    cells = []
    for row in rows:
        name = escape(str(row.get("task", "")))
        if name and len(rows) > 1:
            cells.append(f'<span style="grid-column: 1 / 4">{name}</span>')
        norms = [("|W − 1|", "weight"), ("|b|", "bias")]
        if str(row["site"]).endswith("norm"):
            norms = [("|Δ gain|", "weight"), ("|Δ bias|", "bias")]
        if all(row[kind] != row[kind] for _, kind in norms):
            norms = [("norm", "importance")]
        for label, kind in norms:
            if row[kind] == row[kind]:
                cells.append(_bar(label, row[kind], largest[kind]))
        if row["without"] == row["without"]:
            cells.append(f"<span>without</span><span></span><span>{number(row['without'], sign=True)}</span>")
        if row["density"] < 1:
            cells.append(_bar("density", row["density"], 1.0))
    return f'<div class="bars{"" if kept else " off"}">{"".join(cells)}</div>'


def _bar(label: str, value: float, largest: float) -> str:
    width = 100 * value / largest if largest > 0 else 0
    bar = f'<div class="track" aria-hidden="true"><div class="bar" style="width:{width:.0f}%"></div></div>'
    return f"<span>{label}</span>{bar}<span>{short(value)}</span>"


_COLUMNS = (
    "Task",
    "Metric",
    "Unpruned",
    "Pruned",
    "Difference, 95 % interval",
    "Flipped rows",
    "State of the numbers",
)
_WORDS = {"Task", "Metric", "State of the numbers"}


def numbers(rows: Iterable[Mapping[str, Any]], kept: str) -> str:
    """The score of every task with what is kept, against the unpruned model. `rows`: task, score, status, retrained."""
    body = []
    for row in rows:
        body.append(_score_row(str(row["task"]), row["score"], str(row["status"])))
        if row.get("retrained") is not None:
            body.append(_score_row(f"{row['task']}, retrained", row["retrained"], str(row["retrained_as"])))
    head = "".join(f"<th{_kind(name)}>{name}</th>" for name in _COLUMNS)
    caption = f"Kept: <b>{escape(kept)}</b>"
    table = f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll" role="status" aria-live="polite"><table class="hp hp-scores">{table}</table></div>'


def _score_row(task: str, score: Score, status: str) -> str:
    values = [score.metric, number(score.full), number(score.value), difference(score), flipped(score)]
    cells = "".join(
        f'<td{_kind(name)} data-name="{name}">{escape(cell)}</td>'
        for name, cell in zip(_COLUMNS, [task, *values, status], strict=True)
    )
    stale = "" if status.startswith(("up to date", "run ")) else ' class="stale"'
    return f"<tr{stale}>{cells}</tr>"


def _kind(column: str) -> str:
    return ' class="words"' if column in _WORDS else ""


def costs(kept: pd.Series, full: pd.Series) -> str:
    """Parameters and inference cost with what is kept, and with everything."""
    share = 100 * kept["multiply_adds"] / kept["backbone"]
    free = "; nothing after merge()" if kept["merges"] else "; it cannot be merged"
    return (
        '<p role="status">'
        f"Trained <b>{kept['trained']:,}</b> of {full['trained']:,} parameters ({100 * kept['of_full']:.0f} %), "
        f"stored <b>{kept['stored']:,}</b> of {full['stored']:,}, head left out. "
        f"Inference, beside the backbone: <b>{kept['multiply_adds']:,}</b> multiply-adds per token "
        f"({share:.3g} % of its layers' matrices; {full['multiply_adds']:,} unpruned){free}.</p>"
    )


def flips(tables: Mapping[str, pd.DataFrame], totals: Mapping[str, int | None]) -> str:
    """The rows whose prediction changed, task by task."""
    parts = []
    for task, table in tables.items():
        total = totals[task]
        if total is None:
            text = (
                f"{escape(task)}: the {len(table)} largest changes"
                if len(table)
                else f"{escape(task)}: no change"
            )
        else:
            more = f", the {len(table)} surest shown" if total > len(table) else ""
            text = f"{escape(task)}: {total} predictions flipped{more}"
        parts.append(f"<p>{text}</p>")
        if len(table):
            body = "".join(
                f'<tr><td>{row.row}</td><td class="words">{escape(str(row.text))}</td><td>{escape(str(row.label))}</td>'
                f"<td>{escape(str(row.before))}</td><td>{escape(str(row.after))}</td>"
                f"<td>{number(row.change, sign=True)}</td></tr>"  # type: ignore[arg-type]
                for row in table.itertuples()
            )
            names = ("Row", "Text", "Truth", "Unpruned", "Pruned", "Change")
            head = "".join(f"<th{' class=words' if name == 'Text' else ''}>{name}</th>" for name in names)
            whole = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            parts.append(f'<div class="scroll"><table class="hp">{whole}</table></div>')
    return f"<h4>Examples that changed</h4>{''.join(parts)}"


def code(text: str) -> str:
    """Code with a button that copies it to the clipboard, if the browser allows that."""
    rows = min(16, text.count("\n") + 1)
    area = f'<textarea class="hp" readonly rows="{rows}" aria-label="Code">{escape(text)}</textarea>'
    return f'<div>{area}<br><button class="hp" type="button" onclick="{escape(_COPY)}">Copy</button></div>'


def message(text: str, *, error: bool = False) -> str:
    """A line for the reader; an error is announced."""
    if not text:
        return ""
    kind = 'class="error" role="alert"' if error else 'role="status"'
    return f"<p {kind}>{'<b>Failed:</b> ' if error else ''}{escape(text)}</p>"


def progress(text: str, share: float | None) -> str:
    """A progress bar; without a known share it shows that something is going on."""
    value = "" if share is None else f' value="{share:.3f}" max="1"'
    return f'<p role="status"><progress{value} aria-label="{escape(text)}"></progress> {escape(text)}</p>'


def near(folder: Path) -> str:
    """A folder relative to the working folder, if it lies below it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(folder)
