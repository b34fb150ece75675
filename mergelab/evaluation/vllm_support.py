"""Check that vLLM can generate what a task asks for as transformers does; what it cannot do is an error, not close."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mergelab.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mergelab.evaluation.generation import EncodedPrompts
    from mergelab.tasks.spec import Decoding, TaskSpec

KEY = "eval.engine=vllm"
_COLDEST, _HOTTEST = 0.01, 2.0  # vLLM's temperatures


def check_vllm(tasks: Sequence[TaskSpec]) -> None:
    """Check that vLLM is installed and can run these tasks.

    Raises:
        ConfigError: it is not, or cannot.
    """
    for task in tasks:
        if task.kind not in ("generation", "prompts"):
            kind = task.kind.replace("_", " ") if task.kind != "lm_eval" else "lm-eval"
            raise ConfigError(
                f"{KEY}: generates texts, and {task.name} is a {kind} task; eval.engine=transformers measures it"
            )
        if (odd := _unsupported(task.decoding)) is not None:
            raise ConfigError(f"{task.name}: task.decoding.{odd}, which {KEY} cannot do; eval.engine=transformers can")
    if find_spec("vllm") is None:
        raise ConfigError(f"{KEY}: needs the package vllm, which is not installed: pip install 'mergelab[vllm]'")


def _unsupported(decoding: Decoding) -> str | None:
    """Return the setting that vLLM has no equal of, with its value."""
    if decoding.num_beams > 1:
        return f"num_beams={decoding.num_beams}"
    if decoding.no_repeat_ngram_size:
        return f"no_repeat_ngram_size={decoding.no_repeat_ngram_size}"
    if decoding.do_sample and not _COLDEST <= decoding.temperature <= _HOTTEST:
        return f"temperature={decoding.temperature} is not from {_COLDEST} to {_HOTTEST}"
    return None


def check_module(module: Any, prompts: EncodedPrompts) -> None:
    """Check what can only be known of an opened model.

    Raises:
        ModelError: vLLM would not do with it what transformers does.
    """
    name = type(module).__name__
    if module.config.is_encoder_decoder:
        raise ModelError(f"{KEY}: runs decoders alone, and {name} has an encoder; eval.engine=transformers")
    settings = prompts.settings(module)
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        if getattr(settings, key, None) is not None:
            raise ModelError(f"{KEY}: has no equal of {key}, which {name}'s generation config has")
    # With a least number of tokens vLLM holds these back, whatever it is asked to end at.
    held = _token_ids(prompts.tokenizer.eos_token_id) | _token_ids(module.config.eos_token_id)
    if prompts.decoding.min_new_tokens and (odd := held - prompts.ends(module)):
        raise ModelError(
            f"{KEY}: task.decoding.min_new_tokens would hold back token {min(odd)} too, which does not end texts of "
            f"{name}; eval.engine=transformers"
        )


def _token_ids(value: int | Sequence[int] | None) -> set[int]:
    return {value} if isinstance(value, int) else set(value or ())
