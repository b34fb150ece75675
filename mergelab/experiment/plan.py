"""The plan of one experiment: every setting checked, nothing loaded yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelab.config import ExperimentConfig, ModelsConfig, check, local_path
from mergelab.console.progress import warn
from mergelab.errors import ConfigError, did_you_mean, listed, shortened
from mergelab.experiment.compared import used_name
from mergelab.experiment.locate import Source, decide_source
from mergelab.experiment.slicing import without_slices
from mergelab.experiment.stages import KEY, in_order, named, stage_experiment, with_made_stages
from mergelab.models.chat_templates import check_template
from mergelab.models.references import parse_reference, references

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.engine.method import MergeMethod
    from mergelab.tasks.spec import TaskSpec
    from mergelab.tracking import TrackingConfig

_NOT_THE_EXPERIMENT = ("hydra", "experiment", "sweep")
_FOR_MODELS = ("passthrough", "leave_out", "vocab", "config", "untie")  # keys of `models`


@dataclass(frozen=True)
class Plan:
    """An experiment whose every setting has been checked; nothing is loaded yet."""

    config: ExperimentConfig
    resolved: Mapping[str, Any]
    method: MergeMethod
    parameters: Any
    task_name: str
    tasks: tuple[TaskSpec, ...]
    data_dir: str | None
    limit: int | None
    tracking: TrackingConfig

    @property
    def source(self) -> Source:
        """Decide where models and data come from.

        Raises:
            ConfigError: some are stages that are to be made.
        """
        if self.config.models.stages:
            raise ConfigError(f"{KEY}: is for merges, and for sweeps of settings that are no stage's")
        data = {task.name: (task.path, task.config) for task in self.tasks if task.path}
        local = self.data_dir is not None or not (self.config.evaluate or self.method.needs)
        return decide_source(self.config.source, self.config.models, data, data_is_local=local)


def plan_experiment(config: DictConfig, *, merges: bool = True) -> Plan:
    """Check every setting of ``config``, the method's and the tasks' included, without loading anything.

    Args:
        config: the composed configuration.
        merges: whether a merge is made, which has to be measured or written.

    Raises:
        ConfigError, DataError: a key, a value or a combination is not usable.
        HubError: the model is to be pushed to the hub, and there is no token.
    """
    from mergelab.engine.registry import method_from_config, resolve_weights, unsupported_for_generation
    from mergelab.evaluation.vllm_support import check_vllm
    from mergelab.tasks.loading import tasks_from_config
    from mergelab.tracking import tracking_config

    resolved = _resolved(config)
    written = with_made_stages(check(ExperimentConfig, resolved))
    checked = without_slices(written)
    if checked.models.base is not None and "base" in checked.models.experts:
        raise ConfigError("models.experts.base: that is the base's name; give another one: {<name>: <reference>}")
    names = [*(["base"] if checked.models.base is not None else []), *checked.models.experts]
    if (chosen := checked.save.tokenizer) not in (None, *names):
        raise ConfigError(f"save.tokenizer={chosen}: must be one of {listed(names)}{did_you_mean(str(chosen), names)}")
    check_template(checked.save.chat_template, "save.chat_template")
    method, parameters = method_from_config(checked.method)
    checked = _with_form(checked, method)
    _check_method(method, checked)
    weights = [expert.weight for expert in checked.models.experts.values()]
    resolve_weights(method, parameters, tuple(checked.models.experts), weights)
    suite = tasks_from_config(checked.task, measured=checked.evaluate)
    _check_tasks_of_experts(checked, suite.tasks)
    if checked.evaluate and checked.eval.engine == "vllm":
        check_vllm(suite.tasks)
    if (reason := unsupported_for_generation(method, parameters)) is not None and _merges_writers(checked, suite.tasks):
        raise ConfigError(reason)
    if merges and not checked.evaluate and checked.output is None:
        raise ConfigError("evaluate=false: nothing would be made; say where the merged model goes with output=<folder>")
    _check_form(checked, method.name)
    models = checked.models.model_copy(update={"name": used_name(checked.models)})
    checked = checked.model_copy(update={"models": models})
    tracking = tracking_config(checked.tracking)
    if checked.save.push_to_hub is not None:
        _check_push(checked.save.push_to_hub, checked)
    if checked.save.form == "module_average" and tracking.enabled and tracking.log_model != "none":
        raise ConfigError(
            f"tracking.log_model={tracking.log_model}: MLflow has no format for averaged modules of adapters; "
            "tracking.log_model=none"
        )
    if checked.output is not None:
        check_output(checked.output, checked.models if written.models.stages is None else None)
    for name in in_order(written.models):
        with named(f"{KEY}.{name}"):
            plan_experiment(stage_experiment(resolved, name, {}), merges=False)
    return Plan(
        checked,
        resolved,
        method,
        parameters,
        suite.name,
        suite.tasks,
        suite.data_dir,
        suite.limit,
        tracking,
    )


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Resolve each part of the experiment within the whole: it may refer to a sweep's own keys."""
    from omegaconf import OmegaConf

    keys = [str(key) for key in config if key not in _NOT_THE_EXPERIMENT]
    missing = {key for key in keys if OmegaConf.is_missing(config, key)}
    parts: dict[str, Any] = {key: config[key] for key in keys if key not in missing}
    for part in parts.values():
        missing |= OmegaConf.missing_keys(part) if OmegaConf.is_config(part) else set()
    if missing:
        raise ConfigError("; ".join(f"{key}: needs a value" for key in sorted(missing)))
    return {
        key: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        for key, part in parts.items()
    }


