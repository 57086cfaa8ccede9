from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr

import pytest

from hadamard_toolkit.training import progress
from hadamard_toolkit.training.progress import bar, tell, telling, watching


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of CI, with no wish expressed."""
    for name in ("HADAMARD_PROGRESS", "CI"):
        monkeypatch.delenv(name, raising=False)


class Shell:
    """IPython as a module, and the shell that it has made."""

    def __init__(self, **config: object) -> None:
        self.config = config

    def get_ipython(self) -> Shell:
        return self


@pytest.mark.parametrize(
    ("config", "bars"), [({"IPKernelApp": {}}, True), ({"TerminalIPythonApp": {}}, False)]
)
def test_a_kernel_shows_bars_and_a_shell_whose_output_goes_to_a_file_does_not(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, object], bars: bool
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", Shell(**config))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress.visible() is bars


def shown(stream: io.StringIO, **choices: bool) -> str:
    """What a bar over three items writes to `stream` as standard error."""
    with redirect_stderr(stream):
        assert list(bar(range(3), description="stage two", **choices)) == [0, 1, 2]
    return stream.getvalue()


def test_a_terminal_shows_a_bar_that_goes_away() -> None:
    text = shown(Terminal())
    assert "stage two" in text
    assert text.endswith("\r")


@pytest.mark.parametrize(("name", "value"), [("HADAMARD_PROGRESS", "0"), ("CI", "true")])
def test_silent_when_told_to_and_in_ci(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert shown(Terminal()) == ""


@pytest.mark.parametrize("value", ["", "0", "false", "False"])
def test_a_ci_that_is_said_to_be_off_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CI", value)
    assert "stage two" in shown(Terminal())


def test_silent_where_output_is_a_file() -> None:
    assert shown(io.StringIO()) == ""


def test_a_silent_bar_can_be_used_like_any_other() -> None:
    with redirect_stderr(log := io.StringIO()), bar(total=2) as progress:
        progress.update(2)
        progress.set_postfix(loss="1.0")
    assert log.getvalue() == ""


def test_a_wish_beats_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("HADAMARD_PROGRESS", "1")
    assert "stage two" in shown(io.StringIO())


def test_one_process_of_many_can_stay_silent() -> None:
    assert shown(Terminal(), show=False) == ""


def test_lines_go_to_whoever_listens_and_to_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    tell("before")
    with telling(heard.append):
        tell("within")
        with telling(heard.append):
            tell("deeper")
        tell("within")
    tell("after")
    assert heard == ["within", "deeper", "within"]
    assert capsys.readouterr() == ("", "")


def test_a_watcher_gets_shares_where_a_bar_would_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    seen: list[tuple[str, float]] = []
    with watching(lambda stage, share: seen.append((stage, share))):
        text = shown(Terminal())
        shown(Terminal(), show=False)
        with bar(total=4, description="stage one") as progress:
            progress.update(3)
            progress.refresh()
            progress.set_postfix(loss="1.0", refresh=False)
    assert text == "", "nothing is drawn"
    assert ("stage two", 0.0) in seen
    assert seen[-1] == ("stage one", 0.75)
    assert {stage for stage, _ in seen} == {"stage one", "stage two"}
    shown(Terminal())
    assert seen[-1] == ("stage one", 0.75), "nobody watches any more"
