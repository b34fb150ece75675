"""Generate texts with vLLM (Kwon et al. 2023, arXiv:2309.06180): a running engine is handed each model's weights.

The calls are those that vLLM documents for weight transfer from a trainer. The backend ``ipc`` shares memory of one GPU
between this process and the engine's. The engine starts with weights that are all zero; base, experts and merges then
reach it in the same way.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mergelab.errors import ConfigError, ModelError, NonFinite, listed
from mergelab.evaluation.spread import device_of
from mergelab.evaluation.vllm_support import KEY, check_module
from mergelab.evaluation.vllm_weights import EngineClient, in_one_line, stored_layout, weight_source, write_start
from mergelab.weights.shards import byte_size

if TYPE_CHECKING:
    from mergelab.evaluation.classification import Watch
    from mergelab.evaluation.generation import Array, EncodedPrompts
    from mergelab.evaluation.options import EvaluationOptions

# What vLLM takes of the GPU memory that is free when it starts; merging needs the rest.
_MEMORY_SHARE = 0.8
_BUFFER_BYTES = 1 << 30
_AT_ONCE = 256  # prompts; between these a sweep may stop a trial
# The prompt that a new engine is checked with: its tokens, and the difference in log-probability that is allowed of
# one, relative to 1 + its size. Zeros in the place of a layer change it by far more, another kernel by far less.
_CHECKED_TOKENS, _TOLERANCE = 64, 0.05


class VllmEngine:
    """A place for one running engine: started at first use, and again for a module or a length that it cannot serve."""

    def __init__(self) -> None:
        self._running: _Running | None = None

    @cached_property
    def name(self) -> str:
        """The engine with its version."""
        return f"vllm {version('vllm')}"

    def generate(
        self,
        prompts: EncodedPrompts,
        module: nn.Module,
        options: EvaluationOptions,
        watch: Watch | None = None,
    ) -> Array:
        """Hand a module's weights to the engine and generate a text for each prompt.

        Args:
            prompts: n prompts, and how they are continued.
            module: a decoder of transformers; it is left as it is.
            options: device, dtype, seed and rounds count; vLLM forms batches itself.
            watch: as `EncodedPrompts.run`'s; called once, after each round, or with a seed after each `_AT_ONCE`.

        Returns:
            (n,) texts, without prompts and special tokens.

        Raises:
            ModelError: vLLM cannot start, or cannot run this model; an update has not reached it.
            NonFinite: an output is NaN.
        """
        check_module(module, prompts)
        positions, dtype = int(prompts.lengths.max()), options.torch_dtype or next(module.parameters()).dtype
        running, self._running = self._running, None  # an engine whose update fails is not used again
        started = running is not None and running.serves(module, positions, dtype)
        if running is None or not started:
            running = None
            gc.collect()  # an engine gives its memory back when nothing holds it
            with in_one_line("start"):
                running = _Running(module, prompts, positions, dtype, options.device_for(module))
        running.update()
        if not started:
            running.check(prompts)
        self._running = running
        texts, done = np.empty(len(prompts), dtype=object), 0
        for members in _parts(len(prompts), options):
            texts[members] = running.texts(prompts.take(members))
            done += len(members)
            options.report(done / len(prompts))
            if watch is not None:
                watch(members, texts[members])
        return texts


class _Running:
    """A started engine, and the module whose weights it is handed."""

    def __init__(
        self, module: nn.Module, prompts: EncodedPrompts, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        _set_environment()
        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        self.module, self.positions, self.dtype = module, positions, dtype
        self._versions = itertools.count(1)
        layout = stored_layout(module, dtype)
        with tempfile.TemporaryDirectory() as folder:
            write_start(Path(folder), module, prompts.tokenizer, layout)
            self._llm = LLM(
                model=folder,
                tokenizer=folder,
                dtype=_name(dtype),
                max_model_len=positions,
                generation_config="vllm",
                weight_transfer_config=WeightTransferConfig(backend="ipc"),
                **engine_memory(device),
            )
        self._client = EngineClient(self._llm)
        self._sender = WeightTransferTrainerFactory.trainer_init(
            init_info=IPCTrainerInitInfo(
                rank=0, packed=True, packed_buffer_size_bytes=max(_BUFFER_BYTES, *map(byte_size, layout))
            ),
            client=self._client,
            source=weight_source(module, layout),
        )

    def serves(self, module: nn.Module, positions: int, dtype: torch.dtype) -> bool:
        """Return whether the engine can run the weights in ``module`` on texts of ``positions`` tokens."""
        return self.module is module and positions <= self.positions and dtype == self.dtype

    def update(self) -> None:
        """Hand over the weights that are in the module now, under a new version.

        Raises:
            ModelError: the engine has not taken them, or still has texts of earlier ones.
        """
        self._client.version = f"mergelab {next(self._versions)}"
        with in_one_line("take the weights"):
            self._sender.send_weights()
            has, cleared = self._llm.get_weight_version(), self._llm.reset_prefix_cache()
        if has != self._client.version:
            raise ModelError(f"{KEY}: the engine has the weights {has!r} after an update to {self._client.version!r}")
        if not cleared:
            raise ModelError(f"{KEY}: the engine cannot forget the prefixes that it has of earlier weights")

    def texts(self, prompts: EncodedPrompts) -> Array:
        """Generate a text for each prompt: (n,).

        vLLM looks for stop texts in what it decodes token by token. Where it has found one that is not in the text,
        which is decoded in one piece, the text goes on.
        """
        ends, stop = prompts.ends(self.module), prompts.decoding.stop
        rows, stopped = self._token_ids(prompts, ends, stop)
        texts = prompts.decode(rows, ends)
        found = zip(stopped, prompts.decode(rows, ends, cut=False), strict=True)
        wrong = [at for at, (by, text) in enumerate(found) if by and not any(each in text for each in stop)]
        if wrong:
            again = prompts.take(np.array(wrong))
            texts[wrong] = again.decode(self._token_ids(again, ends, ())[0], ends)
        return texts

    def _token_ids(
        self, prompts: EncodedPrompts, ends: frozenset[int], stop: Sequence[str]
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the tokens behind each prompt, and whether a stop text has ended them."""
        from vllm import SamplingParams

        decoding = prompts.decoding
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.do_sample else {}
        settings = [
            SamplingParams(
                **(sampling or {"temperature": 0.0}),
                seed=int(seed),
                max_tokens=decoding.max_new_tokens,
                min_tokens=decoding.min_new_tokens,
                stop=list(stop),
                stop_token_ids=sorted(ends),
                ignore_eos=True,  # the ends above are all that there are
                logprobs=0,  # of the token that is taken
            )
            for seed in prompts.seeds
        ]
        with in_one_line("generate"):
            outputs = [output.outputs[0] for output in self._llm.generate(_inputs(prompts), settings, use_tqdm=False)]
        for output in outputs:
            if math.isnan(output.cumulative_logprob):
                raise NonFinite("the model's outputs are NaN while it generates")
            if (by := {span.version for span in output.weight_versions or ()}) != {self._client.version}:
                raise ModelError(f"{KEY}: a text was generated by the weights {listed(map(str, by))}, not by the last")
        return [[*output.token_ids] for output in outputs], [isinstance(each.stop_reason, str) for each in outputs]

    @torch.inference_mode()
    def check(self, prompts: EncodedPrompts) -> None:
        """Compare the engine's log-probabilities of a prompt's tokens with the module's.

        Raises:
            ModelError: they differ by more than precision explains: weights are missing, or vLLM computes another
                model.
        """
        from vllm import SamplingParams

        longest = max(prompts.ids, key=len)[: min(_CHECKED_TOKENS, self.positions - 1)]
        if len(longest) < 2:
            return
        with in_one_line("score a prompt"):
            given = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
            (output,) = self._llm.generate([{"prompt_token_ids": longest.tolist()}], [given], use_tqdm=False)
        # The first token has none.
        pairs = zip(longest.tolist()[1:], output.prompt_logprobs[1:], strict=True)
        found = torch.tensor([step[token].logprob for token, step in pairs])
        ids = torch.from_numpy(longest)[None].to(device_of(self.module))
        logits: Tensor = self.module.eval()(input_ids=ids).logits[0, :-1].float().cpu()
        wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None].cpu())[:, 0]
        apart = float(((found - wanted).abs() / (1 + wanted.abs())).mean())
        if not (apart <= _TOLERANCE or wanted.isnan().any()):
            raise ModelError(
                f"{KEY}: {type(self.module).__name__} gives the tokens of a prompt a mean log-probability of "
                f"{float(found.mean()):.3f} in vLLM, {float(wanted.mean()):.3f} in transformers: not all weights have "
                "arrived, or vLLM computes another model"
            )


