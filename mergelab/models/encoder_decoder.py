"""Encoder-decoder models joined from two: warm starts of a pair, and a model with one part exchanged.

What is made is a model folder in the cache like any other, named by all that its content depends on, so that the rest
of mergelab need not know how it came to be. A file in the folder lists the weights that no checkpoint had.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.errors import MergelabError, MergeWarning, ModelError, listed
from mergelab.models.architecture import quiet_transformers, read_config, tokenizer_folder
from mergelab.models.made import made
from mergelab.models.tokens import copy_companions, decoder_tokenizer, load_tokenizer, read_tokens, tokenizer_content
from mergelab.weights.checkpoint import CONFIG, open_checkpoint
from mergelab.weights.module import load_into, named_tensors
from mergelab.weights.pretrained import refuse_own_code
from mergelab.weights.writer import DECODER_TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRED = "EncoderDecoderModel"
KIND = "encoder-decoder"  # its model_type
NEW = "newly_initialised.json"
HOME = "encoder-decoders"  # in the cache
_GENERATION = "generation_config.json"
_IDS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
# Bidirectional although transformers has a causal and no masked language model of them.
_ENCODERS = ("bert-generation", "xlnet")


def newly_initialised(folder: Path) -> frozenset[str]:
    """Return which tensors of a model that was made here no checkpoint had; of other models nothing is known."""
    file = folder / NEW
    return frozenset(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else frozenset()


def warm_start(
    encoder: Path, decoder: Path, *, where: str, seed: int = 0, token_ids: Mapping[str, int] | None = None
) -> Path:
    """Join an encoder and a decoder as ``EncoderDecoderModel.from_encoder_decoder_pretrained`` does.

    The decoder may be an autoencoding model (BERT), which then looks back only, an autoregressive one (GPT-2), or a
    sequence-to-sequence model (BART, or a saved encoder-decoder), whose decoder is taken with its embeddings and its
    trained cross-attention. Of a saved encoder-decoder given as encoder, the encoder is taken. What neither has, most
    often the cross-attention, is drawn with ``seed`` as transformers draws it.

    Where they are not given, ``decoder_start_token_id`` is the decoder's own, else its first special token ([CLS] or
    <s>), ``eos_token_id`` and ``pad_token_id`` are the decoder's own; without a padding token it is the end of text, as
    is common for GPT-2.

    Args:
        encoder, decoder: model folders.
        where: the configuration's key of the pair, for messages.
        seed: of the weights that neither has.
        token_ids: ``decoder_start_token_id``, ``pad_token_id``, ``eos_token_id``, where they are not the decoder's.

    Returns:
        A folder in the cache, with the encoder's tokenizer; the decoder's is in ``decoder_tokenizer`` where it differs.

    Raises:
        ModelError: the two cannot be joined, or a token's id is missing.
    """
    from importlib.metadata import version

    for folder, part in ((encoder, "encoder"), (decoder, "decoder")):
        checkpoint = open_checkpoint(folder, f"{where}.{part}")
        refuse_own_code(f"{where}.{part}", checkpoint.config)
        if checkpoint.is_quantised:
            raise ModelError(f"{where}.{part}: {folder.name} is quantised: join unquantised checkpoints")
    parts = {
        "made": "warm start",
        "folders": [_content(encoder), _content(decoder)],
        "seed": seed,
        "token_ids": dict(token_ids or {}),
        "versions": [version("torch"), version("transformers")],
    }
    return made(HOME, parts, lambda folder: _join(folder, encoder, decoder, where, seed, token_ids or {}))


def _content(folder: Path) -> list[str]:
    """Name the content of a model's folder: its weights, and every small file that goes into a joined model."""
    files = [folder / CONFIG, folder / _GENERATION, folder / NEW]
    texts = [file.read_bytes() if file.is_file() else b"" for file in files]
    texts += [tokenizer_content(each) or b"" for each in (folder, decoder_tokenizer(folder))]
    settings = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    texts += [file.read_bytes() if file.is_file() else b"" for file in settings]
    return [open_checkpoint(folder).content_hash(), *(hashlib.sha256(text).hexdigest() for text in texts)]


# ---------------------------------------------------------------------------------------------------------- warm starts


