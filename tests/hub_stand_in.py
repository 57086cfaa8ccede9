"""A hub on this machine: enough of the protocol for `huggingface_hub` to read small repositories from folders."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, seen: list[str], *rest: object) -> None:
        self.folder, self.seen = folder, seen
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        address = unquote(urlparse(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(length).decode()
        self.seen.append(f"{self.command} {address}")
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", address):
            self._file(self.folder / found[2], found[3])
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", address):
            self._repository(found[2])
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", address):
            self._json(self._listing(found[1], found[2]))
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/paths-info/[^/]+", address):
            paths = json.loads(asked)["paths"]
            self._json([entry for entry in self._listing(found[1], "") if entry["path"] in paths])
        else:
            self._missing("RepoNotFound")

    def _listing(self, repository: str, under: str) -> list[dict[str, object]]:
        root = self.folder / repository
        start = root / under
        if not start.is_dir():
            return []
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(root).as_posix(),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "oid": hashlib.sha1(path.as_posix().encode()).hexdigest(),
            }
            for path in sorted(start.rglob("*"))
        ]

    def _repository(self, repository: str) -> None:
        if not (self.folder / repository).is_dir():
            return self._missing("RepoNotFound")
        files = [{"rfilename": e["path"]} for e in self._listing(repository, "") if e["type"] == "file"]
        return self._json(
            {"id": repository, "sha": REVISION, "siblings": files, "private": False, "tags": []}
        )

    def _file(self, root: Path, file: str) -> None:
        if not (root / file).is_file():
            return self._missing("EntryNotFound" if root.is_dir() else "RepoNotFound")
        body = (root / file).read_bytes()
        return self._send(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": "not in the stand-in"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": REVISION, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder/<owner>/<name>/…`; yields the endpoint and the growing list of requests."""
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, folder, seen))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
