"""Build the text miniatures, or find what was built before: for each a base, experts, and the tasks' data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.config import cache_dir
from mergelab.miniature.build import Progress, _folder_in_making, _save
from mergelab.miniature.text.recipe import COLUMNS, SETS, Base, Expert, Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mergelab.miniature.text.train import Training

Texts = list[tuple[str, ...]]
_BASE, _DATA = "base", "data"
_BASE_SHARE = {"law_recipes": 0.65, "summaries": 0.6}  # of the time that a build takes


@dataclass(frozen=True)
class TextSet:
    """One miniature: its base, its experts by kind and name, and the folder of each task's Parquet files."""

    name: str
    base: Path
    experts: Mapping[str, Mapping[str, Path]]
    data: Mapping[str, Path]


def build(name: str, *, progress: Progress | None = None, recipe: Recipe | None = None) -> TextSet:
    """Return the miniature ``name``, built at first use.

    Everything is really trained, on text that the package's grammars generate; the same recipe gives the same weights
    on one platform. What is finished stands in the cache under a name that hashes this package's source and the major
    versions of torch and transformers. Two processes may build at once: one waits for the other.

    Args:
        name: one of `SETS`.
        progress: called with what is being done and the fraction done.
        recipe: how much is generated and trained; the default is the miniature that the package speaks of.
    """
    recipe = recipe or Recipe()
    home = _home(recipe)
    folder, kinds = home / name, SETS[name]
    if not folder.is_dir():
        from filelock import FileLock

        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            if not folder.is_dir():
                with _folder_in_making(folder) as making:
                    _build(making, name, recipe, progress or (lambda _message, _done: None))
    return TextSet(
        name,
        folder / _BASE,
        {kind: {expert: folder / expert for expert in about.experts} for kind, about in kinds.items()},
        {task: folder / _DATA / task for about in kinds.values() for task in about.tasks},
    )


def _home(recipe: Recipe) -> Path:
    """Name the cache's folder after all source that the outcome depends on."""
    digest = hashlib.sha256(repr(asdict(recipe)).encode())
    here = Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), *sorted(here.parent.glob("*.py"))]:
        digest.update(file.read_bytes())
    for package in ("torch", "transformers"):
        digest.update(version(package).partition(".")[0].encode())
    return cache_dir() / "mini" / digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class _Text:
    """What is generated: for the base, and of each kind what its experts learn from and what is held out."""

    base: Texts
    training: Mapping[str, Texts]
    validation: Mapping[str, Texts]

    @property
    def all(self) -> Iterator[str]:
        """Every text that a model is trained on."""
        for texts in (self.base, *self.training.values()):
            for text in texts:
                yield from text


def _grammar(module: str) -> Callable[[random.Random], tuple[str, ...]]:
    """Return what draws an example: a text and its summary, or a text alone."""
    grammar = import_module(f"mergelab.miniature.text.{module}")
    if hasattr(grammar, "example"):
        example: Callable[[random.Random], tuple[str, ...]] = grammar.example
        return example
    return lambda rng: (grammar.text(rng),)


def _distinct(draw: Callable[[random.Random], tuple[str, ...]], seed: str, count: int) -> Texts:
    """Draw ``count`` examples with different texts."""
    rng = random.Random(seed)
    drawn: dict[str, tuple[str, ...]] = {}
    while len(drawn) < count:
        example = draw(rng)
        drawn.setdefault(example[0], example)
    return list(drawn.values())


def _generate(name: str, recipe: Recipe, base: Base, experts: Sequence[Expert]) -> _Text:
    """Draw all text of the miniature ``name``; no text is in two of its parts."""
    some = max(1, round(base.share * base.documents))
    most = max(expert.documents for expert in experts)
    training, validation, common = {}, {}, []
    for kind, about in SETS[name].items():
        drawn = _distinct(_grammar(about.grammar), f"{recipe.seed} {kind}", recipe.validation + most + some)
        validation[kind] = drawn[: recipe.validation]
        training[kind] = drawn[recipe.validation : recipe.validation + most]
        common += drawn[recipe.validation + most :]
    plain = _grammar("everyday" if name == "law_recipes" else "leads")
    common += _distinct(plain, f"{recipe.seed} everyday", base.documents - len(common))
    random.Random(recipe.seed).shuffle(common)
    return _Text(common, training, validation)