def _join(folder: Path, encoder: Path, decoder: Path, where: str, seed: int, token_ids: Mapping[str, int]) -> None:
    import torch
    from transformers import EncoderDecoderModel

    with quiet_transformers(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            first, new_in_first = _encoder(encoder, f"{where}.encoder")
            second, new_in_second = _decoder(decoder, f"{where}.decoder")
            _check_widths(first, second, where)
            if first.dtype != second.dtype:  # they could not run together
                first, second = first.float(), second.float()
            generation = second.generation_config
            module: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder_model=first, decoder_model=second)
        except MergelabError:
            raise
        except Exception as error:  # files that do not fit can raise anything
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{where}: transformers cannot join the two: {reason}") from error
        new = {f"encoder.{name}" for name in new_in_first} | {f"decoder.{name}" for name in new_in_second}
        new |= {name for name, _ in module.named_parameters() if name.startswith("enc_to_dec_proj.")}
        _set_tokens(module, generation, _token_ids(decoder, where, token_ids))
        for part in (module.config.encoder, module.config.decoder):
            part.name_or_path = ""  # where the folder was on this machine belongs into no model
        module.save_pretrained(folder)
    (folder / NEW).write_text(json.dumps(sorted(new), indent=1) + "\n", encoding="utf-8")
    copy_companions(encoder, folder, tokenizer=True)
    shutil.rmtree(folder / DECODER_TOKENIZER, ignore_errors=True)  # of an encoder-decoder whose encoder it is
    own = decoder_tokenizer(decoder)
    if tokenizer_folder([own]) and not _same_tokens(encoder, own):
        (folder / DECODER_TOKENIZER).mkdir()
        copy_companions(own, folder / DECODER_TOKENIZER, tokenizer=True)


def _encoder(folder: Path, where: str) -> tuple[PreTrainedModel, set[str]]:
    """Load a model without a head; return it, and which of its tensors the checkpoint does not have."""
    from transformers import AutoConfig, AutoModel, EncoderDecoderModel
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = config.model_type
    if kind == KIND:
        whole = EncoderDecoderModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype="auto"
        )
        return whole.encoder, _new_in_part(folder, "encoder")
    if config.is_encoder_decoder:
        raise ModelError(
            f"{where}: {folder.name} is a sequence-to-sequence model ({kind}), of which only the decoder can be "
            "joined; an encoder is a model like BERT"
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *_ENCODERS):
        raise ModelError(
            f"{where}: {folder.name} is a decoder-only model ({kind}), whose tokens do not see those that follow; "
            "an encoder is a model like BERT"
        )
    config.is_decoder = config.add_cross_attention = False
    model, info = AutoModel.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
    )
    return model, set(info["missing_keys"])


def _decoder(folder: Path, where: str) -> tuple[PreTrainedModel, set[str]]:
    """Load a causal language model with cross-attention; return it, and which tensors the checkpoint does not have."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, EncoderDecoderModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = config.model_type
    if kind == KIND:
        whole = EncoderDecoderModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype="auto"
        )
        whole.decoder.generation_config = whole.generation_config
        return whole.decoder, _new_in_part(folder, "decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{where}: {folder.name} cannot be a decoder: transformers has no causal {kind} model")
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "encoder_hidden_states" not in inspect.signature(cls.forward).parameters:
        raise ModelError(
            f"{where}: {folder.name} cannot be a decoder: {kind} models have no cross-attention to an encoder; "
            "BERT- and GPT-2-like ones and the decoders of BART-like ones have it"
        )
    config.is_decoder = config.add_cross_attention = True
    if config.is_encoder_decoder:
        return _decoder_of(folder, cls, config)
    model, info = cls.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False, dtype="auto", output_loading_info=True
    )
    return model, set(info["missing_keys"])


def _decoder_of(folder: Path, cls: type, config: Any) -> tuple[PreTrainedModel, set[str]]:
    """Take the decoder out of a sequence-to-sequence model.

    Transformers does so too, but draws the embeddings anew where they are stored as those that both halves share.
    """
    from transformers import AutoModelForSeq2SeqLM

    whole = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype="auto")
    decoder = cls(config).to(whole.dtype).eval()
    tensors = named_tensors(whole)
    taken = {name: tensors[name] for name in named_tensors(decoder) if name in tensors}
    load_into(decoder, taken, strict=False)
    decoder.generation_config = whole.generation_config
    return decoder, {name for name, _ in decoder.named_parameters() if name not in taken}


def _new_in_part(folder: Path, part: str) -> set[str]:
    return {name.removeprefix(f"{part}.") for name in newly_initialised(folder) if name.startswith(f"{part}.")}


def _check_widths(encoder: PreTrainedModel, decoder: PreTrainedModel, where: str) -> None:
    """Check that the decoder's cross-attention takes what the encoder, or a projection of it, gives."""
    gives, takes = encoder.config.hidden_size, getattr(decoder.config, "cross_attention_hidden_size", None)
    if takes is not None and takes != gives:
        raise ModelError(
            f"{where}: the encoder gives {gives} features for each token, and the decoder's cross-attention takes "
            f"{takes} (cross_attention_hidden_size in its {CONFIG})"
        )


