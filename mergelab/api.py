"""Merging from Python: every method as a function, and the decorators that lift a user's own function to models.

Usage:
    pipe = ml.ties([base, expert_a, expert_b], task="text-classification", base_index=0, density=0.2)

    @ml.layer_merge
    def median(models: list[Tensor], **kw) -> Tensor:
        return torch.stack(models).median(dim=0).values

    median([...hub ids, local folders, modules, pipelines or state dicts...], task="text-classification")
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from mergelab import SEED_FUNCTIONS
from mergelab.config import LayersConfig, LeaveOut, VocabConfig, check
from mergelab.engine.registry import check_parameters, get_method
from mergelab.engine.run import merge
from mergelab.engine.signatures import keywords
from mergelab.errors import ConfigError, listed
from mergelab.estimation.examples import Batch
from mergelab.experiment.given_examples import GivenExamples
from mergelab.experiment.opening import MergeScope, OpenedModels, open_models
from mergelab.experiment.sources import ModelSource, from_list
from mergelab.models.architecture import quiet_transformers
from mergelab.models.configs import untied_config
from mergelab.models.encoder_decoder import PAIRED
from mergelab.models.vocabulary import MergedVocabulary, Policy
from mergelab.weights.align import AlignedModels, check_finite
from mergelab.weights.conversion import load_weights
from mergelab.weights.module import copy_module
from mergelab.weights.pretrained import from_tensors, load_pipeline, pipeline_with
from mergelab.weights.source import DictSource
from mergelab.weights.state_dict import StateDict, dict_map

if TYPE_CHECKING:
    from mergelab.engine.method import MergeMethod
    from mergelab.weights.source import TensorSource

# Names of the library that mergelab grew from.
_OLD_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "k": ("density", lambda k: k),
    "p": ("density", lambda p: 1 - p),
    "tau": ("t", lambda tau: tau),
    "signs": ("weights", lambda signs: signs),
}
_EXAMPLES = """
``examples`` has an entry for each expert, in their order: a list of batches, each a mapping of the module's inputs to
tensors with a row for each example, as the expert's tokenizer returns them; with ``labels`` where the method needs
them, as numbers of that expert's own outputs. The first ``samples`` examples are used. Padding is where
``attention_mask`` is 0."""
_IGNORED, _OLD_PASSTHROUGH = ("verbose",), "passthrough_layers"


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
        config: Literal["last"] | None = None,
        untie: bool = False,
        seed: int = 0,
        examples: Sequence[Iterable[Batch]] | None = None,
        **parameters: Any,
    ) -> Any:
        parameters = {key: value for key, value in parameters.items() if key not in _IGNORED}
        passthrough = [*passthrough, *parameters.pop(_OLD_PASSTHROUGH, ())]
        checked = check_parameters(method, _new_spelling(method, parameters))

        _check_examples(method, examples, vocab)

        def combine(opened: OpenedModels, output: str | None = None) -> dict[str, Tensor]:
            given = None if examples is None else GivenExamples(opened, examples, task, method.name)
            return dict(merge(method, checked, opened.aligned, seed=seed, output=output, examples=given))

        opening = (task, base_index, passthrough, leave_out, vocab, config, untie)
        if not method.one_model_per_expert:
            return _merge_models(models, combine, *opening, module_names=bool(method.needs))

        def for_expert(index: int) -> Any:
            def own(opened: OpenedModels) -> dict[str, Tensor]:
                return combine(opened, opened.aligned.experts[index].name)

            return _merge_models(models, own, *opening, module_names=bool(method.needs))

        return [for_expert(index) for index in range(len(models) - (base_index is not None))]

    merged.__name__ = merged.__qualname__ = name
    merged.__signature__ = _signature(method, merged)  # type: ignore[attr-defined]
    merged.__doc__ = f"{inspect.getdoc(method.function)}\n\n{_usage(method)}"
    return merged


def _signature(method: MergeMethod, merged: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method's function, with the method's parameters in the place of ``**parameters``."""
    *common, _ = inspect.signature(merged).parameters.values()
    if not _learns_from_examples(method):
        common = [each for each in common if each.name != "examples"]
    result = "list[Any]" if method.one_model_per_expert else "Any"
    return inspect.Signature([*common, *keywords(method)], return_annotation=result)


def _learns_from_examples(method: MergeMethod) -> bool:
    return "data" in method.needs


