"""Merging from Python: every method as a function, and the decorators that lift a user's own function to models.

Usage:
    pipe = ml.ties([base, expert_a, expert_b], task="text-classification", base_index=0, density=0.2)

    @ml.layer_merge
    def median(models: list[Tensor], **kw) -> Tensor:
        return torch.stack(models).median(dim=0).values

    median([...hub ids, local folders, modules, pipelines or state dicts...], task="text-classification")
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from mergelab import SEED_FUNCTIONS
from mergelab.config import LayersConfig, LeaveOut, PairConfig, ReferenceConfig, Schema, check
from mergelab.engine.registry import check_parameters, get_method
from mergelab.engine.run import merge
from mergelab.errors import ConfigError, ModelError, did_you_mean, listed
from mergelab.models.architecture import Architecture, architecture, architecture_of, head_names, quiet_transformers
from mergelab.models.encoder_decoder import PAIRED, newly_initialised
from mergelab.models.heads import ReorderedSource, mean_tensor
from mergelab.models.parts import ModelPart, with_part
from mergelab.models.references import Pair, Reference, local_folder, parse_reference
from mergelab.models.skipping import left_out, set_aside
from mergelab.models.vocabulary import MergedVocabulary, Policy, check_vocabularies, merged_vocabulary
from mergelab.weights.align import AlignedModels, align
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.module import copy_module, load_into, module_of
from mergelab.weights.pretrained import load_pipeline, pipeline_with
from mergelab.weights.source import DictSource, TensorSource
from mergelab.weights.state_dict import StateDict, dict_map

if TYPE_CHECKING:
    from mergelab.engine.method import MergeMethod

# Names of the library that mergelab grew from.
_OLD_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "k": ("density", lambda k: k),
    "p": ("density", lambda p: 1 - p),
    "tau": ("t", lambda tau: tau),
    "signs": ("weights", lambda signs: signs),
}


class _PartConfig(Schema):
    """An expert for one part of an encoder-decoder base."""

    reference: ReferenceConfig
    part: ModelPart


@dataclass(frozen=True)
class _Opened:
    """A model as it was given, and its tensors."""

    given: Any
    source: TensorSource
    folder: Path | None = None


@functools.cache
def method_function(name: str) -> Callable[..., Any]:
    """Make a method's function: ``ties(models, *, task, base_index, passthrough, seed, **parameters)``."""
    method = get_method(SEED_FUNCTIONS.get(name, name))

    def merged(
        models: Sequence[Any],
        *,
        task: str | None = None,
        base_index: int | None = 0 if method.needs_base else None,
        passthrough: Sequence[str] = (),
        leave_out: Sequence[int] | Mapping[str, Sequence[int]] = (),
        vocab: Policy | None = None,
        seed: int = 0,
        **parameters: Any,
    ) -> Any:
        parameters = {key: value for key, value in parameters.items() if key != "verbose"}
        passthrough = [*passthrough, *parameters.pop("passthrough_layers", ())]
        checked = check_parameters(method, _new_spelling(method, parameters))

        if method.needs:
            raise ConfigError(
                f"{method.name} needs examples of a task: run it with python -m mergelab method={method.name}"
            )

        def combine(aligned: AlignedModels, output: str | None = None) -> dict[str, Tensor]:
            return dict(merge(method, checked, aligned, seed=seed, output=output))

        if not method.one_model_per_expert:
            return _merge_models(models, combine, task, base_index, passthrough, leave_out, vocab)

        def for_expert(index: int) -> Any:
            def own(aligned: AlignedModels) -> dict[str, Tensor]:
                return combine(aligned, aligned.experts[index].name)

            return _merge_models(models, own, task, base_index, passthrough, leave_out, vocab)

        return [for_expert(index) for index in range(len(models) - (base_index is not None))]

    merged.__name__ = merged.__qualname__ = name
    merged.__doc__ = (
        f"{inspect.getdoc(method.function)}\n\n"
        "``models`` are hub ids, local folders, pairs ``{'encoder': …, 'decoder': …}`` of these, modules, pipelines\n"
        "or state dicts, ``base_index`` says which is the base; the result is of the last one's kind (a pipeline of\n"
        "``task`` for ids and folders; without ``task`` an ``EncoderDecoderModel`` for pairs and folders of such).\n"
        "An expert for one part of an encoder-decoder base is ``{'reference': …, 'part': 'encoder'}``.\n"
        "Tensors that match ``passthrough`` skip the merge: the experts' mean is taken. The layers ``leave_out``\n"
        "(``[0, 1]``: of the encoder and of the decoder, or ``{'encoder': [0], 'decoder': [1]}``) stay the base's.\n"
        "Ids and folders whose tokens differ are merged by token with ``vocab='base'`` (the base's tokens) or\n"
        "``vocab='union'`` (those of all); the pipeline then has the tokenizer that belongs to the merged model."
        + (" The answer is a list of models, one for each expert." if method.one_model_per_expert else "")
    )
    return merged


