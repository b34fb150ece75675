"""A task's examples as a model's inputs: tokenised once, for any number of models that share the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergelab.evaluation.classification import Encoded, encode, predict
from mergelab.evaluation.lengths import max_input_length
from mergelab.evaluation.options import DEFAULTS, EvaluationOptions

if TYPE_CHECKING:
    from torch import nn

    from mergelab.evaluation.classification import Array, Watch
    from mergelab.tasks.data import TaskData


class Inputs(Protocol):
    """Examples that a model can be run over."""

    def take(self, members: Array) -> Inputs:
        """Return some of the examples: those at the positions ``members`` (m,), in that order."""
        ...

    def run(
        self,
        model: nn.Module,
        options: EvaluationOptions = DEFAULTS,
        *,
        watch: Watch | None = None,
    ) -> Array:
        """Return the model's outputs, one for each example, as `mergelab.evaluation.classification.predict` does."""
        ...


@dataclass(frozen=True)
class ClassifierInputs:
    """Texts or pairs of texts for a sequence classifier."""

    encoded: Encoded

    def take(self, members: Array) -> ClassifierInputs:
        """Return some of the examples: those at the positions ``members`` (m,), in that order."""
        return ClassifierInputs(self.encoded.take(members))

    def run(self, model: nn.Module, options: EvaluationOptions = DEFAULTS, *, watch: Watch | None = None) -> Array:
        """Return the logits (n, C)."""
        return predict(model, self.encoded, options, watch=watch)


def prepare(
    data: TaskData,
    config: Any,
    tokenizer: Any,
    options: EvaluationOptions = DEFAULTS,
    *,
    writes_with: Any = None,
) -> Inputs:
    """Tokenise a task's examples for a model.

    Args:
        data: the examples.
        config: the model's configuration.
        tokenizer: of what the model reads.
        options: how the model will be run; ``max_length`` bounds the inputs.
        writes_with: the tokenizer of what it writes, where that is another.

    Raises:
        DataError, ModelError: the examples do not fit the model.
    """
    kind, max_length = data.spec.kind, options.max_length
    if kind in ("generation", "prompts"):
        from mergelab.evaluation.generation import encode_prompts

        return encode_prompts(data, config, tokenizer, writes_with=writes_with, max_length=max_length)
    if kind == "lm_eval":
        from mergelab.evaluation.lm_eval import LmEvalRun

        return LmEvalRun(data.spec, tokenizer, data.labels, data.idx)
    if kind == "language_modelling":
        from mergelab.evaluation.perplexity import encode_windows

        return encode_windows(data, config, tokenizer, max_length)
    return ClassifierInputs(encode(data, tokenizer, max_input_length(config, tokenizer, max_length)))
