"""A stand-in for vLLM 0.33.0 on the CPU: the calls that mergelab makes, with vLLM's names of arguments.

It loads a folder with transformers, has the weights that it is handed, and generates token by token. As vLLM does, it
remembers what it has generated until its prefix cache is reset, and looks for stop texts in what it decodes token by
token. ``fault`` makes it go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.config import WeightTransferConfig

events: list[tuple[str, Any]] = []
fault = ""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class Logprob:
    logprob: float


@dataclass
class WeightVersionSpan:
    version: str
    start: int
    end: int


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[WeightVersionSpan] | None = None


@dataclass
class RequestOutput:
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        generation_config: str = "auto",
        weight_transfer_config: WeightTransferConfig | None = None,
    ) -> None:
        if fault == "no gpu":
            raise RuntimeError("Failed to infer device type, please set the environment variable\n`VLLM_LOGGING_LEVEL`")
        events.append(("start", {"dtype": dtype, "max_model_len": max_model_len}))
        with safe_open(Path(model) / "model.safetensors", "pt") as file:
            self._stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        # vLLM takes the class from the config, and says when a weight is missing.
        assert json.loads((Path(model) / "config.json").read_text())["architectures"]
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        self._model, found = loaded
        assert not found["missing_keys"], found
        assert not found["unexpected_keys"], found
        self._model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._positions = max_model_len or self._model.config.max_position_embeddings
        self._may_transfer = weight_transfer_config is not None and weight_transfer_config.backend == "ipc"
        self._packed, self._updating, self._version = False, False, "default"
        self._received: dict[str, torch.Tensor] = {}
        self._prefixes: dict[Any, CompletionOutput] = {}

    # -------------------------------------------------------------------------------------------------------- weights

    def init_weight_transfer_engine(self, request: Any) -> None:
        assert self._may_transfer, "Weight transfer not configured"
        self._packed = request["init_info"]["packed"]

    def start_weight_update(self) -> None:
        assert not self._updating, "start_weight_update called while a weight update is already active"
        self._updating, self._received = True, {}

    def update_weights(self, request: Any) -> None:
        assert self._updating, "start_weight_update must be called first"
        info = request["update_info"]
        assert self._packed == ("tensor_sizes" in info)
        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            assert name in self._stored, f"There is no module or parameter named {name!r} in the model"
            tensor = info["ipc_handles"][name]
            assert (str(tensor.dtype), [*tensor.shape], shape) == (f"torch.{kind}", shape, self._stored[name])
            self._received[name] = tensor.clone()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert self._updating
        self._updating = False
        events.append(("update", sorted(self._received)))
        if fault == "drop an update" and len([1 for kind, _ in events if kind == "update"]) > 1:
            return  # neither the weights nor their version have arrived
        if fault == "drop a tensor":
            self._received.pop(next(name for name in self._received if "attn" in name))
        if fault == "nan":
            self._received = {name: torch.full_like(tensor, torch.nan) for name, tensor in self._received.items()}
        with torch.no_grad():
            # As a checkpoint: what is not in it stays, which vLLM's log alone says.
            own = self._model.state_dict()
            renamed = _in_memory(self._model, self._received)
            for name, tensor in renamed.items():
                own[name].copy_(tensor)
        if weight_version is not None:
            self._version = weight_version

    def get_weight_version(self) -> str:
        return self._version

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if fault == "prefixes stay":
            return False
        self._prefixes = {}
        return True

    # ----------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        events.append(("generate", [*sampling_params]))
        return [
            self._one(prompt["prompt_token_ids"], given) for prompt, given in zip(prompts, sampling_params, strict=True)
        ]

    @torch.inference_mode()
    def _one(self, ids: list[int], given: SamplingParams) -> RequestOutput:
        assert len(ids) < self._positions, "the decoder prompt is longer than the maximum model length"
        scored = None
        if given.prompt_logprobs is not None:
            scores = self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scored = [None, *({t: Logprob(float(scores[at, t]))} for at, t in enumerate(ids[1:]))]
        key = (tuple(ids), repr(given))
        if key not in self._prefixes:
            self._prefixes[key] = self._completion(ids, given)
        return RequestOutput(scored, [self._prefixes[key]])

    def _completion(self, ids: list[int], given: SamplingParams) -> CompletionOutput:
        assert given.ignore_eos, "the stand-in has no ends of its own"
        stream = torch.Generator().manual_seed(given.seed or 0)
        new: list[int] = []
        total, text, reason, by = 0.0, "", "length", None
        stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
        while len(new) < (given.max_tokens or 16) and len(ids) + len(new) < self._positions:
            scores = self._model(torch.tensor([ids + new])).logits[0, -1].float()
            if len(new) < given.min_tokens:
                scores[given.stop_token_ids] = -torch.inf
            token = _drawn(scores, given, stream)
            total += float(scores.log_softmax(-1)[token])
            new.append(token)
            if token in (given.stop_token_ids or ()):
                reason, by = "stop", token
                break
            text += self._tokenizer.decode([token], skip_special_tokens=True)
            if fault == "early stop" and stop:
                reason, by = "stop", stop[0]
                break
            if (found := next((each for each in stop if each in text), None)) is not None:
                reason, by, text = "stop", found, text[: text.index(found)]
                break
        version = "default" if fault == "old texts" else self._version
        return CompletionOutput(0, text, new, total, reason, by, [WeightVersionSpan(version, 0, len(new))])


def _drawn(scores: torch.Tensor, given: SamplingParams, stream: torch.Generator) -> int:
    if given.temperature == 0:
        return int(scores.argmax())
    shares, order = (scores / given.temperature).softmax(-1).sort(descending=True)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= given.top_p, 0)
    return int(order[torch.multinomial(shares, 1, generator=stream)])


def _in_memory(model: Any, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as transformers has them, of those that a checkpoint has."""
    from mergelab.weights.conversion import as_in
    from mergelab.weights.source import DictSource

    source = as_in(model, DictSource("update", stored))
    return {name: source.get(name) for name in source.keys()}  # noqa: SIM118