def _new_spelling(method: MergeMethod, parameters: Mapping[str, Any]) -> dict[str, Any]:
    known = method.parameters.model_fields
    spelled = {}
    for key, value in parameters.items():
        new, convert = _OLD_PARAMETERS.get(key, (key, lambda same: same))
        spelled[key if key in known or new not in known else new] = value if key in known else convert(value)
    return spelled


def model_merge(function: Callable[..., Mapping[str, Tensor]]) -> Callable[..., Any]:
    """Lift a function of state dicts to models.

    ``function(models: list[StateDict], **parameters) -> StateDict``. The lifted function takes hub ids, local folders,
    modules, pipelines or dicts and answers the kind of the last one. ``base_index`` is handed on where ``function``
    takes it; that model is then left out of the mean that ``passthrough`` tensors get.

    Raises:
        KeyMismatch, ShapeMismatch: the models do not have the same tensors.
        ModelError: a model cannot be opened.
    """

    @functools.wraps(function)
    def merged(
        models: Sequence[Any],
        passthrough: Sequence[str] = (),
        verbose: bool = False,
        *,
        task: str | None = None,
        base_index: int | None = None,
        passthrough_layers: Sequence[str] = (),
        vocab: Policy | None = None,
        **parameters: Any,
    ) -> Any:
        if base_index is not None and _accepts(function, "base_index"):
            parameters["base_index"] = base_index

        def combine(aligned: AlignedModels) -> dict[str, Tensor]:
            dicts = [_state_dict(source, aligned) for source in aligned.experts]
            if aligned.base is not None and base_index is not None:
                dicts.insert(base_index % (len(dicts) + 1), _state_dict(aligned.base, aligned))
            return dict(function(dicts, **parameters))

        return _merge_models(models, combine, task, base_index, [*passthrough, *passthrough_layers], vocab=vocab)

    merged.model_function = function  # type: ignore[attr-defined]
    return merged


