"""Errors of the toolkit and the checks that raise them: argument, its value, what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


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
    """A store of runs, or the folder of an attachment, cannot be written to."""


class MissingExtraError(ToolkitError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class TrainingError(ToolkitError, ArithmeticError):
    """Training diverged."""


def suggestion(value: object, options: Iterable[object]) -> str:
    """ " Did you mean 'x'?", for an error about `value`; empty where no option looks like it.

    The order of words, their case and what stands between them do not matter, nor that one name has more of them;
    initials stand for a name of several words.
    """
    if not isinstance(value, str) or not (asked := _words(value)):
        return ""
    words = {option: own for option in options if isinstance(option, str) and (own := _words(option))}
    joined = {" ".join(own): option for option, own in words.items()}
    close = (
        [option for option, own in words.items() if own == asked]
        or [
            option
            for option, own in words.items()
            if set(asked) <= set(own) or set(own) <= set(asked) or option.startswith(value.lower())
        ]
        or [
            option
            for option in words
            if "".join(re.findall(r"(?<![^\W_])[^\W_]", option.lower())) == value.lower()
        ]
        or [joined[match] for match in difflib.get_close_matches(" ".join(asked), joined)]
    )
    return f" Did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""


def _words(name: str) -> list[str]:
    return sorted(re.findall(r"[^\W\d_]+|\d+", name.lower()))


def check_fields(cls: type[T]) -> type[T]:
    """Let the dataclass `cls` answer unknown and missing keywords with an `ArgumentError`, which suggests a field."""
    init: Any = cls.__init__
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]

    @functools.wraps(init)
    def checked(self: T, *values: Any, **by_name: Any) -> None:
        for name in by_name:
            check_choice(f"field of {cls.__name__}", name, names)
        if missing := [name for name in required[len(values) :] if name not in by_name]:
            raise ArgumentError(f"{cls.__name__} needs the field {', '.join(map(repr, missing))}")
        init(self, *values, **by_name)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


def check_choice(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `ArgumentError` unless `value` is one of `allowed`."""
    options = list(allowed)
    if value not in options:
        raise ArgumentError(
            f"{argument}={value!r} is not allowed; choose one of {', '.join(map(repr, options))}"
            + (f".{hint}" if (hint := suggestion(value, options)) else "")
        )


def check_whole(
    argument: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    below: int | None = None,
    optional: bool = False,
) -> None:
    """Raise `ArgumentError` unless `value` is an int (True and False are none) within the bounds.

    With `optional`, None is allowed too.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _not_allowed(argument, value, "a whole number", _bounds(least, most, None, below), optional)
    check_range(argument, value, least=least, most=most, below=below)


def check_number(
    argument: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Raise `ArgumentError` unless `value` is a finite int or float (True and False are none) within the bounds.

    With `optional`, None is allowed too.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _not_allowed(argument, value, "a finite number", _bounds(least, most, above, below), optional)
    check_range(argument, value, least=least, most=most, above=above, below=below)


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
        raise _not_allowed(argument, value, "", _bounds(least, most, above, below))


def _bounds(least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    signs = {">=": least, ">": above, "<=": most, "<": below}
    return " and ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)


def _not_allowed(
    argument: str, value: object, kind: str, bounds: str, optional: bool = False
) -> ArgumentError:
    allowed = " ".join(filter(None, (kind, bounds, "or None" if optional else "")))
    return ArgumentError(f"{argument}={value!r} is not allowed; it must be {allowed}")
