"""One training on transformers' Trainer: the same seed gives the same weights, also across an interruption."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mergelab.errors import NonFinite
from mergelab.evaluation.classification import plan_batches
from mergelab.evaluation.training_batches import NONE
from mergelab.finetune.examples import EpochBatches, TokenisedExamples
from mergelab.models.architecture import quiet_transformers

if TYPE_CHECKING:
    from mergelab.estimation.examples import Padding
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
Log = Callable[[Mapping[str, float], int], None]

_COMPLETE = "complete"  # a file in a checkpoint that has all of its files
_STATE = "trainer_state.json"
_HELD_OUT_LOSS = "eval_loss"
_POINTS = 10  # of the learning curve in each epoch
_BATCH_TOKENS = 4096  # of an evaluation on what is held out


@dataclass(frozen=True)
class Outcome:
    """What a training has come to.

    Attributes:
        checkpoint: the folder with the weights of the best epoch.
        epoch, step: the best epoch, from 1 on, and the steps until its end.
        epochs: how many were trained.
        held_out: loss and metrics of the best epoch on what is held out.
        curve: a row for each epoch: its number, and what was measured after it.
    """

    checkpoint: Path
    epoch: int
    step: int
    epochs: int
    held_out: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a training's folder, and remove those that a killed process left."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of)
    for path in found:
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.is_dir()), None)


def train(
    model: Any,
    examples: TokenisedExamples,
    held_out: TokenisedExamples,
    truth: Array,
    task: TaskSpec,
    recipe: Mapping[str, Any],
    *,
    seed: int,
    padding: Padding,
    folder: Path,
    device: torch.device,
    log: Log = lambda _values, _step: None,
    progress: Callable[[float], None] = lambda _done: None,
) -> Outcome:
    """Train a model, from the last complete checkpoint in ``folder`` where there is one.

    Args:
        model: with the task's head, in float32; with an adapter, which alone is trained.
        examples, held_out: what is trained on, and what chooses the best epoch.
        truth: the labels of ``held_out``.
        task: what is trained for.
        recipe: `TrainConfig` with all its numbers.
        seed: of dropout and of the order of the examples.
        padding: how examples of different lengths can share a batch.
        folder: where checkpoints are kept: the best, and the last.
        device: where to compute.
        log: called with the points of the learning curve, and the step that each is of.
        progress: called with the fraction done.

    Raises:
        NonFinite: the loss is NaN or infinite.
    """
    last = last_checkpoint(folder)
    history = [] if last is None else _history(last)
    if not _is_over(history, recipe):
        with seeded(seed, device), quiet_transformers():
            arguments = _arguments(recipe, len(examples), seed, folder, device)
            trainer = _ExpertTrainer(model, examples, held_out, truth, task, arguments, padding, log)
            trainer.group(recipe["group_by_length"])
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Keeper(recipe, folder, progress))
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        last = last_checkpoint(folder)
        assert last is not None
        history = _history(last)
    best = _best(history)
    curve = [{"epoch": round(entry["epoch"]), **_measured(entry)} for entry in history]
    step = int(best["step"])
    return Outcome(folder / f"checkpoint-{step}", round(best["epoch"]), step, len(history), _measured(best), curve)


def _measured(entry: Mapping[str, float]) -> dict[str, float]:
    """Return the loss and then the metrics of an entry of the Trainer's history."""
    names = [_HELD_OUT_LOSS, *sorted(name for name in entry if name.startswith("eval_") and name != _HELD_OUT_LOSS)]
    return {name.removeprefix("eval_"): entry[name] for name in names}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _history(checkpoint: Path) -> list[dict[str, float]]:
    """Read what was measured after each epoch until a checkpoint."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if _HELD_OUT_LOSS in entry]


def _best(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return min(history, key=lambda entry: entry[_HELD_OUT_LOSS])  # the first of equal ones


def _is_over(history: Sequence[Mapping[str, float]], recipe: Mapping[str, Any]) -> bool:
    """Return whether all epochs are trained, or the last ones were no better than one before."""
    if len(history) >= recipe["epochs"]:
        return True
    patience = recipe["patience"]
    return bool(history) and patience is not None and len(history) - 1 - history.index(_best(history)) >= patience


def _arguments(
    recipe: Mapping[str, Any], count: int, seed: int, folder: Path, device: torch.device
) -> TrainingArguments:
    steps = math.ceil(count / recipe["batch_size"])
    schedule = recipe["schedule"]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe["epochs"],
        learning_rate=recipe["learning_rate"],
        per_device_train_batch_size=recipe["batch_size"],
        weight_decay=recipe["weight_decay"],
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
        warmup_steps=round(recipe["warmup"] * steps * recipe["epochs"]),
        optim="adamw_torch_fused",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=max(1, steps // _POINTS),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    _ = arguments.device  # counts the GPUs
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Compute deterministically, with gradients; restore all global generators and settings at the end."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            torch.use_deterministic_algorithms(True, warn_only=True)
            memory.fill_uninitialized_memory = False  # which only costs time
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        memory.fill_uninitialized_memory = filled
        random.setstate(python)
        np.random.set_state(numpy)


class _Batches(torch.utils.data.DataLoader[Any]):
    """Batches of the epoch that was set."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _ExpertTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with the losses and inputs that models are measured by."""

    control: Any

    def __init__(
        self,
        model: Any,
        examples: TokenisedExamples,
        held_out: TokenisedExamples,
        truth: Array,
        task: TaskSpec,
        arguments: TrainingArguments,
        padding: Padding,
        log: Log,
    ) -> None:
        numbers, own = range(len(examples)), range(len(held_out))
        super().__init__(model=model, args=arguments, train_dataset=numbers, eval_dataset=own)
        self._examples, self._held_out, self._truth, self._task = examples, held_out, truth, task
        self._padding, self._log, self._grouped = padding, log, False

    def group(self, grouped: bool) -> None:
        """Choose whether the examples of a batch have about equally many tokens."""
        self._grouped = grouped

    def get_train_dataloader(self) -> _Batches:
        """Return the batches of an epoch."""
        args = self.args
        return _Batches(
            range(len(self._examples)),  # type: ignore[arg-type]
            batch_sampler=EpochBatches(
                len(self._examples),
                args.per_device_train_batch_size,
                args.seed,
                self._examples.lengths if self._grouped else None,
            ),
            collate_fn=lambda members: self._examples.batch(np.array(members)),
            generator=torch.Generator().manual_seed(args.seed),  # global ones are for dropout alone
        )

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch's examples, or of its tokens."""
        outputs = self._outputs(model, inputs)
        loss = loss_sum(self._task, outputs.logits, inputs["labels"]) / _counted(self._task, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _outputs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        own = {name: values for name, values in inputs.items() if name != "labels"}
        return model(**own) if self._task.outputs else model(**own, use_cache=False)

    @torch.no_grad()
    def evaluate(self, *_arguments: Any, **_more: Any) -> dict[str, float]:
        """Measure loss and, of a classifier, the task's metrics on what is held out."""
        from mergelab.evaluation.metrics import score

        model: Any = self.model
        held_out = self._held_out
        model.eval()
        total, count, logits = 0.0, 0, []
        order = plan_batches(held_out.lengths, _BATCH_TOKENS, padding=self._padding)
        for members in order:
            inputs = self._prepare_inputs(held_out.batch(members))
            found = self._outputs(model, inputs).logits
            total += float(loss_sum(self._task, found, inputs["labels"]))
            count += int(_counted(self._task, inputs["labels"]))
            logits += [found.float().cpu().numpy()] if self._task.outputs else []
        metrics = {_HELD_OUT_LOSS: total / count}
        if logits:
            ordered = np.concatenate(logits)[np.argsort(np.concatenate(order))]
            metrics |= {f"eval_{name}": value for name, value in score(self._task, ordered, self._truth).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *_more: Any) -> None:
        """Record a point of the learning curve.

        Raises:
            NonFinite: a loss is NaN or infinite.
        """
        super().log(logs)
        step = self.state.global_step
        for name in ("loss", _HELD_OUT_LOSS):
            if name in logs and not math.isfinite(logs[name]):
                raise NonFinite(f"the loss is {logs[name]} at step {step}; a lower train.learning_rate may help")
        self._log(logs, step)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nobody asks, and counting them at every step takes time."""
        return 0


def loss_sum(task: TaskSpec, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses of examples, or of the tokens that have to follow.

    Args:
        task: what the model is for.
        logits: (b, C), or (b, l, V) of models that write.
        labels: (b,) classes or scores, or (b, l) the tokens that have to follow, -100 where none has.
    """
    logits = logits.float()
    if task.is_regression:
        return torch.nn.functional.mse_loss(logits[:, 0], labels.float(), reduction="sum")
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=NONE, reduction="sum"
    )


def _counted(task: TaskSpec, labels: torch.Tensor) -> Any:
    return len(labels) if task.outputs else (labels != NONE).sum().clamp(min=1)


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Keeps the checkpoints of the best and of the last epoch, and ends a training that gets no better."""

    def __init__(self, recipe: Mapping[str, Any], folder: Path, progress: Callable[[float], None]) -> None:
        self._recipe, self._folder, self._progress = recipe, folder, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Show how far the training is."""
        self._progress(state.global_step / max(state.max_steps, 1))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Stop where the last epochs were no better than one before."""
        if _is_over([entry for entry in state.log_history if _HELD_OUT_LOSS in entry], self._recipe):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Mark a checkpoint as complete, and remove those that are neither the best nor the last."""
        own = self._folder / f"checkpoint-{state.global_step}"
        (own / _COMPLETE).touch()
        best = _best([entry for entry in state.log_history if _HELD_OUT_LOSS in entry])
        for path in self._folder.glob("checkpoint-*"):
            if _step_of(path) not in (int(best["step"]), state.global_step):
                shutil.rmtree(path, ignore_errors=True)
