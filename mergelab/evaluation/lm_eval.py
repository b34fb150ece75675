"""Tasks of lm-eval, the Language Model Evaluation Harness (Gao et al. 2021), on a model that is in memory."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import ConfigError, DataError, did_you_mean, listed
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.tasks.loading import check_installed

if TYPE_CHECKING:
    from torch import nn

    from mergelab.evaluation.classification import Array, Watch
    from mergelab.tasks.spec import TaskSpec

# The tokens that an input is taken to have, as lm-eval takes the size of a batch in inputs.
_USUAL_LENGTH = 256
# Standard errors to either side that make a 95 % interval of a mean.
_STANDARD_ERRORS = 1.96


@dataclass(frozen=True)
class LmEvalScore:
    """One of lm-eval's metrics: its value, its standard error where there is one, and whether greater is better."""

    value: float
    error: float | None
    greater_is_better: bool

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the 95 % interval; without a standard error the value itself."""
        around = _STANDARD_ERRORS * (self.error or 0.0)
        return self.value - around, self.value + around


@dataclass(frozen=True)
class LmEvalRun:
    """A run of lm-eval: `mergelab.evaluation.dispatch.Inputs` for whole tasks only."""

    spec: TaskSpec
    tokenizer: Any

    def take(self, members: Array) -> LmEvalRun:
        """Return itself, where there is nothing to choose from.

        Raises:
            ConfigError: always: which examples a task has, lm-eval alone knows.
        """
        raise ConfigError("task.kind=lm_eval: lm-eval measures whole tasks; a part cannot select (eval.protocol=full)")

    def run(
        self,
        model: nn.Module,
        options: EvaluationOptions = DEFAULTS,
        *,
        watch: Watch | None = None,
    ) -> Array:
        """Measure the model with ``lm_eval.simple_evaluate``.

        Args:
            model: a ``transformers`` model; it is left as it is.
            options: how to run it; a batch has as many inputs as make about ``batch_tokens``, ``progress`` is called
                once, at the end, and ``seed`` is not used.
            watch: not used.

        Returns:
            (1,) a JSON object that `scores_of` reads.

        Raises:
            DataError: lm-eval cannot measure it.
        """
        from mergelab.evaluation.packed_linear import inference_copy
        from mergelab.models import hub

        check_installed()
        with _quiet(), contextlib.nullcontext() if hub.reachable() else hub.offline():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            copied: Any = inference_copy(model, options.device_for(model), options.torch_dtype)
            try:
                wrapped = HFLM(
                    pretrained=copied,
                    tokenizer=self.tokenizer,
                    batch_size=max(options.batch_tokens // _USUAL_LENGTH, 1),
                    max_length=options.max_length,
                )
                found: Any = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=list(self.spec.lm_eval_tasks),
                    task_manager=_known_tasks(self.spec),
                    num_fewshot=self.spec.lm_eval_num_fewshot,
                    limit=self.spec.lm_eval_limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
            except (OSError, ValueError, KeyError, RuntimeError, ConnectionError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise DataError(
                    f"{self.spec.name}: lm-eval cannot measure {listed(self.spec.lm_eval_tasks)}: {reason}"
                ) from error
        options.report(1.0)
        outputs = np.empty(1, dtype=object)
        outputs[0] = json.dumps({"scores": _flat(found), "examples": _counted(found)})
        return outputs


def scores_of(outputs: Array) -> tuple[dict[str, LmEvalScore], int]:
    """Read what `LmEvalRun.run` returns: the metrics by name (``arc_easy/acc``), and how many examples they are of."""
    content = json.loads(outputs[0])
    return {name: LmEvalScore(*score) for name, score in content["scores"].items()}, int(content["examples"])


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """Make lm-eval's index of tasks, once for all models: it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _known_tasks(spec: TaskSpec) -> Any:
    """Return lm-eval's index of tasks; check that it has those that are asked for."""
    manager = _task_manager(spec.include_path)
    if unknown := [name for name in spec.lm_eval_tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"task.tasks: lm-eval has no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}"
        )
    return manager


def _flat(found: Mapping[str, Any]) -> dict[str, tuple[float, float | None, bool]]:
    """Bring lm-eval's ``{task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}`` to one level."""
    scores = {}
    for task, values in found["results"].items():
        greater = found.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            name = f"{task}/{metric}" + ("" if way == "none" else f"_{way}")
            scores[name] = (float(value), error, greater.get(metric) is not False)
    return scores


def _counted(found: Mapping[str, Any]) -> int:
    return sum(int(counts["effective"]) for counts in found.get("n-samples", {}).values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from logging and printing, and from drawing bars where there is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shown = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with shown, contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
