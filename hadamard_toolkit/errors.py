"""Errors of the toolkit and the checks that raise them: argument, its value, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable


class ToolkitError(Exception):
    """Base of every error this library raises on purpose."""


class ArgumentError(ToolkitError, ValueError):
    """An argument has a value that is not allowed."""


class UnsupportedError(ToolkitError, NotImplementedError):
    """The request is well formed, but this architecture or method cannot do it."""


class DataError(ToolkitError, ValueError):
    """Data or a task does not have the promised shape."""


class DownloadError(ToolkitError, OSError):
    """A file could not be fetched, has no place to be kept, or its checksum is wrong."""


class StoreError(ToolkitError, OSError):
    """A store of runs cannot be written to."""


class TrainingError(ToolkitError, ArithmeticError):
    """Training diverged."""


def check_choice(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `ArgumentError` unless `value` is one of `allowed`."""
    options = list(allowed)
    if value not in options:
        raise ArgumentError(
            f"{argument}={value!r} is not allowed; choose one of {', '.join(map(repr, options))}"
        )


def check_range(
    argument: str,
    value: float,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise `ArgumentError` unless `least <= value <= most` and `above < value < below` (bounds left out are open)."""
    inside = (
        value == value
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not inside:
        bounds = [
            f"{sign} {bound}"
            for sign, bound in ((">=", least), (">", above), ("<=", most), ("<", below))
            if bound is not None
        ]
        raise ArgumentError(f"{argument}={value!r} is not allowed; it must be {' and '.join(bounds)}")
