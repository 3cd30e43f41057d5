"""A server that answers the real client like the Hugging Face Hub, with one dataset of one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

NAME, COMMIT = "some/set", "0123456789abcdef0123456789abcdef01234567"
_API, _FILES = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/{COMMIT}/"


@contextlib.contextmanager
def serving(files: Mapping[str, bytes], *, breaks_off: str = "", requests: list[str] | None = None) -> Iterator[str]:
    """The server's address, for HF_ENDPOINT. `breaks_off`: a file whose download always stops early. `requests`: takes
    the paths that were asked for.
    """

    class Hub(_Hub):
        held, broken, asked = files, breaks_off, [] if requests is None else requests

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    held: Mapping[str, bytes] = {}
    broken = ""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = unquote(urlparse(self.path).path)
        if path in (_API, f"{_API}/revision/{COMMIT}"):
            self._json(200, {"id": NAME, "sha": COMMIT, "tags": [], "siblings": [], "private": False, "gated": False})
        elif path.startswith(f"{_API}/tree/{COMMIT}"):
            self._tree(path.removeprefix(f"{_API}/tree/{COMMIT}").strip("/"))
        elif path.startswith(_FILES):
            self._file(self.held.get(path.removeprefix(_FILES)))
        else:
            self._missing("RevisionNotFound" if path.startswith(f"{_API}/") else "RepoNotFound")

    do_HEAD = do_GET

    def _tree(self, folder: str) -> None:
        """The entries of a folder."""
        found: dict[str, dict[str, Any]] = {}
        for name, data in self.held.items():
            if name.startswith(f"{folder}/" if folder else ""):
                first, _, rest = name.removeprefix(f"{folder}/" if folder else "").partition("/")
                path = f"{folder}/{first}".lstrip("/")
                kind = {"type": "directory", "size": 0} if rest else {"type": "file", "size": len(data)}
                found[path] = {"path": path, "oid": hashlib.sha1(data).hexdigest(), **kind}
        if found:
            self._json(200, list(found.values()))
        else:
            self._missing("EntryNotFound")

    def _file(self, data: bytes | None) -> None:
        if data is None:
            self._missing("EntryNotFound")
        else:
            self._answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _missing(self, code: str) -> None:
        self._json(404, {"error": "not found"}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            whole = not self.broken or not self.path.endswith(self.broken)
            self.wfile.write(data if whole else data[:100])
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...
