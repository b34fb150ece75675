"""Run lm-eval, the Language Model Evaluation Harness (Gao et al. 2021), on a model that is in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import DataError, listed
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions
from mergelab.tasks.lm_eval import lm_eval_task_set, quiet

if TYPE_CHECKING:
    from torch import nn

    from mergelab.evaluation.classification import Array, Watch
    from mergelab.tasks.spec import TaskSpec

# The tokens that an input is taken to have, as lm-eval takes the size of a batch in inputs.
_USUAL_LENGTH = 256


@dataclass(frozen=True)
class LmEvalRun:
    """Documents of lm-eval's tasks: `mergelab.evaluation.dispatch.Inputs`.

    Attributes:
        tasks: (n,) the position of each document's task.
        numbers: (n,) its number in the task.
    """

    spec: TaskSpec
    tokenizer: Any
    tasks: Array
    numbers: Array

    def take(self, members: Array) -> LmEvalRun:
        """Return some of the documents: those at the positions ``members`` (m,), in that order."""
        return replace(self, tasks=self.tasks[members], numbers=self.numbers[members])

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
            watch: called once, at the end.

        Returns:
            (n,) of JSON objects, lm-eval's values of each document, which `mergelab.tasks.lm_eval` aggregates.

        Raises:
            DataError: lm-eval cannot measure it.
        """
        from mergelab.evaluation.packed_linear import inference_copy
        from mergelab.models import hub

        with quiet(), contextlib.nullcontext() if hub.reachable() else hub.offline():
            from lm_eval.models.huggingface import HFLM

            copied: Any = inference_copy(model, options.device_for(model), options.torch_dtype)
            try:
                wrapped = HFLM(
                    pretrained=copied,
                    tokenizer=self.tokenizer,
                    batch_size=max(options.batch_tokens // _USUAL_LENGTH, 1),
                    max_length=options.max_length,
                )
                values = self._values(wrapped)
            except (OSError, ValueError, KeyError, RuntimeError, ConnectionError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise DataError(
                    f"{self.spec.name}: lm-eval cannot measure {listed(self.spec.lm_eval_tasks)}: {reason}"
                ) from error
        outputs = np.empty(len(self.numbers), dtype=object)
        for place, document in enumerate(zip(self.tasks.tolist(), self.numbers.tolist(), strict=True)):
            if document not in values:
                raise DataError(f"{self.spec.name}: lm-eval returns nothing of document {document[1]} of a task")
            outputs[place] = json.dumps(values[document], default=_plain)
        if watch is not None:
            watch(np.arange(len(outputs)), outputs)
        options.report(1.0)
        return outputs

    def _values(self, wrapped: Any) -> dict[tuple[int, int], dict[str, Any]]:
        """Return lm-eval's values by their names, by a document's task and number."""
        import lm_eval

        found = lm_eval_task_set(self.spec)
        chosen = {
            name: sorted(self.numbers[self.tasks == position].tolist()) for position, name in enumerate(found.tasks)
        }
        chosen = {name: numbers for name, numbers in chosen.items() if numbers}
        with contextlib.ExitStack() as stack:
            for name, numbers in chosen.items():
                key = (name, self.spec.lm_eval_num_fewshot)
                count = found.counts[name]
                stack.enter_context(_prompts_of_all(found.tasks[name], numbers, count, found.requests, key))
            result: Any = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[found.tasks[name] for name in chosen],
                task_manager=found.manager,
                num_fewshot=self.spec.lm_eval_num_fewshot,
                samples=chosen,
                bootstrap_iters=0,
                log_samples=True,
            )
        positions = {name: position for position, name in enumerate(found.tasks)}
        values: dict[tuple[int, int], dict[str, Any]] = {}
        for name, samples in result["samples"].items():
            for sample in samples:
                own = values.setdefault((positions[name], int(sample["doc_id"])), {})
                own |= {f"{metric},{sample['filter']}": sample[metric] for metric in sample["metrics"]}
        return values


@contextlib.contextmanager
def _prompts_of_all(task: Any, numbers: list[int], count: int, built: dict[Any, list[Any]], key: Any) -> Iterator[None]:
    """Let a task ask for some of its documents as it would ask for all: with the same worked examples.

    lm-eval draws these one document after the other, so that the prompt of one depends on how many came before it. All
    are built once, for any number of models.
    """
    build = task.build_all_requests
    place = {number: at for at, number in enumerate(numbers)}

    def build_some(**rest: Any) -> None:
        if key not in built:
            build(**{**rest, "samples": None, "limit": count})
            built[key] = list(task.instances)
        task._instances = [
            replace(request, resps=[], filtered_resps={}) for request in built[key] if request.doc_id in place
        ]
        for request in task._instances:
            request.doc_id = place[request.doc_id]  # lm-eval counts among those that it was asked for

    task.build_all_requests = build_some
    try:
        yield
    finally:
        del task.build_all_requests


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise DataError(f"lm-eval: its value of a document is a {type(value).__name__}, which cannot be kept")