def _check_examples(method: MergeMethod, examples: Any, vocab: Policy | None) -> None:
    """Raise `ConfigError` for examples that a method needs and does not get, or the other way round."""
    run = f"run it with python -m mergelab method={method.name}"
    if method.needs and not _learns_from_examples(method):
        raise ConfigError(f"{method.name} needs examples that select: {run}")
    if examples is None and method.needs:
        raise ConfigError(
            f"{method.name} learns from examples: give batches for each expert, examples=[[batch, …], …], or {run}"
        )
    if examples is not None and not method.needs:
        raise ConfigError(f"examples: {method.name} learns from none")
    if examples is not None and vocab is not None:
        raise ConfigError(f"vocab={vocab!r}: not together with examples, whose tokens are those of one vocabulary")


def old_keywords(method: MergeMethod) -> dict[str, str | None]:
    """Return the keywords of the library that mergelab grew from that a method's function takes too.

    Each with the keyword that it is today; None for one that has no effect.
    """
    known = method.parameters.model_fields
    spelled = {old: new for old, (new, _) in _OLD_PARAMETERS.items() if new in known and old not in known}
    return {**spelled, **dict.fromkeys(_IGNORED), _OLD_PASSTHROUGH: "passthrough"}


def _usage(method: MergeMethod) -> str:
    """Describe what every method's function takes and returns."""
    return (
        "``models`` are hub ids, local folders, pairs ``{'encoder': …, 'decoder': …}`` of these, modules, pipelines\n"
        "or state dicts, ``base_index`` says which is the base; the result is of the last one's kind (a pipeline of\n"
        "``task`` for ids and folders; without ``task`` an ``EncoderDecoderModel`` for pairs and folders of such).\n"
        "An expert may be an adapter of PEFT or Adapters (a folder, a hub id or a PeftModel), on a base that is an id\n"
        "or a folder, or without one on the base that it names.\n"
        "An expert for one part of an encoder-decoder base is ``{'reference': …, 'part': 'encoder'}``.\n"
        "Classifiers' heads are merged in the order of the last one's labels; names that do not match are an error.\n"
        "Tensors that match ``passthrough`` skip the merge: the experts' mean is taken. The layers ``leave_out``\n"
        "(``[0, 1]``: of the encoder and of the decoder, or ``{'encoder': [0], 'decoder': [1]}``) stay the base's.\n"
        "Ids and folders whose tokens differ are merged by token with ``vocab='base'`` (the base's tokens) or\n"
        "``vocab='union'`` (those of all); the pipeline then has the tokenizer that belongs to the merged model.\n"
        "Models whose configs differ in what their weights mean are merged only with ``config='last'``, under the\n"
        "last one's. Models of which some tie input and output embeddings and others do not are merged untied with\n"
        "``untie=True``."
        + (_EXAMPLES if _learns_from_examples(method) else "")
        + (" The result is a list of models, one for each expert." if method.one_model_per_expert else "")
    )


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
    modules, pipelines or dicts and returns the kind of the last one. ``base_index`` is passed on where ``function``
    takes it; that model does not count in the mean that ``passthrough`` tensors get.

    Raises:
        KeyMismatch, ShapeMismatch: the models do not have the same tensors.
        NonFinite: a tensor of a model, or of the result, holds NaN or infinity.
        ModelError: a model cannot be opened, or its labels or tokens do not fit the others'.
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
        config: Literal["last"] | None = None,
        **parameters: Any,
    ) -> Any:
        if base_index is not None and _accepts(function, "base_index"):
            parameters["base_index"] = base_index

        def combine(opened: OpenedModels) -> dict[str, Tensor]:
            aligned = opened.aligned
            dicts = [_state_dict(source, aligned) for source in aligned.experts]
            if aligned.base is not None and base_index is not None:
                dicts.insert(base_index % (len(dicts) + 1), _state_dict(aligned.base, aligned))
            result = DictSource(function.__name__, dict(function(dicts, **parameters)))
            for name, tensor in result.tensors.items():
                check_finite(result, name, tensor)
            return dict(result.tensors)

        return _merge_models(
            models, combine, task, base_index, [*passthrough, *passthrough_layers], vocab=vocab, config=config
        )

    merged.model_function = function  # type: ignore[attr-defined]
    return merged


