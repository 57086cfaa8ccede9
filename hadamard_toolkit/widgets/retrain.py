"""A run in a process of its own, with its progress, that can be cancelled without leaving half a run behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict

from hadamard_toolkit.errors import ToolkitError
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore

_BAR = re.compile(r"(stage \w+):\s+(\d+)%")
GRACE = 5.0  # seconds that a cancelled process gets to end by itself
_MARK = "hadamard-attempt:"


class RetrainingError(ToolkitError, RuntimeError):
    """A retraining failed or its process died."""


class Retraining:
    """`ht.run(spec, store)` in another process, started at once.

    `progress` says how far it is, `finished` whether it is over, `result()` what came of it. `cancel()` ends it; a
    run is written wholly or not at all, so the store then holds what it held before.
    """

    def __init__(self, spec: RunSpec, store: RunStore) -> None:
        self.spec, self.store = spec, store
        self.cancelled, self._share, self._stage = False, 0.0, "starting"
        self._told: list[str] = []
        self._answer: dict[str, object] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hadamard_toolkit.widgets.retrain", str(store.folder), store.keep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "HADAMARD_PROGRESS": "1", "TQDM_MININTERVAL": "0.1"},
            start_new_session=True,  # Ctrl-C in the notebook server is not meant for it
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(spec.to_json().encode())
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read_bars, self._read_answer)
        ]
        for reader in self._readers:
            reader.start()

    def _read_bars(self) -> None:
        line, stream = b"", self._process.stderr
        assert stream is not None
        with stream:
            while chunk := stream.read(1):  # a bar ends its lines with a carriage return
                line += chunk
                if chunk in b"\r\n":
                    text, line = line.decode(errors="replace"), b""
                    if found := _BAR.search(text):
                        self._stage, self._share = found[1], int(found[2]) / 100
                    elif text.strip():
                        self._told = [*self._told[-20:], text.strip()]

    def _read_answer(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                if line.startswith(_MARK.encode()):
                    self._answer = json.loads(line[len(_MARK) :])

    @property
    def progress(self) -> tuple[str, float]:
        """The stage in words, and the share of it that is done, 0 to 1."""
        return self._stage, self._share

    @property
    def finished(self) -> bool:
        """Whether the process has ended, however it did."""
        return self._process.poll() is not None

    def result(self) -> str | None:
        """Wait for the end: the key of the run, or None if it was cancelled. `RetrainingError` says why it failed."""
        self._process.wait()
        for reader in self._readers:
            reader.join()
        if self.cancelled:
            return None
        if self._answer.get("status") == "done" and self.spec in self.store:
            return self.spec.key
        reason = (
            self._answer.get("reason")
            or " ".join(self._told[-3:])
            or f"exit status {self._process.returncode}"
        )
        raise RetrainingError(f"retraining {self.spec.key} failed: {reason}")

    def cancel(self) -> None:
        """End it now and remove what it was writing, if it was."""
        if self.finished:
            return
        self.cancelled = True
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join()
        for left in self.store.folder.glob(f".staging-{self._process.pid}-*"):
            shutil.rmtree(left, ignore_errors=True)


def main() -> None:
    """The other process: a spec on stdin; store and what it keeps as arguments; the attempt on stdout."""
    from hadamard_toolkit.runs.engines import attempt_run

    folder, keep = sys.argv[1:]
    attempt = attempt_run(RunSpec.from_dict(json.loads(sys.stdin.read())), RunStore(folder, keep=keep))
    print(_MARK + json.dumps({**asdict(attempt), "spec": None}), flush=True)


if __name__ == "__main__":
    main()
