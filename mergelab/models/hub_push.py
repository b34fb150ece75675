"""Upload a merged model to the hub: checked before the merge is computed, then written in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergelab.errors import HubError
from mergelab.models.hub import causes_of, endpoint, reachable
from mergelab.weights.companions import MERGEKIT, PROVENANCE

_EMPTY = {".gitattributes"}  # what the hub puts into a new repository
# Where older versions of transformers wrote the place that a model or a tokenizer was loaded from.
_PLACES = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}
_FOLDER = re.compile(r"^[ -]*(model|base_model|path): *['\"]?/", re.MULTILINE)  # in a mergekit config written here


def check_token(repo_id: str) -> None:
    """Check, without network, that there is a token and that the hub may be asked.

    Raises:
        HubError: there is none, or ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants, get_token

    key = f"save.push_to_hub={repo_id}"
    if not get_token():
        raise HubError(f"{key}: there is no token of the hub; log in (`hf auth login`) or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{key}: HF_HUB_OFFLINE is set, and nothing can be uploaded")


def check_push(repo_id: str, *, private: bool) -> None:
    """Check that a repository can be written to, without writing to it.

    Raises:
        HubError: there is no token or the hub does not take it; the hub cannot be reached; or the repository exists and
            holds something else than a merge of mergelab, or is public where it should be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    key = f"save.push_to_hub={repo_id}"
    check_token(repo_id)
    if not reachable():
        raise HubError(f"{key}: the hub at {endpoint()} cannot be reached")
    try:
        HfApi().whoami()
        found = HfApi().model_info(repo_id)
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise HubError(f"{key}: {_why(error)}") from error
    names = {sibling.rfilename for sibling in found.siblings or ()}
    if names - _EMPTY and PROVENANCE not in names:
        raise HubError(f"{key}: the repository exists and holds no merge of mergelab's; choose another name")
    if private and not found.private:
        raise HubError(f"{key}: the repository is public; save.private=false says that this is meant")


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder as a model repository's only content, in one commit, and return the repository's address.

    Files of an earlier push that the folder does not have are deleted: shards of another size would be loaded in place
    of the new ones. The repository's history keeps them.

    Raises:
        HubError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, said = HfApi(), "Upload a merge by mergelab"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        with without_places(folder) as clean:
            api.upload_folder(repo_id=repo_id, folder_path=clean, delete_patterns="*", commit_message=said)
    except Exception as error:
        raise HubError(f"{folder.name} cannot be pushed to {repo_id}: {_why(error)}") from error
    return f"{endpoint()}/{repo_id}"


@contextmanager
def without_places(folder: Path) -> Iterator[Path]:
    """Yield the folder, or one like it whose configs do not say where on this machine their models were.

    A mergekit config of models that are folders of this machine is left out: nobody else could use it. The files of the
    other folder are links to those of the first, but for the configs that differ.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    changed = {file: text for file in files if (text := _without_place(file)) is not None}
    local = [file for file in files if file.name == MERGEKIT and _names_folders(file)]
    if not (changed or local):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in files:
            if file in local:
                continue
            target = Path(temporary, file.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in changed:
                target.write_text(changed[file], encoding="utf-8")
            else:
                target.symlink_to(file.absolute())
        yield Path(temporary)


def _without_place(file: Path) -> str | None:
    """Return a config's text without the local place that it names; None where it names none."""
    key = _PLACES.get(file.name)
    if key is None:
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    place = content.get(key)
    if not isinstance(place, str) or not (place.startswith(("/", ".", "~", "\\")) or place[1:2] == ":"):
        return None  # a hub id, which may be said
    return json.dumps({name: value for name, value in content.items() if name != key}, indent=2) + "\n"


def _names_folders(file: Path) -> bool:
    """Return whether a mergekit config that was written here has a model that is a folder."""
    return _FOLDER.search(file.read_text(encoding="utf-8")) is not None


def _why(error: Exception) -> str:
    """Say what an error of ``huggingface_hub`` means."""
    from huggingface_hub.errors import HfHubHTTPError

    for each in causes_of(error):
        if isinstance(each, HfHubHTTPError):
            response: Any = each.response
            status = response.status_code if response is not None else "an error"
            if status == 401:
                return "the hub does not take the token (HF_TOKEN, or that of `hf auth login`)"
            if status == 403:
                return "the token may not write there"
            return f"{endpoint()} answered {status}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
