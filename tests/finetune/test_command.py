"""``mergelab finetune``: experts for every kind of task that merges take, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from mergelab.finetune import training
from mergelab.report.provenance import read_provenance
from tests.conftest import Outcome
from tests.finetune.conftest import FEW, ROWS, rte, write
from tests.finetune.test_training import made, training_of
from tests.tasks.tiny import sentences

Finetune = Callable[..., Outcome]
RTE = ("task=rte", "base=./bert", "output=x", "tracking=none")


def with_validation(place: Path) -> None:
    """Give the data a validation split, which only the merge needs."""
    (place / "data").unlink()
    write(place / "data" / "rte", rte(sentences(ROWS, 0)))
    write(place / "data" / "rte", rte(sentences(ROWS, 9)), "validation")


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["weights", "adapter"])
def test_experts_are_merged_and_measured_by_the_command_that_is_shown(
    finetune: Finetune, mergelab_command: Finetune, place: Path, lora: tuple[str, ...]
) -> None:
    with_validation(place)
    out = made(finetune(*RTE, "seeds=[0,1]", "train.learning_rate=1e-2", *lora))
    (line,) = (line for line in out.splitlines() if line.startswith("merge them: "))
    command = shlex.split(line.removeprefix("merge them: "))
    assert command[:3] == ["python", "-m", "mergelab"]
    shown = made(mergelab_command(*command[3:], "eval.preflight=false", "tracking=none", "--format=json"))
    models = [row["model"] for row in json.loads(shown)["rows"]]
    assert any("seed-0" in model for model in models)
    assert any("seed-1" in model for model in models)


def test_an_adapter_names_its_base_and_has_the_names_of_the_labels(finetune: Finetune, place: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    made(finetune(*RTE, "lora.r=2", "lora.alpha=6"))
    folder = place / "x" / "seed-0"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == place / "bert"
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 6.0, "SEQ_CLS")
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "entailment", "1": "not_entailment"}
    # PEFT's own loading gives the loss that was measured.
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    assert any("lora_B" in name and parameter.any() for name, parameter in model.named_parameters())
    assert not (folder / "model.safetensors").exists()


def test_a_causal_model_learns_running_text(finetune: Finetune, place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made(
        finetune("task=wikitext", "base=./gpt2", "output=x", "tracking=none", "task.window=24", "task.stride=24",
                 "train.batch_size=4", "train.learning_rate=1e-3")
    )  # fmt: skip
    losses = [row["loss"] for row in training_of(place / "x" / "seed-0")["curve"]]
    assert losses[1] < losses[0]
    # The held-out rows are the last ones, read as one text; every token but the first follows once.
    rows = pq.read_table(place / "data" / "wikitext-2-raw-v1" / "train.parquet")["text"].to_pylist()
    pieces, before = [], ""
    for number, row in enumerate(rows):
        if row.strip():
            pieces.append(before + row)
            before = ""
        before += "\n\n" if number + 1 < len(rows) else ""
    text = "".join(pieces[-round(0.2 * len(pieces)) :])
    model = AutoModelForCausalLM.from_pretrained(place / "x" / "seed-0").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(place / "x" / "seed-0")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(1, len(tokens), 24):
            end = min(start + 24, len(tokens))
            begin = max(end - 25, 0)
            logits = model(tokens[None, begin : end - 1]).logits[0, start - 1 - begin :]
            total += float(functional.cross_entropy(logits, tokens[start:end], reduction="sum"))
            count += end - start
    assert total / count == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("base", ["gpt2", "t5"])
def test_models_that_write_learn_the_answers(finetune: Finetune, place: Path, base: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from mergelab.tasks.splits import holdout

    lora = () if base == "gpt2" else ("lora.r=2",)
    made(finetune("task=samsum", f"base=./{base}", "output=x", "tracking=none", "train.learning_rate=1e-3", *lora))
    found = training_of(place / "x" / "seed-0")
    table = pq.read_table(place / "data" / "samsum" / "train.parquet").to_pydict()
    members = holdout(np.zeros(ROWS, dtype=np.int64), 0.2, 0)[0]
    folder = place / "x" / "seed-0"
    if base == "t5":
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place / "t5"), folder)
        tokenizer = AutoTokenizer.from_pretrained(place / "t5")
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for at in members:
            texts = table["dialogue"][at], table["summary"][at].strip()
            prompt, answer = (tokenizer(text)["input_ids"] for text in texts)
            if base == "t5":
                # The library's own shift and loss; the tokenizer ends every text.
                labels = torch.tensor([answer])
                loss = model(input_ids=torch.tensor([prompt]), labels=labels).loss
                length = len(answer)
            else:
                ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])[:, :96]
                labels = ids.clone()
                labels[:, : len(prompt)] = -100
                length = int((labels[:, 1:] != -100).sum())
                loss = model(input_ids=ids, labels=labels).loss
            total, count = total + float(loss) * length, count + length
    assert total / count == pytest.approx(found["held_out"]["loss"], rel=1e-4)


def test_scores_are_learnt_as_a_regression(finetune: Finetune, place: Path) -> None:
    (place / "data").unlink()
    rows = rte(sentences(ROWS, 0))
    rows["label"] = [float(len(text.split()) % 6) for text in rows["sentence1"]]
    write(place / "data" / "stsb", {**rows, "label": np.array(rows["label"], dtype=np.float32)})
    made(finetune("task=stsb", "base=./bert", "output=x", "tracking=none"))
    config = json.loads((place / "x" / "seed-0" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert set(training_of(place / "x" / "seed-0")["held_out"]) == {"loss", "pearson", "spearmanr"}


def test_card_and_provenance_say_how_it_was_made_without_this_machines_paths(finetune: Finetune, place: Path) -> None:
    made(finetune("task=rte", f"base={place}/bert", f"output={place}/x", "seeds=[4]"))
    folder = place / "x" / "seed-4"
    record = read_provenance(folder)
    assert record is not None
    assert (record.method, record.parameters["seed"], record.parameters["epochs"]) == ("finetune", 4, 2)
    assert record.base is not None
    assert record.base.model == "bert"
    assert record.run
    card = (folder / "README.md").read_text()
    assert str(place) not in card + (folder / "mergelab.json").read_text()
    assert "48 examples of the training split of `rte`" in card
    assert record.run in card
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def hidden(place: Path) -> None:
    (place / "data").unlink()
    write(place / "data" / "rte", {**rte(sentences(ROWS, 0)), "label": [-1] * ROWS})


def no_training(place: Path) -> None:
    (place / "data").unlink()
    write(place / "data" / "rte", rte(sentences(ROWS, 0)), "validation")


def a_file(place: Path) -> None:
    (place / "x").write_text("")


def other_things(place: Path) -> None:
    (place / "x").mkdir()
    (place / "x" / "thesis.txt").write_text("")


def an_adapter(place: Path) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")


def nothing(_place: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "prepare", "said"),
    [
        (RTE, no_training, "task=rte: fine-tuning needs its training split: rte: no data of the split train in"),
        (RTE, no_training, "it has validation (train.split=... chooses)"),
        (RTE, hidden, "task=rte: the labels of its training split are hidden"),
        (RTE, a_file, "output=x: is a file"),
        (RTE, other_things, "output=x: the folder is not empty"),
        ((*RTE, "seeds=[0,1,0]"), nothing, "seeds=[0, 1, 0]: must not repeat a seed"),
        ((*RTE, "seeds=[]"), nothing, "seeds=[]"),
        ((*RTE, "seeds=[-1]"), nothing, "seeds.0=-1: must be at least 0"),
        ((*RTE, "seeds=[4294967296]"), nothing, "seeds.0=4294967296: must be less than"),
        ((*RTE, "shards=0"), nothing, "shards=0: must be at least 1"),
        ((*RTE, "shards=49"), nothing, "shards=49: 48 examples are left"),
        ((*RTE, "train.epochs=0"), nothing, "train.epochs=0: must be at least 1"),
        ((*RTE, "train.learning_rate=-1e-3"), nothing, "train.learning_rate=-0.001: must be greater than 0"),
        ((*RTE, "train.holdout=0"), nothing, "train.holdout=0: must be greater than 0"),
        ((*RTE, "train.holdout=1"), nothing, "train.holdout=1: must be less than 1"),
        ((*RTE, "train.batch_size=0"), nothing, "train.batch_size=0: must be at least 1"),
        ((*RTE, "train.max_length=1000"), nothing, "train.max_length=1000: the model allows 96"),
        ((*RTE, "lora.r=0"), nothing, "lora.r=0: must be at least 1"),
        ((*RTE, "lora.alpha=8"), nothing, "lora.alpha: belongs to a LoRA adapter"),
        (
            (*RTE, "lora.r=2", "lora.targets=[nowhere]"),
            nothing,
            "lora.targets=['nowhere']: ./bert has no layer",
        ),
        ((*RTE, "device=cuda:1"), nothing, "device=cuda:1: write CUDA_VISIBLE_DEVICES=1"),
        ((*RTE, "task.limit=5"), nothing, "task.limit: is of the examples that models are measured on"),
        ((*RTE, "task.splits=[train]"), nothing, "task.splits=['train']: experts are trained on train"),
        ((*RTE, "models.experts=[./bert]"), nothing, "models.experts: experts are made here, not merged"),
        (
            (*RTE, "base=./t5", "task=wikitext"),
            nothing,
            "does not fit task=wikitext, which needs a model",
        ),
        ((*RTE, "base=./bert", "task=samsum"), nothing, "base=./bert: BertForMaskedLM does not fit task=samsum"),
        ((*RTE, "base=./adapter"), an_adapter, "base=./adapter: is an adapter"),
        ((*RTE, "base=./nowhere"), nothing, "model './nowhere': the folder does not exist"),
        (("task=prompts", "base=./gpt2", "output=x"), nothing, "task=prompts: has no training examples"),
        (("task=glue7", "base=./bert", "output=x"), nothing, "task=glue7: a suite; fine-tune on one task at a time"),
        ((*RTE, "train.epoch=3"), nothing, "train.epoch: no such key; did you mean 'train.epochs'?"),
        (("-m", *RTE), nothing, "one recipe is trained at a time"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else getattr(value, "__name__", None) or "",
)
def test_bad_input_is_one_line_before_anything_is_written(
    finetune: Finetune, place: Path, arguments: tuple[str, ...], prepare: Callable[[Path], None], said: str
) -> None:
    prepare(place)
    before = sorted(place.rglob("*"))
    outcome = finetune(*(one for one in FEW if one.partition("=")[0] not in " ".join(arguments)), *arguments)
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert len(line) <= 407
    assert sorted(place.rglob("*")) == before


def test_another_recipe_in_the_same_folder_is_refused_and_more_seeds_are_not(finetune: Finetune, place: Path) -> None:
    made(finetune(*RTE, "train.epochs=1"))
    weights = (place / "x" / "seed-0" / "model.safetensors").read_bytes()
    for changed, said in (
        ("train.learning_rate=1e-3", "train.learning_rate was 5e-05 and is 0.001 now"),
        ("shards=2", "shards was 1 and is 2 now"),
        ("lora.r=2", "lora.r was null and is 2 now"),
    ):
        outcome = finetune(*RTE, "train.epochs=1", changed)
        assert outcome.code == 2
        assert said in outcome.err
    write(place / "other" / "rte", rte(sentences(ROWS, 5)))
    assert "data was" in finetune(*RTE, "train.epochs=1", "task.data_dir=other").err
    made(finetune(*RTE, "train.epochs=1", "seeds=[0,1]"))
    assert (place / "x" / "seed-0" / "model.safetensors").read_bytes() == weights
    assert (place / "x" / "seed-1").is_dir()


def test_a_recipe_that_is_older_than_a_setting_was_made_with_its_default(finetune: Finetune, place: Path) -> None:
    made(finetune(*RTE, "train.epochs=1"))
    file = place / "x" / "finetuning.json"
    recipe = json.loads(file.read_text())
    del recipe["train"]["group_by_length"]
    file.write_text(json.dumps(recipe))
    outcome = finetune(*RTE, "train.epochs=1", "train.group_by_length=true")
    assert outcome.code == 2
    assert "train.group_by_length was false and is true now" in outcome.err
    made(finetune(*RTE, "train.epochs=1", "seeds=[0,1]"))


def test_a_base_whose_weights_are_not_its_own_is_refused(finetune: Finetune, place: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = (place / "bert").resolve()
    (place / "bert").unlink()
    (place / "bert").mkdir()
    for file in target.iterdir():
        (place / "bert" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "bert" / "model.safetensors")
    save_file({f"other.{name}": value for name, value in tensors.items()}, place / "bert" / "model.safetensors")
    outcome = finetune(*RTE)
    assert outcome.code == 2
    assert "its weights lack" in outcome.err


def test_a_loss_that_is_no_number_ends_the_training(
    finetune: Finetune, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = training.loss_sum
    monkeypatch.setattr(training, "loss_sum", lambda *arguments: own(*arguments) * float("inf"))
    outcome = finetune(*RTE)
    assert outcome.code == 2
    assert outcome.err == "error: the loss is inf at step 1; a lower train.learning_rate may help\n"
    assert not (place / "x" / "seed-0").exists()


def test_the_table_has_the_formats_of_other_tables(finetune: Finetune) -> None:
    shown = json.loads(made(finetune(*RTE, "train.epochs=1", "--format=json")))
    (row,) = shown["rows"]
    assert (row["expert"], row["epoch"], row["folder"]) == ("seed-0", 1, "x/seed-0")
    assert pa.types.is_floating(pa.array([row["loss"]]).type)
