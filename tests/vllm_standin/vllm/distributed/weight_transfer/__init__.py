"""As ``vllm.distributed.weight_transfer``: a sender that shares tensors of this process in the place of GPU memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(ABC):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        metadata = cls.__dict__.get("metadata")
        if metadata is not None and not isinstance(metadata, cached_property):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

    @property
    @abstractmethod
    def metadata(self) -> list[ParamMeta]:
        raise NotImplementedError

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError


class _Sender:
    def __init__(self, init_info: Any, client: Any, source: WeightSource) -> None:
        self._source, self._client, self._size = source, client, init_info.packed_buffer_size_bytes
        client.init_weight_transfer_engine({"packed": init_info.packed})

    def send_weights(self) -> None:
        self._client.start_weight_update()
        chunk: list[tuple[str, torch.Tensor]] = []
        used = 0
        for name, tensor in self._source.iter_full():
            size = tensor.numel() * tensor.element_size()
            if size > self._size:
                raise ValueError(f"Tensor '{name}' has size {size} bytes, which exceeds buffer_size_bytes={self._size}")
            if used + size > self._size:
                self._send(chunk)
                chunk, used = [], 0
            chunk.append((name, tensor))
            used += size
        self._send(chunk)
        self._client.finish_weight_update()

    def _send(self, chunk: list[tuple[str, torch.Tensor]]) -> None:
        self._client.update_weights(
            {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).split(".")[-1] for _, tensor in chunk],
                "shapes": [list(tensor.shape) for _, tensor in chunk],
                "ipc_handles": dict(chunk),
                "tensor_sizes": [tensor.numel() * tensor.element_size() for _, tensor in chunk],
            }
        )


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None) -> _Sender:
        assert source is not None
        assert init_info.backend == "ipc"
        assert [meta.name for meta in source.metadata] == [name for name, _ in source.iter_full()]
        return _Sender(init_info, client, source)