def _learnt_by(text: _Text, kind: str, expert: Expert) -> Texts:
    """Draw what one expert is trained on, of its kind's texts and of the base's, in an order of its own."""
    rng = random.Random(expert.seed)
    own = rng.sample(text.training[kind], expert.documents)
    mixed = [*own, *rng.sample(text.base, expert.replay)]
    rng.shuffle(mixed)
    return mixed


def _write_data(folder: Path, task: str, splits: Mapping[str, Texts]) -> None:
    """Write Parquet files with the columns that the real task's dataset has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for split, texts in splits.items():
        columns = dict(zip(COLUMNS[task], map(list, zip(*texts, strict=True)), strict=True))
        pq.write_table(
            pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}),
            folder / f"{split}.parquet",
        )


# ----------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class _Maker:
    """How models of one sort are made: the untrained one, a training of it, and what is saved beside it."""

    fresh: Callable[[], Any]
    training: Callable[[Any, Texts, int, float, int], Training]
    save_tokenizer: Callable[[Path], None]


def _language_models(text: _Text, recipe: Recipe) -> _Maker:
    from mergelab.miniature.text import language_model as lm

    numbers = recipe.law_recipes
    tokenizer = lm.make_tokenizer(text.all, numbers.vocabulary)

    def training(model: Any, texts: Texts, batch: int, rate: float, seed: int) -> Training:
        plain = [text for (text,) in texts]
        return lm.training(model, tokenizer, plain, batch=batch, rate=rate, seed=seed, positions=numbers.positions)

    return _Maker(
        lambda: lm.make_model(numbers.base, numbers, tokenizer.get_vocab_size()),
        training,
        lambda folder: lm.save_tokenizer(tokenizer, numbers.positions, folder),
    )


def _summarisers(text: _Text, recipe: Recipe) -> _Maker:
    from mergelab.miniature import tokenizer as words
    from mergelab.miniature.text import summariser

    vocabulary = words.vocabulary(text.all)
    tokenizer: Tokenizer = words.make_tokenizer(vocabulary)

    def training(model: Any, texts: Texts, batch: int, rate: float, seed: int) -> Training:
        return summariser.training(model, tokenizer, texts, batch=batch, rate=rate, seed=seed)

    return _Maker(
        lambda: summariser.make_model(recipe.summaries, len(vocabulary)),
        training,
        lambda folder: words.save_tokenizer(tokenizer, vocabulary, folder),
    )


def _build(folder: Path, name: str, recipe: Recipe, tell: Progress) -> None:
    """Generate the text, train the base and then the experts side by side, and write everything into ``folder``."""
    from mergelab.miniature.text.train import copy_of, train_all
    from mergelab.miniature.train import quiet_torch

    numbers = recipe.law_recipes if name == "law_recipes" else recipe.summaries
    text = _generate(name, recipe, numbers.base, numbers.experts)
    for kind, about in SETS[name].items():
        for task in about.tasks:
            splits = {"train": text.training[kind], "validation": text.validation[kind]}
            _write_data(folder / _DATA / task, task, splits)
    maker = (_language_models if name == "law_recipes" else _summarisers)(text, recipe)
    share = _BASE_SHARE[name]
    with quiet_torch(recipe.seed):
        base = maker.fresh()
        batch = numbers.base.batch
        maker.training(base, text.base, batch, numbers.base.rate, recipe.seed).run(
            lambda done: tell(f"training the base of mini/{name}", share * done)
        )
        jobs = {
            expert: maker.training(copy_of(base), _learnt_by(text, kind, how), batch, how.rate, how.seed)
            for kind, about in SETS[name].items()
            for expert, how in zip(about.experts, numbers.experts, strict=True)
        }
        train_all(
            list(jobs.values()),
            lambda done: tell(f"training the experts of mini/{name}", share + (1 - share) * done),
        )
    for called, model in {_BASE: base, **{expert: job.model for expert, job in jobs.items()}}.items():
        _save(model, folder / called)
        maker.save_tokenizer(folder / called)