def layer_merge(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Lift a function of one tensor of every model, ``function(models: list[Tensor], **parameters)``, to models."""
    merged = model_merge(dict_map(function))
    merged.layer_function = function  # type: ignore[attr-defined]
    return merged


def _state_dict(source: TensorSource, aligned: AlignedModels) -> StateDict:
    """Read the tensors that are merged, checked for NaN and infinity as a method's are."""
    tensors = StateDict({name: source.get(name) for name in aligned.names})
    for name, tensor in tensors.items():
        check_finite(source, name, tensor)
    return tensors


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _merge_models(
    models: Sequence[Any],
    combine: Callable[[OpenedModels], dict[str, Tensor]],
    task: str | None,
    base_index: int | None,
    passthrough: Sequence[str],
    leave_out: Sequence[int] | Mapping[str, Sequence[int]] = (),
    vocab: Policy | None = None,
    config: Literal["last"] | None = None,
    untie: bool = False,
    *,
    module_names: bool = False,
) -> Any:
    """Open ``models``, combine what they share, average what skips the merge, and return the last one's kind."""
    if not models:
        raise ConfigError("there are no models to merge")
    if base_index is not None and not -len(models) <= base_index < len(models):
        raise ConfigError(f"base_index={base_index}: there are {len(models)} models")
    if vocab not in (None, *get_args(Policy)):
        raise ConfigError(f"vocab={vocab!r}: must be one of {listed(map(repr, get_args(Policy)))}, or None")
    if vocab == "base" and base_index is None:
        raise ConfigError(
            "vocab='base': there is no base model (base_index); vocab='union' starts from the first model"
        )
    if config not in (None, "last"):
        raise ConfigError(f"config={config!r}: must be 'last', or None")
    experts = from_list(models, base_index)
    base = None if base_index is None else experts.pop(base_index)
    scope = MergeScope(
        passthrough,
        _layers(leave_out),
        vocab=None if vocab is None else VocabConfig(source=vocab),
        separate_heads=False,
        any_config=config is not None,
        untie=untie,
        module_names=module_names,
        key="",
    )
    with torch.no_grad():
        opened = open_models(base, experts, scope)
        aligned = opened.aligned
        merged = {**combine(opened), **opened.passed_through}
    for name in aligned.integers:
        merged.setdefault(name, (aligned.base or aligned.experts[0]).get(name))
    for alias, name in aligned.aliases.items():  # a user's function returns the merged names alone
        merged.setdefault(alias, merged[name])
    return _same_kind(experts[-1], merged, task, opened.vocabulary, untied=opened.untied)


def _layers(leave_out: Sequence[int] | Mapping[str, Sequence[int]]) -> LeaveOut:
    if isinstance(leave_out, Mapping):
        return check(LayersConfig, {part: list(numbers) for part, numbers in leave_out.items()}, "leave_out")
    return list(leave_out)


def _same_kind(
    template: ModelSource,
    merged: dict[str, Tensor],
    task: str | None,
    vocabulary: MergedVocabulary | None,
    *,
    untied: bool,
) -> Any:
    """Return merged tensors as a model of the template's kind: a state dict, a module or a pipeline."""

    def filled(module: nn.Module) -> nn.Module:
        config: Any = getattr(module, "config", None)
        if untied and config is not None:
            config.update(untied_config(config.to_dict()))
        return load_weights(module, merged, untied=untied)

    given, folder = template.given, template.folder
    if folder is None:
        if isinstance(given, nn.Module):
            return filled(copy_module(given))
        if isinstance(given, Mapping):
            return StateDict(merged)
        return pipeline_with(given, filled(copy_module(given.model)))
    if task is None:
        if template.architecture is None or template.architecture.name != PAIRED:
            raise ConfigError("merging hub ids or folders makes a pipeline: say which with task='text-classification'")
        from transformers import EncoderDecoderModel

        with quiet_transformers():
            if template.checkpoint is not None and not template.checkpoint.standard:
                return filled(from_tensors(EncoderDecoderModel, template.checkpoint))
            module = EncoderDecoderModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype="auto"
            )
        return filled(module)
    with quiet_transformers(), ExitStack() as stack:
        pipe = load_pipeline(
            folder,
            task,
            tokenizer=stack.enter_context(vocabulary.companions(folder)) if vocabulary else None,
            checkpoint=template.checkpoint,
            adapt=functools.partial(vocabulary.fit, folder=folder) if vocabulary else None,
        )
    filled(pipe.model)
    return pipe
