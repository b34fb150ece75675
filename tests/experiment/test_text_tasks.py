"""Ready tasks of generation from the command line: what is reported is what a plain loop over the prompts finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sacrebleu
import torch

from mergelab.tasks.data import TaskData, load_data
from mergelab.tasks.loading import load_task
from mergelab.tasks.prompting import answer
from tests.conftest import Outcome
from tests.standins import glue_table
from tests.tasks.tiny import byte_tokenizer


def read_result(folder: Path, task: str) -> dict[str, dict[str, float]]:
    """Each model's reported values, by the name of its folder."""
    (file,) = folder.glob("outputs/runs/*/*/result.json")
    return {
        model["label"].removeprefix("./"): {
            name: score["value"] for name, score in model["results"][task]["report"].items()
        }
        for model in json.loads(file.read_text())["models"]
    }


def plain_texts(folder: Path, data: TaskData, **options: Any) -> list[str]:
    """Generate with transformers alone, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    is_pair = bool(json.loads((folder / "config.json").read_text()).get("is_encoder_decoder"))
    model = (AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM).from_pretrained(folder).eval()
    texts = []
    with torch.no_grad():
        for (prompt,) in data.texts:
            inputs = tokenizer(prompt, return_tensors="pt")
            written = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, **options
            )[0]
            new = written[1 if is_pair else inputs["input_ids"].shape[1] :]
            texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def word_t5(texts: Sequence[str]) -> tuple[Any, Any]:
    """Build a T5 with random weights, whose tokens are the words of ``texts``, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(wrapped), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), wrapped


def teach(model: Any, tokenizer: Any, data: TaskData, seed: int, steps: int) -> None:
    """Train a text-to-text model to answer the prompts in the words of the references."""
    prompts, answers = [text for (text,) in data.texts], [said for (said,) in data.references]  # type: ignore[union-attr]
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(prompts), (24,)).tolist()
        inputs = tokenizer([prompts[i] for i in rows], padding=True, return_tensors="pt")
        wanted = tokenizer([answers[i] for i in rows], padding=True, return_tensors="pt")["input_ids"]
        loss = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=wanted.masked_fill(wanted == 0, -100),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_experts_that_answer_in_words_are_scored_as_a_plain_loop_scores_them(
    mergelab_command: Callable[..., Outcome], workplace: Path
) -> None:
    task = load_task("t5_sst2")
    train = [workplace / f"train-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate([*train, workplace]):
        folder.mkdir(exist_ok=True)
        pq.write_table(glue_table("sst2", 240 if folder in train else 40, seed), folder / "validation.parquet")
    taught, data = [load_data(task, data_dir=folder) for folder in train], load_data(task, data_dir=workplace)
    model, tokenizer = word_t5([*(text for (text,) in data.texts), "positive negative"])
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, own, steps in (("base", None, 0), ("a", taught[0], 60), ("b", taught[1], 60)):
        model.load_state_dict(initial)
        if own is not None:
            teach(model, tokenizer, own, seed=len(name), steps=steps)
        model.save_pretrained(workplace / name)
        tokenizer.save_pretrained(workplace / name)

    outcome = mergelab_command(
        "method=task_arithmetic", "method.lambda=0.2", "task=t5_sst2", "models.base=./base", "models.experts=[./a,./b]",
        "task.data_dir=.", "output=merged", "tracking=none",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "invalid_rate" in outcome.out

    reported = read_result(workplace, "t5_sst2")
    assert len(reported) == 4
    assert data.references is not None
    for name, found in reported.items():
        texts = plain_texts(workplace / (name if name in ("base", "a", "b") else "merged"), data, max_new_tokens=10)
        hits = [text == said for text, (said,) in zip(texts, data.references, strict=True)]
        invalid = [text not in ("negative", "positive") for text in texts]
        assert found == {"accuracy": np.mean(hits), "invalid_rate": np.mean(invalid)}
    assert reported["a"]["accuracy"] > 0.7
    assert (reported["a"]["invalid_rate"], reported["base"]["invalid_rate"]) == (0.0, 1.0)


def byte_gpt2(folder: Path, seed: int) -> None:
    """Save a GPT-2 with random weights that writes bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=400, n_embd=32, n_layer=2, n_head=2, initializer_range=0.6,
        bos_token_id=len(tokenizer) - 1, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["e2e_nlg", "gsm8k"])
def test_texts_for_real_prompts_are_scored_as_a_plain_loop_scores_them(
    name: str, mergelab_command: Callable[..., Outcome], workplace: Path, generation_data: Path
) -> None:
    task = load_task(name)
    for seed, folder in enumerate(("base", "a", "b")):
        byte_gpt2(workplace / folder, seed)
    shots = ["task.fewshot_examples=null", "task.num_fewshot=null"] if name == "gsm8k" else []
    (workplace / name).mkdir()
    rows = pq.read_table(generation_data / name / f"{task.splits[0]}.parquet").slice(0, 40)
    rows = rows.filter([len(text) < 200 for text in rows.column(0).to_pylist()])
    pq.write_table(rows, workplace / name / f"{task.splits[0]}.parquet")

    outcome = mergelab_command(
        "method=soup", f"task={name}", *shots, "models=gpt2_law_recipes", "models.base=./base",
        "models.experts=[./a,./b]", "task.data_dir=.", "task.decoding.max_new_tokens=40", "eval.preflight=false",
        "output=merged", "tracking=none", "eval.bootstrap=50",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err

    reported = read_result(workplace, name)
    data = load_data(task, data_dir=workplace)
    if shots:
        data = TaskData(**{**vars(data), "texts": tuple((text.rsplit("\n\n", 1)[1],) for (text,) in data.texts)})
    assert data.references is not None
    for label, found in reported.items():
        folder = workplace / (label if label in ("base", "a", "b") else "merged")
        texts = plain_texts(folder, data, max_new_tokens=40)
        if name == "gsm8k":
            numbers = [answer("number", text.split("\nQ:")[0]) for text in texts]
            assert found["invalid_rate"] == np.mean([not number for number in numbers])
            hits = [number == said for number, (said,) in zip(numbers, data.references, strict=True)]
            assert found["exact_match"] == np.mean(hits)
        else:
            most = max(map(len, data.references))
            streams = [[said[i] if i < len(said) else None for said in data.references] for i in range(most)]
            assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score / 100)
            assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score / 100)
    measured = [found["chrf" if name == "e2e_nlg" else "invalid_rate"] for found in reported.values()]
    assert len(set(measured)) > 1, "models must differ"
