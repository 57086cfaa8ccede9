"""A run in a process of its own, with its progress, that can be cancelled without leaving half a run behind.

The child process writes a line of JSON to its stdout whenever training gets ahead (`stage`, `share`), and one at the
end (`status`, `reason`). Everything else that is printed there goes to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import IO, Any

from hadamard_toolkit.errors import ToolkitError
from hadamard_toolkit.runs.spec import RunSpec
from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.training.progress import watching

GRACE = 5.0  # seconds that a cancelled process gets to end by itself


class RetrainingError(ToolkitError, RuntimeError):
    """A retraining failed or its process died."""


class Retraining:
    """`ht.run(spec, store)` in another process, started at once.

    `progress` says how far it is, `finished` whether it is over, `result()` what came of it. `cancel()` ends it; a
    run is written wholly or not at all, so the store then holds what it held before.
    """

    def __init__(self, spec: RunSpec, store: RunStore) -> None:
        self.spec, self.store, self.cancelled = spec, store, False
        self._progress: tuple[str, float] = ("starting", 0.0)
        self._outcome: dict[str, Any] = {}
        self._last_words = ""
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # `_read` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hadamard_toolkit.widgets.retrain", str(store.folder), store.keep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C in the notebook server is not meant for it
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(spec.to_json())
        self._reader = threading.Thread(target=self._read, args=(errors,), daemon=True)
        self._reader.start()

    def _read(self, errors: IO[str]) -> None:
        """Follow the messages to the end of the process, then keep the last lines that it wrote to stderr."""
        assert self._process.stdout is not None
        with errors, self._process.stdout as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # the process was killed while it wrote
                message = json.loads(line)
                if "share" in message:
                    self._progress = message["stage"], message["share"]
                else:
                    self._outcome = message
            errors.seek(0)
            self._last_words = " ".join(line.strip() for line in errors.readlines()[-3:])

    @property
    def progress(self) -> tuple[str, float]:
        """The stage in words, and the share of it that is done, 0 to 1."""
        return self._progress

    @property
    def finished(self) -> bool:
        """Whether the process has ended, however it did."""
        return self._process.poll() is not None

    def result(self) -> str | None:
        """Wait for the end: the key of the run, or None if it was cancelled. `RetrainingError` says why it failed."""
        self._process.wait()
        self._reader.join()
        if self.cancelled:
            return None
        if self._outcome.get("status") == "done" and self.spec in self.store:
            return self.spec.key
        reason = self._outcome.get("reason") or self._last_words or f"exit status {self._process.returncode}"
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
        self._reader.join()
        for left in self.store.folder.glob(f".staging-{self._process.pid}-*"):
            shutil.rmtree(left, ignore_errors=True)


def main() -> None:
    """The other process: a spec on stdin; store and what it keeps as arguments; messages on stdout."""
    from hadamard_toolkit.runs.engines import attempt_run

    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the messages

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    folder, keep = sys.argv[1:]
    spec = RunSpec.from_dict(json.loads(sys.stdin.read()))
    with watching(lambda stage, share: send({"stage": stage, "share": share})):
        attempt = attempt_run(spec, RunStore(folder, keep=keep))
    send({**asdict(attempt), "spec": None})


if __name__ == "__main__":
    main()
