"""The page opens without a network, shows what the tables have, and runs nothing that came from a run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mergelab.tracking import names
from tests.conftest import Outcome
from tests.report.conftest import Store, right_on
from tests.report.test_groups import sweep

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<b>"


class Page(HTMLParser):
    """Collects a page's elements, scripts and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.within = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.within != "style":
            self.text += data


def page() -> Page:
    return Page(Path("report/report.html").read_text(encoding="utf-8"))


def test_the_page_asks_no_network_for_anything(compared: Store, report: Callable[..., Outcome]) -> None:
    sweep(compared)
    report("rte")
    found = page()
    assert Path("report/report.html").stat().st_size < 10_000_000
    loading = [
        value for _, attributes in found.elements for key, value in attributes.items() if key in ("src", "srcset")
    ]
    assert loading == []
    assert not {tag for tag, _ in found.elements} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    files = {a["href"] for tag, a in found.elements if tag == "a" and not str(a["href"]).startswith(("http", "#"))}
    assert files == {"models.csv", "models.parquet", "models.md", "models.tex", "trials.csv", "trials.parquet"}
    assert all(Path("report", str(name)).is_file() for name in files)


def test_only_the_pages_own_scripts_may_run(compared: Store, report: Callable[..., Outcome]) -> None:
    report("rte")
    found = page()
    (policy,) = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    executed = [text for attributes, text in found.scripts if attributes.get("type") != "application/json"]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in executed]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy is not None
    assert f"script-src {allowed};" in policy
    assert policy.startswith("default-src 'none';")


def test_what_comes_from_a_run_is_text_wherever_it_is_shown(store: Store, report: Callable[..., Outcome]) -> None:
    store.models = {"base": f"base{HOSTILE}", "a": f"a{HOSTILE}", "b": "org/b"}
    store.baseline("base", "base", right_on(100))
    store.baseline("expert", "a", right_on(170, seed=1))
    for number in range(3):
        overrides = ("method=ties", "task=rte", f"method.density=0.{number + 2}")
        store.run("merge", *overrides, correct=right_on(150 + number), name=f"rte {number}{HOSTILE}")
    store.run("merge", "task=rte", status="FAILED", name=f"failed{HOSTILE}", tags={names.ERROR: HOSTILE})
    note = f"rte: accuracy on 200{HOSTILE}"
    store.run("merge", "method=soup", "task=rte", correct=right_on(150), note=note, name=f"rte soup{HOSTILE}")
    parent = sweep(store)
    store.tracker.client.set_tag(parent, "mlflow.runName", f"sweep {HOSTILE}")
    assert report("rte").code == 0
    found = page()
    assert not {tag for tag, _ in found.elements} & {"img", "b"} - {"b"}
    assert len(found.scripts) == 3
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    for shown in (f"a{HOSTILE}", f"2{HOSTILE}", f"base{HOSTILE}", f"soup{HOSTILE}", note, f"sweep {HOSTILE}"):
        assert shown in found.text
    (figures,) = [json.loads(text) for attributes, text in found.scripts if attributes.get("type")]
    for text in texts(figures):
        assert not re.search(r"<(?!br>|extra>|/extra>)", text), text


def texts(value: object) -> list[str]:
    """All texts of nested data, keys aside."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in texts(one)] if isinstance(value, list) else []


def test_the_papers_defaults_are_marked_on_the_curves(store: Store, report: Callable[..., Outcome]) -> None:
    sweep(store, trials=8, stopped=3)
    report()
    (figures,) = [json.loads(text) for attributes, text in page().scripts if attributes.get("type")]
    (curve,) = [f for f in figures.values() if f["layout"].get("xaxis", {}).get("title", {}).get("text") == "density"]
    (mark,) = curve["layout"]["shapes"]
    assert (mark["x0"], mark["x1"]) == (0.2, 0.2)  # Yadav et al. 2023
    measured, estimated = curve["data"]
    assert (len(measured["x"]), len(estimated["x"])) == (5, 3)
    assert measured["marker"]["color"] != estimated["marker"]["color"]
    assert estimated["error_y"]["array"] == pytest.approx([0.02] * 3)


def test_tables_have_the_same_numbers_in_every_form(compared: Store, report: Callable[..., Outcome]) -> None:
    printed = report("rte").out
    table = pq.read_table("report/models.parquet").to_pylist()
    assert [row["model"] for row in table][:2] == ["ties density=0.3", "org/a"]
    assert table[0]["accuracy"] == 0.9
    markdown, latex = (Path("report", name).read_text(encoding="utf-8") for name in ("models.md", "models.tex"))
    for text in (printed, markdown, latex, page().text):
        assert "0.9000 [0.850, 0.950]" in re.sub(r"\s+", " ", text).replace("0.9000 * [", "0.9000 [")
        assert "+0.0500" in text
    assert json.loads(report("rte", "--format=json").out)["rows"][0]["accuracy"] == 0.9
    assert report("rte", "--format=latex").out.count("\\toprule") == 1
    assert report("rte", "--format=markdown").out.startswith("| model")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_fits_with_whole_names(
    compared: Store, report: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [line for line in report("rte").out.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, rows)) <= width
    assert any("│ ties density=0.3 " in row and "0.9000" in row for row in rows)
    assert any("p (Holm)" in row for row in rows)


def test_standard_output_has_the_result_alone_for_a_program(compared: Store, report: Callable[..., Outcome]) -> None:
    outcome = report("rte", "--format=csv")
    assert outcome.out.startswith("task,source,protocol,rank,model")
    assert "report report/report.html" in outcome.err
