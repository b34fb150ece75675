"""Views of an experiment's runs that the MLflow UI opens by a link: the merges, the trials of a sweep, the baselines.

A view is a tag of the experiment, in the form that the UI itself writes when a user saves one (MLflow 3.15 and later).
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.tracking import names

OLDEST = (3, 15)  # the first MLflow whose UI has saved views
MERGES, BASELINES = "mergelab-merges", "mergelab-baselines"
_SWEEP = "mergelab-trials-"
_MOST_SWEEPS = 20  # views of older sweeps are removed
_DEFLATED = "deflate;"
_WIDTHS = {"metrics": 125, "params": 110, "tags": 480}  # pixels
_BOUND = 90
SHOWN_OF_MERGES = ("method.name", "method.lambda", "method.density")
_ASIDE: tuple[names.Kind, ...] = ("trial", "base", "expert", "grid", "sweep", "analysis", "stages", "finetuning")


@dataclass(frozen=True)
class View:
    """A choice of an experiment's runs, with the columns that are shown of them.

    Attributes:
        key: what the link names it by.
        name: what the UI calls it.
        search: the filter, in MLflow's syntax.
        columns: in their order, such as ``params.`method.density```.
        order_by: the column that sorts.
        ascending: whether the least comes first.
    """

    key: str
    name: str
    search: str
    columns: tuple[str, ...]
    order_by: str
    ascending: bool

    def state(self) -> dict[str, Any]:
        """Return the state of the UI's page of runs."""
        return {
            "searchFilter": self.search,
            "orderByKey": self.order_by,
            "orderByAsc": self.ascending,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": list(self.columns),
            "columnOrder": list(self.columns),
            "columnWidths": {column: _width(column) for column in self.columns},
            "viewMaximized": True,
            "runListHidden": False,
        }


def sweep_key(run_id: str) -> str:
    """Return the key of the view of a sweep's trials."""
    return f"{_SWEEP}{run_id[:12]}"


def merges(metric: str, *, minimized: bool, settings: Sequence[str] = ()) -> View:
    """Return the view of all merges that were measured on reporting examples, the best first.

    Args:
        metric: what they are judged by, ``report/accuracy``.
        minimized: whether less of it is better.
        settings: parameters of methods to show besides λ and density, ``method.t``.
    """
    columns = [*map(_param, [*SHOWN_OF_MERGES, *settings]), *_interval(metric), _param("models.name")]
    columns += [_param("eval.protocol"), _metric(names.P_VS_BEST_EXPERT)]
    search = " AND ".join(f"{_tag(names.KIND)} != '{kind}'" for kind in _ASIDE)
    return View(MERGES, "merges", search, tuple(columns), _metric(metric), minimized)


def trials(run_id: str, sweep: str, metric: str, *, minimized: bool, swept: Sequence[str]) -> View:
    """Return the view of a sweep's trials, the best estimate first.

    Args:
        run_id: the sweep's run.
        sweep: its name.
        metric: the objective's estimate, ``estimate/accuracy``.
        minimized: whether less of it is better.
        swept: the keys that the trials vary.
    """
    score = metric.replace(names.estimate_metric(""), names.select_metric(""), 1)
    columns = [*map(_param, swept), *_interval(metric), _metric(score), _metric(names.SELECT_EXAMPLES)]
    columns += [_tag(names.PRUNED), _metric(names.MERGE_SECONDS), _metric(names.EVAL_SECONDS)]
    search = f"{_tag(names.PARENT)} = '{run_id}' AND {_tag(names.KIND)} = 'trial'"
    return View(sweep_key(run_id), f"trials of {sweep}", search, tuple(columns), _metric(metric), minimized)


def baselines(metric: str, *, minimized: bool) -> View:
    """Return the view of the base and the experts, the best first."""
    columns = [_param(names.ROLE), _param("models.name"), *_interval(metric), _param("eval.protocol"), _param("seed")]
    search = f"{_tag(names.BASELINE_KEY)} != ''"
    return View(BASELINES, "baselines", search, tuple(columns), _metric(metric), minimized)


def _width(column: str) -> int:
    is_bound = column.endswith((f"{names.low('')}`", f"{names.high('')}`"))
    return _BOUND if is_bound else _WIDTHS[column.partition(".")[0]]


def _interval(metric: str) -> list[str]:
    return [_metric(metric), _metric(names.low(metric)), _metric(names.high(metric))]


def _metric(name: str) -> str:
    return f"metrics.`{name}`"


def _param(name: str) -> str:
    return f"params.`{name}`"


def _tag(name: str) -> str:
    return f"tags.`{name}`"


# ------------------------------------------------------------------------------------------------- as MLflow's tags


def written(view: View, now: float | None = None) -> str:
    """Write a view as the value of an experiment's tag."""
    text = json.dumps(view.state(), separators=(",", ":"), ensure_ascii=False)
    state = _DEFLATED + base64.b64encode(zlib.compress(text.encode())).decode()
    made = int(1000 * (time.time() if now is None else now))
    return json.dumps({"name": view.name, "createdAt": made, "updatedAt": made, "state": state}, separators=(",", ":"))


def read(value: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a tag's value: what is said of the view (name, times), and its state.

    Raises:
        ValueError: it is not that of a view.
    """
    try:
        about = json.loads(value)
        state = about.pop("state")
        text = zlib.decompress(base64.b64decode(state.removeprefix(_DEFLATED))) if _DEFLATED in state else state
        return about, json.loads(text)
    except (AttributeError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"not a saved view: {error}") from error


def changes(tags: Mapping[str, str], views: Sequence[View]) -> tuple[dict[str, str], list[str]]:
    """Return the tags to set so that an experiment has the views, and the names of those to remove.

    A view that a user has changed in the UI stays as it is. Of sweeps, the newest have one.
    """
    wanted = {names.saved_view(view.key): view for view in views}
    fresh = {tag: written(view) for tag, view in wanted.items() if _is_stale(tags.get(tag), view)}
    prefix = names.saved_view(_SWEEP)
    known = {tag: _made(value) for tag, value in {**tags, **fresh}.items() if tag.startswith(prefix)}
    kept = sorted(known, key=lambda tag: known[tag], reverse=True)[:_MOST_SWEEPS]
    return fresh, [tag for tag in known if tag not in kept and tag in tags]


def _is_stale(value: str | None, view: View) -> bool:
    if value is None:
        return True
    try:
        about, state = read(value)
    except ValueError:
        return False
    touched = about.get("updatedAt", about["createdAt"]) != about["createdAt"]
    return not touched and (state != view.state() or about.get("name") != view.name)


def _made(value: str) -> float:
    try:
        return float(read(value)[0]["createdAt"])
    except (ValueError, KeyError, TypeError):
        return 0.0
