"""Which modules a model has in mergekit, parts that are merged of models and with parameters of their own.

A few architectures have modules with names (``encoder``, ``text_decoder``). Of the others every stack of layers is one,
called as its tensors' names begin (``model.encoder.layers``), and ``default`` is the rest, or all where there is one
stack alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergelab.errors import ConfigError, MergelabError, did_you_mean, listed
from mergelab.mergekit.document import MergeDocument, Slice
from mergelab.mergekit.module_rules import Region
from mergelab.models import hub
from mergelab.models.references import parse_reference
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.naming import places

DEFAULT = "default"
_Modules = Mapping[str, tuple[str, ...]]
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
_VISION: _Modules = {
    "multi_modal_projector": _PROJECTOR,
    "vision_tower": ("vision_tower.", "model.vision_tower."),
    "text_decoder": (),
}
_QWEN: _Modules = {
    "multi_modal_projector": tuple(
        f"{start}visual.{merger}." for start in ("", "model.") for merger in ("merger", "deepstack_merger_list")
    ),
    "vision_tower": ("visual.", "model.visual."),
    "text_decoder": (),
}
# What the names of a module's tensors begin with; of several modules the first counts, and the last has the rest.
_NAMED: Mapping[str, _Modules] = {
    "T5ForConditionalGeneration": {"encoder": ("encoder.",), "decoder": ("decoder.",), "shared": ()},
    "WhisperForConditionalGeneration": {"encoder": ("model.encoder.",), "decoder": ()},
    "Gemma3ForConditionalGeneration": _VISION,
    "Mistral3ForConditionalGeneration": _VISION,
    "Llama4ForConditionalGeneration": {
        "multi_modal_projector": _PROJECTOR,
        "vision_model": ("vision_model.", "model.vision_model."),
        "text_decoder": (),
    },
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen3VLForConditionalGeneration": _QWEN,
    "Qwen3VLMoeForConditionalGeneration": _QWEN,
}
_LAYER = re.compile(r"\.\d+\.")
_LAST = re.compile(r"(norm|lm_head)\.(weight|bias)$")


def modules_of(document: MergeDocument) -> list[tuple[Slice, Region]]:
    """Return a document's slices, each with the tensors that it is for; nothing where the model has one module alone.

    Raises:
        ConfigError: the model has no such module, or further ones; a module has other layers than the model's, or
            no model is there whose tensors would tell.
    """
    if not document.modules or (model := _model(document)) is None:
        return []
    architecture = str((model.config.get("architectures") or ["the model"])[0])
    names = model.keys()
    modules = _NAMED.get(architecture) or _by_stack(names)
    key = f"{document.where}: modules"
    if unknown := [name for name in document.modules if name not in modules]:
        hint = did_you_mean(unknown[0], modules) or f"; there are {listed(modules)}"
        raise ConfigError(f"{key}.{unknown[0]}: {architecture} has no such module{hint}")
    if missing := [name for name in modules if name not in document.modules]:
        raise ConfigError(
            f"{key}: {listed(missing)} of {architecture} is missing, and mergekit would write no such tensors"
        )
    if len(modules) == 1:
        return []
    found: list[tuple[Slice, Region]] = []
    for name, prefixes in modules.items():
        own = tuple(each for each in names if each.startswith(prefixes or ""))
        names = [each for each in names if not each.startswith(prefixes or "")]
        taken = tuple(prefix for prefix in prefixes if any(each.startswith(prefix) for each in own))
        region = Region(taken or prefixes, own)
        found += _by_layers(document.modules[name], region, f"{key}.{name}")
    return found


def _model(document: MergeDocument) -> Checkpoint | None:
    """Return one of the models, all of which have the same tensors; None where there is none yet and none is needed."""
    named = [document.base, *(source.model for each in document.slices for source in each.sources)]
    given = list(dict.fromkeys(name for name in named if name is not None))
    several = document.modules.keys() != {DEFAULT}
    for fetched in (False, True) if several else (False,):
        for name in given:
            try:
                if (folder := _folder(name, fetched=fetched)) is not None:
                    return open_checkpoint(folder, name)
            except MergelabError:
                continue
    if several:
        raise ConfigError(
            f"{document.where}: modules: what they are is read from a model, and none of {listed(given)} is there"
        )
    return None


def _folder(name: str, *, fetched: bool) -> Path | None:
    """Return the folder of a model, of one with an adapter the model's; None for one of the hub that is not here."""
    model = parse_reference(name).models[0]
    if model.repository is None or model.folder is not None:
        return model.folder
    return (hub.fetch if fetched else hub.cached)(model.repository, model.revision)


def _by_stack(names: Sequence[str]) -> _Modules:
    """Return the modules of a model whose stacks of layers are its modules, the longer prefix first."""
    stacks = {name[: match.start()] for name in names if (match := _LAYER.search(name))}
    if len(stacks) < 2:
        return {DEFAULT: ()}
    found = {stack: (f"{stack}.",) for stack in sorted(stacks, key=len, reverse=True)}
    return found if all(map(_LAYER.search, names)) else {**found, DEFAULT: ()}


def _by_layers(slices: Sequence[Slice], region: Region, key: str) -> list[tuple[Slice, Region]]:
    """Give each slice of a module the layers that it is for.

    Raises:
        ConfigError: they are not those of the model, each in its place; or where a tensor outside them belongs is
            not known.
    """
    if slices[0].sources[0].layers is None:
        return [(slices[0], region)]
    own = places(region.names)
    count = max((each.count for each in own.values()), default=0)
    stops = list(itertools.accumulate(stop - start for each in slices for start, stop in [_range(each)]))
    starts = [0, *stops[:-1]]
    ranges = [{source.layers for source in each.sources} for each in slices]
    if stops[-1] != count or ranges != [{each} for each in zip(starts, stops, strict=True)]:
        raise ConfigError(
            f"{key}.slices: must have layers 0 to {count}, each in its place; of several modules none is stacked anew"
        )
    if len(slices) > 1 and (odd := [name for name in own if own[name].layer > count and not _LAST.search(name)]):
        raise ConfigError(f"{key}.slices: it is not known to which slice {listed(odd)} belongs; write models")
    bounds = [(start or None, None if stop == count else stop) for start, stop in zip(starts, stops, strict=True)]
    return [(each, replace(region, layers=layers)) for each, layers in zip(slices, bounds, strict=True)]


def _range(part: Slice) -> tuple[int, int]:
    return part.sources[0].layers or (0, 0)
