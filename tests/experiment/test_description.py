"""A model is measured as transformers makes it of its own folder, and saved as it was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import mergelab as ml
from mergelab.errors import ModelError
from tests.conftest import Outcome

Command = Callable[..., Outcome]
WORDS = [
    *("the", "a", "cat", "dog", "bird", "house", "river", "sun", "tree", "runs", "sleeps", "eats", "sees", "likes"),
    *("hates", "big", "small", "red", "blue", "green"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 48}


def tokenizer(*, lower: bool = True) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: row for row, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase() if lower else normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=48, **roles)


def bert(folder: Path, seed: int, kind: str = "SequenceClassification", own: Any = None, **settings: Any) -> Path:
    """Save a BERT with weights of clear scale; ``own`` is its tokenizer, None: it has none."""
    labels: Mapping[int, str] = settings.pop("id2label", {0: "entailment", 1: "not_entailment"})
    heads = {"num_attention_heads": 4} | settings
    config = BertConfig(**SIZE, **heads, vocab_size=len(WORDS) + 5, id2label=labels)
    config.label2id = {name: row for row, name in labels.items()}
    torch.manual_seed(seed)
    model = getattr(transformers, f"BertFor{kind}")(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.3 * torch.randn(weights.shape)
    model.save_pretrained(folder)
    if own is not None:
        own.save_pretrained(folder)
    return folder


def near(folder: Path, like: Path, seed: int) -> Path:
    """Copy a model and move its weights a little."""
    shutil.copytree(like, folder)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.02 * torch.randn(weights.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of sentences, half of their words with a capital; RTE-shaped data of them; an empty cache."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    draw = np.random.default_rng(3)

    def sentence() -> str:
        words = draw.choice(WORDS, size=int(draw.integers(2, 12)))
        return " ".join(word.capitalize() if draw.random() < 0.5 else word for word in words)

    pairs = [(sentence(), sentence()) for _ in range(80)]
    columns = {"sentence1": [a for a, _ in pairs], "sentence2": [b for _, b in pairs], "idx": list(range(80))}
    (workplace / "data").mkdir()
    table = pa.table({**columns, "label": [int(row) for row in draw.integers(0, 2, 80)]})
    pq.write_table(table, workplace / "data" / "validation.parquet")
    return pairs


def accuracy(model: Path, texts: list[tuple[str, str]], reads_with: Path | None = None, config: Any = None) -> float:
    """Measure a folder with transformers alone, one example at a time."""
    module = AutoModelForSequenceClassification.from_pretrained(model, config=config).eval()
    reads = AutoTokenizer.from_pretrained(reads_with or model)
    labels = pq.read_table(model.parent / "data" / "validation.parquet")["label"].to_pylist()
    with torch.no_grad():
        found = [int(module(**reads(*pair, return_tensors="pt")).logits.argmax()) for pair in texts]
    return float(np.mean([row == label for row, label in zip(found, labels, strict=True)]))


def recorded(workplace: Path) -> list[float]:
    """Return the accuracies of the last run: of the base, if there is one, the experts and the merged model."""
    newest = sorted(workplace.glob("outputs/runs/*/*/result.json"))[-1]
    return [m["results"]["rte"]["report"]["accuracy"]["value"] for m in json.loads(newest.read_text())["models"]]


MEASURED = ["method=soup", "task=rte", "task.data_dir=data", "tracking=none", "eval.preflight=false"]
SAVED = ["method=soup", "evaluate=false", "tracking=none", "output=merged"]


def test_each_expert_is_measured_under_its_own_config(
    mergelab_command: Command, workplace: Path, texts: list[tuple[str, str]]
) -> None:
    a = bert(workplace / "a", 1, own=tokenizer())
    b = near(workplace / "b", a, 2)
    content = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(content | {"num_attention_heads": 8, "hidden_act": "relu"}))
    models = ["models.base=null", "models.experts=[./a,./b]"]

    outcome = mergelab_command(*MEASURED, *models)
    assert outcome.code == 2
    assert outcome.err.strip().count("\n") == 0
    for said in ("hidden_act is 'gelu' in a and 'relu' in b", "num_attention_heads is 4 in a and 8 in b"):
        assert said in outcome.err
    assert "models.config=a" in outcome.err
    assert not list(workplace.glob("outputs/runs/*/*/result.json"))

    for whose in ("a", "b"):
        outcome = mergelab_command(*MEASURED, *models, f"models.config={whose}", f"output=under-{whose}")
        assert outcome.code == 0, outcome.err
        assert recorded(workplace) == [accuracy(each, texts) for each in (a, b, workplace / f"under-{whose}")]
        saved = json.loads((workplace / f"under-{whose}" / "config.json").read_text())
        assert saved["num_attention_heads"] == {"a": 4, "b": 8}[whose]
    with pytest.raises(ModelError, match=r"num_attention_heads is 4 in .*config='last'"):
        ml.soup([str(a), str(b)], task="text-classification")
    assert ml.soup([str(a), str(b)], task="text-classification", config="last").model.config.num_attention_heads == 8
    assert mergelab_command(*MEASURED, *models, "models.config=c").code == 2


def test_a_base_of_another_config_is_refused_and_measured_under_its_own(
    mergelab_command: Command, workplace: Path, texts: list[tuple[str, str]]
) -> None:
    bert(workplace / "base", 0, "MaskedLM", own=tokenizer(), hidden_act="relu")
    a = bert(workplace / "a", 1, own=tokenizer())
    models = ["models.base=./base", "models.experts=[./a]"]
    outcome = mergelab_command(*MEASURED, *models)
    assert outcome.code == 2
    assert "hidden_act is 'relu' in base and 'gelu' in a" in outcome.err
    outcome = mergelab_command(*MEASURED, *models, "models.config=a", "output=merged")
    assert outcome.code == 0, outcome.err
    hybrid = near(workplace / "hybrid", a, 0)  # the base's body behind the merged head, under the base's config
    body = {k: v for k, v in load_file(workplace / "base" / "model.safetensors").items() if k.startswith("bert.")}
    from safetensors.torch import save_file

    save_file({**load_file(a / "model.safetensors"), **body}, hybrid / "model.safetensors", metadata={"format": "pt"})
    config = BertConfig.from_pretrained(workplace / "base", num_labels=2)
    assert recorded(workplace)[:2] == [accuracy(hybrid, texts, config=config), accuracy(a, texts)]
    outcome = mergelab_command(*SAVED, *models, "models.config=base", "output=under-base")
    assert outcome.code == 0, outcome.err
    saved = json.loads((workplace / "under-base" / "config.json").read_text())
    assert (saved["hidden_act"], saved["architectures"]) == ("relu", ["BertForSequenceClassification"])


def test_the_base_behind_the_merged_head_has_that_heads_settings(
    mergelab_command: Command, workplace: Path, texts: list[tuple[str, str]]
) -> None:
    """ModernBERT's head takes the first token's state or the mean, as its config says."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    labels = {"id2label": {0: "entailment", 1: "not_entailment"}}
    for seed, (name, kind, pooling) in enumerate(
        (
            ("base", ModernBertForMaskedLM, "cls"),
            ("a", ModernBertForSequenceClassification, "mean"),
            ("hybrid", ModernBertForSequenceClassification, "mean"),
        )
    ):
        torch.manual_seed(seed)
        config = ModernBertConfig(
            **size, **ids, **labels, vocab_size=len(WORDS) + 5, classifier_pooling=pooling, max_position_embeddings=48
        )
        model = kind(config)
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.3 * torch.randn(weights.shape)
        model.save_pretrained(workplace / name)
        tokenizer().save_pretrained(workplace / name)
    outcome = mergelab_command(*MEASURED, "models.base=./base", "models.experts=[./a]")
    assert outcome.code == 0, outcome.err
    from safetensors.torch import save_file

    base, a = (load_file(workplace / name / "model.safetensors") for name in ("base", "a"))
    body = {name: tensor for name, tensor in base.items() if name.startswith("model.")}
    save_file({**a, **body}, workplace / "hybrid" / "model.safetensors", metadata={"format": "pt"})
    assert recorded(workplace)[0] == accuracy(workplace / "hybrid", texts)
    config = ModernBertConfig.from_pretrained(workplace / "hybrid", classifier_pooling="cls")
    assert accuracy(workplace / "hybrid", texts, config=config) != recorded(workplace)[0]


