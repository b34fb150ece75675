"""Saved views: what they show is what runs have, in the form that MLflow's own UI writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlflow.demo.generators import saved_views
from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from mergelab.tracking import Tracker, names, store, views
from mergelab.tracking.views import View, changes, read, written

METRIC = "report/accuracy"


def tags_of(tracker: Tracker, client: Any) -> dict[str, str]:
    return dict(client.get_experiment(tracker.experiment("rte")).tags)


def test_a_view_is_written_as_mlflow_writes_its_own() -> None:
    view = views.merges(METRIC, minimized=False)
    own = saved_views.DemoTraceSavedViewDef("id", view.name, "prefix.", view.state())
    expected = json.loads(saved_views._serialize_trace_saved_view(own, 1234))
    assert json.loads(written(view, 1.234)) | {"updatedAt": 1234} == expected | {"updatedAt": 1234}
    about, state = read(written(view))
    assert about["name"] == "merges"
    assert state == view.state()
    assert len(written(view)) < MAX_EXPERIMENT_TAG_VAL_LENGTH


@pytest.mark.parametrize(
    ("view", "found"),
    [
        (views.merges(METRIC, minimized=False), ["ties", "soup", "report", "unscored"]),
        (views.merges(METRIC, minimized=True), ["report", "soup", "ties", "unscored"]),
        (views.baselines(METRIC, minimized=False), ["expert", "base"]),
    ],
    ids=["merges", "less", "baselines"],
)
def test_a_views_filter_and_order_find_its_runs(
    tracker: Tracker, mlflow_client: Any, view: View, found: list[str]
) -> None:
    kinds = {"soup": ("merge", 0.7), "ties": ("merge", 0.8), "unscored": ("merge", None), "base": ("base", 0.5),
             "expert": ("expert", 0.6), "grid": ("grid", 0.9), "trial": ("trial", 0.9), "report": ("report", 0.4),
             "sweep": ("sweep", 0.9), "analysis": ("analysis", None), "stages": ("stages", None),
             "finetuning": ("finetuning", None)}  # fmt: skip
    for name, (kind, score) in kinds.items():
        key = {names.BASELINE_KEY: "k"} if kind in ("base", "expert") else {}
        with tracker.start_run(name, experiment="rte", tags={names.KIND: kind, **key}) as run:
            if score is not None:
                run.log_metrics({METRIC: score})
    assert search(tracker, mlflow_client, view) == found


def search(tracker: Tracker, client: Any, view: View) -> list[str]:
    """Names of the runs that the UI would list."""
    state = view.state()
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    runs = client.search_runs([tracker.experiment("rte")], state["searchFilter"], order_by=[order])
    return [run.info.run_name for run in runs]


def test_the_view_of_a_sweep_has_its_own_trials(tracker: Tracker, mlflow_client: Any) -> None:
    sweeps = [tracker.start_run("sweep", experiment="rte", tags={names.KIND: "sweep"}) for _ in range(2)]
    for parent in sweeps:
        for number, kind in enumerate(("trial", "trial", "report")):
            name = f"{kind} {number} of {parent.id}"
            with tracker.start_run(name, experiment="rte", tags={names.KIND: kind}, parent=parent.id) as run:
                run.log_metrics({"estimate/accuracy": number / 10})
    view = views.trials(str(sweeps[0].id), "s", "estimate/accuracy", minimized=False, swept=["method.density"])
    assert search(tracker, mlflow_client, view) == [f"trial {number} of {sweeps[0].id}" for number in (1, 0)]
    columns = ["estimate/accuracy", "estimate/accuracy_low", "estimate/accuracy_high", "select/accuracy"]
    assert list(view.columns[:5]) == ["params.`method.density`", *(f"metrics.`{column}`" for column in columns)]
    for parent in sweeps:
        parent.end()


def test_an_experiment_gets_its_views_and_a_link_opens_them(tracker: Tracker, mlflow_client: Any) -> None:
    page = tracker.ui_page("rte", view=views.MERGES)
    assert "viewStateShareKey" not in page  # there is no such view yet
    tracker.save_views("rte", [views.merges(METRIC, minimized=False), views.baselines(METRIC, minimized=False)])
    saved = {tag: read(value)[0]["name"] for tag, value in tags_of(tracker, mlflow_client).items() if "View" in tag}
    assert saved == {names.saved_view(views.MERGES): "merges", names.saved_view(views.BASELINES): "baselines"}
    page = tracker.ui_page("rte", view=views.MERGES)
    assert page.endswith("/runs?viewStateShareKey=mergelab-merges&workflowType=machine_learning")
    before = tags_of(tracker, mlflow_client)
    tracker.save_views("rte", [views.merges(METRIC, minimized=False)])
    assert tags_of(tracker, mlflow_client) == before


@pytest.mark.parametrize("version", ["3.14.0", "3.1.2", "unknown"])
def test_an_older_mlflow_gets_no_views(
    tracker: Tracker, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    import mlflow

    monkeypatch.setattr(mlflow, "__version__", version)
    store._version_of_ui.cache_clear()
    try:
        tracker.save_views("rte", [views.merges(METRIC, minimized=False)])
        assert not [tag for tag in tags_of(tracker, mlflow_client) if "View" in tag]
        assert "viewStateShareKey" not in tracker.ui_page("rte", view=views.MERGES)
    finally:
        store._version_of_ui.cache_clear()


def test_a_view_that_a_user_has_changed_stays() -> None:
    tag, view = names.saved_view(views.MERGES), views.merges(METRIC, minimized=False)
    other = views.merges("report/f1", minimized=False)
    assert set(changes({tag: written(other)}, [view])[0]) == {tag}
    assert changes({tag: written(view)}, [view]) == ({}, [])
    touched = json.loads(written(other))
    touched["updatedAt"] += 1
    assert changes({tag: json.dumps(touched)}, [view]) == ({}, [])
    assert changes({tag: "not a view"}, [view]) == ({}, [])


def test_of_many_sweeps_the_newest_have_views() -> None:
    known = {
        names.saved_view(views.sweep_key(f"{number:032d}"[::-1])): written(
            views.trials("x", str(number), "estimate/accuracy", minimized=False, swept=[]), number
        )
        for number in range(25)
    }
    fresh, gone = changes(known, [views.trials("f" * 32, "new", "estimate/accuracy", minimized=False, swept=[])])
    assert len(fresh) == 1
    assert gone == list(known)[:6]
