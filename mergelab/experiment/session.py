"""The opened models of one experiment: aligned weights, heads, tokenizer, data, and resident models to measure in."""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import ExperimentConfig
from mergelab.errors import ConfigError, ModelError, did_you_mean, listed
from mergelab.evaluation.scoring import Prediction, PredictionCache, prediction_key
from mergelab.models.architecture import (
    Architecture,
    architecture,
    head_names,
    open_classifier,
    open_generator,
    read_config,
    tokenizer_folder,
)
from mergelab.models.encoder_decoder import PAIRED, newly_initialised
from mergelab.models.heads import Head, mean_head, mean_tensor, read_head
from mergelab.models.skipping import left_out, set_aside
from mergelab.models.tokens import decoder_tokenizer, load_tokenizer
from mergelab.models.vocabulary import check_vocabularies, merged_vocabulary
from mergelab.tasks.labels import label_order
from mergelab.weights.align import align, check_finite
from mergelab.weights.checkpoint import Checkpoint, open_checkpoint
from mergelab.weights.module import load_into

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergelab.evaluation.classification import Watch
    from mergelab.evaluation.dispatch import Inputs
    from mergelab.evaluation.scoring import Array
    from mergelab.experiment.locate import LocatedExpert, LocatedModels
    from mergelab.models.vocabulary import MergedVocabulary
    from mergelab.tasks.data import TaskData
    from mergelab.tasks.spec import TaskSpec
    from mergelab.weights.source import TensorSource

Progress = Callable[[str, float], None]


