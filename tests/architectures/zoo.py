"""A table of architectures: the classes of ``transformers`` that make a small model of each, and its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Special tokens in the order of their ids: as most models have them, as those that descend from fairseq, as T5.
USUAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
SENTENCEPIECE = ("<pad>", "</s>", "<unk>", "<s>", "<mask>")
WORDS = (
    *("the", "a", "cat", "dog", "bird", "house", "river", "sun", "moon", "tree", "runs", "sleeps", "eats", "sees"),
    *("likes", "hates", "big", "small", "red", "blue", "green", "old", "new", "is", "are", "was", "not", "very", "and"),
    *("or", "but", "with", "on", "in", "under", "over", "quickly", "slowly", "man", "woman", "child", "book", "paper"),
    *("car", "road", "city", "yes", "no"),
)
VOCABULARY = len(USUAL) + len(WORDS)
STOP_WORD = len(USUAL) + WORDS.index("not")  # a second token that ends what a generator writes
LABELS = {0: "not_entailment", 1: "entailment"}  # the other order than the task's
POSITIONS = 64

Task = Literal["classification", "generation"]
Reading = Literal["pairs", "pairs without types", "pairs before the class token", "running text", "source"]

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
    "max_position_embeddings": POSITIONS,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_PAIRED = "AutoModelForSeq2SeqLM"
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
    special: tuple[str, ...] = USUAL
    starts_with: str = "</s>"  # what a decoder behind an encoder begins with

    @property
    def task(self) -> Task:
        return "classification" if self.reads.startswith("pairs") else "generation"

    @property
    def is_pair(self) -> bool:
        """Whether it reads with an encoder and writes with a decoder."""
        return self.reads == "source"

    @property
    def ids(self) -> dict[str, int]:
        """The ids of the special tokens, as a config names them."""
        tokens = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
        tokens |= {"decoder_start": self.starts_with} if self.is_pair else {}
        return {f"{name}_token_id": self.special.index(token) for name, token in tokens.items()}


def classifier(name: str, stem: str, reads: Reading = "pairs", **settings: Any) -> Kind:
    model = f"{stem}ForSequenceClassification"
    if stem != "XLNet":  # which has no limit, and refuses to be given one
        settings["max_position_embeddings"] = POSITIONS
    special = settings.pop("special", USUAL)
    return Kind(name, model, f"{stem}Config", settings, reads, "AutoModelForSequenceClassification", special)


def decoder(name: str, stem: str, *, config: str | None = None, **settings: Any) -> Kind:
    model = settings.pop("model", f"{stem}ForCausalLM")
    special = settings.pop("special", USUAL)
    settings["max_position_embeddings"] = POSITIONS
    return Kind(name, model, config or f"{stem}Config", settings, special=special)


def pair(name: str, stem: str, **settings: Any) -> Kind:
    model = settings.pop("model", f"{stem}ForConditionalGeneration")
    special, start = settings.pop("special", USUAL), settings.pop("starts_with", "</s>")
    return Kind(name, model, f"{stem}Config", settings, "source", _PAIRED, special, start)


KINDS = (
    classifier("bert", "Bert", **SMALL),
    classifier("roberta", "Roberta", "pairs without types", **SMALL, type_vocab_size=1, special=FAIRSEQ),
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
        cls_token_id=USUAL.index("<s>"),
        sep_token_id=USUAL.index("</s>"),
    ),
    classifier("xlnet", "XLNet", "pairs before the class token", d_model=32, n_layer=2, n_head=4, d_inner=48),
    classifier("mpnet", "MPNet", "pairs without types", **SMALL, special=FAIRSEQ),
    decoder("gpt2", "GPT2", model="GPT2LMHeadModel", **GPT2),
    decoder("gpt_neox", "GPTNeoX", **SMALL),
    decoder("opt", "OPT", **{**SMALL, "ffn_dim": 48}, word_embed_proj_dim=32, special=FAIRSEQ),
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
    pair("t5", "T5", **T5, special=SENTENCEPIECE, starts_with="<pad>"),
    pair(
        "t5_gated",
        "T5",
        **T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        special=SENTENCEPIECE,
        starts_with="<pad>",
    ),
    pair("bart", "Bart", **PAIR, forced_eos_token_id=FAIRSEQ.index("</s>"), special=FAIRSEQ),
    pair("mbart", "MBart", **PAIR, forced_eos_token_id=FAIRSEQ.index("</s>"), special=FAIRSEQ),
    pair("marian", "Marian", model="MarianMTModel", **PAIR, starts_with="<pad>"),
    pair("pegasus", "Pegasus", **PAIR, special=SENTENCEPIECE, starts_with="<pad>"),
    Kind(
        "bert2gpt2",
        "EncoderDecoderModel",
        "EncoderDecoderConfig",
        {},
        "source",
        "AutoModelForSeq2SeqLM",
        starts_with="<s>",
    ),
    Kind(
        "bert2bert",
        "EncoderDecoderModel",
        "EncoderDecoderConfig",
        {},
        "source",
        "AutoModelForSeq2SeqLM",
        starts_with="<s>",
    ),
    Kind("llava", "LlavaForConditionalGeneration", "LlavaConfig", auto="AutoModelForImageTextToText"),
)
_HEADS = ("classifier.", "pre_classifier.", "pooler.", "head.", "logits_proj.", "sequence_summary.")
BY_NAME = {kind.name: kind for kind in KINDS}
CLASSIFIERS = [kind.name for kind in KINDS if kind.task == "classification"]
GENERATORS = [kind.name for kind in KINDS if kind.task == "generation"]


def head_names(kind: Kind, names: Iterable[str]) -> list[str]:
    """Name the tensors of a classifier's head, which have the experts' mean whatever the method."""
    return [name for name in names if kind.task == "classification" and name.startswith(_HEADS)]
