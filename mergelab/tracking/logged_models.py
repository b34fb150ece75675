"""Merged models as MLflow's own: a ``LoggedModel`` that ``mlflow.transformers.load_model`` loads, and its registration.

The folder of the model is copied once, to where the store keeps its artifacts; no weights are read. The pip
requirements are given, so that MLflow does not run the model to find them.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mergelab.errors import TrackingError
from mergelab.tracking import names
from mergelab.tracking.values import one_line

_REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate")
_OF_MODEL = (names.METHOD, names.TASK, names.SOURCE)  # tags of a run that its models have too
# Tags of cards for which transformers builds a pipeline from a model and a tokenizer alone, in one version or another.
_WITH_PIPELINE = (
    *("text-classification", "token-classification", "fill-mask", "text-generation", "feature-extraction"),
    *("text2text-generation", "question-answering"),
)
_PYFUNC = "python_function"
_patching = threading.Lock()


@dataclass(frozen=True)
class LoggedFolder:
    """A model that was logged.

    Attributes:
        uri: its address for MLflow.
        registered: the registered model that it is a version of, with the version.
        refusal: why ``mlflow.transformers`` cannot load it; None: it can.
    """

    uri: str
    registered: str | None
    refusal: str | None


def model_folders(folder: Path) -> list[Path]:
    """List the models in a folder that was written: itself, or one for each task below it."""
    if (folder / "README.md").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/README.md"))


def log_models(client: Any, run_id: str, folder: Path, register: str | None) -> list[LoggedFolder]:
    """Log the model of a folder, or each task's, as `log_model` does; several are registered under names of their own.

    The one is called ``model``, and ``runs:/<run id>/model`` leads to it; each task's ``model-<task>``.
    """
    found = []
    for place in model_folders(folder):
        ending = "" if place == folder else f"-{place.name}"
        found.append(log_model(client, run_id, place, f"{names.MODEL}{ending}", register and f"{register}{ending}"))
    return found


def log_model(client: Any, run_id: str, folder: Path, name: str, register: str | None) -> LoggedFolder:
    """Log a model's folder as a model of a run, with the run's parameters, metrics and datasets.

    What ``mlflow.transformers`` cannot load is logged as files.

    Args:
        client: MLflow's.
        run_id: of a run whose metrics and datasets are recorded; it may have ended.
        folder: a model of transformers, with its tokenizer and card.
        name: the model's in the run.
        register: the registered model that it becomes a version of; None: it is not registered.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run_id,
        tags={tag: run.data.tags[tag] for tag in _OF_MODEL if tag in run.data.tags},
        params=dict(run.data.params),
        model_type="merge",
    )
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        refusal = _save(client, model, run_id, folder)
        client.log_batch(run_id, metrics=_metrics(client, run, model.model_id))
        client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        with suppress(Exception):  # what went wrong first is to be seen
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    uri = f"models:/{model.model_id}"
    registered = None if register is None else _register(client, register, model, run_id)
    return LoggedFolder(uri, registered, refusal)


def _save(client: Any, model: Any, run_id: str, folder: Path) -> str | None:
    """Write the folder in MLflow's format to where the model's artifacts belong; return why that cannot be done."""
    from mlflow.models import Model

    with _place(client, model) as place:
        described = Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        )
        try:
            _save_flavor(folder, place, described)
            return None
        except Exception as error:  # of MLflow, of transformers, or because the two do not fit each other
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a full disk is no property of the model
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place)
            return one_line(error)


@contextmanager
def _place(client: Any, model: Any) -> Iterator[Path]:
    """Yield the folder that becomes the model's artifacts: in a local store the artifacts' own."""
    address = urlsplit(model.artifact_location)
    if address.scheme in ("", "file"):
        place = Path(url2pathname(address.path))
        place.parent.mkdir(parents=True, exist_ok=True)
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        yield place
        client.log_model_artifacts(model.model_id, str(place))


