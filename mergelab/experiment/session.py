"""An experiment's opened models, run over the examples of its tasks; nothing is loaded or measured twice."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab import evaluation
from mergelab.console.progress import warn
from mergelab.evaluation.options import options_from_config
from mergelab.evaluation.scoring import Prediction, PredictionCache, prediction_key
from mergelab.evaluation.spread import division, is_spread, placed
from mergelab.evaluation.vllm_engine import VllmEngine
from mergelab.experiment.description import config_owner, describe
from mergelab.experiment.heads import Heads
from mergelab.experiment.opening import MergeScope, open_models
from mergelab.experiment.sources import from_folder
from mergelab.weights.conversion import load_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergelab.config import ExperimentConfig
    from mergelab.evaluation.classification import Watch
    from mergelab.evaluation.dispatch import Inputs
    from mergelab.evaluation.options import EvaluationOptions
    from mergelab.evaluation.scoring import Array
    from mergelab.experiment.description import Description, Descriptions
    from mergelab.experiment.locate import LocatedModels
    from mergelab.experiment.opening import OpenedModels
    from mergelab.models.heads import Head
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import TaskSpec

Progress = Callable[[str, float], None]


def open_session(
    located: LocatedModels, tasks: Sequence[TaskSpec], config: ExperimentConfig, *, module_names: bool = False
) -> Session:
    """Open the models of an experiment; ``module_names`` as in `MergeScope`.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch, NonFinite: the models cannot be opened or do not fit together.
        ConfigError: the device is not there; the head policy or a pattern does not fit the models.
        DataError: an expert's labels cannot be matched with a task's.
    """
    import torch

    options, models = options_from_config(config.eval, config.device), config.models
    if config.eval.engine == "vllm":
        options = replace(options, engine=VllmEngine())
    base = located.base
    source = None if base is None else from_folder(base.folder, base.name, label=base.label)
    experts = [from_folder(expert.folder, expert.name, label=expert.label) for expert in located.experts]
    chosen = next((model for model in (source, *experts) if model and model.name == config.save.tokenizer), None)
    scope = MergeScope(
        passthrough=models.passthrough,
        leave_out=models.leave_out,
        merge_new=models.merge_new,
        vocab=models.vocab,
        any_config=models.config is not None,
        owner=config_owner(source, experts, models.config, config.save.tokenizer),
        tokenizer=chosen,
        untie=models.untie,
        module_names=module_names,
        dtype=None if config.save.dtype is None else getattr(torch, config.save.dtype),
    )
    opened = open_models(source, experts, scope)
    descriptions = describe(
        opened,
        located,
        config=models.config,
        tokenizer=config.save.tokenizer,
        template=config.save.chat_template,
    )
    heads = Heads(opened, located, tasks, models.head, measured=config.evaluate)
    cache = PredictionCache() if config.eval.cache else None
    return Session(located, tasks, opened, heads, descriptions, options, cache)


class Session:
    """Opened models; any number of weights can be measured in them without loading anything again.

    Attributes:
        located: where the models are, and what tables call them.
        tasks: what is measured.
        opened: the models' tensors under common names.
        heads: the merged model's head for each task, and the experts'.
        descriptions: the config and tokenizer that each model is measured with, and the merged one saved with.
        options: how models are run.
    """

    def __init__(
        self,
        located: LocatedModels,
        tasks: Sequence[TaskSpec],
        opened: OpenedModels,
        heads: Heads,
        descriptions: Descriptions,
        options: EvaluationOptions,
        cache: PredictionCache | None = None,
    ) -> None:
        self.located, self.tasks, self.opened = located, tuple(tasks), opened
        self.heads, self.descriptions, self.options = heads, descriptions, options
        self._cache = cache
        self._tokenizers: dict[str, tuple[Any, Any]] = {}
        self._modules: dict[tuple[str, int], nn.Module] = {}
        self._inputs: dict[tuple[str, str, str], Inputs] = {}

    @property
    def device(self) -> torch.device:
        """The device that models are merged and measured on."""
        import torch

        return torch.device(self.options.device or "cpu")

    def described(self, index: int, *, in_merged_rows: bool = False) -> Description:
        """Return an expert's description; ``in_merged_rows``: the merged model's, where its tokens are others."""
        descriptions = self.descriptions
        return descriptions.merged if in_merged_rows and self.opened.vocabulary else descriptions.experts[index]

    def tokenizers(self, of: Description | None = None) -> tuple[Any, Any]:
        """Return a model's tokenizer, the merged one's by default, and the one of what it writes if that is another."""
        of = of or self.descriptions.merged
        if of.tokenizer_digest not in self._tokenizers:
            self._tokenizers[of.tokenizer_digest] = of.load_tokenizer(), of.load_decoder_tokenizer()
        return self._tokenizers[of.tokenizer_digest]

    def module(self, outputs: int, of: Description | None = None) -> nn.Module:
        """Return a module with ``outputs`` outputs, or with 0 one that writes texts; opened at first use.

        All weights of models whose config, settings of generation and number of tokens are the same are measured in
        one, one after the other. Of those of other models than the merged one the last is kept.

        Args:
            outputs: the number of outputs.
            of: the model that is measured; None: the merged one.

        Raises:
            ModelError: it is of another kind.
        """
        merged = self.descriptions.merged
        key = ((of or merged).module_key, outputs)
        if key not in self._modules:
            for other in [other for other in self._modules if other[0] != merged.module_key]:
                del self._modules[other]
            opened = (of or merged).open(outputs)
            opened = placed(opened, self.device, self.options.torch_dtype, self.options.max_memory)
            self._modules[key] = opened
            if is_spread(opened):
                warn(division(opened))
        return self._modules[key]

    def predict(
        self,
        data: TaskData,
        backbone: Callable[[], Mapping[str, Tensor]],
        head: Head,
        model: str,
        *,
        of: Description | None = None,
        key: Sequence[str] | None = None,
        progress: Progress = lambda _message, _done: None,
        members: Array | None = None,
        watch: Watch | None = None,
        seed: int | None = None,
        rounds: Array | None = None,
    ) -> Prediction:
        """Measure weights on a task's examples.

        Args:
            data: the examples.
            backbone: makes the weights; called only where the predictions are not in the cache.
            head: the head to measure them with.
            model: what progress messages call the model.
            of: whose config and tokenizer it is measured with; None: the merged model's.
            key: names the content of the backbone; without it nothing is cached.
            progress: called with a message and the fraction done.
            members: (m,) positions of the examples that are measured, in the order of which the outputs come; None:
                all.
            watch: as `mergelab.evaluation.classification.predict`'s.
            seed, rounds: as those of `EvaluationOptions`.
        """
        name = None if key is None or self._cache is None else self.data_key(data, [*key, head.digest], of)
        if name is not None and self._cache is not None and (known := self._cache.get(name)) is not None:
            return Prediction(*known, cached=True)
        module, inputs = self.module(data.spec.outputs, of), self.inputs(data, of)
        load_weights(module, {**backbone(), **head.tensors}, untied=self.opened.untied)
        title = f"evaluating {model} on {data.spec.name}"
        options = replace(self.options, seed=seed, rounds=rounds, progress=lambda done: progress(title, done))
        started = time.perf_counter()
        outputs = (inputs if members is None else inputs.take(members)).run(module, options, watch=watch)
        seconds = time.perf_counter() - started
        if name is not None and self._cache is not None:
            self._cache.put(name, outputs, seconds)
        return Prediction(outputs, seconds, cached=False)

    def inputs(self, data: TaskData, of: Description | None = None) -> Inputs:
        """Tokenise a task's examples for a model, by default the merged one, once."""
        from mergelab.evaluation.dispatch import prepare

        of = of or self.descriptions.merged
        key = (data.spec.name, of.module_key, of.tokenizer_digest)
        if key not in self._inputs:
            config: Any = self.module(data.spec.outputs, of).config
            reads, writes = self.tokenizers(of)
            self._inputs[key] = prepare(data, config, reads, self.options, writes_with=writes)
        return self._inputs[key]

    def data_key(self, data: TaskData, content: Sequence[str], of: Description | None = None) -> str:
        """Name all that the outputs of a model of this content for these examples depend on."""
        from importlib.metadata import version

        of = of or self.descriptions.merged
        parts: dict[str, Any] = {
            "weights": list(content),
            "config": of.config_digest,
            "data": data.fingerprint,
            "tokenizer": of.tokenizer_digest,
            "max_length": self.options.max_length,
            "dtype": self.options.dtype,
            "device": self.device.type,
            "versions": [version("torch"), version("transformers"), version("mergelab"), _evaluation_code()],
        }
        if not data.spec.outputs:
            numbers = hashlib.sha256(np.stack([data.parts, data.idx]).astype("<i8").tobytes()).hexdigest()
            parts["task"] = [repr(data.spec), numbers]  # sampled texts depend on an example's number
        if self.options.engine is not None:
            parts["engine"] = self.options.engine.name
        if of.vocabulary is not None:  # what a model lacks is read from the others
            parts["vocabulary"] = [self.opened.content(model.name) for model in self.opened.models]
        return prediction_key(parts)


@functools.cache
def _evaluation_code() -> str:
    """Return a hash of the code that makes outputs of weights: how examples are encoded, padded and run."""
    folder = Path(evaluation.__file__).parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()
