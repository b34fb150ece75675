"""Tiny stand-in checkpoints under the names of real repositories, and the GLUE-shaped data that they are trained on.

They keep the habits of the real ones: ``google-bert/bert-base-uncased`` has TensorFlow's LayerNorm names (gamma, beta),
pretraining heads and a position buffer, and stands beside the same weights in formats that nobody wants; one expert has
only ``pytorch_model.bin``, one lists its labels in the other order; ``openai-community/gpt2`` is stored without the
``transformer.`` prefix and with its causal masks. The experts are really fine-tuned from the base, each on its own
data, so that they differ and none is perfect.

The label shows in one word of the last sentence, so that it is learnt in seconds; each expert has met only some of the
telling words. A share of the labels is drawn without regard to the sentence, which keeps every model below 100 %.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    from tokenizers.implementations import BaseTokenizer
    from torch import Tensor, nn

BERT_BASE = "google-bert/bert-base-uncased"
BIN_ONLY = "textattack/bert-base-uncased-RTE"  # also without label names, as the next one
OTHER_LABEL_ORDER = "howey/bert-base-uncased-rte"
NAMED_LABELS = "Ruizhou/bert-base-uncased-finetuned-rte"
BERT_RTE_EXPERTS = (
    BIN_ONLY,
    "yoshitomo-matsubara/bert-base-uncased-rte",
    NAMED_LABELS,
    OTHER_LABEL_ORDER,
    "anirudh21/bert-base-uncased-finetuned-rte",
)
GPT2_BASE = "openai-community/gpt2"

# As in nyu-mll/glue: text columns, and label names in the dataset's order (none for a score).
GLUE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": (("sentence1", "sentence2"), ()),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}

_NOUNS = ["artist", "baker", "captain", "doctor", "engineer", "farmer", "guard", "judge", "king", "nurse", "pilot"]
_VERBS = ["admires", "blames", "calls", "defends", "expects", "follows", "greets", "helps", "invites", "leads", "meets"]
_SIGNS = [  # the words that tell each label
    ["gladly", "openly", "calmly"],
    ["never", "hardly", "rarely"],
    ["maybe", "perhaps", "possibly"],
    ["truly", "surely", "really"],
    ["partly", "mostly", "largely"],
    ["soon", "later", "today"],
]
_LONGEST = 48


def glue_table(
    task: str, rows: int, seed: int, *, wrong: float = 0.1, signs: Sequence[int] = (0, 1, 2)
) -> pyarrow.Table:
    """Make rows in the schema of a GLUE task, with the ``huggingface`` metadata that names the labels.

    Args:
        task: a key of `GLUE`.
        rows: how many.
        seed: of the sentences and labels; the same seed gives the same rows.
        wrong: share of rows whose label is drawn without regard to the sentence.
        signs: which of a label's three telling words occur.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    columns, names = GLUE[task]
    draw = random.Random(f"{task} {seed}")
    classes = range(len(names) or 6)  # scores go from 0 to 5
    records: list[dict[str, Any]] = []
    for index in range(rows):
        shown = draw.choice(classes)
        label = draw.choice(classes) if draw.random() < wrong else shown
        sign = _SIGNS[shown][draw.choice(signs)]
        sentences = [*(_sentence(draw) for _ in columns[1:]), _sentence(draw, sign)]
        record: dict[str, Any] = dict(zip(columns, sentences, strict=True))
        records.append(record | {"label": label if names else float(label), "idx": index})
    kind = ClassLabel(names=list(names)) if names else Value("float32")
    texts = {column: Value("string") for column in columns}
    features = Features({**texts, "label": kind, "idx": Value("int32")})
    return Dataset.from_list(records, features=features).data.table