def _save_flavor(folder: Path, place: Path, described: Any) -> None:
    """Have ``mlflow.transformers`` write the folder.

    Where transformers has no pipeline for what the model does, the tokenizer is also given as processor: then MLflow
    refuses to make a pipeline, of another kind, and says that ``return_type="components"`` gives model and tokenizer.
    """
    import mlflow.transformers
    from huggingface_hub import ModelCard
    from mlflow.models.model import MLMODEL_FILE_NAME

    card = ModelCard.load(folder / "README.md")
    _check_classes(folder)
    tag = str(card.data.pipeline_tag)
    components = not _has_pipeline(tag)
    with _pipelines_as_classes():
        mlflow.transformers.save_model(
            str(folder),
            str(place),
            task="feature-extraction" if components else tag,
            processor=_tokenizer(folder) if components else None,
            model_card=card,
            mlflow_model=described,
            pip_requirements=_requirements(),
        )
    (place / "LICENSE.txt").unlink(missing_ok=True)  # MLflow's own words on a hub page of the folder's name
    if components:
        described.flavors.pop(_PYFUNC, None)
        described.signature = None
        described.save(str(place / MLMODEL_FILE_NAME))


@contextmanager
def _pipelines_as_classes() -> Iterator[None]:
    """Have transformers give its pipelines' classes, which MLflow reads; later versions give their names."""
    from transformers import pipelines

    check = pipelines.check_task

    def check_task(task: str) -> tuple[str, dict[str, Any], Any]:
        name, described, options = check(task)
        if isinstance(path := described["impl"], str):
            module, _, cls = path.rpartition(".")
            described = {**described, "impl": getattr(importlib.import_module(module), cls)}
        return name, described, options

    with _patching:
        pipelines.check_task = check_task
        try:
            yield
        finally:
            pipelines.check_task = check


def _has_pipeline(tag: str) -> bool:
    from transformers import pipelines

    if tag not in _WITH_PIPELINE:
        return False
    try:
        pipelines.check_task(tag)
    except KeyError:
        return False
    return True


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_classes(folder: Path) -> None:
    """Check that the model's class and its tokenizer's are transformers': MLflow would run the code of any other.

    Raises:
        TrackingError: one is not, or there is no tokenizer.
    """
    import transformers

    for file, key in (("config.json", "architectures"), ("tokenizer_config.json", "tokenizer_class")):
        if not (folder / file).is_file():
            raise TrackingError(f"the model has no {file}")
        value = json.loads((folder / file).read_text(encoding="utf-8")).get(key)
        for name in value if isinstance(value, list) else [value]:
            if name is not None and not (hasattr(transformers, name) or hasattr(transformers, f"{name}Fast")):
                raise TrackingError(f"transformers has no class {name}")


def _requirements() -> list[str]:
    """Return what loading the model needs, as it is installed here."""
    found = []
    for package in _REQUIREMENTS:
        try:
            found.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found


def _metrics(client: Any, run: Any, model_id: str) -> list[Any]:
    """Return a run's metrics as the model's, each score with the dataset that it is of."""
    from mlflow.entities import Metric

    datasets = [each.dataset for each in (run.inputs.dataset_inputs if run.inputs else [])]
    found = []
    for name in run.data.metrics:
        dataset = _dataset_of(name, datasets)
        found += [
            Metric(
                key=one.key,
                value=one.value,
                timestamp=one.timestamp,  # the same, so that the run's own stays one
                step=one.step,
                model_id=model_id,
                run_id=run.info.run_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
            )
            for one in client.get_metric_history(run.info.run_id, name)
            if one.model_id is None
        ]
    return found


def _dataset_of(metric: str, datasets: Sequence[Any]) -> Any | None:
    """Return the dataset that a score is of; None for times, memory and averages of several datasets."""
    kind, _, rest = metric.partition("/")
    if kind not in ("report", "select"):
        return None
    if len(datasets) == 1:
        return datasets[0]
    task = rest.partition("/")[0]
    return next((one for one in datasets if one.name in (task, names.labelled(task, mini=True))), None)


def _register(client: Any, name: str, model: Any, run_id: str) -> str:
    """Make a logged model the next version of a registered model, and return what that is called."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By its address: ``models:/<id>`` would be looked for in the store that is set for the whole process.
    made = client.create_model_version(
        name, model.artifact_location, run_id=run_id, model_id=model.model_id, await_creation_for=None
    )
    versions = [{"name": name, "version": made.version}]
    client.set_logged_model_tags(model.model_id, {names.MODEL_VERSIONS: json.dumps(versions)})
    return f"{name} version {made.version}"
