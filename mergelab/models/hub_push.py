"""Upload a merged model to the hub: checked before the merge is computed, then written in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergelab.errors import HubError
from mergelab.models.hub import causes_of, endpoint, reachable
from mergelab.weights.companions import PROVENANCE

_EMPTY = {".gitattributes"}  # what the hub puts into a new repository


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

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, delete_patterns="*", commit_message="Upload a merge by mergelab"
        )
    except Exception as error:
        raise HubError(f"{folder.name} cannot be pushed to {repo_id}: {_why(error)}") from error
    return f"{endpoint()}/{repo_id}"


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
