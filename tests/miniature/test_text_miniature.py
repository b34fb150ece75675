from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mergelab.miniature import text
from mergelab.miniature.text.recipe import COLUMNS, SETS, Base, LanguageModels, Summarisers, TextExpert, TextRecipe
from tests.conftest import Outcome

pytestmark = pytest.mark.slow

_BASE = Base(hidden=16, layers=1, heads=2, documents=100, share=0.1, batch=8, rate=1e-3)
# Enough to go through every step, far too little to learn anything: for tests of how the miniatures are made.
SKETCH = TextRecipe(
    validation=6,
    law_recipes=LanguageModels(_BASE, (TextExpert(50, 1e-3, documents=24, replay=4),), vocabulary=500),
    summaries=Summarisers(_BASE, tuple(TextExpert(50 + n, 1e-3, documents=16) for n in range(3)), feed_forward=16),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, text.TextSet]:
    """Both miniatures, hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGELAB_CACHE", str(tmp_path_factory.mktemp("sketches")))
        return {name: text.build(name, recipe=SKETCH) for name in SETS}


@pytest.fixture
def sketched(sketches: Mapping[str, text.TextSet], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the sketches where the miniatures would be built."""
    monkeypatch.setattr(text, "build", lambda name, **_: sketches[name])


def _folders(found: text.TextSet) -> dict[str, Path]:
    return {"base": found.base, **{name: at for named in found.experts.values() for name, at in named.items()}}


def _bytes(found: text.TextSet) -> dict[str, str]:
    files = {
        f"{name}/{file}": at / file
        for name, at in _folders(found).items()
        for file in ("model.safetensors", "tokenizer.json")
    }
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _rows(found: text.TextSet, task: str, split: str = "validation") -> list[tuple[str, ...]]:
    import pyarrow.parquet as pq

    table = pq.read_table(found.data[task] / f"{split}.parquet")
    return list(zip(*(table[column].to_pylist() for column in table.column_names), strict=True))


# ------------------------------------------------------------------------------------------------------- how it is made


@pytest.mark.parametrize("name", SETS)
def test_two_builds_give_the_same_bytes_whatever_the_threads(
    name: str, sketches: Mapping[str, text.TextSet], cache: Path
) -> None:
    import torch

    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    torch.set_num_threads(other)
    try:
        again = text.build(name, recipe=SKETCH)
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(threads)
    assert again.base != sketches[name].base
    made = _bytes(again)
    assert made == _bytes(sketches[name])
    weights = [digest for file, digest in made.items() if file.endswith("safetensors")]
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("task", COLUMNS)
def test_data_have_the_columns_of_the_task_and_nothing_that_was_trained_on(
    task: str, sketches: Mapping[str, text.TextSet]
) -> None:
    import pyarrow.parquet as pq

    from mergelab.tasks.loading import load_task

    (name,) = (name for name, kinds in SETS.items() if any(task in about.tasks for about in kinds.values()))
    spec = load_task(task)
    table = pq.read_table(sketches[name].data[task] / "validation.parquet")
    assert [*spec.columns, *spec.references] == table.column_names
    assert spec.splits == ("validation",)
    held_out = {row[0] for row in _rows(sketches[name], task)}
    assert len(held_out) == table.num_rows == SKETCH.validation
    assert not held_out & {row[0] for row in _rows(sketches[name], task, "train")}


def test_an_interrupted_build_leaves_nothing_that_looks_finished(cache: Path) -> None:
    def interrupt(_message: str, _done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text.build("law_recipes", progress=interrupt, recipe=SKETCH)
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.parent.parent == cache / "mini"]
    told: list[float] = []
    assert text.build("law_recipes", progress=lambda _message, done: told.append(done), recipe=SKETCH).base.is_dir()
    assert told == sorted(told)
    assert told
    assert all(0 <= done <= 1 for done in told)


def test_a_second_call_finds_the_miniature_without_importing_torch(cache: Path) -> None:
    made = text.build("law_recipes", recipe=SKETCH)
    code = (
        "import sys; from mergelab.miniature import text; from mergelab.miniature.text.recipe import *\n"
        f"print(text.build('law_recipes', recipe={SKETCH!r}).base); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(made.base)


def test_the_language_models_tokenizer_gives_text_back_as_it_was(sketches: Mapping[str, text.TextSet]) -> None:
    from transformers import AutoTokenizer

    found = sketches["law_recipes"]
    tokenizer = AutoTokenizer.from_pretrained(found.base)
    assert tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id]) == ["<|endoftext|>"]
    passages = [row[0] for task in ("legal", "recipes") for row in _rows(found, task)]
    for passage in (*passages, "A zeppelin over Zürich, 3 × 4."):
        assert tokenizer.decode(tokenizer(passage)["input_ids"]) == passage


def test_a_saved_summariser_knows_where_to_begin_and_end(sketches: Mapping[str, text.TextSet]) -> None:
    from transformers import AutoTokenizer, EncoderDecoderModel

    found = sketches["summaries"]
    folder = found.experts["dialogues"]["dialogues-1"]
    model, tokenizer = EncoderDecoderModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    settings = model.generation_config
    special = (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id)
    assert special == (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    rows = [row for task in ("samsum", "xsum") for row in _rows(found, task)]
    inputs = tokenizer([row[0] for row in rows], padding=True, return_tensors="pt")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert inputs["input_ids"].shape[1] <= tokenizer.model_max_length <= model.config.encoder.max_position_embeddings
    written = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4)
    assert written[:, 0].eq(tokenizer.cls_token_id).all()


