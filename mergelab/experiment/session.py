"""An experiment's opened models, run over the examples of its tasks; nothing is loaded or measured twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import ModelError
from mergelab.evaluation.options import options_from_config
from mergelab.evaluation.scoring import Prediction, PredictionCache, prediction_key
from mergelab.experiment.heads import Heads
from mergelab.experiment.opening import MergeScope, open_models
from mergelab.experiment.sources import from_folder
from mergelab.models.architecture import open_classifier, open_generator, tokenizer_folder
from mergelab.models.tokens import decoder_tokenizer, load_tokenizer
from mergelab.weights.conversion import load_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergelab.config import ExperimentConfig
    from mergelab.evaluation.classification import Watch
    from mergelab.evaluation.dispatch import Inputs
    from mergelab.evaluation.options import EvaluationOptions
    from mergelab.evaluation.scoring import Array
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
    scope = MergeScope(
        passthrough=models.passthrough,
        leave_out=models.leave_out,
        merge_new=models.merge_new,
        vocab=models.vocab,
        untie=models.untie,
        module_names=module_names,
        dtype=None if config.save.dtype is None else getattr(torch, config.save.dtype),
    )
    base = located.base
    opened = open_models(
        None if base is None else from_folder(base.folder, base.name, label=base.label),
        [from_folder(expert.folder, expert.name, label=expert.label) for expert in located.experts],
        scope,
    )
    heads = Heads(opened, located, tasks, models.head)
    return Session(located, tasks, opened, heads, options, PredictionCache() if config.eval.cache else None)


class Session:
    """Opened models; any number of weights can be measured in them without loading anything again.

    Attributes:
        located: where the models are, and what tables call them.
        tasks: what is measured.
        opened: the models' tensors under common names.
        heads: the merged model's head for each task, and the experts'.
        options: how models are run.
    """

    def __init__(
        self,
        located: LocatedModels,
        tasks: Sequence[TaskSpec],
        opened: OpenedModels,
        heads: Heads,
        options: EvaluationOptions,
        cache: PredictionCache | None = None,
    ) -> None:
        self.located, self.tasks, self.opened = located, tuple(tasks), opened
        self.heads, self.options = heads, options
        self._cache = cache
        self._tokenizer: Any = None
        self._modules: dict[int, nn.Module] = {}
        self._inputs: dict[str, Inputs] = {}

    @property
    def device(self) -> torch.device:
        """The device that models are merged and measured on."""
        import torch

        return torch.device(self.options.device or "cpu")

    @property
    def tokenizer(self) -> Any:
        """The one tokenizer that all models are measured with: the base's, or the first expert's that has one."""
        if self._tokenizer is None:
            own = self.opened.vocabulary and self.opened.vocabulary.tokenizer()
            self._tokenizer = own or load_tokenizer(self.opened.folders, self.located.name)
        return self._tokenizer

    @property
    def decoder_tokenizer(self) -> Any:
        """The tokenizer of what encoder-decoders write, where it is another than that of what they read."""
        folder = tokenizer_folder(self.opened.folders)
        if folder is None or (own := decoder_tokenizer(folder)) == folder:
            return None
        return load_tokenizer([own], self.located.name)

    def module(self, outputs: int) -> nn.Module:
        """Return the module with ``outputs`` outputs, or with 0 the one that writes texts; opened at first use.

        All weights are measured in it, one after the other.

        Raises:
            ModelError: the models are of another kind.
        """
        if outputs not in self._modules:
            kind = self.opened.architecture
            assert kind is not None
            if not (kind.is_classifier if outputs else kind.is_generator):
                asked = "classification" if outputs else "generation or language modelling"
                raise ModelError(f"{self.located.name}: a {kind.name} cannot be measured on a {asked} task")
            expert = self.located.experts[0]
            if outputs:
                module = open_classifier(expert.folder, expert.label, outputs)
            else:
                module = open_generator(expert.folder, expert.label)
            if self.opened.vocabulary is not None:
                module = self.opened.vocabulary.fit(module, expert.folder)
            self._modules[outputs] = module.to(self.device)
        return self._modules[outputs]

    def predict(
        self,
        data: TaskData,
        backbone: Callable[[], Mapping[str, Tensor]],
        head: Head,
        model: str,
        *,
        key: Sequence[str] | None = None,
        progress: Progress = lambda _message, _done: None,
        members: Array | None = None,
        watch: Watch | None = None,
        seed: int | None = None,
    ) -> Prediction:
        """Measure weights on a task's examples.

        Args:
            data: the examples.
            backbone: makes the weights; called only where the predictions are not in the cache.
            head: the head to measure them with.
            model: what progress messages call the model.
            key: names the content of the backbone; without it nothing is cached.
            progress: called with a message and the fraction done.
            members: (m,) positions of the examples that are measured, in the order of which the outputs come; None:
                all.
            watch: as `mergelab.evaluation.classification.predict`'s.
            seed: as `EvaluationOptions.seed`.
        """
        name = None if key is None or self._cache is None else self.data_key(data, [*key, head.digest])
        if name is not None and self._cache is not None and (known := self._cache.get(name)) is not None:
            return Prediction(*known, cached=True)
        module, inputs = self.module(data.spec.outputs), self._inputs_of(data)
        load_weights(module, {**backbone(), **head.tensors}, untied=self.opened.untied)
        title = f"evaluating {model} on {data.spec.name}"
        options = replace(self.options, seed=seed, progress=lambda done: progress(title, done))
        started = time.perf_counter()
        outputs = (inputs if members is None else inputs.take(members)).run(module, options, watch=watch)
        seconds = time.perf_counter() - started
        if name is not None and self._cache is not None:
            self._cache.put(name, outputs, seconds)
        return Prediction(outputs, seconds, cached=False)

    @cached_property
    def config_digest(self) -> str:
        """A hash of the configs of the module that weights are measured in."""
        folder = self.located.experts[0].folder
        files = [folder / name for name in ("config.json", "generation_config.json")]
        return _digest(file for file in files if file.is_file())

    def _inputs_of(self, data: TaskData) -> Inputs:
        """Tokenise a task's examples, once."""
        from mergelab.evaluation.dispatch import prepare

        if data.spec.name not in self._inputs:
            config: Any = self.module(data.spec.outputs).config
            self._inputs[data.spec.name] = prepare(
                data, config, self.tokenizer, self.options, writes_with=self.decoder_tokenizer
            )
        return self._inputs[data.spec.name]

    def data_key(self, data: TaskData, content: Sequence[str]) -> str:
        """Name all that the outputs of a model of this content for these examples depend on."""
        from importlib.metadata import version

        folder = tokenizer_folder(self.opened.folders)
        assert folder is not None
        named = ("token", "vocab", "merges", ".model", ".spm")
        files = sorted(file for file in folder.rglob("*") if file.is_file() and any(n in file.name for n in named))
        parts: dict[str, Any] = {
            "weights": list(content),
            "config": self.config_digest,
            "data": data.fingerprint,
            "tokenizer": _digest(files),
            "max_length": self.options.max_length,
            "dtype": self.options.dtype,
            "device": self.device.type,
            "versions": [version("torch"), version("transformers"), version("mergelab")],
        }
        if not data.spec.outputs:
            numbers = hashlib.sha256(np.stack([data.parts, data.idx]).astype("<i8").tobytes()).hexdigest()
            parts["task"] = [repr(data.spec), numbers]  # sampled texts depend on an example's number
        if (vocabulary := self.opened.vocabulary) is not None:  # what a model lacks is read from the others
            contents = [self.opened.content(model.name) for model in self.opened.models]
            parts["vocabulary"] = [vocabulary.digest, contents]
        return prediction_key(parts)


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
