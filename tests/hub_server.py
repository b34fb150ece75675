"""A hub-compatible HTTP server on loopback: model and dataset repositories served from plain folders.

It answers what huggingface_hub, transformers and datasets ask for (repository information, tree and path listings,
file heads and ranged downloads; uploads with a token), with the hub's own headers and error codes, and without xet, so
that files come and go by plain HTTP.

    with HubServer(tmp_path) as hub:
        hub.add_model("google-bert/bert-base-uncased", tmp_path / "bert")
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        assert ("GET", "/api/models/google-bert/bert-base-uncased") in hub.requests
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_uploads import Refused, Uploads, readable

if TYPE_CHECKING:
    import pyarrow

CREATED = "2024-01-01T00:00:00.000Z"
LARGE = (".safetensors", ".bin", ".parquet", ".h5", ".msgpack", ".onnx", ".gz")  # what hub repositories keep in LFS

_VERBS = "revision|tree|paths-info|refs|commits|discussions"
_NAME = rf"(?!(?:{_VERBS}|resolve)(?:/|$))[^/]+"
_API = re.compile(rf"/api/(models|datasets)/((?:{_NAME}/)?{_NAME})(?:/({_VERBS})(?:/([^/]+)(?:/(.*))?)?)?")
_RESOLVE = re.compile(rf"/(datasets/)?((?:{_NAME}/)?{_NAME})/(?:resolve|raw)/([^/]+)/(.+)")


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: where it is, and the digests the hub would give for it."""

    path: Path
    size: int
    blob: str  # git's SHA-1 of a small file, or of the pointer that stands for a large one
    sha256: str | None  # of a large file

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob

    def entry(self, name: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "path": name, "size": self.size, "oid": self.blob, **lfs}


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, StoredFile]

    @property
    def files_on_disk(self) -> dict[str, Path]:
        return {name: file.path for name, file in self.files.items()}


@dataclass
class Repository:
    id: str
    gated: bool
    revisions: dict[str, Commit] = field(default_factory=dict)  # by branch or tag name and by commit hash
    private: bool = False


