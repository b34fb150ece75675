"""The package's names and docstrings follow its language rules, as far as a program can check them."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mergelab

ROOT = Path(mergelab.__file__).parent
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# First words of a description of a result or a thing; a function's docstring says what the function does instead.
NOT_IMPERATIVE = frozenset(
    [
        *("a", "all", "an", "any", "answer", "each", "every", "how", "if", "it", "its", "that", "the", "these", "this"),
        *("those", "what", "when", "where", "whether", "which", "who", "why"),
    ]
)
ENDING_IN_ING = frozenset({"bring"})  # verbs that look like a participle

# `metrics.classification` and `metrics.regression` are modules for evaluate.load, `metrics.answers` reads texts.
HISTORY = re.compile(r"\b(no longer|used to|previously|formerly|was renamed|moved from|legacy|todo|fixme)\b", re.I)


@cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield the classes and functions of a module, nested ones included."""
    yield from (child for child in ast.walk(node) if isinstance(child, Definition))


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Yield a module's public classes and functions, and the public methods of these classes."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def is_property(node: Definition) -> bool:
    names = {getattr(each, "id", getattr(each, "attr", "")) for each in node.decorator_list}
    return bool(names & {"property", "cached_property"})


def first_word(docstring: str) -> str:
    return docstring.split(maxsplit=1)[0].strip(".,:;`'\"").lower()


def is_imperative(word: str) -> bool:
    """Return False for articles and the like, third persons ("returns") and participles ("training")."""
    third_person = word.endswith("s") and not word.endswith("ss")
    participle = word.endswith("ing") and word not in ENDING_IN_ING
    return not (word in NOT_IMPERATIVE or third_person or participle)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("return", True), ("pass", True), ("bring", True), ("returns", False), ("the", False), ("training", False)],
)
def test_imperatives_are_recognised(word: str, expected: bool) -> None:
    assert is_imperative(word) == expected


def test_no_docstring_begins_with_answer() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, module in parsed().items()
        for node in definitions(module)
        if (text := ast.get_docstring(node)) and first_word(text) in ("answer", "answers")
    ]
    assert not found


def test_a_public_functions_docstring_begins_with_an_imperative() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for path, module in parsed().items()
        for node in public(module)
        if not isinstance(node, ast.ClassDef)
        and not is_property(node)
        and (text := ast.get_docstring(node))
        and not is_imperative(first_word(text))
    ]
    assert not found, "\n".join(found)


def test_no_public_class_name_is_defined_in_two_modules() -> None:
    places: dict[str, list[str]] = {}
    for path, module in parsed().items():
        for node in module.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: at for name, at in places.items() if len(at) > 1}


def test_comments_tell_no_history() -> None:
    found = []
    for path in parsed():
        with tokenize.open(path) as file:
            found += [
                f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}"
                for token in tokenize.generate_tokens(file.readline)
                if token.type == tokenize.COMMENT and HISTORY.search(token.string)
            ]
    assert not found, "\n".join(found)
