"""What methods that learn from data are given: an expert as a module, and examples of what it was trained on.

Where the examples come from is not for methods to know; whoever merges says so by an object with these attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

# The keyword arguments of a transformers model: ``input_ids`` (b, l), ``attention_mask`` (b, l) with 0 where padded, …
# A sequence-to-sequence model's have ``decoder_input_ids`` and ``decoder_attention_mask`` (b, m) as well.
Batch = Mapping[str, Tensor]
LABELS = "labels"


class ExpertExamples(Protocol):
    """One expert and the examples that were drawn for it.

    Attributes:
        count: how many examples there are; at least one.
        key: a name for all that a statistic depends on besides its own settings: the expert's weights and head, the
            examples, and how they become inputs. Empty where there is no such name, and nothing can be kept.
        parameter_names: the common name (as in ``AlignedModels.names``) of each of the module's parameters that takes
            part in the merge.
    """

    @property
    def count(self) -> int: ...  # noqa: D102

    @property
    def key(self) -> str: ...  # noqa: D102

    @property
    def parameter_names(self) -> Mapping[str, str]: ...  # noqa: D102

    def module(self) -> nn.Module:
        """Return the expert with its own weights and head, in evaluation mode.

        It may be one that experts share: it is this expert's until another one's is asked for. It may be written into;
        when it is asked for again, it is the expert again.
        """
        ...

    def batches(self) -> Iterator[Batch]:
        """Return all examples as inputs of the module, where it is, in an order that is always the same.

        ``labels`` (b,) is among them where labels were asked for: class numbers, or scores. Of models that write
        tokens it always is, (b, l) or (b, m): the token that should follow each position, −100 where none is to.
        """
        ...


class Examples(Protocol):
    """Draw examples for each expert.

    Attributes:
        folder: where statistics may be kept between runs; None: nowhere.
    """

    @property
    def folder(self) -> Path | None: ...  # noqa: D102

    def of(self, expert: str, *, samples: int, seed: int, labelled: bool = False) -> ExpertExamples:
        """Draw examples for the expert of that name.

        Args:
            expert: its name among the aligned experts.
            samples: how many, or all where there are not so many.
            seed: of the draw.
            labelled: whether batches have to have labels.

        Raises:
            MergelabError: there are none, or no labels.
        """
        ...