class Session:
    """Open the models once; then any number of weights can be measured without loading anything again.

    Raises:
        ModelError, KeyMismatch, ShapeMismatch: the models cannot be opened or do not fit together.
        ConfigError: the head policy or a pass-through pattern does not fit the models.
        DataError: an expert's labels cannot be aligned with a task's.
    """

    def __init__(self, located: LocatedModels, tasks: Sequence[TaskSpec], config: ExperimentConfig) -> None:
        self.located, self.tasks, self.config = located, tuple(tasks), config
        self.cache = PredictionCache()
        self.checkpoints: dict[str, Checkpoint] = {
            expert.name: open_checkpoint(expert.folder, expert.name) for expert in located.experts
        }
        if located.base is not None:
            self.checkpoints["base"] = open_checkpoint(located.base.folder, "base")
        self.kind = self._kind()
        base = self.checkpoints.get("base")
        experts = [self.checkpoints[expert.name] for expert in located.experts]
        self.head_names = head_names(experts[0].keys(), self.kind)
        self.vocabulary = self._merged_vocabulary([base, *experts] if base is not None else experts)
        aligned = align(
            base,
            experts,
            ignore=[*self.head_names, *config.models.passthrough],
            backbone_prefix=f"{self.kind.prefix}." if self.kind.is_classifier else None,
            adapt=None if self.vocabulary is None else partial(self.vocabulary.adapt, heads=self.head_names),
        )
        self.aligned, kept = set_aside(
            aligned,
            left_out(aligned.names, config.models.leave_out, key="models.leave_out"),
            [] if config.models.merge_new else [newly_initialised(folder) for folder in self.folders()],
        )
        self.passed_through = {**self._passed_through(experts[0].keys()), **kept}
        self._tokenizer: Any = None
        self._modules: dict[int, nn.Module] = {}
        self._inputs: dict[str, Inputs] = {}
        self._averaged = frozenset(expert.name for expert in located.experts)
        self.heads = {task.name: self._merged_head(task) for task in self.tasks}

    # ------------------------------------------------------------------------------------------------ what is opened

    def _kind(self) -> Architecture:
        kinds = {
            expert.name: architecture(expert.folder, expert.label, self.checkpoints[expert.name].keys())
            for expert in self.located.experts
        }
        first = next(iter(kinds.values()))
        odd = [f"{name} is a {kind.name}" for name, kind in kinds.items() if kind.name != first.name]
        if odd:
            raise ModelError(
                f"experts must be of one architecture: {next(iter(kinds))} is a {first.name}, {listed(odd)}"
            )
        base = self.located.base
        if (
            base is not None
            and first.name == PAIRED
            and PAIRED not in (at := read_config(base.folder, base.label).get("architectures") or [PAIRED])
        ):
            raise ModelError(
                f"models.base: {base.label} is a {listed(at)}, and the experts are encoder-decoders; give a pair "
                "{encoder: …, decoder: …} or a saved encoder-decoder"
            )
        self._kinds = kinds
        return first

    def _merged_vocabulary(self, models: Sequence[Checkpoint]) -> MergedVocabulary | None:
        """Plan the merged model's tokens; None where it has those that all models have."""
        if self.config.models.vocab is None:
            check_vocabularies(models, has_base=self.located.base is not None)
            return None
        return merged_vocabulary(self.config.models.vocab, models)

    def _passed_through(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Average, over the experts, the tensors that skip the merge or that the base does not have."""
        for pattern in self.config.models.passthrough:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"models.passthrough: no tensor matches {pattern!r}{did_you_mean(pattern, names)}")
        chosen = {name for pattern in self.config.models.passthrough for name in fnmatch.filter(names, pattern)}
        chosen = (chosen | set(self.aligned.experts_only)) - set(self.head_names)
        experts, dtype = self.aligned.experts, self.saved_dtype
        return {name: mean_tensor([expert.get(name) for expert in experts], dtype) for name in sorted(chosen)}

    def expert_serves(self, expert: LocatedExpert, task: TaskSpec) -> bool:
        """Return whether an expert's own head is for ``task``."""
        return self.config.models.head != "per_task" or expert.task == task.name

    def expert_head(self, index: int, task: TaskSpec) -> Head:
        """Read an expert's head with its outputs in the order of ``task``'s labels; empty where none is asked for."""
        expert = self.located.experts[index]
        if not (self.head_names and task.outputs):
            return Head({}, expert.name)
        labels = self._kinds[expert.name].id2label
        order = label_order(task, labels, model=expert.label, override=expert.labels)
        return read_head(self.aligned.experts[index], self.head_names, order)

    def _merged_head(self, task: TaskSpec) -> Head:
        policy = self.config.models.head
        names = [expert.name for expert in self.located.experts]
        if policy == "base":
            if not (self.head_names and task.outputs):
                return Head({}, "base")
            if self.located.base is None or self.aligned.base is None:
                raise ConfigError("models.head=base: there is no base model (models.base is null)")
            kind = architecture(self.located.base.folder, self.located.base.label)
            lacking = sorted(set(self.head_names) - set(self.aligned.base.keys()))
            if lacking:
                raise ConfigError(f"models.head=base: the base {self.located.base.label} has no {listed(lacking)}")
            order = label_order(task, kind.id2label, model=self.located.base.label)
            return read_head(self.aligned.base, self.head_names, order)
        if policy.startswith("expert:"):
            return self.expert_head(names.index(policy.removeprefix("expert:")), task)
        if policy == "per_task":
            serving = [index for index, expert in enumerate(self.located.experts) if expert.task == task.name]
            if not serving:
                raise ConfigError(
                    f"models.head=per_task: no expert's head is for {task.name!r} (experts serve "
                    f"{listed(str(expert.task) for expert in self.located.experts)}); set models.experts.<name>.task"
                )
            return self.expert_head(serving[0], task)
        averaged = [self.expert_head(index, task) for index, name in enumerate(names) if name in self._averaged]
        return mean_head(averaged, self.saved_dtype)

    def average_heads_of(self, experts: Collection[str]) -> None:
        """Let the merged model's head, where it is the experts' average, be that of these experts."""
        if frozenset(experts) == self._averaged:
            return
        self._averaged = frozenset(experts)
        if self.config.models.head == "average":
            self.heads = {task.name: self._merged_head(task) for task in self.tasks}

    # -------------------------------------------------------------------------------------------- weights to measure

    def base_backbone(self) -> dict[str, Tensor]:
        """Collect the base's tensors; what it does not have is the experts' mean, as in the merged model."""
        base = self.aligned.base
        assert base is not None
        return {**self.passed_through, **self._read(base)}

    def expert_backbone(self, index: int) -> dict[str, Tensor]:
        """Collect an expert's own tensors, heads aside."""
        return self._read(self.aligned.experts[index])

    def _read(self, source: TensorSource) -> dict[str, Tensor]:
        """Read what a model has of the backbone, and look it through for NaN and infinity."""
        available = {*source.keys(), *source.aliases()} - set(self.head_names)
        wanted = dict.fromkeys([*self.aligned.names, *self.aligned.aliases, *self.passed_through])
        tensors = {name: source.get(name) for name in wanted if name in available}
        for name, tensor in tensors.items():
            check_finite(source, name, tensor)
        return tensors

    def content(self, name: str) -> str:
        """Return the content hash of an opened model's weights (``base`` or an expert's name)."""
        return self.checkpoints[name].content_hash()

    def head_owner(self) -> dict[str, str]:
        """Return for each task the name of the expert whose head it has, under a policy that says one."""
        return {task.name: self.heads[task.name].owner for task in self.tasks}

    # ------------------------------------------------------------------------------------------------------ measuring

    @property
    def tokenizer(self) -> Any:
        """The one tokenizer that all models are measured with: the base's, or the first expert's that has one."""
        if self._tokenizer is None:
            own = self.vocabulary and self.vocabulary.tokenizer()
            self._tokenizer = own or load_tokenizer(self.folders(), self.located.name)
        return self._tokenizer

    def folders(self) -> list[Path]:
        """List the models' folders, the base's first."""
        base = [self.located.base.folder] if self.located.base else []
        return [*base, *(expert.folder for expert in self.located.experts)]

    @property
    def decoder_tokenizer(self) -> Any:
        """The tokenizer of what encoder-decoders write, where it is another than that of what they read."""
        folder = tokenizer_folder(self.folders())
        if folder is None or (own := decoder_tokenizer(folder)) == folder:
            return None
        return load_tokenizer([own], self.located.name)

    def module(self, outputs: int) -> nn.Module:
        """Return the module with ``outputs`` outputs, or with 0 the one that writes texts; opened at first use.

        Raises:
            ModelError: the models are of another kind.
        """
        if outputs not in self._modules:
            fits = self.kind.is_classifier if outputs else self.kind.is_generator
            if not fits:
                asked = "classification" if outputs else "generation or language modelling"
                raise ModelError(f"{self.located.name}: a {self.kind.name} cannot be measured on a {asked} task")
            expert = self.located.experts[0]
            if outputs:
                module = open_classifier(expert.folder, expert.label, outputs)
            else:
                module = open_generator(expert.folder, expert.label)
            if self.vocabulary is not None:
                module = self.vocabulary.fit(module, expert.folder)
            self._modules[outputs] = module.to(self.device)
        return self._modules[outputs]

    @property
    def saved_dtype(self) -> torch.dtype | None:
        """The dtype that merged tensors are rounded to, once; None for the models' own."""
        import torch

        name = self.config.save.dtype
        return None if name is None else getattr(torch, name)

    @property
    def device(self) -> Any:
        """The device that models are measured on."""
        from mergelab.evaluation.classification import best_device

        return best_device(self.config.device)

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

        ``backbone`` is called only where the predictions are not in the cache; ``key`` names the content of the
        weights, without it nothing is cached. ``members`` (m,) chooses examples by position, in the order of which the
        outputs then come; ``watch`` and ``seed`` are `mergelab.evaluation.classification.predict`'s.
        """
        name = self.data_key(data, key) if key is not None and self.config.eval.cache else None
        if name is not None and (kept := self.cache.get(name)) is not None:
            return Prediction(*kept, cached=True)
        module, inputs = self.module(data.spec.outputs), self._inputs_of(data)
        load_into(module, {**backbone(), **head.tensors})
        started = time.perf_counter()
        outputs = (inputs if members is None else inputs.take(members)).run(
            module,
            device=self.device,
            dtype=self.config.eval.dtype,
            batch_tokens=self.config.eval.batch_tokens,
            progress=lambda done: progress(f"evaluating {model} on {data.spec.name}", done),
            watch=watch,
            seed=seed,
        )
        seconds = time.perf_counter() - started
        if name is not None:
            self.cache.put(name, outputs, seconds)
        return Prediction(outputs, seconds, cached=False)

    def _inputs_of(self, data: TaskData) -> Inputs:
        """Tokenise a task's examples, once."""
        from mergelab.evaluation.dispatch import prepare

        if data.spec.name not in self._inputs:
            config: Any = self.module(data.spec.outputs).config
            self._inputs[data.spec.name] = prepare(
                data,
                config,
                self.tokenizer,
                writes_with=self.decoder_tokenizer,
                max_length=self.config.eval.max_length,
            )
        return self._inputs[data.spec.name]

    def data_key(self, data: TaskData, content: Sequence[str]) -> str:
        """Name all that what a model of this content makes of these examples depends on."""
        from importlib.metadata import version

        folder = tokenizer_folder(self.folders())
        assert folder is not None
        named = ("token", "vocab", ".model")
        files = sorted(file for file in folder.rglob("*") if file.is_file() and any(n in file.name for n in named))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        evaluation = self.config.eval
        parts = {
            "weights": list(content),
            "data": data.fingerprint,
            "tokenizer": digest,
            "max_length": evaluation.max_length,
            "dtype": evaluation.dtype,
            "device": self.device.type,
            "versions": [version("torch"), version("transformers"), version("mergelab")],
        }
        if not data.spec.outputs:
            numbers = hashlib.sha256(np.stack([data.parts, data.idx]).astype("<i8").tobytes()).hexdigest()
            parts["task"] = [repr(data.spec), numbers]  # sampled texts depend on an example's number
        if self.vocabulary is not None:  # what a model lacks is read from the others
            contents = [self.content(name) for name in self.checkpoints]
            parts["vocabulary"] = [self.vocabulary.digest, contents]
        return prediction_key(parts)