def _parts(count: int, options: EvaluationOptions) -> list[Array]:
    """Group examples: all at once, by rounds, or with a seed in drawn order, so that each part is a fair sample."""
    if options.rounds is not None:
        return [np.flatnonzero(options.rounds == one) for one in np.unique(options.rounds)]
    if options.seed is None:
        return [np.arange(count)]
    drawn = np.random.default_rng(options.seed).permutation(count)
    return [drawn[start : start + _AT_ONCE] for start in range(0, count, _AT_ONCE)]


def _set_environment() -> None:
    """Set what vLLM reads from the environment when it is imported, where the user has not."""
    # Without it vLLM sends no handles of GPU memory to its own process; nothing else reaches that process.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def engine_memory(device: torch.device) -> dict[str, float]:
    """Return vLLM's setting of how much of the GPU it may take.

    Raises:
        ConfigError: the GPU is not the first one, which vLLM uses.
    """
    if device.type != "cuda":
        return {}
    if device.index:
        raise ConfigError(
            f"device={device}: vLLM takes the first GPU that it sees; CUDA_VISIBLE_DEVICES={device.index} and "
            "device=cuda choose another one"
        )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return {"gpu_memory_utilization": math.floor(100 * _MEMORY_SHARE * free / total) / 100}


def _inputs(prompts: EncodedPrompts) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids.tolist()} for ids in prompts.ids]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
