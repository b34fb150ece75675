"""The model hub: whether it can be reached, what its local cache holds, and the download of what a checkpoint needs.

``huggingface_hub`` does the work. What is decided here is what to ask it for, how long to wait, and what its errors
mean to a user. It retries an unreachable hub for half a minute and sets some requests no time limit at all, so that
`reachable` is asked first.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergelab.errors import HubError, ModelError, listed
from mergelab.weights.adapters import (
    ADAPTER_CONFIG,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    LIBRARY_WEIGHTS,
    PEFT_WEIGHTS,
    adapter_refusal,
    is_adapter,
)
from mergelab.weights.companions import PROVENANCE, README, is_companion, is_module_weights, module_folders
from mergelab.weights.files import WEIGHT_FILES, StoredWeights, is_inside, weight_files

# Any hub or mirror of it has something to say about this one, be it that it does not have it.
_PROBED = "google-bert/bert-base-uncased"
_REQUEST_SECONDS = 10.0

_TOKENIZER = re.compile(
    r"(decoder_tokenizer/)?(tokenizer\.(json|model)|tokenizer_config\.json|vocab\.(txt|json)|merges\.txt|bpe\.codes"
    r"|spiece\.model|sentencepiece(\.bpe)?\.model|spm\.model|(source|target)\.spm|special_tokens_map\.json"
    r"|added_tokens\.json)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def endpoint() -> str:
    """Return the hub's address: ``HF_ENDPOINT``, else the public hub's."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def reachable(timeout: float = 2.0) -> bool:
    """Ask the hub for one small answer; False when none has come after ``timeout`` seconds, name resolution included.

    An answer counts only when it is a hub's (JSON, no server error): a captive portal or a proxy's error page does not.
    Always False with ``HF_HUB_OFFLINE``.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    finished, answered = threading.Event(), threading.Event()

    def ask() -> None:
        # Whatever goes wrong (refused, unresolved, no certificate, a malformed address), there is no hub to be had.
        with suppress(Exception):
            url = f"{constants.ENDPOINT}/api/models/{_PROBED}"
            answer = get_session().get(url, params={"expand": "sha"}, timeout=timeout)
            if answer.status_code < 500 and "json" in answer.headers.get("Content-Type", ""):
                answered.set()
        finished.set()

    # Name resolution heeds no time limit, so it is left behind in a thread that does not keep the process alive.
    threading.Thread(target=ask, name="hub-probe", daemon=True).start()
    finished.wait(timeout)
    return answered.is_set()


def cached(repo_id: str, revision: str | None = None) -> Path | None:
    """Find a model's folder in the local cache, without network; None unless config, weights and tokenizer are there.

    An adapter is complete with its configuration and its weights. A model that has no tokenizer is complete when the
    cache has that on record, as after `fetch`.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        adapter = try_to_load_from_cache(repo_id, ADAPTER_CONFIG, revision=revision)
        if isinstance(adapter, str):
            folder = Path(adapter).parent
            return folder if any((folder / name).is_file() for name in (*PEFT_WEIGHTS, *LIBRARY_WEIGHTS)) else None
        config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        if _absent_weights(folder):
            return None
        if any(_TOKENIZER.fullmatch(path.name) for path in folder.iterdir()):
            return folder
        recorded = try_to_load_from_cache(repo_id, "tokenizer_config.json", revision=folder.name)
        return folder if recorded is not None else None
    except (ValueError, KeyError, HubError):  # a malformed id or index, or not all shards
        return None


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download what a transformers checkpoint needs and return the local snapshot's folder.

    That is configuration, card and companion files (tokenizer, generation settings, chat templates, licence, …), then
    the weights in one format: safetensors, or PyTorch's where there are no safetensors; of an adapter its own. Files
    that the cache has are not fetched again. When the hub cannot be reached, a complete copy in the cache serves.

    Raises:
        HubError: the repository or revision does not exist, is gated, has no weights, or the hub cannot be reached.
    """
    if not reachable():
        if folder := cached(repo_id, revision):
            return folder
        if (config := _cached_adapter(repo_id, revision)) is not None:
            raise HubError(adapter_refusal(_named(repo_id, revision), config))
        raise HubError(_unreachable(repo_id, revision))
    try:
        return _download(repo_id, revision)
    except HubError:
        raise
    except Exception as error:  # the transport's own exceptions come from requests, httpx or httpx2, by version
        message = _explain(error, repo_id, revision)
        if message is None:
            raise
        raise HubError(message) from error


def commit(path: Path) -> str | None:
    """Return the commit hash of a snapshot in the hub's cache, None for any other folder."""
    inside = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.name if inside and _COMMIT.fullmatch(path.name) else None


