"""Which metrics fit which task; `training.metrics` and `training.squad_metrics` compute them."""

from __future__ import annotations

from hadamard_toolkit.errors import ArgumentError, suggestion

BY_KIND = {
    "classification": ("accuracy", "f1", "macro-f1", "micro-f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "span": ("f1", "exact-match"),
}


def fitting(kind: str, n_labels: int) -> tuple[str, ...]:
    """The metrics of a task of this kind; `f1` of a classification is that of class 1, so it needs two classes."""
    if kind == "classification" and n_labels != 2:
        return tuple(name for name in BY_KIND[kind] if name != "f1")
    return BY_KIND[kind]


def check_metric(name: object, kind: str, n_labels: int) -> None:
    """Raise `ArgumentError` unless the metric `name` means something for a task of this kind."""
    allowed = fitting(kind, n_labels)
    if name not in allowed:
        of = f" with {n_labels} labels" if kind == "classification" else ""
        raise ArgumentError(
            f"metric={name!r} is not allowed for kind={kind!r}{of}; choose one of {', '.join(map(repr, allowed))}"
            + (f".{hint}" if (hint := suggestion(name, allowed)) else "")
        )
