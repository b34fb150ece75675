"""Build the miniature, or return the cached one: a base for all tasks, and data and experts for each task."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.cache import cache_dir
from mergelab.miniature.recipe import EXPERTS, GRAMMARS, Expert, Recipe
from mergelab.miniature.record import Example
from mergelab.weights.unfinished import unfinished_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertForPreTraining

    from mergelab.miniature.train import Corpus

Progress = Callable[[str, float], None]
TASKS: tuple[str, ...] = tuple(GRAMMARS)
_BASE, _DATA = "base", "data"


@dataclass(frozen=True)
class MiniSet:
    """One task's miniature: the folders of the base, of each expert by name, and of the task's data."""

    task: str
    base: Path
    experts: dict[str, Path]
    data: Path


def build(task: str, *, progress: Progress | None = None, recipe: Recipe | None = None) -> MiniSet:
    """Return ``task``'s miniature, built at its first use.

    All models are trained on text that the package's grammars generate. The same recipe gives the same weights on one
    platform. The result is cached under a hash of this package's source and of the major versions of torch and
    transformers. Each part is built in a temporary folder that is renamed when it is complete. When two processes build
    at once, one waits for the other.

    Args:
        task: one of `TASKS`.
        progress: called with a message and the fraction done.
        recipe: amounts of data and training; default: those of the published miniature.
    """
    recipe = recipe or Recipe()
    report = progress or (lambda _message, _done: None)
    home = _home(recipe)
    names = {f"mini-{number + 1}": home / task / f"mini-{number + 1}" for number in range(len(EXPERTS))}
    found = MiniSet(task, home / _BASE, names, home / task / _DATA)
    if not found.base.is_dir() or not (home / task).is_dir():
        from filelock import FileLock

        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):
            _build_missing(home, task, recipe, report)
    return found


def _home(recipe: Recipe) -> Path:
    return cache_home(recipe, [Path(__file__).parent])


def cache_home(recipe: Any, source: Sequence[Path]) -> Path:
    """Return the cache folder of a recipe, which depends on all source that the result depends on.

    Args:
        recipe: a frozen dataclass.
        source: folders with the Python files that generate and train.
    """
    digest = hashlib.sha256(repr(asdict(recipe)).encode())
    for folder in source:
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    for package in ("torch", "transformers"):
        digest.update(version(package).partition(".")[0].encode())
    return cache_dir() / "mini" / digest.hexdigest()[:16]


def _build_missing(home: Path, task: str, recipe: Recipe, report: Progress) -> None:
    """Build the parts that the cache lacks; for the first task, the base takes more than half of the time."""
    share = 0.0 if (home / _BASE).is_dir() else 0.6
    if share:
        with unfinished_folder(home / _BASE, remains_of="*") as folder:
            _build_base(folder, recipe, lambda done: report("training the miniature's base", share * done))
    if not (home / task).is_dir():
        with unfinished_folder(home / task, remains_of="*") as folder:
            message = f"training the miniature's {task} experts"
            _build_task(home / _BASE, folder, task, recipe, lambda done: report(message, share + (1 - share) * done))


# ----------------------------------------------------------------------------------------------------------- the base


def _build_base(folder: Path, recipe: Recipe, progress: Callable[[float], None]) -> None:
    from mergelab.miniature import tokenizer as words
    from mergelab.miniature import train

    pairs, unrelated = _documents(recipe)
    vocabulary = words.vocabulary([*(text for pair in pairs for text in pair), *_all_texts()])
    tokenizer = words.make_wordpiece(vocabulary)
    with train.quiet_torch(recipe.seed):
        corpus = _corpus(tokenizer, pairs, unrelated)
        model = train.pretrain(corpus, len(vocabulary), recipe, progress)
    save_model(model, folder)
    words.save_wordpiece(tokenizer, vocabulary, folder)


def _documents(recipe: Recipe) -> tuple[list[tuple[str, ...]], list[int]]:
    """Draw the pretraining text: one or two sentences, and whether the second is unrelated (`IGNORED`: no second)."""
    from mergelab.miniature.train import IGNORED

    rng = random.Random(recipe.seed)
    grammars = [_grammar(task) for task in GRAMMARS]
    pairs: list[tuple[str, ...]] = []
    unrelated: list[int] = []
    for grammar in rng.choices(grammars, list(recipe.mixture), k=recipe.documents):
        document = grammar.document(rng)
        if not document.second:
            pairs.append((document.first,))
            unrelated.append(IGNORED)
            continue
        other = int(rng.random() < 0.5)
        pairs.append((document.first, document.unrelated if other else document.second))
        unrelated.append(other)
    return pairs, unrelated


def _corpus(tokenizer: Tokenizer, pairs: Sequence[tuple[str, ...]], unrelated: Sequence[int]) -> Corpus:
    import torch

    from mergelab.miniature import train

    return train.Corpus(train.encode_texts(tokenizer, pairs), torch.tensor(unrelated))


def _all_texts() -> Iterator[str]:
    """Yield enough text of every grammar that the vocabulary has all of its words."""
    for task in GRAMMARS:
        rng = random.Random(f"vocabulary {task}")
        for _ in range(3000):
            yield from _grammar(task).example(rng).texts


def _grammar(task: str) -> Any:
    return import_module(f"mergelab.miniature.{GRAMMARS[task].module}")


# -------------------------------------------------------------------------------------------------- data and experts


def _build_task(base: Path, folder: Path, task: str, recipe: Recipe, progress: Callable[[float], None]) -> None:
    import torch
    from transformers import BertForPreTraining

    from mergelab.miniature import tokenizer as words
    from mergelab.miniature import train
    from mergelab.models.architecture import quiet_transformers

    grammar, size = _grammar(task), GRAMMARS[task]
    drawn = _examples(grammar, f"{recipe.seed} {task}", recipe.scaled(size.validation) + recipe.scaled(size.train))
    validation, training = drawn[: recipe.scaled(size.validation)], drawn[recipe.scaled(size.validation) :]
    _write_data(folder / _DATA, grammar, {"train": training, "validation": validation})
    vocabulary = (base / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = words.make_wordpiece(vocabulary)
    with quiet_transformers():
        pretrained: BertForPreTraining = BertForPreTraining.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    kind = torch.float32 if _names(grammar) is None else torch.int64
    with train.quiet_torch(recipe.seed):
        jobs = []
        for number, expert in enumerate(EXPERTS):
            own = _share(training, number, expert)
            config = train.make_config(recipe, len(vocabulary), **_labels(grammar))
            jobs.append(
                train.Finetuning(
                    train.with_head(pretrained, config, expert.seed),
                    train.encode_texts(tokenizer, [example.texts for example in own]),
                    torch.tensor([example.label for example in own]).to(kind),
                    expert,
                )
            )
        train.train_all(jobs, progress)
    for number, job in enumerate(jobs):
        save_model(job.model, folder / f"mini-{number + 1}")
        words.save_wordpiece(tokenizer, vocabulary, folder / f"mini-{number + 1}")


def _examples(grammar: Any, seed: str, count: int) -> list[Example]:
    """Draw ``count`` distinct examples."""
    rng = random.Random(seed)
    drawn: dict[tuple[str, ...], Example] = {}
    while len(drawn) < count:
        example = grammar.example(rng)
        drawn.setdefault(example.texts, example)
    return list(drawn.values())


def _share(training: Sequence[Example], number: int, expert: Expert) -> list[Example]:
    """Select one expert's training examples: all that show its own phenomena, and a fraction of the others."""
    kinds = sorted({example.kind for example in training})
    favoured = set(kinds[number % len(kinds) :: len(EXPERTS)])
    rng = random.Random(expert.seed)
    return [example for example in training if example.kind in favoured or rng.random() < expert.share]