def test_each_model_reads_with_its_own_tokenizer(
    mergelab_command: Command, workplace: Path, texts: list[tuple[str, str]]
) -> None:
    a = bert(workplace / "a", 1, own=tokenizer(lower=True))
    b = near(workplace / "b", a, 2)
    tokenizer(lower=False).save_pretrained(b)  # every word with a capital is unknown
    models = ["models.base=null", "models.experts=[./a,./b]"]
    assert accuracy(b, texts) != accuracy(b, texts, reads_with=a)
    for chosen, whose in ((None, "a"), ("b", "b")):
        choice = [] if chosen is None else [f"save.tokenizer={chosen}"]
        outcome = mergelab_command(*MEASURED, *models, *choice, f"output=out-{whose}")
        assert outcome.code == 0, outcome.err
        assert "tokenizers differ (normaliser)" in " ".join(outcome.err.replace("│", " ").split())
        assert f"that of {whose}" in " ".join(outcome.err.replace("│", " ").split())
        merged = workplace / f"out-{whose}"
        assert recorded(workplace) == [accuracy(a, texts), accuracy(b, texts), accuracy(merged, texts)]
        assert (merged / "tokenizer.json").read_bytes() == (workplace / whose / "tokenizer.json").read_bytes()


def test_an_expert_without_tokenizer_has_the_bases(
    mergelab_command: Command, workplace: Path, texts: list[tuple[str, str]]
) -> None:
    base = bert(workplace / "base", 0, own=tokenizer())
    a, b = bert(workplace / "a", 1), bert(workplace / "b", 2)
    for command in (MEASURED, SAVED):
        shutil.rmtree(workplace / "merged", ignore_errors=True)
        models = ["models.base=./base", "models.experts=[./a,./b]", "output=merged"]
        outcome = mergelab_command(*command, *models)
        assert outcome.code == 0, outcome.err
        reads = AutoTokenizer.from_pretrained(workplace / "merged")
        assert reads("the cat sees")["input_ids"] == AutoTokenizer.from_pretrained(base)("the cat sees")["input_ids"]
    assert recorded(workplace)[1:] == [
        accuracy(a, texts, reads_with=base),
        accuracy(b, texts, reads_with=base),
        accuracy(workplace / "merged", texts),
    ]