def _check_method(method: MergeMethod, config: ExperimentConfig) -> None:
    """Check that the method can be used with these models, heads and protocol."""
    from mergelab.engine.registry import check_capabilities

    check_capabilities(method, has_base=config.models.base is not None, experts=len(config.models.experts))
    if method.one_model_per_expert and config.models.head in ("average", "base"):
        raise ConfigError(
            f"method={method.name}: makes one model for each expert, and models.head={config.models.head} does not "
            "say which of them a task is measured with; models.head=per_task: its own expert's, "
            "models.head=expert:<name>: that one's"
        )
    if "selection" in method.needs and not (config.evaluate and config.eval.protocol != "full"):
        raise ConfigError(
            f"method={method.name}: chooses by scores, and with "
            f"{'evaluate=false' if not config.evaluate else 'eval.protocol=full'} there are no examples that select; "
            "eval.protocol=holdout sets some apart (oracle: the reporting ones, and labelled so)"
        )


def _check_tasks_of_experts(config: ExperimentConfig, tasks: Sequence[TaskSpec]) -> None:
    """Check that an expert's task is one: a misspelt one would be taken for that of the measurement."""
    from mergelab.tasks.loading import task_names

    named = {name: expert.task for name, expert in config.models.experts.items() if expert.task is not None}
    if not named or config.models.mini is not None:
        return
    known = dict.fromkeys([*(task.name for task in tasks), *task_names()])
    for name, task in named.items():
        if task not in known:
            hint = did_you_mean(task, known) or f" (there are {listed(known, 20)})"
            raise ConfigError(f"models.experts.{name}.task={shortened(task)}: no such task{hint}")


def _with_form(config: ExperimentConfig, method: MergeMethod) -> ExperimentConfig:
    """Choose what a merged model is written as, where that is not said.

    Raises:
        ConfigError: it is said, and is not for this method.
    """
    form = config.save.form
    if method.takes_adapters and form in ("lora_cat", "ia3"):
        raise ConfigError(f"save.form={form}: {method.name} makes factors of its own, which save.form=lora writes")
    if form == "lora" and not method.takes_adapters:
        raise ConfigError(
            f"save.form=lora: is for methods that combine factors, such as peft_linear; {method.name} is written with "
            "save.form=lora_cat or lora_svd"
        )
    chosen = form or ("lora" if method.takes_adapters and isinstance(config.models.base, str) else "dense")
    return config.model_copy(update={"save": config.save.model_copy(update={"form": chosen})})


def _check_form(config: ExperimentConfig, method: str) -> None:
    """Check that what a merged model is written as fits the rest.

    Raises:
        ConfigError: it does not.
    """
    save, vocab = config.save, config.models.vocab
    if save.chat_template is not None and save.library == "adapters":
        raise ConfigError("save.chat_template: is written with a tokenizer, which save.library=adapters has none of")
    if save.form != "dense" and vocab is not None and (vocab.padding == "drop" or vocab.pad_to_multiple_of):
        key = "padding" if vocab.padding == "drop" else "pad_to_multiple_of"
        raise ConfigError(f"models.vocab.{key}: an adapter on the base keeps its rows; save.form=dense writes a model")
    if save.form == "lora_svd" and (save.rank is None) == (save.energy is None):
        raise ConfigError("save.form=lora_svd: give one of save.rank and save.energy")
    if save.form != "lora_svd" and (save.rank is not None or save.energy is not None):
        key = "rank" if save.rank is not None else "energy"
        raise ConfigError(f"save.{key}: belongs to save.form=lora_svd, and save.form is {save.form}")
    if save.form == "dense":
        if save.library is not None:
            raise ConfigError(f"save.library={save.library}: is for adapters (save.form=lora_cat, lora_svd, ia3, …)")
        return
    if save.form == "module_average":
        if save.library == "peft":
            raise ConfigError("save.library=peft: save.form=module_average is for adapters of the Adapters library")
        _check_module_average(config, method)
        return
    if not isinstance(config.models.base, str):
        raise ConfigError(f"save.form={save.form}: an adapter needs a base (models.base) that is a folder or a hub id")
    if save.dtype is not None:
        raise ConfigError(f"save.dtype={save.dtype}: adapters are written in float32; leave it out")


