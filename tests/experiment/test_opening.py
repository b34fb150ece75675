"""Opening models is one function for the command line and the library: the same checks, the same bits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    pipeline,
)

import mergelab as ml
from mergelab.errors import ConfigError, KeyMismatch, MergeWarning, ModelError, NonFinite, ShapeMismatch
from mergelab.experiment.label_orders import Labels
from mergelab.experiment.label_orders import label_orders as orders_and_labels
from mergelab.experiment.opening import MergeScope, open_models
from mergelab.experiment.sources import ModelSource, from_given
from mergelab.weights.source import DictSource
from tests.conftest import Outcome
from tests.standins import BERT_BASE, BIN_ONLY, NAMED_LABELS, OTHER_LABEL_ORDER, glue_table
from tests.tasks.tiny import classifier as tiny_classifier
from tests.vocabularies import bert

Command = Callable[..., Outcome]
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEAD = ("classifier.weight", "classifier.bias")


def classifier(seed: int, *labels: str, kind: type = BertForSequenceClassification) -> Any:
    torch.manual_seed(seed)
    names = dict(enumerate(labels or ("LABEL_0", "LABEL_1")))
    return kind(BertConfig(**SIZE, vocab_size=20, id2label=names, label2id={v: k for k, v in names.items()}))


def sources(*models: Any) -> list[ModelSource]:
    return [from_given(model, f"models[{index}]") for index, model in enumerate(models)]


def label_orders(models: list[ModelSource]) -> list[Any]:
    return orders_and_labels([Labels(model.name, model.labels) for model in models]).orders


def without_warnings(models: list[ModelSource]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return label_orders(models)


@pytest.fixture
def folders(bert_checkpoints: Mapping[str, Path]) -> dict[str, Path]:
    """A base; an expert with only numbers for labels; one with names; one with the names in the other order."""
    return {
        "base": bert_checkpoints[BERT_BASE],
        "numbered": bert_checkpoints[BIN_ONLY],
        "other": bert_checkpoints[OTHER_LABEL_ORDER],
        "named": bert_checkpoints[NAMED_LABELS],
    }


# ------------------------------------------------------------------------------------------------- both ways, same bits


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.3}), ("task_arithmetic", {"weights": [1.0, -0.5, 2.0]}), ("soup", {})],
)
def test_the_command_line_and_the_library_merge_the_same_models_to_the_same_bits(
    mergelab_command: Command, folders: dict[str, Path], workplace: Path, method: str, parameters: dict[str, Any]
) -> None:
    experts = [folders[name] for name in ("named", "other", "numbered")]
    # Sums are taken in the order of the names; these sort as the folders do.
    given = "{" + ", ".join(f"{'abc'[sorted(experts).index(folder)]}: {folder}" for folder in experts) + "}"
    spelled = [f"method.{key}={value}" for key, value in parameters.items()]
    outcome = mergelab_command(
        f"models.base={folders['base']}", f"models.experts={given}", "task=rte", "evaluate=false", "output=merged",
        "models.leave_out=[0]", "models.passthrough=['*word_embeddings*']", f"method={method}", *spelled,
        "tracking=none",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    with pytest.warns(MergeWarning, match=r"labels are numbers only \(LABEL_0, …\), which are taken to mean"):
        pipe = getattr(ml, method)(
            [folders["base"], *experts], task="text-classification", base_index=0, leave_out=[0],
            passthrough=["*word_embeddings*", "classifier.*"], **parameters,
        )  # fmt: skip
    command, library = load_file(workplace / "merged" / "model.safetensors"), pipe.model.state_dict()
    assert command.keys() == library.keys()
    assert [name for name in command if not torch.equal(command[name], library[name])] == []


# ------------------------------------------------------------------------------------------------------- architectures


def test_experts_of_different_architectures_are_refused_though_their_tensors_have_the_same_names() -> None:
    pair = [classifier(0), classifier(1, kind=BertForTokenClassification)]
    said = r"one architecture: models\[0\] is a BertForSequenceClassification, models\[1\] is a BertForTokenClassif"
    with pytest.raises(ModelError, match=said):
        ml.soup([pair[0], pair[1]])


def test_a_users_subclass_of_a_model_is_that_model(tmp_path: Path) -> None:
    class Mine(BertForSequenceClassification):
        pass

    classifier(0).save_pretrained(tmp_path / "saved")
    merged = ml.soup([tmp_path / "saved", classifier(1, kind=Mine)])
    assert type(merged) is Mine


def test_a_base_without_a_head_is_recognised_by_the_experts_class_where_names_do_not_show_it() -> None:
    size = {**SIZE, "num_hidden_layers": 1, "vocab_size": 20, "tie_word_embeddings": True}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**size))
    experts = [LlamaForSequenceClassification(LlamaConfig(**size)) for _ in range(2)]
    merged = ml.task_arithmetic([base, *experts], lambda_=0.5)
    torch.testing.assert_close(merged.score.weight, (experts[0].score.weight + experts[1].score.weight) / 2)


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_matched_as_those_of_tasks_are() -> None:
    models = sources(classifier(0, "Not-Entailment", "ENTAILED"), classifier(1, "entailment", "not_entailment"))
    assert without_warnings(models) == [(1, 0), None]
    merged = ml.soup([model.given for model in models])
    first, second = (model.given.classifier.weight for model in models)
    torch.testing.assert_close(merged.classifier.weight, (first.flip(0) + second) / 2)


def test_models_of_one_score_are_merged_whatever_the_score_is_called() -> None:
    models = [classifier(0, "LABEL_0"), classifier(1, "similarity"), classifier(2, "score")]
    assert without_warnings(sources(*models)) == [None] * 3


def test_three_labels_come_in_the_last_models_order() -> None:
    models = [classifier(0, "a", "b", "c"), classifier(1, "c", "a", "b")]
    assert without_warnings(sources(*models)) == [(2, 0, 1), None]
    merged = ml.soup(models)
    expected = (models[0].classifier.bias[[2, 0, 1]] + models[1].classifier.bias) / 2
    torch.testing.assert_close(merged.classifier.bias, expected)


def test_labels_that_cannot_be_matched_are_refused() -> None:
    said = r"the labels of models\[0\] \(negative, positive\) cannot be matched with models\[1\]'s \(equivalent, not"
    with pytest.raises(ModelError, match=said):
        ml.soup([classifier(0, "negative", "positive"), classifier(1, "equivalent", "not_equivalent")])
    with pytest.raises(ModelError, match="cannot be matched"):
        ml.soup([classifier(0, "a", "b", "b"), classifier(1, "b", "a", "b")])


def test_numbered_labels_are_taken_for_those_that_most_models_name() -> None:
    numbered, named, other = classifier(0), classifier(1, "yes", "no"), classifier(2, "no", "yes")
    with pytest.warns(MergeWarning, match=r"^models\[0\]: labels are numbers only .* yes, no, as in models\[1\]$"):
        assert label_orders(sources(numbered, named)) == [None, None]
    said = r"models\[2\]: labels are numbers only .* yes, no, as in models\[0\], though models\[1\] has another order"
    with pytest.warns(MergeWarning, match=said):
        assert label_orders(sources(named, other, numbered)) == [None, (1, 0), None]
    with pytest.warns(MergeWarning, match=r"yes, no, as in models\[2\], though models\[1\]"):
        assert label_orders(sources(numbered, other, named, named)) == [None, (1, 0), None, None]
    with pytest.warns(MergeWarning, match=r"yes, no, as in models\[0\], though models\[2\]"):
        assert label_orders(sources(named, numbered, other)) == [(1, 0), (1, 0), None]
    turned = classifier(3, "LABEL_1", "LABEL_0")
    assert without_warnings(sources(numbered, turned)) == [(1, 0), None]


def test_the_order_is_the_last_experts_wherever_the_base_stands() -> None:
    expert, base = classifier(0, "yes", "no"), classifier(1, "no", "yes")
    merged = ml.task_arithmetic([expert, base], base_index=-1, lambda_=1.0)
    assert merged.config.id2label == {0: "yes", 1: "no"}
    torch.testing.assert_close(merged.classifier.weight, expert.classifier.weight)


def test_a_base_whose_head_is_not_merged_may_have_other_labels() -> None:
    models = [classifier(0, "negative", "positive"), classifier(1, "yes", "no"), classifier(2, "yes", "no")]
    with pytest.raises(ModelError, match=r"the labels of models\[0\]"):
        ml.task_arithmetic(models)
    merged = ml.task_arithmetic(models, passthrough=["classifier.*"])
    torch.testing.assert_close(merged.classifier.bias, (models[1].classifier.bias + models[2].classifier.bias) / 2)


# -------------------------------------------------------------------------------------------------------------- tokens


def test_pipelines_whose_tokens_differ_are_refused(tmp_path: Path) -> None:
    one, turned = bert(tmp_path / "one", 0), bert(tmp_path / "turned", 1, reverse=True)
    pipes = [pipeline("text-classification", model=str(folder)) for folder in (one, turned)]
    with pytest.raises(ModelError, match=r"the models' tokens differ in 6 rows: 5 is .* in models\[0\]"):
        ml.soup(pipes)
    with pytest.raises(ModelError, match="the models' tokens differ in 6 rows"):
        ml.soup([str(one), pipes[1]], task="text-classification")
    assert ml.soup([str(one), pipes[0]]).tokenizer is pipes[0].tokenizer


# ------------------------------------------------------------------------------------- tensors that skip the merge


def test_what_passes_through_must_be_finite_and_of_one_shape() -> None:
    bad = {"body": torch.zeros(2), "head": torch.tensor([1.0, float("nan")])}
    good = {"body": torch.zeros(2), "head": torch.zeros(2)}
    with pytest.raises(NonFinite, match=r"models\[1\]: head holds NaN or infinity"):
        ml.soup([good, bad], passthrough=["head"])
    with pytest.raises(
        ShapeMismatch, match=r"head cannot be averaged: it is float32\[1\] in models\[0\] and float32\[2\]"
    ):
        ml.soup([{"body": torch.zeros(2), "head": torch.zeros(1)}, good], passthrough=["head"])
    with pytest.raises(ModelError, match="head holds integers, which are copied"):
        ml.soup([{**good, "head": torch.tensor([at])} for at in (1, 2)], passthrough=["head"])
    with pytest.raises(KeyMismatch, match=r"models\[1\]: has no tensor 'head'"):
        ml.soup([good, {"body": torch.zeros(2)}], passthrough=["head"])


def test_a_layer_that_stays_the_bases_must_be_finite() -> None:
    dicts = [{"layer.0.w": torch.tensor([value]), "x": torch.zeros(1)} for value in (float("inf"), 1.0)]
    with pytest.raises(NonFinite, match=r"models\[0\]: layer.0.w holds NaN or infinity"):
        ml.task_arithmetic(dicts, leave_out=[0])


def test_a_head_with_nan_is_not_written(mergelab_command: Command, folders: dict[str, Path], workplace: Path) -> None:
    import shutil

    shutil.copytree(folders["named"], workplace / "a")
    tensors = load_file(workplace / "a" / "model.safetensors")
    tensors["classifier.bias"][1] = float("nan")
    save_file(tensors, workplace / "a" / "model.safetensors", metadata={"format": "pt"})
    settings = [f"models.base={folders['base']}", f"models.experts={{a: ./a, b: {folders['other']}}}", "task=rte"]
    outcome = mergelab_command(*settings, "evaluate=false", "output=merged", "tracking=none")
    assert outcome.code == 2
    assert "a: classifier.bias holds NaN or infinity" in outcome.err
    assert not (workplace / "merged").exists()


def test_a_pattern_is_one_of_todays_names() -> None:
    def old(value: float) -> dict[str, torch.Tensor]:
        return {"x.LayerNorm.gamma": torch.full((2,), value), "y": torch.zeros(2)}

    assert ml.soup([old(1.0), old(2.0)], passthrough=["x.LayerNorm.weight"])["x.LayerNorm.weight"].tolist() == [1.5] * 2
    with pytest.raises(ConfigError, match=r"no tensor matches 'x.LayerNorm.gamma'; did you mean 'x.LayerNorm.weight'"):
        ml.soup([old(1.0), old(2.0)], passthrough=["x.LayerNorm.gamma"])


def test_the_record_says_what_was_opened() -> None:
    base, *experts = sources(classifier(0, "b", "a"), classifier(1, "b", "a"), classifier(2, "a", "b"))
    merged = open_models(base, experts, MergeScope(passthrough=["*pooler*"], separate_heads=False, key=""))
    assert merged.architecture is not None
    assert merged.architecture.name == "BertForSequenceClassification"
    assert merged.head_names == HEAD
    assert merged.label_orders == ((1, 0), None)
    assert set(HEAD) <= set(merged.aligned.names)
    assert sorted(merged.passed_through) == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    separate = open_models(base, experts, MergeScope())
    assert not set(HEAD) & set(separate.aligned.names)
    assert separate.label_orders == (None, None)
    assert not set(HEAD) & {*separate.expert_backbone(0), *separate.passed_through}


# ---------------------------------------------------------------------------------------------- functions of the user's


def test_a_users_function_neither_gets_nor_returns_nan() -> None:
    dicts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([float("nan")])}]

    @ml.layer_merge
    def largest(models: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(models).nan_to_num(0).max(dim=0).values

    @ml.layer_merge
    def ratio(models: list[torch.Tensor]) -> torch.Tensor:
        return models[0] / (models[1] - models[1])

    with pytest.raises(NonFinite, match=r"models\[1\]: w holds NaN or infinity"):
        largest(dicts)
    with pytest.raises(NonFinite, match="ratio: w holds NaN or infinity"):
        ratio([dicts[0], dicts[0]])


def test_a_users_function_gives_back_tied_tensors_under_every_name() -> None:
    def tied(value: float) -> dict[str, torch.Tensor]:
        weight = torch.full((3, 2), value)
        return {"wte.weight": weight, "lm_head.weight": weight}

    @ml.layer_merge
    def mean(models: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(models).mean(dim=0)

    merged = mean([tied(1.0), tied(3.0)])
    assert merged.keys() == ml.soup([tied(1.0), tied(3.0)]).keys() == {"wte.weight", "lm_head.weight"}
    assert torch.equal(merged["lm_head.weight"], torch.full((3, 2), 2.0))


def test_a_modules_running_statistics_are_merged_as_its_checkpoints_are() -> None:
    def network(mean: float) -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        module[1].running_mean.fill_(mean)
        module[1].num_batches_tracked.fill_(int(mean))
        module[1].register_buffer("scratch", torch.full((1,), mean), persistent=False)
        return module

    merged: Any = ml.soup([network(1.0), network(3.0)])
    assert merged[1].running_mean.tolist() == [2.0] * 3
    assert merged[1].scratch.tolist() == [3.0]
    assert merged[1].num_batches_tracked == 3


def test_a_source_that_is_no_model_has_neither_labels_nor_tokens() -> None:
    source = ModelSource("x", DictSource("x", {"w": torch.zeros(1)}), {"w": torch.zeros(1)})
    assert source.architecture is None
    assert source.labels == ()
    assert source.tokens is None
    module = nn.Linear(2, 2)
    module.config = {"vocab_size": 7}  # type: ignore[assignment]
    assert from_given(module, "m").architecture is None
    assert type(ml.soup([module, nn.Linear(2, 2)])) is nn.Linear


def test_a_folder_whose_class_transformers_does_not_have_is_named(tmp_path: Path) -> None:
    classifier(0).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "architectures": None, "model_type": "x"}))
    with pytest.raises(ModelError, match="names no model class that transformers has"):
        ml.soup([tmp_path / "a", classifier(1)])


def test_classifiers_and_regressors_merge_where_each_has_its_own_head(
    mergelab_command: Command, workplace: Path
) -> None:
    for name, outputs in (("base", 2), ("rte", 2), ("stsb", 1)):
        model, tokenizer = tiny_classifier("bert", outputs)
        model.config.problem_type = "regression" if outputs == 1 else "single_label_classification"
        model.save_pretrained(workplace / name)
        tokenizer.save_pretrained(workplace / name)
    for task in ("rte", "stsb"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 40, 1), workplace / "data" / task / "validation.parquet")
    models = ("models.base=./base", "models.experts={rte: ./rte, stsb: ./stsb}", "method=soup")
    suite = ("task=suite", "task.members=[rte,stsb]", "task.data_dir=data", "eval.preflight=false", "tracking=none")
    outcome = mergelab_command(*suite, *models, "models.head=per_task", "output=merged")
    assert outcome.code == 0, outcome.err
    for task, outputs in (("rte", 2), ("stsb", 1)):
        written = AutoModelForSequenceClassification.from_pretrained(workplace / "merged" / task)
        assert (written.config.num_labels, written.classifier.out_features) == (outputs, outputs)
        assert written.config.problem_type == ("regression" if outputs == 1 else "single_label_classification")
    (file,) = workplace.glob("outputs/runs/*/*/result.json")
    base, rte, stsb, merged = json.loads(file.read_text())["models"]
    assert set(base["results"]) == set(merged["results"]) == {"rte", "stsb"}
    assert (set(rte["results"]), set(stsb["results"])) == ({"rte"}, {"stsb"})
    outcome = mergelab_command(*suite, *models, "models.head=average")
    assert outcome.code == 2
