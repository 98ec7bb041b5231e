# Copyright 2026 The clusterformer-hf team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A Hub on this machine: what huggingface_hub asks for when it uploads, lists and downloads a model repository."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers
from huggingface_hub import ModelCard


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each commit."""
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        content = [parent, *(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))]
        sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class LocalHub(ThreadingHTTPServer):
    """
    Args:
        tokens: For each token that is known the owners whose repositories it may write to.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, list[str]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        """Method, path and status of every request."""
        self.holds_uploads = False
        """Large files that arrive are kept waiting, and then lost."""
        self.upload_arrived = threading.Event()
        self.breaks_commits = False
        self.refuses_cards = False
        """The connection ends instead of a commit."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    @contextmanager
    def connected(self, monkeypatch, home: Path):
        """Runs it, and huggingface_hub's client in this process uses it and nothing of this machine's."""
        with self.running():
            settings = {
                "ENDPOINT": self.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,  # the transfer of large files that this Hub does not know
                "HF_TOKEN_PATH": str(home / "token"),
                "HF_HUB_CACHE": str(home / "cache"),
            }
            for name, value in settings.items():
                monkeypatch.setattr(huggingface_hub.constants, name, value)
            monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # which keeps the Hub that it was made for
            yield self
        huggingface_hub.close_session()

    def handle_error(self, request, client_address):
        """Clients that are killed are part of the tests."""


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    ROUTES = [
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "describe"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "create_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?", "list_files"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "choose_upload_modes"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "offer_uploads"),
        ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "receive_large_file"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "send_file"),
    ]

    def answer_request(self):
        self.body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self._has_length() else self._chunks()
        )
        method, path = self.command.replace("HEAD", "GET"), urlsplit(self.path).path
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == route_method:
                try:
                    getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items() if value})
                except Refused as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                    self.send(error.status, json.dumps({"error": str(error)}).encode(), headers)
                return
        self.send(404, b'{"error": "no such page"}', {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def _has_length(self) -> bool:
        return self.headers.get("Transfer-Encoding") != "chunked"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.server.requests.append((self.command, self.path, status))
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content):
        self.send(200, json.dumps(content).encode())

    def log_message(self, *args):
        pass

    # Who may do what

    def owners(self) -> list[str]:
        """Whose repositories the token may write to."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            raise Refused(401, "", "Invalid username or password.")
        return self.server.tokens[token]

    def check_may_write(self, repo: str):
        if repo.split("/")[0] not in self.owners():
            raise Refused(403, "", "You don't have the rights to do this.")

    def repository(self, repo: str) -> Repository:
        found = self.server.repositories.get(repo)
        if found is None or (found.private and repo.split("/")[0] not in self.owners()):
            raise Refused(404, "RepoNotFound", "Repository not found")
        return found

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(repo)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # What is asked for

    def create_repository(self):
        request = json.loads(self.body)
        repo = f"{request['organization']}/{request['name']}"
        self.check_may_write(repo)
        if repo in self.server.repositories:
            return self.send(409, json.dumps({"error": "exists", "url": f"{self.server.url}/{repo}"}).encode())
        private = request.get("private") or request.get("visibility") == "private"
        self.server.repositories[repo] = repository = Repository(bool(private))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send_json({"url": f"{self.server.url}/{repo}"})

    def validate_card(self):
        errors = []
        try:
            ModelCard(json.loads(self.body)["content"])
        except Exception as error:
            errors = [{"message": str(error)}]
        if self.server.refuses_cards:
            errors = [{"message": "license must be one of them"}]
        self.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def describe(self, repo: str, revision: str = "main"):
        sha, files = self.files(repo, revision)
        siblings = [{"rfilename": name} for name in files]
        self.send_json({"id": repo, "sha": sha, "private": self.repository(repo).private, "siblings": siblings})

    def create_branch(self, repo: str, revision: str):
        self.check_may_write(repo)
        repository = self.repository(repo)
        if revision in repository.branches:
            return self.send(409, b'{"error": "exists"}')
        repository.branches[revision] = repository.branches["main"]
        self.send_json({})

    def list_files(self, repo: str, revision: str):
        _, files = self.files(repo, revision)
        self.send_json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        )

    def choose_upload_modes(self, repo: str, revision: str):
        self.check_may_write(repo)
        self.files(repo, revision)
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {name: "lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in names}
        self.send_json(
            {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
        )

    def offer_uploads(self, repo: str):
        self.check_may_write(repo)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large_files:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def receive_large_file(self, oid: str):
        if self.server.holds_uploads:
            self.server.upload_arrived.set()
            self.rfile.read()  # until the client is gone
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        self.send(200)

    def commit(self, repo: str, revision: str):
        self.check_may_write(repo)
        if self.server.breaks_commits:
            self.close_connection = True
            return
        files = dict(self.files(repo, revision)[1])
        for line in filter(None, self.body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.repository(repo).commit(revision, files)
        self.send_json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def send_file(self, repo: str, revision: str, name: str):
        sha, files = self.files(repo, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Content-Type": "application/octet-stream"}
        self.send(200, files[name], headers)
