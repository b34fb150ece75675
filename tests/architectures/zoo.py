"""Small models of many architectures, built from their configs and saved by ``transformers``, each with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
WORDS = (
    "the a cat dog bird house river sun moon tree runs sleeps eats sees likes hates big small red blue green old new is "
    "are was not very and or but with on in under over quickly slowly man woman child book paper car road city yes no"
).split()
PAD, START, END, MASK = 0, 1, 2, 4
STOP_WORD = len(SPECIAL) + WORDS.index("not")  # a second token that ends what a generator writes
VOCABULARY = len(SPECIAL) + len(WORDS)
LABELS = {0: "not_entailment", 1: "entailment"}  # the other order than the task's
POSITIONS = 64

Task = Literal["classification", "generation"]
Reading = Literal["pairs", "pairs without types", "pairs before the class token", "running text", "source"]

IDS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": END,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
WINDOW = {"sliding_window": 4}


@dataclass(frozen=True)
class Kind:
    """An architecture: the classes of transformers that make it, and how its tokenizer reads."""

    name: str
    model: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: Reading = "running text"
    auto: str = "AutoModelForCausalLM"

    @property
    def task(self) -> Task:
        return "classification" if self.reads.startswith("pairs") else "generation"

    @property
    def is_pair(self) -> bool:
        """Whether it reads with an encoder and writes with a decoder."""
        return self.reads == "source"


def classifier(name: str, stem: str, reads: Reading = "pairs", **settings: Any) -> Kind:
    model = f"{stem}ForSequenceClassification"
    if stem != "XLNet":  # which has no limit, and refuses to be given one
        settings["max_position_embeddings"] = POSITIONS
    return Kind(name, model, f"{stem}Config", settings, reads, "AutoModelForSequenceClassification")


def decoder(name: str, stem: str, *, config: str | None = None, **settings: Any) -> Kind:
    model = settings.pop("model", f"{stem}ForCausalLM")
    return Kind(name, model, config or f"{stem}Config", {"max_position_embeddings": POSITIONS, **settings})


def pair(name: str, stem: str, **settings: Any) -> Kind:
    model = settings.pop("model", f"{stem}ForConditionalGeneration")
    return Kind(name, model, f"{stem}Config", settings, "source", "AutoModelForSeq2SeqLM")


KINDS = (
    classifier("bert", "Bert", **SMALL),
    classifier("roberta", "Roberta", "pairs without types", **SMALL, type_vocab_size=1),
    classifier("distilbert", "DistilBert", "pairs without types", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    classifier("albert", "Albert", **SMALL, embedding_size=16),
    classifier(
        "deberta_v2",
        "DebertaV2",
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
    ),
    classifier("electra", "Electra", **SMALL, embedding_size=16),
    classifier(
        "modernbert",
        "ModernBert",
        "pairs without types",
        **{**SMALL, "num_hidden_layers": 4},
        local_attention=8,
        cls_token_id=START,
        sep_token_id=END,
    ),
    classifier("xlnet", "XLNet", "pairs before the class token", d_model=32, n_layer=2, n_head=4, d_inner=48),
    classifier("mpnet", "MPNet", "pairs without types", **SMALL),
    decoder("gpt2", "GPT2", model="GPT2LMHeadModel", **GPT2),
    decoder("gpt_neox", "GPTNeoX", **SMALL),
    decoder("opt", "OPT", **{**SMALL, "ffn_dim": 48}, word_embed_proj_dim=32),
    decoder("llama", "Llama", **GROUPED),
    decoder("llama_tied", "Llama", **GROUPED, tie_word_embeddings=True),
    decoder("mistral", "Mistral", **GROUPED, **WINDOW),
    decoder("qwen2", "Qwen2", **GROUPED, tie_word_embeddings=True),
    decoder("qwen3", "Qwen3", **GROUPED),
    decoder("gemma2", "Gemma2", **GROUPED, **WINDOW, query_pre_attn_scalar=8),
    decoder("gemma3", "Gemma3", config="Gemma3TextConfig", **GROUPED, **WINDOW, query_pre_attn_scalar=8),
    decoder("phi3", "Phi3", **SMALL, num_key_value_heads=2),
    decoder("mixtral", "Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    decoder(
        "qwen3_moe",
        "Qwen3Moe",
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
        norm_topk_prob=True,
    ),
    pair("t5", "T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD),
    pair(
        "t5_gated",
        "T5",
        **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    pair("bart", "Bart", **PAIR, max_position_embeddings=POSITIONS, forced_eos_token_id=END),
    pair("mbart", "MBart", **PAIR, max_position_embeddings=POSITIONS, forced_eos_token_id=END),
    pair("marian", "Marian", model="MarianMTModel", **PAIR, max_position_embeddings=POSITIONS),
    pair("pegasus", "Pegasus", **PAIR, max_position_embeddings=POSITIONS, forced_eos_token_id=END),
    Kind("bert2gpt2", "EncoderDecoderModel", "EncoderDecoderConfig", {}, "source", "AutoModelForSeq2SeqLM"),
    Kind("bert2bert", "EncoderDecoderModel", "EncoderDecoderConfig", {}, "source", "AutoModelForSeq2SeqLM"),
    Kind("llava", "LlavaForConditionalGeneration", "LlavaConfig", auto="AutoModelForImageTextToText"),
)
BY_NAME = {kind.name: kind for kind in KINDS}
CLASSIFIERS = [kind.name for kind in KINDS if kind.task == "classification"]
GENERATORS = [kind.name for kind in KINDS if kind.task == "generation"]


def is_known(kind: Kind) -> bool:
    """Return whether the installed transformers has this architecture."""
    import transformers

    return hasattr(transformers, kind.model) and hasattr(transformers, kind.config)


def save_models(kind: Kind, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> None:
    """Save ``base`` and the experts ``a`` and ``b`` of an architecture below ``folder``.

    Experts are a base with every parameter moved by about a third of its scale; parameters that the architecture ties
    stay tied. ``saving`` is passed on to ``save_pretrained``.
    """
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = _network(kind)
        _perturb(model, 0, 0.1)
        if seed:
            _perturb(model, seed, 0.04)
        if kind.task == "generation":
            _set_generation(model)
        model.to(dtype).eval().save_pretrained(folder / name, **saving)
        tokenizer(kind).save_pretrained(folder / name)


def _network(kind: Kind) -> nn.Module:
    import transformers as t

    if kind.name == "bert2gpt2":
        return _joined(t.GPT2Config(vocab_size=VOCABULARY, **IDS, **GPT2))
    if kind.name == "bert2bert":
        return _joined(t.BertConfig(vocab_size=VOCABULARY, **IDS, **SMALL, max_position_embeddings=POSITIONS))
    if kind.name == "llava":
        text = t.LlamaConfig(vocab_size=VOCABULARY, **IDS, **GROUPED, max_position_embeddings=POSITIONS)
        vision = t.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=16)
        config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=MASK, **IDS)
        return t.LlavaForConditionalGeneration(config)
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, **IDS, **kind.settings}
    if kind.task == "classification":
        settings |= {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    return getattr(t, kind.model)(getattr(t, kind.config)(**settings))  # type: ignore[no-any-return]


def _joined(decoder: Any) -> nn.Module:
    """Join a BERT encoder with a decoder."""
    import transformers as t

    encoder = t.BertConfig(vocab_size=VOCABULARY, **IDS, **SMALL, max_position_embeddings=POSITIONS)
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.update({**IDS, "decoder_start_token_id": START})
    return t.EncoderDecoderModel(config)  # type: ignore[no-any-return]


def _perturb(model: nn.Module, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoidal positions are not
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _set_generation(model: Any) -> None:
    """Give a generator settings of its own: it samples by default, and two tokens end its texts."""
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.max_new_tokens = True, 0.7, 0.9, 5
    own.pad_token_id, own.bos_token_id, own.eos_token_id = PAD, START, [END, STOP_WORD]
    own.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)


def tokenizer(kind: Kind) -> Any:
    """Make a word-level tokenizer that places special tokens as the architecture's own does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, double = {
        "pairs": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "pairs without types": ("<s> $A </s>", "<s> $A </s> $B </s>"),
        "pairs before the class token": ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),
        "running text": ("<s> $A", "<s> $A $B"),
        "source": ("$A </s>", "$A $B </s>"),
    }[kind.reads]
    special = [("<s>", START), ("</s>", END)]
    fast.post_processor = processors.TemplateProcessing(single=single, pair=double, special_tokens=special)
    names = ["input_ids", "attention_mask"]
    if kind.reads in ("pairs", "pairs before the class token") and kind.name != "deberta_v2":
        names.insert(1, "token_type_ids")
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if kind.task == "classification":
        tokens |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    side = "left" if kind.name == "xlnet" else "right"
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_input_names=names, padding_side=side, model_max_length=POSITIONS - 8, **tokens
    )
