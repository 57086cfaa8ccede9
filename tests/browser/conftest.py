"""Real servers on this machine, a real browser, and a tiny run to prune. A missing browser is an error, not a skip."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

import pytest

from hadamard_toolkit.runs.store import RunStore
from hadamard_toolkit.widgets.app import NOTEBOOK
from tests.widgets.conftest import backbone_folder, data_root, store, tiny_spec

if TYPE_CHECKING:  # the plain test run collects this folder too, without the extra `browser`
    from playwright.sync_api import Browser, Page

__all__ = ["backbone_folder", "data_root", "store", "tiny_spec"]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCREENS = Path(__file__).resolve().parents[2] / "build" / "pruner"
STUDY = Path(__file__).resolve().parents[2] / "notebooks" / "06_layer_pruning.ipynb"
BEFORE = dict(os.environ)  # as it is before fixtures change it
PATIENCE = 180.0  # seconds for anything to happen: a loaded machine is no failure


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The distribution's Chromium with a fresh profile."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("no Chromium: `make browser-test` installs Debian's, or $CHROMIUM names one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page with a profile of its own; what its console says is printed when the test fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    page.on("console", lambda said: print("console:", said.type, said.text) if said.type == "error" else None)
    yield page
    context.close()


@pytest.fixture(scope="package")
def places(tmp_path_factory: pytest.TempPathFactory, store: RunStore) -> dict[str, str]:
    """The environment of the servers: where runs are read, retrained ones and figures go."""
    folder = tmp_path_factory.mktemp("pruner")
    return {
        **os.environ,
        **apart(folder),
        "HADAMARD_STORE": str(store.folder),
        "HADAMARD_RUN": store.keys()[0],
        "HADAMARD_RETRAINED": str(folder / "runs"),
    }


def apart(folder: Path) -> dict[str, str]:
    """Figures, and what Jupyter reads and writes, in a folder of their own."""
    return {
        "HADAMARD_FIGURES": str(folder / "figures"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A process that is up once a line of its output matches; `url` is where."""

    def __init__(
        self, command: list[str], environment: dict[str, str], ready: str, url: str, folder: Path
    ) -> None:
        kept = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
        self.url, self.said = url, ""
        self._process = subprocess.Popen(
            command,
            env=kept,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until = time.monotonic() + PATIENCE
        while not re.search(ready, self.said):
            try:
                self.said += self._lines.get(timeout=1)
            except Empty:
                if self._process.poll() is not None or time.monotonic() > until:
                    self.stop()
                    pytest.fail(f"{command[2]} did not come up:\n{self.said}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.put(line)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)


@pytest.fixture(scope="package")
def voila(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app as `hadamard pruner` serves it."""
    port, folder = free_port(), tmp_path_factory.mktemp("voila")
    command = [sys.executable, "-m", "hadamard_toolkit.cli", "pruner", "--store", places["HADAMARD_STORE"]]
    command += ["--run", places["HADAMARD_RUN"], "--port", str(port), "--no-browser"]
    server = Server(command, places, r"Voil. is running at", f"http://127.0.0.1:{port}/", folder)
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of notebook 06 as an app, on the reference runs and the embedded data."""
    port, folder = free_port(), tmp_path_factory.mktemp("study")
    command = [
        sys.executable,
        "-m",
        "voila",
        str(STUDY),
        "--Voila.ip=127.0.0.1",
        f"--port={port}",
        "--no-browser",
    ]
    server = Server(
        command, {**BEFORE, **apart(folder)}, r"Voil. is running at", f"http://127.0.0.1:{port}/", folder
    )
    yield server.url
    server.stop()


@pytest.fixture(scope="package")
def lab(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of JupyterLab with the app's notebook open."""
    port, folder = free_port(), tmp_path_factory.mktemp("lab")
    shutil.copy(NOTEBOOK, folder)
    quiet = Path(places["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    quiet.mkdir(parents=True)
    news = {"fetchNews": "false", "checkForUpdates": False}
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps(news))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--allow-root",
    ]
    command += [
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    server = Server(
        command, places, r"is running at", f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}", folder
    )
    yield server.url
    server.stop()
