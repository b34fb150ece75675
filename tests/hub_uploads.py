"""The uploads of a hub-compatible server: repositories made, files sent as git objects or by LFS, commits.

``huggingface_hub`` asks first who the token belongs to, makes the repository, has the card checked, asks how each file
is to be sent, sends large ones to the addresses of an LFS batch, and commits all of it in one request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.hub_server import Commit, HubServer, Repository

_MODEL = r"((?:[^/]+/)?[^/]+)"
_PREUPLOAD = re.compile(rf"/api/models/{_MODEL}/preupload/([^/]+)")
_COMMIT = re.compile(rf"/api/models/{_MODEL}/commit/([^/]+)")
_BATCH = re.compile(rf"/{_MODEL}\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/lfs-storage/([0-9a-f]{64})(/verify)?")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refused(Exception):
    """An upload that the hub does not take; its status and its code."""

    def __init__(self, status: int, code: str, message: str, **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class Uploads:
    """What has been sent to a hub.

    Attributes:
        tokens: those that the hub takes, with the organisations that they may write to.
        cards: the cards that it was asked to check.
    """

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.tokens: dict[str, tuple[str, ...]] = {}
        self.cards: list[str] = []

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> object | None:
        """Return the answer to a request that belongs to an upload; None for any other."""
        organisations = self.tokens.get((headers.get("Authorization") or "").removeprefix("Bearer "))
        if path == "/api/whoami-v2":
            if organisations is None:
                raise Refused(401, "Unauthorized", "Invalid username or password.")
            return {"type": "user", "name": "somebody", "orgs": [{"name": name} for name in organisations]}
        if (method, path) == ("POST", "/api/validate-yaml"):
            return self._validated(json.loads(body)["content"])
        if method == "PUT" and (found := _OBJECT.fullmatch(path)):  # signed, in the hub: there is no token
            return self._stored(found[1], body)
        writes = (_PREUPLOAD, _COMMIT, _BATCH, _OBJECT)
        found = next((match for one in writes if (match := one.fullmatch(path))), None)
        if method != "POST" or not (found or path == "/api/repos/create"):
            return None
        asked = json.loads(body) if path == "/api/repos/create" else {}
        name = f"{asked['organization']}/{asked['name']}" if asked else unquote(found[1]) if found else ""
        if organisations is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        if (found is None or found.re is not _OBJECT) and name.partition("/")[0] not in organisations:
            raise Refused(403, "Forbidden", f"You don't have the rights to write to {name}")
        if found is None:
            return self._created(name, asked)
        if found.re is _PREUPLOAD:
            return {"files": [self._mode(one) for one in json.loads(body)["files"]]}
        if found.re is _BATCH:
            return {"transfer": "basic", "objects": [self._actions(one) for one in json.loads(body)["objects"]]}
        if found.re is _COMMIT:
            return self._committed(name, [json.loads(line) for line in body.splitlines() if line])
        return {}  # verified

    def _validated(self, card: str) -> object:
        """Check what the hub checks of a card's metadata: ids of models, and the parts of a model index."""
        from huggingface_hub import ModelCard

        self.cards.append(card)
        data = ModelCard(card).data.to_dict()
        errors = [
            f'"base_model" with value "{one}" is not valid' for one in data.get("base_model") or []
            if not _HUB_ID.fullmatch(one)
        ]  # fmt: skip
        for result in (data.get("model-index") or [{}])[0].get("results", []):
            errors += [f'"{part}.type" is required' for part in ("task", "dataset") if "type" not in result[part]]
            errors += ['"metrics" need a value' for one in result["metrics"] if "value" not in one]
        if errors:
            raise Refused(400, "InvalidYaml", "; ".join(errors))
        return {"errors": [], "warnings": []}

    def _created(self, name: str, asked: Mapping[str, Any]) -> object:
        if self.hub.repository(name) is not None:
            raise Refused(409, "RepoExists", "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.create(name, {".gitattributes": self._file(b"*.safetensors filter=lfs\n")}, private=private)
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def _mode(self, file: Mapping[str, Any]) -> object:
        from tests.hub_server import LARGE

        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _actions(self, one: Mapping[str, Any]) -> object:
        if self._place(one["oid"]).is_file():
            return {"oid": one["oid"], "size": one["size"]}
        at = f"{self.hub.url}/lfs-storage/{one['oid']}"
        return {**one, "actions": {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}}

    def _stored(self, oid: str, body: bytes) -> object:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadDigest", "The content is not what was announced")
        self._file(body)
        return {}

    def _committed(self, name: str, lines: list[dict[str, Any]]) -> object:
        repository = self.hub.repository(name)
        if repository is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        files = dict(repository.revisions["main"].files_on_disk)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = self._file(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._place(value["oid"])
        commit: Commit = self.hub.create(name, files, private=repository.private)
        return {
            "commitUrl": f"{self.hub.url}/{name}/commit/{commit.sha}",
            "commitOid": commit.sha,
            "pullRequestUrl": None,
        }

    def _file(self, content: bytes) -> Path:
        place = self._place(hashlib.sha256(content).hexdigest())
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        return place

    def _place(self, oid: str) -> Path:
        return self.hub.root / "uploaded" / oid


def readable(repository: Repository, tokens: Mapping[str, object], headers: Mapping[str, str]) -> bool:
    """Return whether the sender of a request may see a repository."""
    token = (headers.get("Authorization") or "").removeprefix("Bearer ")
    return not repository.private or token in tokens