NER = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
STARS = {row: f"{row + 1} stars" for row in range(5)}
TOPICS = {"id2label": {0: "law", 1: "art", 2: "war"}, "problem_type": "multi_label_classification"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("TokenClassification", {"id2label": NER}),
    "stars": ("SequenceClassification", {"id2label": STARS}),
    "answers": ("QuestionAnswering", {}),
    "choices": ("MultipleChoice", {}),
    "score": ("SequenceClassification", {"id2label": {0: "LABEL_0"}, "problem_type": "regression"}),
    "topics": ("SequenceClassification", TOPICS),
}


@pytest.mark.parametrize("task", ["task=rte", "task=prompts", "task=suite"])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_no_task_knows_are_kept(mergelab_command: Command, workplace: Path, kind: str, task: str) -> None:
    head, settings = KINDS[kind]
    bert(workplace / "base", 0, "MaskedLM", own=tokenizer())
    for name, seed in (("a", 1), ("b", 2)):
        bert(workplace / name, seed, head, own=tokenizer(), **settings)
    models = ["models.base=./base", "models.experts={a: ./a, b: ./b}", "models.head=average"]
    outcome = mergelab_command(*SAVED, *models, task)
    assert outcome.code == 0, outcome.err
    a, b, merged = (load_file(workplace / name / "model.safetensors") for name in ("a", "b", "merged"))
    assert merged.keys() == a.keys()
    for name in (name for name in a if not name.startswith("bert.")):
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    cls = getattr(transformers, f"BertFor{head}")
    model, found = cls.from_pretrained(workplace / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.config.id2label == cls.from_pretrained(workplace / "a").config.id2label
    assert model.config.problem_type == settings.get("problem_type")
    assert model.config.architectures == [f"BertFor{head}"]


@pytest.mark.parametrize("task", ["task=rte", "task=prompts"])
def test_a_method_with_a_model_for_each_expert_keeps_such_heads_too(
    mergelab_command: Command, workplace: Path, task: str
) -> None:
    bert(workplace / "base", 0, "MaskedLM", own=tokenizer())
    for name, seed in (("a", 1), ("b", 2)):
        bert(workplace / name, seed, "TokenClassification", own=tokenizer(), id2label=NER)
    models = ["models.base=./base", "models.experts={a: ./a, b: ./b}", "models.head=expert:b"]
    outcome = mergelab_command("method=emr", *SAVED[1:], *models, task)
    assert outcome.code == 0, outcome.err
    b, merged = (load_file(workplace / name / "model.safetensors") for name in ("b", "merged"))
    assert torch.equal(merged["classifier.weight"], b["classifier.weight"])
    assert merged.keys() == b.keys()


def test_given_labels_must_be_as_many_as_outputs(mergelab_command: Command, workplace: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        bert(workplace / name, seed, "TokenClassification", own=tokenizer(), id2label=NER)
    experts = "models.experts={a: ./a, b: {reference: ./b, labels: [one, two]}}"
    outcome = mergelab_command(*SAVED, "models.base=null", experts)
    assert outcome.code == 2
    assert "has 5 labels, and 2 are given for it" in outcome.err
    assert not (workplace / "merged").exists()


@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
def test_labels_are_matched_by_name_or_refused(mergelab_command: Command, workplace: Path, head: str) -> None:
    order = [4, 0, 1, 2, 3]
    others = {row: name.replace("PER", "ORG") for row, name in NER.items()}
    labels = {"a": NER, "turned": {row: NER[old] for row, old in enumerate(order)}, "other": others}
    for seed, (name, own) in enumerate(labels.items()):
        bert(workplace / name, seed, head, own=tokenizer(), id2label=own)
    outcome = mergelab_command(*SAVED, "models.base=null", "models.experts=[./turned,./a]")
    assert outcome.code == 0, outcome.err
    a, turned, merged = (load_file(workplace / name / "model.safetensors") for name in ("a", "turned", "merged"))
    back = [order.index(row) for row in range(5)]
    torch.testing.assert_close(
        merged["classifier.weight"], (a["classifier.weight"] + turned["classifier.weight"][back]) / 2
    )
    assert json.loads((workplace / "merged" / "config.json").read_text())["id2label"] == {
        str(row): name for row, name in NER.items()
    }
    outcome = mergelab_command(*SAVED, "models.base=null", "models.experts=[./other,./a]", "output=none")
    assert outcome.code == 2
    assert outcome.err.strip().count("\n") == 0
    assert "B-ORG" in outcome.err
    assert "id2label" in outcome.err
    assert not (workplace / "none").exists()
    outcome = mergelab_command(
        *SAVED, "models.base=null", "models.experts=[./other,./a]", "models.head=expert:other", "output=one"
    )
    assert outcome.code == 0, outcome.err
    one, other = (load_file(workplace / name / "model.safetensors") for name in ("one", "other"))
    assert torch.equal(one["classifier.weight"], other["classifier.weight"])
    saved = json.loads((workplace / "one" / "config.json").read_text())["id2label"]
    assert saved == {str(row): name for row, name in others.items()}


def test_a_head_whose_output_layer_cannot_be_told_is_not_reordered(mergelab_command: Command, workplace: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    names = [f"topic {row}" for row in range(16)]  # as many as the model is wide
    for seed, (name, labels) in enumerate((("a", names), ("b", names[::-1]))):
        config = RobertaConfig(
            vocab_size=len(WORDS) + 5,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            id2label=dict(enumerate(labels)),
        )
        torch.manual_seed(seed)
        RobertaForSequenceClassification(config).save_pretrained(workplace / name)
        tokenizer().save_pretrained(workplace / name)
    outcome = mergelab_command(*SAVED, "models.base=null", "models.experts=[./a,./b]")
    assert outcome.code == 2
    assert "it is not known which makes the outputs" in outcome.err
    assert not (workplace / "merged").exists()


def test_numbered_labels_that_nothing_measures_are_told(mergelab_command: Command, workplace: Path) -> None:
    bert(workplace / "a", 1, own=tokenizer())
    bert(workplace / "b", 2, own=tokenizer(), id2label={0: "LABEL_0", 1: "LABEL_1"})
    models = ["models.base=null", "task=rte"]
    outcome = mergelab_command(*SAVED, *models, "models.experts={a: ./a, b: ./b}")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.err.replace("│", " ").split())
    assert "b: labels are numbers only (LABEL_0, …), which are taken to be rte's (entailment, not_entailment)" in said
    assert "models.experts.b.labels=[...]" in said
    named = "models.experts={a: ./a, b: {reference: ./b, labels: [not_entailment, entailment]}}"
    outcome = mergelab_command(*SAVED, *models, named, "output=other")
    assert outcome.code == 0, outcome.err
    assert "numbers only" not in outcome.err
    a, b, merged = (load_file(workplace / name / "model.safetensors") for name in ("a", "b", "other"))
    torch.testing.assert_close(merged["classifier.bias"], (a["classifier.bias"] + b["classifier.bias"].flip(0)) / 2)