def dataset_cached(path: str, config: str | None) -> bool:
    """Return whether ``datasets`` has prepared this dataset before, so that it loads without network."""
    return dataset_folder(path, config) is not None


def dataset_folder(path: str, config: str | None) -> Path | None:
    """Return the folder in which ``datasets`` has prepared this dataset before; None where it has not."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    own = cache / path.replace("/", "___") / (config or "default")
    prepared = (file.parent.name for file in own.glob("*/*/dataset_info.json"))
    return own if any(not name.endswith(".incomplete") for name in prepared) else None


@contextmanager
def offline() -> Iterator[None]:
    """Keep ``datasets`` and ``huggingface_hub`` off the network inside the block.

    With an unreachable hub they would try again for half a minute before they take what is in the cache.
    """
    import datasets.config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi

    what = _named(repo_id, revision)
    information = HfApi().model_info(repo_id, revision=revision, timeout=_REQUEST_SECONDS)
    names = {sibling.rfilename for sibling in information.siblings or ()}
    if outside := sorted(name for name in names if name.startswith("/") or ".." in name.split("/")):
        raise HubError(f"{what} names files outside its folder: {listed(outside, 3)}")
    if ADAPTER_CONFIG in names and (weights_of := _adapter_weights(names)):
        described = {"config.json", ADAPTER_CONFIG, HEAD_CONFIG, README, PROVENANCE, *weights_of[1:]}
        _snapshot(repo_id, revision, {name for name in names if name in described or is_companion(name)})
        return _snapshot(repo_id, revision, weights_of[:1])
    if is_adapter(names):
        raise HubError(adapter_refusal(what, _adapter_config(repo_id, information.sha, names)))
    if "config.json" not in names:
        raise HubError(f"{what} has no config.json: it is not a transformers checkpoint")
    weights = _weights_among(names, what)
    if weights is None:
        others = sorted(name for name in names if name.endswith((".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt")))
        raise HubError(
            f"{what} has no weights that can be merged (model.safetensors or pytorch_model.bin)"
            + (f"; it has {listed(others)}" if others else "")
        )
    small = {name for name in names if name in ("config.json", README, PROVENANCE) or is_companion(name)}
    if not any(_TOKENIZER.fullmatch(name) for name in small):
        _record_absence(repo_id, information.sha, "tokenizer_config.json")
    # The weights come last: a snapshot that has them is then complete in all else, whenever it was interrupted.
    folder = _snapshot(repo_id, revision, {*small, weights.index} if weights.index else small)
    modules = module_folders(folder)
    further = [name for name in names if is_module_weights(name, modules)]
    folder = _snapshot(repo_id, commit(folder) or revision, [*further, *_weight_files(folder, weights)])
    if absent := _absent_weights(folder):
        raise HubError(f"{what} lacks weight files that its index names: {listed(absent)}")
    return folder


def _adapter_weights(names: Collection[str]) -> list[str]:
    """Return the weights of an adapter among a repository's files, and of a head beside it; none if it has none."""
    if weights := next((name for name in (*PEFT_WEIGHTS, *LIBRARY_WEIGHTS) if name in names), None):
        return [weights, *[name for name in HEAD_WEIGHTS if name in names and weights in LIBRARY_WEIGHTS][:1]]
    return []


