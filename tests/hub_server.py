"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as downloads use."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
# Half of the body is sent, and the connection ends.
CUT = "cut"
# The hub tells these apart by a header.
REFUSALS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


@dataclass
class Hub:
    """Commits (hash → files, newest last) of repositories "models/OWNER/NAME" and "datasets/OWNER/NAME"."""

    url: str = ""
    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[tuple[str, int | str]] = field(default_factory=list)

    def commit(self, repository: str, files: Files) -> str:
        """Make a commit of exactly these files and return its hash."""
        commits = self.repositories.setdefault(repository, {})
        commit = _hash(repr((len(commits), sorted(files.items()))).encode())[:40]
        commits[commit] = dict(files)
        return commit

    def fail(self, pattern: str, answer: int | str) -> None:
        """Answer the next request "METHOD /path" with the pattern by a status, a refusal or CUT."""
        self.faults.append((pattern, answer))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        fault = next((entry for entry in self.hub.faults if re.search(entry[0], self.hub.requests[-1])), None)
        if fault:
            self.hub.faults.remove(fault)
        self.wrong = fault[1] if fault else ""
        self.close_connection = self.wrong == CUT
        if self.wrong in ("", CUT):
            self._route(unquote(urlsplit(self.path).path))
        else:
            self._send({}, self.wrong) if isinstance(self.wrong, int) else self._refuse(self.wrong)

    do_GET = do_HEAD = _answer

    def _send(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.wrong == CUT else data)

    def _refuse(self, code: str) -> None:
        self._send({}, REFUSALS[code], X_Error_Code=code)

    def _route(self, path: str) -> None:
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._repository((found[1] or "models/") + found[2], "resolve", found[3], found[4])
        elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/(\w+)/([^/]+)/?(.*))?", path):
            self._repository(found[1], found[2] or "revision", found[3] or "main", found[4] or "")
        else:
            self._send({}, 404)

    def _repository(self, name: str, action: str, revision: str, path: str) -> None:
        commits = self.hub.repositories.get(name)
        if not commits:
            return self._refuse("RepoNotFound")
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._refuse("RevisionNotFound")
        files = commits[commit]
        if action == "revision":
            names = [{"rfilename": file} for file in files]
            self._send({"id": name.partition("/")[2], "sha": commit, "siblings": names})
        elif action == "tree":
            below, deep = f"{path}/" if path else "", "recursive=true" in self.path.lower()
            found = [entry for entry in _tree(files) if entry["path"].startswith(below)]
            self._send([entry for entry in found if deep or "/" not in entry["path"][len(below) :]])
        elif path not in files:
            self._refuse("EntryNotFound")
        else:
            data, size = files[path], len(files[path])
            headers = {"ETag": f'"{_hash(data)}"', "X_Repo_Commit": commit}
            if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
                return self._send(data, **headers)
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            self._send(data[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{size}", **headers)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tree(files: Files) -> list[dict[str, Any]]:
    parts = [file.split("/") for file in files]
    folders = sorted({"/".join(names[:depth]) for names in parts for depth in range(1, len(names))})
    return [
        *({"type": "directory", "path": path, "oid": ""} for path in folders),
        *({"type": "file", "path": p, "oid": _hash(d)[:40], "size": len(d)} for p, d in files.items()),
    ]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run an empty hub on a free port until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
