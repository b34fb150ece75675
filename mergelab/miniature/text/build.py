"""Build the text miniatures, or return the cached ones: for each a base, experts, and the tasks' data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.miniature.build import Progress, cache_home, save_model
from mergelab.miniature.text.recipe import COLUMNS, SETS, Base, TextExpert, TextRecipe
from mergelab.weights.unfinished import unfinished_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mergelab.miniature.text.train import Training

Texts = list[tuple[str, ...]]
_BASE, _DATA = "base", "data"
_BASE_SHARE = {"law_recipes": 0.65, "summaries": 0.6}  # fraction of a build's time


@dataclass(frozen=True)
class TextSet:
    """One text miniature: the folders of the base, of the experts by kind and name, and of each task's data."""

    name: str
    base: Path
    experts: Mapping[str, Mapping[str, Path]]
    data: Mapping[str, Path]


def build(name: str, *, progress: Progress | None = None, recipe: TextRecipe | None = None) -> TextSet:
    """Return the miniature ``name``, built at its first use.

    All models are trained on text that the package's grammars generate. The same recipe gives the same weights on one
    platform. The result is cached under a hash of this package's source and of the major versions of torch and
    transformers. When two processes build at once, one waits for the other.

    Args:
        name: one of `SETS`.
        progress: called with a message and the fraction done.
        recipe: amounts of data and training; default: those of the published miniature.
    """
    recipe = recipe or TextRecipe()
    home = _home(recipe)
    folder, kinds = home / name, SETS[name]
    if not folder.is_dir():
        from filelock import FileLock

        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            if not folder.is_dir():
                with unfinished_folder(folder, remains_of="*") as partial:
                    _build(partial, name, recipe, progress or (lambda _message, _done: None))
    return TextSet(
        name,
        folder / _BASE,
        {kind: {expert: folder / expert for expert in about.experts} for kind, about in kinds.items()},
        {task: folder / _DATA / task for about in kinds.values() for task in about.tasks},
    )


def _home(recipe: TextRecipe) -> Path:
    here = Path(__file__).parent
    return cache_home(recipe, [here, here.parent])


# ------------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class _Text:
    """Generated text: for the base, and by kind for training and validation of its experts."""

    base: Texts
    training: Mapping[str, Texts]
    validation: Mapping[str, Texts]

    @property
    def all(self) -> Iterator[str]:
        """All text that a model is trained on."""
        for texts in (self.base, *self.training.values()):
            for text in texts:
                yield from text


def _grammar(module: str) -> Callable[[random.Random], tuple[str, ...]]:
    """Return the function that draws an example: a text and its summary, or only a text."""
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


def _generate(name: str, recipe: TextRecipe, base: Base, experts: Sequence[TextExpert]) -> _Text:
    """Draw all text of the miniature ``name``; its parts are disjoint."""
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


def _training_texts(text: _Text, kind: str, expert: TextExpert) -> Texts:
    """Draw one expert's training texts, of its kind and of the base's, in random order."""
    rng = random.Random(expert.seed)
    own = rng.sample(text.training[kind], expert.documents)
    mixed = [*own, *rng.sample(text.base, expert.replay)]
    rng.shuffle(mixed)
    return mixed


def _write_data(folder: Path, task: str, splits: Mapping[str, Texts]) -> None:
    """Write Parquet files with the columns of the real task's dataset."""
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
    """Functions that make models of one architecture: the untrained model, its training, and its tokenizer's files."""

    untrained: Callable[[], Any]
    training: Callable[[Any, Texts, int, float, int], Training]
    save_tokenizer: Callable[[Path], None]


def _language_models(text: _Text, recipe: TextRecipe) -> _Maker:
    from mergelab.miniature.text import language_model as lm

    numbers = recipe.law_recipes
    tokenizer = lm.make_bpe(text.all, numbers.vocabulary)

    def training(model: Any, texts: Texts, batch: int, rate: float, seed: int) -> Training:
        plain = [text for (text,) in texts]
        return lm.gpt2_training(model, tokenizer, plain, batch=batch, rate=rate, seed=seed, positions=numbers.positions)

    return _Maker(
        lambda: lm.make_gpt2(numbers.base, numbers, tokenizer.get_vocab_size()),
        training,
        lambda folder: lm.save_bpe(tokenizer, numbers.positions, folder),
    )


def _summarisers(text: _Text, recipe: TextRecipe) -> _Maker:
    from mergelab.miniature import tokenizer as words
    from mergelab.miniature.text import summariser

    vocabulary = words.vocabulary(text.all)
    tokenizer: Tokenizer = words.make_wordpiece(vocabulary)

    def training(model: Any, texts: Texts, batch: int, rate: float, seed: int) -> Training:
        return summariser.bert2bert_training(model, tokenizer, texts, batch=batch, rate=rate, seed=seed)

    return _Maker(
        lambda: summariser.make_bert2bert(recipe.summaries, len(vocabulary)),
        training,
        lambda folder: words.save_wordpiece(tokenizer, vocabulary, folder),
    )


def _build(folder: Path, name: str, recipe: TextRecipe, report: Progress) -> None:
    """Generate the text, train the base and then the experts in parallel, and write everything into ``folder``."""
    from mergelab.miniature.text.train import copy_of
    from mergelab.miniature.train import quiet_torch, train_all

    numbers = recipe.law_recipes if name == "law_recipes" else recipe.summaries
    text = _generate(name, recipe, numbers.base, numbers.experts)
    for kind, about in SETS[name].items():
        for task in about.tasks:
            splits = {"train": text.training[kind], "validation": text.validation[kind]}
            _write_data(folder / _DATA / task, task, splits)
    maker = (_language_models if name == "law_recipes" else _summarisers)(text, recipe)
    share = _BASE_SHARE[name]
    with quiet_torch(recipe.seed):
        base = maker.untrained()
        batch = numbers.base.batch
        maker.training(base, text.base, batch, numbers.base.rate, recipe.seed).run(
            lambda done: report(f"training the base of mini/{name}", share * done)
        )
        jobs = {
            expert: maker.training(copy_of(base), _training_texts(text, kind, how), batch, how.rate, how.seed)
            for kind, about in SETS[name].items()
            for expert, how in zip(about.experts, numbers.experts, strict=True)
        }
        train_all(
            list(jobs.values()),
            lambda done: report(f"training the experts of mini/{name}", share + (1 - share) * done),
        )
    for called, model in {_BASE: base, **{expert: job.model for expert, job in jobs.items()}}.items():
        save_model(model, folder / called)
        maker.save_tokenizer(folder / called)