def _adapter_config(repo_id: str, revision: str | None, names: Iterable[str]) -> Mapping[str, Any]:
    """Fetch what a repository says of its adapter, where it says something."""
    from huggingface_hub import hf_hub_download

    return {} if ADAPTER_CONFIG not in names else _json(hf_hub_download(repo_id, ADAPTER_CONFIG, revision=revision))


def _cached_adapter(repo_id: str, revision: str | None) -> Mapping[str, Any] | None:
    """Read what the local cache says of an adapter; None for a repository that is none, or is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(repo_id, ADAPTER_CONFIG, revision=revision)
    except ValueError:  # a malformed id
        return None
    return _json(file) if isinstance(file, str) else None


def _json(file: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _snapshot(repo_id: str, revision: str | None, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            # None shows it on a terminal only.
            super().__init__(*args, **{"disable": None, **settings})  # type: ignore[no-untyped-call]

    return Path(
        snapshot_download(repo_id, revision=revision, allow_patterns=sorted(map(_literal, names)), tqdm_class=Bar)
    )


def _literal(name: str) -> str:
    """Return the pattern that fits this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _weights_among(names: Iterable[str], what: str) -> StoredWeights | None:
    """Choose a repository's weights by the names of its files; see `mergelab.weights.files.weight_files`.

    Raises:
        HubError: there are several variants of them, or a shard is missing.
    """
    try:
        return weight_files(set(names))
    except ModelError as error:
        raise HubError(f"{what}: {error}") from None


def _weight_files(folder: Path, weights: StoredWeights) -> list[str]:
    if weights.index is None:
        return list(weights.files)
    files = set(json.loads((folder / weights.index).read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(file for file in files if is_inside(folder, file))


def _absent_weights(folder: Path) -> list[str]:
    """List the weight files that ``folder`` should have and has not."""
    weights = _weights_among((path.name for path in folder.iterdir()), str(folder))
    wanted = _weight_files(folder, weights) if weights else [WEIGHT_FILES[0]]
    return [name for name in wanted if not (folder / name).is_file()]


def _record_absence(repo_id: str, revision: str | None, name: str) -> None:
    """Have ``huggingface_hub`` note in its cache that the repository lacks a file, as it does when asked for it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        hf_hub_download(repo_id, name, revision=revision)


def _explain(error: Exception, repo_id: str, revision: str | None) -> str | None:
    """Say in one line what an error of ``huggingface_hub`` means; None for one that is not about the hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = _named(repo_id, revision)
    for each in causes_of(error):
        if isinstance(each, GatedRepoError):
            return f"{what} is gated: accept its terms at {endpoint()}/{repo_id} and log in (`hf auth login`)"
        if isinstance(each, RepositoryNotFoundError):
            return f"{what} does not exist on {endpoint()}; if it is private, log in (`hf auth login`)"
        if isinstance(each, RevisionNotFoundError):
            return f"{what} does not exist on {endpoint()}: the repository has no revision {revision or 'main'!r}"
        if isinstance(each, HFValidationError):
            return f"{repo_id!r} is not a hub id (org/name)"
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code if each.response is not None else "an error"
            refused = " (is HF_TOKEN valid?)" if status in (401, 403) else ""
            return f"{what} cannot be fetched: {endpoint()} answered {status}{refused}"
        if isinstance(each, OSError) and each.errno is not None and type(each).__module__ == "builtins":
            if isinstance(each, ConnectionError | TimeoutError):
                return _unreachable(repo_id, revision)
            return f"{what} cannot be stored in the local cache: {each.strerror}"
        if type(each).__module__.partition(".")[0] in ("requests", "httpx", "httpx2"):
            return _unreachable(repo_id, revision)
    return None


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Go from an error to what caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def _unreachable(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub at {endpoint()} cannot be reached"
    return f"{_named(repo_id, revision)} cannot be fetched: {why}, and the local cache has no complete copy"


def _named(repo_id: str, revision: str | None) -> str:
    return f"model {repo_id}@{revision}" if revision else f"model {repo_id}"