def _same_tokens(a: Path, b: Path) -> bool:
    return tokenizer_content(a) == tokenizer_content(b) or read_tokens(a) == read_tokens(b)


def _token_ids(folder: Path, where: str, given: Mapping[str, int]) -> dict[str, int]:
    """Return the ids that generation needs, the user's before the decoder's own.

    Raises:
        ModelError: there is no token to start or to pad with, or the decoder has no such row.
    """
    config, generation = read_config(folder, where), _generation(folder)
    own = decoder_tokenizer(folder)
    tokenizer = load_tokenizer([own], where) if tokenizer_folder([own]) else None

    def first(name: str, *roles: str) -> int | None:
        found = [given.get(name), generation.get(name), config.get(name)]
        found[2:2] = [getattr(tokenizer, f"{role}_token_id", None) for role in roles]
        ids = [each[0] if isinstance(each, list) and each else each for each in found]
        return next((each for each in ids if isinstance(each, int)), None)

    start = first("decoder_start_token_id")
    start = first("bos_token_id", "bos", "cls") if start is None else start
    end = first("eos_token_id", "eos", "sep")
    pad = first("pad_token_id", "pad")
    ids = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end if pad is None else pad}
    rows = (config.get("decoder") or config).get("vocab_size")
    for name, value in ids.items():
        if value is None and name != "eos_token_id":
            raise ModelError(
                f"{where}: the decoder {folder.name} does not say which token is its {name.removesuffix('_token_id')} "
                f"token; say {name} with the encoder and the decoder"
            )
        if value is not None and rows is not None and not 0 <= value < rows:
            raise ModelError(f"{where}.{name}={value}: the decoder {folder.name} has {rows} tokens")
    return {name: value for name, value in ids.items() if value is not None}


def _set_tokens(module: Any, generation: Any, ids: Mapping[str, int]) -> None:
    """Write the ids, and the decoder's settings of generation, where ``generate`` and ``forward`` look for them."""
    from transformers import GenerationConfig

    for name, value in ids.items():
        setattr(module.config, name, value)
    module.config.vocab_size = module.config.decoder.vocab_size
    settings = {} if generation is None else generation.to_diff_dict()
    for name in ("_from_model_config", "transformers_version"):
        settings.pop(name, None)
    module.generation_config = GenerationConfig(**settings | dict(ids))


@contextmanager
def companions(like: Path, others: Sequence[Path]) -> Iterator[Path]:
    """Give a folder of what goes with merged weights, where ``generate`` finds the tokens that it needs.

    Ids that the settings of ``like`` lack, as transformers' own warm starts do, are those of the first other model that
    says them; a warning tells what none says.
    """
    settings = {folder: read_config(folder, folder.name) | _generation(folder) for folder in (like, *others)}
    found = {
        name: next((said[name] for said in settings.values() if said.get(name) is not None), None) for name in _IDS
    }
    if unknown := [name for name in _IDS if found[name] is None and name != "eos_token_id"]:
        warnings.warn(
            f"no model says its {listed(unknown)}, which the merged model needs to write; set it in its {CONFIG}",
            MergeWarning,
            stacklevel=2,
        )
    known = {name: value for name, value in found.items() if value is not None}
    files = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in _settings_of(like)}
    if all(content.get(name) is not None for content in files.values() for name in known):
        yield like
        return
    with tempfile.TemporaryDirectory() as made_for_now:
        folder = Path(made_for_now)
        for of_tokenizer in (False, True):
            copy_companions(like, folder, tokenizer=of_tokenizer)
        for name, content in files.items():
            lacking = {key: value for key, value in known.items() if content.get(key) is None}
            (folder / name).write_text(json.dumps(content | lacking, indent=2) + "\n", encoding="utf-8")
        yield folder


def _settings_of(folder: Path) -> list[Path]:
    return [file for file in (folder / CONFIG, folder / _GENERATION) if file.is_file()]


def _generation(folder: Path) -> dict[str, Any]:
    """Read the settings of generation that a model's folder has, those that say something."""
    content = {}
    if (folder / _GENERATION).is_file():
        with suppress(ValueError):
            content = json.loads((folder / _GENERATION).read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if value is not None}
