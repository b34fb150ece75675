"""As ``vllm.distributed.weight_transfer.ipc_engine``."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True)
class IPCTrainerInitInfo:
    backend: ClassVar[str] = "ipc"
    rank: int
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30
