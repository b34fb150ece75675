"""The pages are complete and up to date: sizes, links, what is made from the code, the configuration's JSON Schema."""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

import jsonschema
import pytest
import yaml

from mergelab.config import CONF_DIR
from tests.conftest import ROOT
from tests.docs.pages import Page, pages

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documentation is not part of this copy")
PAGES = pages()
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)\s]*)?\)")


def page(name: str) -> Page:
    (found,) = (each for each in PAGES if each.name == name)
    return found


def test_the_readme_is_short_and_its_tables_fit_80_columns() -> None:
    readme = page("README.md")
    assert len(readme.text.encode()) <= 10_000
    shown = [line for block in readme.blocks("text") for line in block.splitlines()]
    assert len(shown) > 5
    assert [line for line in shown if len(line) > 80] == []


@pytest.mark.parametrize("name", [each.name for each in PAGES])
def test_links_lead_to_files(name: str) -> None:
    folder = posixpath.dirname(name)
    targets = LINK.findall(re.sub(r"```.*?```", "", page(name).text, flags=re.DOTALL))
    assert [target for target in targets if not (ROOT / folder / target).is_file()] == []


@pytest.mark.parametrize("name", [each.name for each in PAGES])
def test_what_pages_show_names_no_folder_of_the_machine_that_printed_it(name: str) -> None:
    shown = "".join(page(name).blocks("text"))
    assert re.findall(r"(?<![\w/.:])/(?:root|home|tmp|work|usr|private|Users|opt)/\S*", shown) == []


def test_pages_made_from_the_code_are_up_to_date() -> None:
    from docs.scripts.reference import outdated

    assert outdated() == [], "run `make reference`"


def test_every_method_and_every_key_has_its_place() -> None:
    from mergelab.config import EvalConfig, ModelsConfig, SaveConfig
    from mergelab.engine.registry import method_names

    index = page("docs/methods/index.md").text
    assert [name for name in method_names() if f"[`{name}`](" not in index] == []
    configuration = page("docs/configuration.md").text
    for group, schema in (("models", ModelsConfig), ("eval", EvalConfig), ("save", SaveConfig)):
        assert [key for key in schema.model_fields if f"| `{group}.{key}` |" not in configuration] == []
    row = next(line for line in configuration.splitlines() if "| `eval.holdout_fraction` |" in line)
    assert "number greater than 0 and less than 1" in row
    assert "| `0.5` |" in row


def documents() -> list[tuple[str, Any]]:
    """Every file in conf/ that sets keys of mergelab, with the part of the schema that it is held to."""
    found = []
    for path in sorted(CONF_DIR.rglob("*.yaml")):
        group = path.relative_to(CONF_DIR).parts[0]
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if group in ("models", "method", "eval", "save", "tracking", "task") and path.parent.name == group:
            found.append((f"{group}/{path.stem}", {group: content}))
        elif group in ("experiment", "config.yaml", "analyze.yaml"):
            found.append((f"{path.stem}", content))
        elif group == "sweep":
            found.append((f"{group}/{path.stem}", content))
    return found


@pytest.fixture(scope="module")
def schema() -> Any:
    content = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


@pytest.mark.parametrize(("name", "content"), [pytest.param(*each, id=each[0]) for each in documents()])
def test_the_projects_own_files_fit_the_json_schema(schema: Any, name: str, content: Any) -> None:
    assert [error.message for error in schema.iter_errors(content)] == []


@pytest.mark.parametrize(
    "content",
    [
        {"eval": {"protocoll": "full"}},
        {"eval": {"protocol": "half"}},
        {"eval": {"holdout_fraction": 1.5}},
        {"eval": {"holdout_fraction": "half"}},
        {"method": {"name": "ties", "densty": 0.2}},
        {"method": {"name": "ties", "density": 2.0}},
        {"method": {"name": "ties", "scope": "row"}},
        {"models": {"experts": {"a": {"reference": "org/a", "weigth": 2}}}},
        {"models": {"head": 3}},
        {"sweep": {"n_trials": 0}},
        {"sweep": {"n_trial": 5}},
        {"task": {"kind": "generating"}},
        {"sources": "mini"},
    ],
    ids=str,
)
def test_what_mergelab_refuses_does_not_fit_the_json_schema(schema: Any, content: Any) -> None:
    assert not schema.is_valid(content)


@pytest.mark.parametrize(
    "content",
    [
        {"seed": "${oc.env:SEED}", "eval": {"bootstrap": "${n}"}},
        {"models": {"experts": ["org/a", {"encoder": "a", "decoder": "b"}, {"reference": "c", "weight": 2}]}},
        {"models": {"experts": {"a": None, "b": {"stack": [{"model": "m", "layers": [0, 2]}]}}}},
        {"method": {"name": "ties", "density": {"a": 0.2, "b": 0.5}, "lambda": [0.2, 0.8], "weights": [1, 2]}},
        {"method": {"name": "custom", "function": "my.module", "cut": 2}},
        {"sweep": {"direction": ["maximize", "minimize"], "params": {"method.t": "interval(0,1)"}}},
    ],
    ids=str,
)
def test_what_mergelab_takes_fits_the_json_schema(schema: Any, content: Any) -> None:
    assert [error.message for error in schema.iter_errors(content)] == []