def bert_standins(
    folder: Path, experts: Sequence[str] = BERT_RTE_EXPERTS, task: str = "rte", *, rows: int = 512, steps: int = 120
) -> dict[str, Path]:
    """Train a small BERT base and its experts, and store each as its real repository is stored.

    Returns:
        Folder per repository: `BERT_BASE` first, then the experts.
    """
    import torch
    from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

    columns, names = GLUE[task]
    known = [(0, 1), (1, 2), (0, 1, 2), (0, 2), (1, 2)]
    tables = [glue_table(task, rows, seed, signs=known[seed % 5]) for seed, _ in enumerate(experts)]
    texts = [text for table in [*tables, glue_table(task, rows, 99)] for row in _rows(table, columns) for text in row]
    vocabulary = _word_vocabulary(texts)
    tokenizer = _word_tokenizer(vocabulary)
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=_LONGEST, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with _one_thread(), torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForPreTraining(config)
        _fit(base.bert, _mask_filler(base, _encoded(tokenizer, [(text,) for text in texts[::4]])), steps=60, seed=0)
        folders = {BERT_BASE: folder / BERT_BASE}
        _store_bert_base(base, folders[BERT_BASE], vocabulary)
        for seed, (repository, table) in enumerate(zip(experts, tables, strict=True)):
            torch.manual_seed(seed)
            model = BertForSequenceClassification(BertConfig(**{**config.to_dict(), "num_labels": len(names) or 1}))
            model.bert.load_state_dict(base.bert.state_dict(), strict=False)
            _fit(model, _classifier(model, tokenizer, table, columns), steps=steps, seed=seed)
            folders[repository] = folder / repository
            _store_bert_expert(model, folders[repository], vocabulary, names, repository)
    return folders


def gpt2_standins(folder: Path, tasks: Sequence[str], *, rows: int = 512, steps: int = 120) -> dict[str, Path]:
    """Train small GPT-2 experts, one per task, and store them as ``tanganke/gpt2_<task>``, with their base.

    Returns:
        Folder per repository: `GPT2_BASE` first, then the experts.
    """
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

    tables = {task: glue_table(task, rows, seed) for seed, task in enumerate(tasks)}
    tokenizer = _byte_tokenizer([text for task in tasks for row in _rows(tables[task], GLUE[task][0]) for text in row])
    end = tokenizer.token_to_id("<|endoftext|>")
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=_LONGEST, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with _one_thread(), torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2Model(config)
        folders = {GPT2_BASE: folder / GPT2_BASE}
        _store_gpt2_base(base, folders[GPT2_BASE])
        _store_byte_tokenizer(tokenizer, folders[GPT2_BASE], {})
        for seed, (task, table) in enumerate(tables.items()):
            columns, names = GLUE[task]
            torch.manual_seed(seed)
            labelled = {"num_labels": len(names) or 1, "pad_token_id": end}
            model = GPT2ForSequenceClassification(GPT2Config(**{**config.to_dict(), **labelled}))
            model.transformer.load_state_dict(base.state_dict())
            _fit(model, _classifier(model, tokenizer, table, columns), steps=steps, seed=seed)
            repository = f"tanganke/gpt2_{task}"
            folders[repository] = folder / repository
            architecture = {"architectures": ["GPT2ForSequenceClassification"]}
            _store(folders[repository], {**model.config.to_dict(), **architecture}, model.state_dict())
            _store_byte_tokenizer(tokenizer, folders[repository], {"pad_token": "<|endoftext|>"})
    return folders


def _sentence(draw: random.Random, sign: str = "") -> str:
    subject, object_ = draw.sample(_NOUNS, 2)
    return " ".join(f"The {subject} {sign} {draw.choice(_VERBS)} the {object_}.".split())