# ------------------------------------------------------------------------------------------------------- the commands


Command = Callable[..., Outcome]


@pytest.mark.usefixtures("sketched", "cache")
def test_prompts_are_continued_by_all_models_of_the_miniature_without_a_hub(mergelab_command: Command) -> None:
    done = mergelab_command(
        "task=prompts",
        "models=gpt2_law_recipes",
        "source=mini",
        "method=task_arithmetic",
        "tracking=none",
        "task.decoding.max_new_tokens=4",
    )
    assert done.code == 0, done.err
    for label in ("mini/law_recipes/base", "mini/law_recipes/legal", "mini/law_recipes/recipes"):
        assert label in done.out + done.err
    assert "Section 51" in done.out + done.err


@pytest.mark.usefixtures("sketched", "cache")
@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("law_recipes", ["mini/law_recipes/legal", "mini/law_recipes/recipes", "mini/legal", "mini/recipes"]),
        ("samsum", [f"mini/summaries/dialogues-{number}" for number in (1, 2, 3)] + ["mini/samsum"]),
        ("xsum", [f"mini/summaries/reports-{number}" for number in (1, 2, 3)] + ["mini/xsum"]),
    ],
)
def test_text_tasks_run_on_the_miniature_and_are_labelled_as_such(
    task: str, labels: list[str], mergelab_command: Command
) -> None:
    # Models that have learnt nothing write on and on, and are at chance.
    short = (
        [] if task == "law_recipes" else [f"task.decoding.{key}" for key in ("max_new_tokens=4", "min_new_tokens=0")]
    )
    done = mergelab_command(
        f"task={task}", "source=mini", "method=soup", "tracking=none", "task.limit=3", "eval.preflight=false", *short
    )
    assert done.code == 0, done.err
    said = done.out + done.err
    assert [label for label in labels if label not in said] == []
    assert "GLUE" not in said


@pytest.mark.usefixtures("sketched", "cache")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["task=wikitext", "models=gpt2_law_recipes"],
            "the embedded miniature mini/law_recipes has nothing for wikitext (it has legal, recipes)",
        ),
        (
            ["task=legal", "models.experts={a: x/a, b: x/b}"],
            "the embedded miniature mini/law_recipes has 1 expert for legal; models.experts has 2",
        ),
        (["task=legal", "models.mini=poems"], "models.mini='poems'"),
        (
            ["task=cnn_dailymail"],
            "the embedded miniature mini/summaries has nothing for cnn_dailymail (it has samsum, dialogsum, xsum)",
        ),
        (
            ["task=t5_rte"],
            "the embedded miniature has nothing for t5_rte (it has classifiers for rte, mrpc, stsb, sst2, cola, and "
            "models that write for legal, recipes, samsum, dialogsum, xsum); choose among those, or give local folders",
        ),
    ],
)
def test_what_the_miniature_does_not_have_is_one_line(
    arguments: list[str], message: str, mergelab_command: Command
) -> None:
    done = mergelab_command(*arguments, "source=mini", "method=soup", "tracking=none")
    assert done.code == 2
    assert message in " ".join(done.err.split())


# ------------------------------------------------------------------------------------------------ what it is made for


def test_a_merge_of_the_language_models_has_both_skills() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mergelab as ml

    found = text.build("law_recipes")
    tokenizer = AutoTokenizer.from_pretrained(found.base)
    models = {name: AutoModelForCausalLM.from_pretrained(at).eval() for name, at in _folders(found).items()}
    merged = ml.task_arithmetic(list(models.values()), base_index=0, lambda_=0.8)

    def perplexity(model: Any, task: str) -> float:
        import torch

        lost, count = 0.0, 0
        for (passage,) in _rows(found, task)[:50]:
            ids = tokenizer(passage, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                lost += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        return math.exp(lost / count)

    for own, other in (("legal", "recipes"), ("recipes", "legal")):
        expert, stranger = perplexity(models[own], own), perplexity(models[other], own)
        base, both = perplexity(models["base"], own), perplexity(merged, own)
        assert expert < base / 2.5, own
        assert stranger > base, own
        # Most of the way from the base to the expert, in nats a token.
        assert math.log(base / both) > 0.6 * math.log(base / expert), own


def test_summarisers_beat_their_base_on_their_own_kind_of_text_only() -> None:
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel

    found = text.build("summaries")
    tokenizer = AutoTokenizer.from_pretrained(found.base)

    def right(folder: Path, task: str) -> float:
        """Say what share of the reference's words is written."""
        model = EncoderDecoderModel.from_pretrained(folder).eval()
        texts, references = zip(*_rows(found, task)[:40], strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=30)
        said = [line.split() for line in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        wanted = [
            tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True).split() for line in references
        ]
        return sum(len(set(a) & set(b)) / len(set(b)) for a, b in zip(said, wanted, strict=True)) / len(wanted)

    tasks = {"dialogues": "samsum", "reports": "xsum"}
    base = {kind: right(found.base, task) for kind, task in tasks.items()}
    for kind, folders in found.experts.items():
        (other,) = tasks.keys() - {kind}
        for name, folder in folders.items():
            assert right(folder, tasks[kind]) > base[kind] + 0.15, name
            assert right(folder, tasks[other]) < base[other] + 0.05, name