def _check_push(repository: str, config: ExperimentConfig) -> None:
    """Check what can be known without network of a push to the hub.

    Raises:
        HubError: there is no token. ConfigError: the adapter's base is a local folder.
    """
    from mergelab.models.hub_push import check_token

    key = f"save.push_to_hub={repository}"
    if config.save.form != "dense":
        base = config.models.base
        if base is not None and any(model.folder for model in parse_reference(base).models):
            raise ConfigError(
                f"{key}: an adapter is of use with its base alone, and models.base is a folder of this machine; name "
                "it by its hub id, or write save.form=dense"
            )
    check_token(repository)


def _check_module_average(config: ExperimentConfig, method: str) -> None:
    """Check that a configuration is one of an average of modules.

    Raises:
        ConfigError: a setting is for models.
    """
    form = "save.form=module_average"
    if method != "soup" or config.method.get("normalize", True) is not True:
        raise ConfigError(f"{form}: modules are averaged by method=soup with method.normalize=true alone")
    if config.evaluate:
        raise ConfigError(f"{form}: needs evaluate=false; only the Adapters library runs models with such adapters")
    if config.source == "mini":
        raise ConfigError(f"{form}: the embedded miniature has no such adapters; give folders or hub ids")
    if odd := [key for key in _FOR_MODELS if getattr(config.models, key)]:
        raise ConfigError(f"models.{odd[0]}: is for models, and {form} averages modules of adapters")
    if odd := [name for name, expert in config.models.experts.items() if expert.part is not None]:
        raise ConfigError(f"models.experts.{odd[0]}.part: is for models, and {form} averages modules of adapters")


def _merges_writers(config: ExperimentConfig, tasks: Sequence[TaskSpec]) -> bool:
    """Return whether an expert was made for a task whose models write text."""
    from mergelab.tasks.loading import task_of_expert

    if config.source == "mini" and config.models.mini is None:
        return False  # whatever the experts are called, classifiers take their places
    made_for = (task_of_expert(expert.task or name, tasks) for name, expert in config.models.experts.items())
    return any(all(not each.outputs for each in ([task] if task else tasks)) for task in made_for)


def warn_if_mini(wanted: str, source: str) -> None:
    """Warn, once, when the miniature takes the place of models that were asked for.

    Args:
        wanted: the key ``source`` of the configuration.
        source: what was decided.
    """
    if source == "mini" and wanted == "auto":
        warn(
            "The model hub cannot be reached and its cache does not have these models. This run uses mergelab's "
            "embedded miniature instead: small transformers trained here on generated text. Its scores are not those "
            "of the real task. source=mini asks for it without this warning, source=hub makes it an error."
        )


def check_output(output: str, models: ModelsConfig | None) -> None:
    """Check, before any work is done, that the merge of ``models`` can be written to ``output``.

    ``models`` is None where some of them are still to be made.

    Raises:
        ConfigError: it is a file, a folder in use, a model's own folder, or inside something that is no folder.
    """
    from mergelab.weights.writer import is_unfinished, making_of

    folder = local_path(output, "output")
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        making_of(folder).exists()  # its name is longer
    except OSError as error:
        raise ConfigError(f"output={shortened(output)}: no folder can be called so ({error.strerror})") from None
    if not existing.is_dir():
        raise ConfigError(f"output={output}: {existing} is a file; a folder that does not exist yet is needed")
    if existing == folder and any(not is_unfinished(path) for path in folder.iterdir()):
        for reference in references(models) if models is not None else ():
            if reference.folder is not None and folder.samefile(reference.folder):
                raise ConfigError(f"output={output}: the folder is that of an input model; choose another one")
        raise ConfigError(f"output={output}: the folder is not empty; choose another one or remove it")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output={output}: {existing} cannot be written to")