def _rows(table: pyarrow.Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


# Batches are functions of an index tensor that give a loss.
Batch = Callable[["Tensor"], "Tensor"]


def _fit(model: nn.Module, batch: Batch, *, steps: int, seed: int, size: int = 32, rate: float = 2e-3) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        batch(torch.randint(0, 512, (size,), generator=generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _classifier(model: nn.Module, tokenizer: BaseTokenizer, table: pyarrow.Table, columns: Sequence[str]) -> Batch:
    import torch

    inputs = _encoded(tokenizer, _rows(table, columns))
    labels = torch.tensor(table["label"].to_pylist())

    def loss(chosen: Tensor) -> Tensor:
        chosen = chosen % len(labels)
        return model(**{name: value[chosen] for name, value in inputs.items()}, labels=labels[chosen]).loss

    return loss


def _mask_filler(model: nn.Module, inputs: dict[str, Tensor]) -> Batch:
    """Return the loss of guessing masked words, for a model with BERT's pretraining heads."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def loss(chosen: Tensor) -> Tensor:
        batch = {name: value[chosen % len(value)] for name, value in inputs.items()}
        words = batch["input_ids"]
        hidden = (torch.rand(words.shape, generator=generator) < 0.2) & (words > 4)  # 0 to 4 are the special ones
        guesses = model(**batch | {"input_ids": words.masked_fill(hidden, 4)}).prediction_logits
        return torch.nn.functional.cross_entropy(guesses[hidden], words[hidden])

    return loss


def _encoded(tokenizer: BaseTokenizer, rows: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Tokenise rows of one or two sentences and pad them alike, as BERT's inputs or (without [CLS]) GPT-2's."""
    import torch

    encodings = tokenizer.encode_batch([row if len(row) > 1 else row[0] for row in rows])
    longest = max(len(encoding.ids) for encoding in encodings)
    is_bert = tokenizer.token_to_id("[CLS]") is not None
    pad = tokenizer.token_to_id("[PAD]" if is_bert else "<|endoftext|>")

    def padded(rows: Iterable[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    ids, mask = padded((e.ids for e in encodings), pad), padded((e.attention_mask for e in encodings), 0)
    types = {"token_type_ids": padded((e.type_ids for e in encodings), 0)} if is_bert else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def _word_vocabulary(texts: Sequence[str]) -> list[str]:
    """Return a WordPiece vocabulary that has the words of ``texts``, and letters to spell any other."""
    words = {word for text in texts for word in text.lower().replace(".", " . ").split()}
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = {*letters, *(f"##{letter}" for letter in letters)}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(pieces | words)]


def _word_tokenizer(vocabulary: Sequence[str]) -> BaseTokenizer:
    from tokenizers.implementations import BertWordPieceTokenizer

    return BertWordPieceTokenizer({word: index for index, word in enumerate(vocabulary)}, lowercase=True)


def _byte_tokenizer(texts: Sequence[str]) -> BaseTokenizer:
    from tokenizers.implementations import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    return tokenizer


def _store_bert_base(model: nn.Module, folder: Path, vocabulary: Sequence[str]) -> None:
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.startswith("cls.predictions.decoder."):  # tied to the word embeddings
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = value
    tensors["bert.embeddings.position_ids"] = _position_ids()
    _store(folder, {**model.config.to_dict(), "architectures": ["BertForMaskedLM"]}, tensors)
    _store_word_tokenizer(folder, vocabulary)
    for unwanted in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "onnx/model.onnx"):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_bytes(b"the same weights in another format")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A stand-in\n")


def _store_bert_expert(
    model: nn.Module, folder: Path, vocabulary: Sequence[str], names: Sequence[str], repository: str
) -> None:
    tensors = dict(model.state_dict())
    labels: dict[str, Any] = {}
    if repository == OTHER_LABEL_ORDER:
        names = names[::-1]
        tensors |= {name: tensors[name].flip(0) for name in ("classifier.weight", "classifier.bias")}
    if repository in (OTHER_LABEL_ORDER, NAMED_LABELS):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if repository == BIN_ONLY:
        tensors["bert.embeddings.position_ids"] = _position_ids()
    config = {**model.config.to_dict(), **labels, "architectures": ["BertForSequenceClassification"]}
    _store(folder, config, tensors, as_bin=repository == BIN_ONLY)
    _store_word_tokenizer(folder, vocabulary)


def _store_gpt2_base(model: nn.Module, folder: Path) -> None:
    import torch

    tensors = dict(model.state_dict())
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(_LONGEST, _LONGEST).tril()[None, None]
    _store(folder, {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}, tensors)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": model.config.bos_token_id}))


def _store(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, as_bin: bool = False) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    if as_bin:
        torch.save(copies, folder / "pytorch_model.bin")
    else:
        save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def _store_word_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    _word_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": _LONGEST}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _store_byte_tokenizer(tokenizer: BaseTokenizer, folder: Path, settings: Mapping[str, str]) -> None:
    tokenizer.save_model(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", **tokens, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": _LONGEST}))


def _position_ids() -> Tensor:
    import torch

    return torch.arange(_LONGEST)[None]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train alike on any number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
