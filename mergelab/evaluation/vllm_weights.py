"""What vLLM is handed: a module's weights as its files have them, through vLLM's calls for weight transfer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergelab.errors import MergelabError, ModelError, listed
from mergelab.evaluation.vllm_support import KEY
from mergelab.weights.conversion import tied_parameters
from mergelab.weights.shards import write_zeros
from mergelab.weights.source import TensorInfo


class EngineClient:
    """Carry what vLLM's sender says to an engine of this process: vLLM's protocol ``VLLMWeightSyncClient``.

    Attributes:
        version: what the engine's weights are called after the next update.
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self.version = llm, ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Say how weights will come."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Hand over some of the weights."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update, and label the engine's weights with `version`."""
        self._llm.finish_weight_update(weight_version=weight_version or self.version)


def weight_source(module: nn.Module, layout: Sequence[TensorInfo]) -> Any:
    """Return vLLM's view of a module's weights: exactly the tensors of ``layout``, read anew at each update."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class ModuleWeights(WeightSource):  # type: ignore[misc]
        @cached_property
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, dtype, shape) for name, shape, dtype in layout]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            tensors = _stored_tensors(module)
            if different := sorted(tensors.keys() ^ {info.name for info in layout}):
                raise ModelError(f"{KEY}: {listed(different)} of {type(module).__name__} are not in all models")
            yield from ((name, tensors[name].detach().to(dtype)) for name, _, dtype in layout)

    return ModuleWeights()


def stored_layout(module: nn.Module, dtype: torch.dtype) -> list[TensorInfo]:
    """Return the tensors that a module's files would have; those of floating point are handed over in ``dtype``.

    Raises:
        ModelError: tensors are separate that the model's config ties.
    """
    return [
        TensorInfo(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in _stored_tensors(module).items()
    ]


def _stored_tensors(module: Any) -> dict[str, Tensor]:
    """Return a module's tensors under the names, and in the shapes, that transformers stores; tied ones once."""
    ends, starts = module.get_output_embeddings(), module.get_input_embeddings()
    if module.config.get_text_config().tie_word_embeddings and not (ends is None or ends.weight is starts.weight):
        raise ModelError(f"{KEY}: the merge has tensors apart that a model's config ties; eval.engine=transformers")
    ties = tied_parameters(module)
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in module.state_dict().items() if name not in ties}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 stores what it has in memory
        return tensors
    return dict(revert_weight_conversion(module, tensors))


def write_start(folder: Path, module: Any, tokenizer: Any, layout: Sequence[TensorInfo]) -> None:
    """Write what an engine starts from: config, tokenizer, and weights of the right names and shapes, all zero.

    vLLM checks that none is missing, and what no update reaches can be seen.
    """
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_zeros(folder / "model.safetensors", layout)


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turn whatever vLLM raises into one line.

    Raises:
        ModelError: with vLLM's own reason.
    """
    try:
        yield
    except MergelabError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{KEY}: vLLM {version('vllm')} cannot {what}: {reason}") from error