class HubError(Exception):
    """An answer other than success, with the hub's code for it."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class HubServer:
    """Serve repositories from folders while the ``with`` block lasts.

    Attributes:
        requests: (method, path with query) of every request so far, in order of arrival.
        delay: seconds to wait before each answer.
        missing_status: status for an unknown repository; the hub says 401 to who is not logged in, else 404.
        gated_status: status for a gated repository's files: 401 to who is not logged in, else 403.
        outage: when set, the status (503, say) that every request is answered with.
        uploads: what has been sent, and the tokens that may send it.
    """

    def __init__(self, root: Path, *, delay: float = 0.0) -> None:
        self.root = root
        self.delay = delay
        self.missing_status: Literal[401, 404] = 404
        self.gated_status: Literal[401, 403] = 401
        self.outage: int | None = None
        self.requests: list[tuple[str, str]] = []
        self.uploads = Uploads(self)
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._http.daemon_threads = True
        self._http.block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def add_model(self, repo_id: str, folder: Path | str, revision: str = "main", *, gated: bool = False) -> str:
        """Serve ``folder`` (relative ones from the root) as a model repository; return the commit's hash."""
        return self._add("models", repo_id, folder, revision, gated)

    def add_dataset(self, repo_id: str, folder: Path | str, revision: str = "main", *, gated: bool = False) -> str:
        """Serve ``folder`` (relative ones from the root) as a dataset repository; return the commit's hash."""
        return self._add("datasets", repo_id, folder, revision, gated)

    def remove(self, repo_id: str) -> None:
        for kind in ("models", "datasets"):
            self._repositories.pop((kind, repo_id), None)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that point the clients of a new process here, with ``home`` as their empty cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would tell S3 about each load
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a public service to convert .bin files
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _add(self, kind: str, repo_id: str, folder: Path | str, revision: str, gated: bool) -> str:
        base = self.root / folder
        paths = sorted(path for path in base.rglob("*") if path.is_file())
        return self._commit(kind, repo_id, {p.relative_to(base).as_posix(): p for p in paths}, revision, gated).sha

    def repository(self, repo_id: str) -> Repository | None:
        """Return a model repository, or None."""
        return self._repositories.get(("models", repo_id))

    def create(self, repo_id: str, paths: Mapping[str, Path], *, private: bool) -> Commit:
        """Give a model repository, a new one or an old one, a commit with these files."""
        commit = self._commit("models", repo_id, paths, "main", False)
        self._repositories[("models", repo_id)].private = private
        return commit

    def _commit(self, kind: str, repo_id: str, paths: Mapping[str, Path], revision: str, gated: bool) -> Commit:
        files = {name: _stored(path, name) for name, path in paths.items()}
        listing = [repo_id, revision, sorted((name, file.etag) for name, file in files.items())]
        commit = Commit(hashlib.sha1(json.dumps(listing).encode()).hexdigest(), files)
        repository = self._repositories.setdefault((kind, repo_id), Repository(repo_id, gated))
        repository.gated = gated
        repository.revisions |= {revision: commit, commit.sha: commit}
        return commit

    def find(self, kind: str, repo_id: str, revision: str | None) -> tuple[Repository, Commit]:
        repository = self._repositories.get((kind, repo_id))
        if repository is None:
            raise HubError(self.missing_status, "RepoNotFound", "Repository not found")
        commit = repository.revisions.get(revision or "main")
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        self.hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.delay:
            time.sleep(self.hub.delay)
        with suppress(BrokenPipeError, ConnectionResetError):  # a client that gave up waiting
            try:
                if self.hub.outage:
                    raise HubError(self.hub.outage, "Outage", "Service Unavailable")
                self._route(body)
            except HubError as error:
                self._send_json({"error": str(error)}, error.status, error.headers)
            except Refused as error:
                answer = {"error": str(error), "errors": [{"message": str(error)}], **error.content}
                self._send_json(answer, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    def _route(self, body: bytes) -> None:
        target = urlsplit(self.path)
        if (answer := self.hub.uploads.answer(self.command, target.path, self.headers, body)) is not None:
            self._send_json(answer)
        elif target.path == "/":
            self._send_json({})
        elif target.path == "/api/agent-harnesses":
            self._send_json({"standardEnvVars": [], "harnesses": {}})
        elif match := _API.fullmatch(target.path):
            kind, repo_id, verb, revision, path = (unquote(part) if part else "" for part in match.groups())
            answer = self._api(kind, repo_id, verb, revision, path, parse_qs(target.query), body)
            self._send_json(answer)
        elif match := _RESOLVE.fullmatch(target.path):
            dataset, repo_id, revision, name = match.groups()
            self._send_file("datasets" if dataset else "models", unquote(repo_id), unquote(revision), unquote(name))
        else:
            raise HubError(404, "NotFound", f"Cannot {self.command} {target.path}")

    def _api(
        self, kind: str, repo_id: str, verb: str, revision: str, path: str, query: Mapping[str, list[str]], body: bytes
    ) -> object:
        repository, commit = self._find(kind, repo_id, revision)
        if verb == "tree":
            return _tree(commit, path, recursive=query.get("recursive", ["false"])[0].lower() in ("1", "true"))
        if verb == "paths-info":
            wanted = _paths(body, self.headers.get("Content-Type", ""))
            return [entry for entry in _tree(commit, "", recursive=True) if entry["path"] in wanted]
        if verb == "refs":
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": each.sha}
                        for name, each in repository.revisions.items() if name != each.sha]  # fmt: skip
            return {"branches": branches, "tags": [], "converts": []}
        if verb == "commits":
            return [{"id": commit.sha, "title": "initial commit", "message": "", "date": CREATED, "authors": []}]
        if verb == "discussions":
            return {"discussions": [], "count": 0, "start": 0}
        blobs = "blobs" in query
        return _information(repository, commit, blobs=blobs)

    def _find(self, kind: str, repo_id: str, revision: str) -> tuple[Repository, Commit]:
        repository, commit = self.hub.find(kind, repo_id, revision)
        if not readable(repository, self.hub.uploads.tokens, self.headers):
            raise HubError(self.hub.missing_status, "RepoNotFound", "Repository not found")
        return repository, commit

    def _send_file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        repository, commit = self._find(kind, repo_id, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if repository.gated:
            message = f"Access to {kind[:-1]} {repo_id} is restricted."
            raise HubError(self.hub.gated_status, "GatedRepo", message, headers)
        if (file := commit.files.get(name)) is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.sha256:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        start, stop = _range(self.headers.get("Range"), file.size)
        if start >= stop and file.size:
            raise HubError(416, "RangeNotSatisfiable", "Range", {"Content-Range": f"bytes */{file.size}"})
        if whole := (start, stop) == (0, file.size) and "Range" not in self.headers:
            self.send_response(200)
        else:
            self.send_response(206)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self._send_headers(headers, file.size if whole else stop - start)
        if self.command != "HEAD":
            with file.path.open("rb") as stream:
                stream.seek(start)
                self.wfile.write(stream.read(stop - start))

    def _send_json(self, answer: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self._send_headers({"Content-Type": "application/json; charset=utf-8", **(headers or {})}, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_headers(self, headers: Mapping[str, str], length: int) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _stored(path: Path, name: str) -> StoredFile:
    content = path.read_bytes()
    if name.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        return StoredFile(path, len(content), _git_blob(pointer), digest)
    return StoredFile(path, len(content), _git_blob(content), None)


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(commit: Commit, path: str, *, recursive: bool) -> list[dict[str, Any]]:
    """List files and folders under ``path`` as the hub does: folders too, one level unless recursive."""
    prefix = f"{path.strip('/')}/" if path.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in commit.files.items():
        if not name.startswith(prefix):
            continue
        folders = name[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(folders) + 1 if recursive else min(len(folders), 1) + 1):
            folder = prefix + "/".join(folders[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": _git_blob(folder.encode()), "size": 0}
        if recursive or not folders:
            entries[name] = file.entry(name)
    if prefix and not entries:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on this revision", {"X-Repo-Commit": commit.sha})
    return [entries[name] for name in sorted(entries)]


def _paths(body: bytes, content_type: str) -> set[str]:
    given = json.loads(body) if "json" in content_type else parse_qs(body.decode())
    paths = given.get("paths", [])
    return {paths} if isinstance(paths, str) else {path.strip("/") for path in paths}


def _information(repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for name, file in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": name}
        if blobs:
            sibling |= {"size": file.size, "blobId": file.blob}
            if file.sha256:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        siblings.append(sibling)
    return {
        "_id": hashlib.md5(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "sha": commit.sha,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": CREATED,
        "lastModified": CREATED,
        "siblings": siblings,
    }


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Return the half-open byte range that a Range header asks for."""
    if not (match := re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")):
        return 0, size
    first, last = match.groups()
    if not first:
        return max(0, size - int(last or 0)), size
    return int(first), min(size, int(last) + 1) if last else size


def glue_repository(folder: Path, tasks: Mapping[str, Mapping[str, pyarrow.Table]]) -> Path:
    """Write ``nyu-mll/glue`` as it is on the hub: a README.md that describes each task, and Parquet files per split.

    Args:
        folder: the repository's folder, made if need be.
        tasks: per task and split, the rows. A column's features come from the table's ``huggingface`` metadata where it
            has any (as in files written by ``datasets``), else from its Arrow type.
    """
    import yaml
    from datasets import Features
    from datasets.info import DatasetInfo

    configs: list[dict[str, Any]] = []
    infos: list[dict[str, Any]] = []
    for task, splits in tasks.items():
        features: Features | None = None
        data_files = []
        for split, table in splits.items():
            _write_parquet(table, folder / task / f"{split}-00000-of-00001.parquet")
            data_files.append({"split": split, "path": f"{task}/{split}-*"})
            features = features or Features.from_arrow_schema(table.schema)
        configs.append({"config_name": task, "data_files": data_files})
        counts = [{"name": split, "num_bytes": table.nbytes, "num_examples": table.num_rows}
                  for split, table in splits.items()]  # fmt: skip
        described = DatasetInfo(features=features)._to_yaml_dict()["features"] if features else []
        sizes = {"download_size": 0, "dataset_size": sum(table.nbytes for table in splits.values())}
        infos.append({"config_name": task, "features": described, "splits": counts, **sizes})
    card = yaml.safe_dump({"language": ["en"], "dataset_info": infos, "configs": configs}, sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{card}---\n\n# GLUE-shaped data\n", encoding="utf-8")
    return folder


def _write_parquet(table: pyarrow.Table, path: Path) -> None:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
