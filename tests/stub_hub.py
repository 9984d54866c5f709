"""A hub on this machine, for tests of downloads: it answers as the Hugging Face hub answers its client."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from urllib.parse import unquote, urlsplit

import pytest


class StubHub:
    """Serves folders as repositories, and counts what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.refused: dict[str, tuple[int, str]] = {}  # repository → status and error code of the real hub
        self.asked: Counter[tuple[str, str]] = Counter()  # (method, file) of requests for files
        self.hold: Callable[[str], bool] = lambda file: False  # whether the bytes of a file must still wait
        self.changed = Condition()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, folder: Path) -> str:
        """Serve a folder as a repository; gives its commit."""
        self.repositories[name] = folder
        return self.commit(name)

    def commit(self, name: str) -> str:
        digest = hashlib.sha1()
        for path, data in self.files(name).items():
            digest.update(path.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()

    def files(self, name: str) -> dict[str, bytes]:
        folder = self.repositories[name]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if len(parts) < 4:
            return self.send(request, 404, b"", {})  # the client asks for more than models
        owner, repository, verb, *rest = parts[2:] if is_api else parts
        name = f"{owner}/{repository}"
        if name in self.refused:
            return self.send(request, self.refused[name][0], b"", {"X-Error-Code": self.refused[name][1]})
        if name not in self.repositories:
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        files, commit = self.files(name), self.commit(name)
        if rest[0] not in ("main", commit):
            return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            said: object = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": file} for file in files],
            }
            if verb == "tree":
                said = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
            return self.send(request, 200, json.dumps(said).encode(), {"Content-Type": "application/json"})
        file = "/".join(rest[1:])
        with self.changed:
            self.asked[request.command, file] += 1
            self.changed.notify_all()
            if body:
                self.changed.wait_for(lambda: not self.hold(file), timeout=60)
        if file not in files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(files[file]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        return self.send(request, 200, files[file], headers, body)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool = True
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body and request.command != "HEAD":
            request.wfile.write(data)


@pytest.fixture
def stub_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """The hub that this process knows, with an empty cache in `tmp_path`/cache."""
    from huggingface_hub import constants

    from stages.backbones import clip, hub

    stub = StubHub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{stub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for remembered in (hub.fetch, clip._listed_file):
        remembered.cache_clear()
    serving = Thread(target=stub.server.serve_forever, daemon=True)
    serving.start()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()
    serving.join()
