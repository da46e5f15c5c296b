"""A stand-in for the Hub on this machine: enough of its HTTP interface for the real client to push and to pull."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin")


@dataclass
class LocalHub:
    """What the server holds: files by repository and path, and large files by their hash until a commit names them.

    A data set lies under ``datasets/owner/name``, as in its address. Nobody may write to those in `read_only`.
    `tokens` are the authorizations of what was asked for, by its path; of several the last. `history` is what a
    repository held after each commit.
    """

    url: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    read_only: set[str] = field(default_factory=set)
    history: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a fresh process whose Hugging Face client talks to this server alone."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error::UserWarning",
        }

    def revision(self, repo: str) -> str:
        """The commit of a repository: a hash of what it holds."""
        digest = hashlib.sha1()
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Runs the server on a free port of the loopback address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _repo_and_rest(path: str) -> tuple[str, list[str]]:
    """Of ``api/KIND/OWNER/NAME/...`` the repository, and what follows."""
    _, kind, owner, name, *rest = path.split("/")
    return f"{'' if kind == 'models' else f'{kind}/'}{owner}/{name}", rest


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LocalHub:
        hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def log_message(self, format: str, *args: Any) -> None:
        """The tests print enough."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.tokens[path] = self.headers.get("Authorization", "")
        if path == "api/whoami-v2":
            return self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path.startswith(("api/models/", "api/datasets/")):
            return self._about(*_repo_and_rest(path))
        repo, resolve, rest_of_path = path.partition("/resolve/")
        if resolve:
            return self._file(repo, rest_of_path.partition("/")[2])
        return self._json({"error": f"unknown address {path}"}, 404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'user'}/{request['name']}"
            self.hub.repos.setdefault(repo, {})
            return self._json({"url": f"{self.hub.url}/{repo}", "id": repo})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}} for entry in wanted
            ]
            return self._json({"transfer": "basic", "objects": actions}, kind="application/vnd.git-lfs+json")
        if path.startswith(("api/models/", "api/datasets/")):
            repo, (action, *_) = _repo_and_rest(path)
            if action == "paths-info":
                wanted = parse_qs(body.decode())["paths"]
                return self._json([entry for entry in self._entries(repo) if entry["path"] in wanted])
            if action == "preupload":
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            if action == "commit":
                return self._commit(repo, body)
        return self._json({"error": f"unknown address {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[1]
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = content
        self._json({})

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.hub.repos[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.history.setdefault(repo, []).append(dict(files))
        oid = self.hub.revision(repo)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _about(self, repo: str, rest: list[str]) -> None:
        if repo not in self.hub.repos:
            return self._json({"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["auth-check"]:
            return self._json({}, 403 if rest[1:] == ["write"] and repo in self.hub.read_only else 200)
        if rest[:1] == ["tree"]:  # tree/REVISION/FOLDER
            folder, recursive = "".join(f"{name}/" for name in rest[2:]), "recursive=True" in self.path
            inside = [entry for entry in self._entries(repo) if entry["path"].startswith(folder)]
            return self._json([entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(folder)])
        files = self.hub.repos[repo]
        return self._json(
            {
                "id": repo,
                "sha": self.hub.revision(repo),
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
            }
        )

    def _entries(self, repo: str) -> list[dict[str, Any]]:
        """Files and folders as the Hub describes them."""
        files = self.hub.repos[repo]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        return [
            *({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders),
            *(
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ),
        ]

    def _file(self, repo: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self._json({"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"})
        commit = {"X-Repo-Commit": self.hub.revision(repo)}
        if path not in self.hub.repos[repo]:
            return self._json({"error": "Entry not found"}, 404, headers={"X-Error-Code": "EntryNotFound", **commit})
        content = self.hub.repos[repo][path]
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self._send(content[int(part[1]) : int(part[2]) + 1], 206, "application/octet-stream", commit)
        return self._send(content, 200, "application/octet-stream", {**commit, **etag})

    def _json(
        self, value: Any, status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self._send(json.dumps(value).encode(), status, kind, headers or {})

    def _send(self, content: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