def _names(grammar: Any) -> tuple[str, ...] | None:
    return getattr(grammar, "LABEL_NAMES", None)


def _labels(grammar: Any) -> dict[str, Any]:
    """Return the config of the model's outputs: the task's label names, or one score."""
    names = _names(grammar)
    if names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _write_data(folder: Path, grammar: Any, splits: dict[str, Sequence[Example]]) -> None:
    """Write Parquet files in the hub's format, with ``huggingface`` metadata."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _names(grammar)
    folder.mkdir(parents=True)
    label: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
    features: dict[str, Any] = {column: {"dtype": "string", "_type": "Value"} for column in grammar.COLUMNS}
    features |= {"label": label, "idx": {"dtype": "int32", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kinds = [*((column, pa.string()) for column in grammar.COLUMNS)]
    kinds += [("label", pa.float32() if names is None else pa.int64()), ("idx", pa.int32())]
    for split, examples in splits.items():
        columns = [*zip(*(example.texts for example in examples), strict=True)]
        values = [*map(list, columns), [example.label for example in examples], list(range(len(examples)))]
        schema = pa.schema(kinds, metadata=metadata)
        arrays = [pa.array(column, kind) for column, (_, kind) in zip(values, kinds, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / f"{split}.parquet")


def save_model(model: Any, folder: Path) -> None:
    """Save a model without a progress bar."""
    from mergelab.models.architecture import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder)
