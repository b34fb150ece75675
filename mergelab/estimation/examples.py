"""Define the input of methods that learn from data: an expert as a module, and examples of its training data.

Methods do not depend on where the examples come from. The caller of a merge passes an object of these protocols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

# The keyword arguments of a transformers model: ``input_ids`` (b, l), ``attention_mask`` (b, l) with 0 at padding, …
# Those of a sequence-to-sequence model include ``decoder_input_ids`` and ``decoder_attention_mask`` (b, m).
Batch = Mapping[str, Tensor]
LABELS = "labels"
# How examples of different lengths share a batch: padded on one side; only those of equal length; each alone.
Padding = Literal["right", "left", "equal", "alone"]


class ExpertExamples(Protocol):
    """One expert and the examples that were drawn for it.

    Attributes:
        count: number of examples, at least one.
        key: identifies everything that a statistic depends on besides its own settings: the expert's weights and head,
            the examples, and how they are tokenised and batched. Empty when statistics cannot be cached.
        parameter_names: for each of the module's parameters that are merged, its common name (as in
            ``AlignedModels.names``).
        padding_side: how the module's examples can share a batch, as those of ``batches`` do.
    """

    @property
    def count(self) -> int: ...  # noqa: D102

    @property
    def key(self) -> str: ...  # noqa: D102

    @property
    def parameter_names(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def padding_side(self) -> Padding: ...  # noqa: D102

    def module(self) -> nn.Module:
        """Return the expert with its own weights and head, in evaluation mode.

        Experts may share one module: it holds this expert's weights until another expert's module is requested. Callers
        may write into it. The next call restores the expert's weights.
        """
        ...

    def batches(self) -> Iterator[Batch]:
        """Yield all examples as inputs of the module, on its device, always in the same order.

        With ``labelled`` a batch has ``labels`` (b,): class indices, or scores. For models that generate tokens a batch
        always has ``labels`` (b, l) or (b, m): the next token at each position, −100 where there is none.
        """
        ...


class ExampleSource(Protocol):
    """Draws examples for each expert.

    Attributes:
        folder: where statistics are cached between runs; None: nowhere.
    """

    @property
    def folder(self) -> Path | None: ...  # noqa: D102

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> ExpertExamples:
        """Draw examples for one expert.

        Args:
            expert: its name among the aligned experts.
            samples: number of examples; all when there are fewer.
            seed: of the draw.
            labelled: whether batches must have labels.

        Raises:
            MergelabError: there are no examples, or no labels.
        """
        ...