def layer_merge(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Lift a function of one tensor of every model, ``function(models: list[Tensor], **parameters)``, to models."""
    merged = model_merge(dict_map(function))
    merged.layer_function = function  # type: ignore[attr-defined]
    return merged


def _state_dict(source: TensorSource, aligned: AlignedModels) -> StateDict:
    return StateDict({name: source.get(name) for name in aligned.names})


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _merge_models(
    models: Sequence[Any],
    combine: Callable[[AlignedModels], dict[str, Tensor]],
    task: str | None,
    base_index: int | None,
    passthrough: Sequence[str],
    leave_out: Sequence[int] | Mapping[str, Sequence[int]] = (),
    vocab: Policy | None = None,
) -> Any:
    """Open ``models``, combine what they share, average what skips the merge, and give back the last one's kind."""
    if not models:
        raise ConfigError("there are no models to merge")
    if base_index is not None and not -len(models) <= base_index < len(models):
        raise ConfigError(f"base_index={base_index}: there are {len(models)} models")
    given = _open_all(models, base_index)
    vocabulary = _merged_vocabulary(vocab, given, base_index)
    opened = _same_label_order(given)
    template = opened[-1]
    experts = list(opened)
    base = experts.pop(base_index) if base_index is not None else None
    if base is template and experts:
        template = experts[-1]
    if not experts:
        raise ConfigError("there is no expert beside the base")
    names = template.source.keys()
    for pattern in passthrough:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"passthrough: no tensor matches {pattern!r}{did_you_mean(pattern, names)}")
    if leave_out and base is None:
        raise ConfigError("leave_out: there is no base model (base_index) whose layers are kept")
    heads = () if vocabulary is None else head_names(names, _kind(template))
    aligned = align(
        base.source if base else None,
        [expert.source for expert in experts],
        ignore=list(passthrough),
        adapt=None if vocabulary is None else functools.partial(vocabulary.adapt, heads=heads),
    )
    aligned, kept = set_aside(
        aligned,
        left_out(aligned.names, _layers(leave_out), key="leave_out"),
        [newly_initialised(model.folder) if model.folder else () for model in (*([base] if base else []), *experts)],
    )
    with torch.no_grad():
        merged = {**combine(aligned), **kept}
        skipped = {name for pattern in passthrough for name in fnmatch.filter(names, pattern)} | set(
            aligned.experts_only
        )
        for name in sorted(skipped):
            merged[name] = mean_tensor([expert.get(name) for expert in aligned.experts])
    for name in aligned.integers:
        merged.setdefault(name, (aligned.base or aligned.experts[0]).get(name))
    return _same_kind(template, merged, task, vocabulary)


def _merged_vocabulary(
    policy: Policy | None, opened: Sequence[_Opened], base_index: int | None
) -> MergedVocabulary | None:
    """Plan the merged model's tokens; None where it has those that all models have, row by row."""
    if policy not in (None, *get_args(Policy)):
        raise ConfigError(f"vocab={policy!r}: must be one of {listed(map(repr, get_args(Policy)))}, or None")
    if policy == "base" and base_index is None:
        raise ConfigError(
            "vocab='base': there is no base model (base_index); vocab='union' starts from the first model"
        )
    checkpoints = [model.source for model in opened if isinstance(model.source, Checkpoint)]
    if len(checkpoints) < len(opened):
        if policy is None:  # modules and dicts do not say which row is which token's
            return None
        odd = next(model.source.name for model in opened if not isinstance(model.source, Checkpoint))
        raise ConfigError(
            f"vocab={policy!r}: {odd} has no tokenizer; models are merged by token where all are hub ids or folders"
        )
    if base_index is not None:
        checkpoints.insert(0, checkpoints.pop(base_index))
    if policy is None:
        check_vocabularies(checkpoints, has_base=base_index is not None, key="vocab")
        return None
    return merged_vocabulary(policy, checkpoints)


def _layers(leave_out: Sequence[int] | Mapping[str, Sequence[int]]) -> LeaveOut:
    if isinstance(leave_out, Mapping):
        return check(LayersConfig, {part: list(numbers) for part, numbers in leave_out.items()}, "leave_out")
    return list(leave_out)


def _same_label_order(opened: Sequence[_Opened]) -> list[_Opened]:
    """Read the heads of classifiers whose labels are the last one's in another order in that one's order."""
    wanted = _labels(opened[-1])
    reordered = []
    for model in opened:
        own = _labels(model)
        if own != wanted and sorted(own) == sorted(wanted):
            order = tuple(own.index(label) for label in wanted)
            names = frozenset(head_names(model.source.keys(), _kind(model)))
            model = replace(model, source=ReorderedSource(model.source, names, order))
        reordered.append(model)
    return reordered


