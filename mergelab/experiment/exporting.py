"""A merge as a mergekit config: what is known of its models, and how mergekit calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mergelab.config import ExperimentConfig, check
from mergelab.engine.registry import method_from_config
from mergelab.experiment.stages import with_made_stages
from mergelab.mergekit.export import Facts, exported
from mergelab.mergekit.tokens import NoEqual
from mergelab.models.adapted import base_reference, is_adapter_folder
from mergelab.models.references import Adapted, Reference, local_folder, parse_reference
from mergelab.weights.adapters import ADAPTER_CONFIG
from mergelab.weights.json_files import read_json
from mergelab.weights.source import layout_of

if TYPE_CHECKING:
    from mergelab.config import ReferenceConfig
    from mergelab.experiment.locate import LocatedModels
    from mergelab.experiment.opening import OpenedModels
    from mergelab.experiment.plan import Plan
    from mergelab.models.vocabulary import MergedVocabulary

_AMBIGUOUS = frozenset("@+")  # in a folder's name; mergekit reads a revision or an adapter there


def as_mergekit(plan: Plan, located: LocatedModels, opened: OpenedModels) -> str:
    """Return the text of a mergekit config that makes a plan's merged model.

    Raises:
        NoEqual: a setting has no equal in mergekit; names it.
    """
    if located.source == "mini":
        raise NoEqual("source=mini: the embedded miniature is no model that mergekit could be given")
    config = with_made_stages(check(ExperimentConfig, plan.resolved))
    parameters = method_from_config(config.method)[1] if config.models.slices else plan.parameters
    models = config.models
    save = config.save.model_copy(update={"form": plan.config.save.form})
    config = config.model_copy(update={"save": save})
    given = {name: expert.reference for name, expert in models.experts.items() if expert.part is None}
    given |= {"base": models.base} if models.base is not None else {}
    called = {name: _called(reference, models.base, name) for name, reference in given.items()}
    facts = Facts(
        references={name: each for name, each in called.items() if each is not None},
        stored=_stored(opened),
        apart=tuple(opened.passed_through),
        heads=opened.head_names,
        seed=plan.config.seed,
        rows=_rows(opened.vocabulary),
    )
    return exported(config, plan.method, parameters, facts)


def _rows(vocabulary: MergedVocabulary | None) -> list[str]:
    """Return which settings of ``models.vocab`` change a row of a model."""
    if vocabulary is None:
        return []
    held = torch.stack([rows[: vocabulary.count] >= 0 for rows in vocabulary.rows]).sum(0)
    set_apart = torch.tensor([row in vocabulary.chosen for row in range(vocabulary.count)])
    changed = {
        "padding": vocabulary.count > len(vocabulary.tokens),
        "unknown": bool(((held == 0) & ~set_apart).any()),
        "lacking": bool(((held > 1) & (held < len(vocabulary.rows)) & ~set_apart).any()),
    }
    return [key for key, value in changed.items() if value]


def _stored(opened: OpenedModels) -> str | None:
    """Return the dtype of the merged tensors; None where there are several."""
    reference = opened.aligned.base or opened.aligned.experts[0]
    found = {info.dtype for info in layout_of(reference, opened.aligned.names)}
    if opened.dtype is not None:
        found = {opened.dtype}
    return str(next(iter(found))).removeprefix("torch.") if len(found) == 1 else None


def _called(reference: ReferenceConfig, base: ReferenceConfig | None, name: str) -> str | Mapping[str, Any] | None:
    """Return what mergekit calls a model; None where it cannot be given that."""
    parsed = parse_reference(reference)
    if isinstance(parsed, Reference) and is_adapter_folder(folder := local_folder(parsed, name)):
        on = parse_reference(base if base is not None else base_reference(folder, name))
        parsed = Adapted(on, parsed) if isinstance(on, Reference) else on
    if isinstance(parsed, Reference):
        return _path(parsed) if _is_plain(parsed) else {"model": _parts(parsed)}
    if not isinstance(parsed, Adapted):
        return None
    settings = read_json(local_folder(parsed.adapter, name) / ADAPTER_CONFIG, name)
    if settings.get("peft_type") != "LORA":
        return None
    if _is_plain(parsed.model) and _is_plain(parsed.adapter):
        return f"{_path(parsed.model)}+{_path(parsed.adapter)}"
    return {"model": _parts(parsed.model), "lora": _parts(parsed.adapter)}


def _is_plain(reference: Reference) -> bool:
    return reference.folder is None or _AMBIGUOUS.isdisjoint(str(reference.folder))


def _path(reference: Reference) -> str:
    return reference.text if reference.folder is None else str(reference.folder)


def _parts(reference: Reference) -> dict[str, str]:
    if reference.folder is not None or reference.repository is None:
        return {"path": _path(reference)}
    revision = {} if reference.revision is None else {"revision": reference.revision}
    return {"path": reference.repository, **revision}