def _labels(model: _Opened) -> list[str]:
    """Return a classifier's label names in the order of its outputs; nothing for other models and for dicts."""
    if isinstance(model.given, Mapping) and model.folder is None:
        return []
    labels = _kind(model).id2label
    return [labels[index].lower() for index in sorted(labels)] if _kind(model).is_classifier else []


def _kind(model: _Opened) -> Architecture:
    if model.folder is not None:
        return architecture(model.folder, model.source.name, model.source.keys())
    return architecture_of(module_of(model.given))


def _open_all(models: Sequence[Any], base_index: int | None) -> list[_Opened]:
    """Open the models; the base first, since an expert for one part of it has the base's other part."""
    at = None if base_index is None else base_index % len(models)
    base = None if at is None else _open(models[at], f"models[{at}]")
    return [
        base if base is not None and index == at else _open(model, f"models[{index}]", base)
        for index, model in enumerate(models)
    ]


def _open(model: Any, name: str, base: _Opened | None = None) -> _Opened:
    if isinstance(model, str | Path):
        return _open_reference(model, parse_reference(str(model)), name)
    if isinstance(model, Mapping) and isinstance(model.get("part"), str):
        return _open_part(model, name, base)
    if isinstance(model, Mapping) and any(isinstance(value, str | Path) for value in model.values()):
        return _open_reference(model, parse_reference(check(PairConfig, _as_text(model), name)), name)
    if (module := module_of(model)) is not None:
        return _Opened(model, DictSource(name, dict(module.named_parameters())))
    if isinstance(model, Mapping):
        return _Opened(model, DictSource(name, dict(model)))
    raise ModelError(
        f"{name} is a {type(model).__name__}; it must be a hub id, a local folder, a pair of these, a module, a "
        "pipeline or a state dict"
    )


def _open_part(given: Mapping[str, Any], name: str, base: _Opened | None) -> _Opened:
    """Open the base with a checkpoint in the place of its encoder or decoder."""
    wanted = check(_PartConfig, _as_text(given), name)
    if base is None or base.folder is None:
        raise ConfigError(
            f"{name} has part={wanted.part}, and there is no base model (base_index) that is a hub id, a folder or a "
            "pair for the other part"
        )
    reference = parse_reference(wanted.reference)
    folder = with_part(base.folder, local_folder(reference, name), wanted.part, where=name)
    return _Opened(given, open_checkpoint(folder, f"{reference.text} ({wanted.part})"), folder)


def _as_text(value: Any) -> Any:
    """Write paths in a reference as text."""
    if isinstance(value, Mapping):
        return {key: _as_text(each) for key, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def _open_reference(given: Any, reference: Reference | Pair, name: str) -> _Opened:
    folder = local_folder(reference, name)
    return _Opened(given, open_checkpoint(folder, reference.text), folder)


def _same_kind(
    template: _Opened, merged: dict[str, Tensor], task: str | None, vocabulary: MergedVocabulary | None = None
) -> Any:
    given = template.given
    if isinstance(given, Mapping) and template.folder is None:
        return StateDict(merged)
    if isinstance(given, nn.Module):
        return load_into(copy_module(given), merged)
    if template.folder is None:
        return pipeline_with(given, load_into(copy_module(given.model), merged))
    if task is None and _kind(template).name == PAIRED:
        from transformers import EncoderDecoderModel

        with quiet_transformers():
            module = EncoderDecoderModel.from_pretrained(template.folder, local_files_only=True, dtype="auto")
        return load_into(module, merged)
    if task is None:
        raise ConfigError("merging hub ids or folders makes a pipeline: say which with task='text-classification'")
    with quiet_transformers(), ExitStack() as stack:
        pipe = load_pipeline(
            template.folder,
            task,
            tokenizer=stack.enter_context(vocabulary.companions(template.folder)) if vocabulary else None,
            adapt=functools.partial(vocabulary.fit, folder=template.folder) if vocabulary else None,
        )
    load_into(pipe.model, merged)
    return pipe
