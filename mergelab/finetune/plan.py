"""The plan of a fine-tuning: every setting checked, nothing loaded yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergelab.config import ModelsConfig, ReferenceConfig, Schema, check, local_path
from mergelab.errors import ConfigError, listed
from mergelab.experiment.locate import Source, decide_source
from mergelab.models.references import Adapted, LayerStack, parse_reference
from mergelab.tasks.loading import tasks_from_config
from mergelab.tracking import names, tracking_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergelab.tasks.spec import TaskSpec
    from mergelab.tracking import TrackingConfig

_RATE, _LORA_RATE, _MINI_RATE = 5e-5, 2e-4, 1e-3
_BATCH, _TEXT_BATCH = 32, 8
MAX_LENGTH = "train.max_length"
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what all generators that the Trainer seeds take


class TrainConfig(Schema):
    """How an expert is trained."""

    split: Annotated[str, Field(pattern=r"^[\w.\-]+$")] = "train"
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 3
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_length: Annotated[int, Field(ge=8)] | None = None
    group_by_length: bool = False
    examples: Annotated[int, Field(ge=2)] | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Field(ge=1)] | None = 2


class LoraConfig(Schema):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685); with ``r`` None all weights are trained."""

    r: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)] | None = None


class FinetuneConfig(Schema):
    """One recipe, for several seeds and parts of the data."""

    base: ReferenceConfig
    seeds: Annotated[list[Seed], Field(min_length=1)]
    shards: Annotated[int, Field(ge=1, le=10_000)] = 1
    seed: Seed = 0
    output: str | None = None
    source: Literal["auto", "hub", "mini"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()


@dataclass(frozen=True)
class Member:
    """One expert that is to be made: of a seed, on one part of the training examples."""

    seed: int
    shard: int
    shards: int

    @property
    def name(self) -> str:
        """What its folder is called: ``seed-0``, or ``seed-0-shard-2`` where there are several parts."""
        return f"seed-{self.seed}" + (f"-shard-{self.shard + 1}" if self.shards > 1 else "")


@dataclass(frozen=True)
class FinetunePlan:
    """A fine-tuning whose every setting has been checked.

    Attributes:
        config: what was asked for.
        models: the base alone, as `mergelab.experiment.locate.locate` takes it.
        task: what is trained for.
        data_dir: a folder of Parquet files instead of the hub's data.
        resolved: the configuration, plain.
    """

    config: FinetuneConfig
    models: ModelsConfig
    task: TaskSpec
    data_dir: str | None
    tracking: TrackingConfig
    resolved: Mapping[str, Any]

    @property
    def members(self) -> tuple[Member, ...]:
        """The experts, in the order in which they are made."""
        config = self.config
        return tuple(Member(seed, shard, config.shards) for seed in config.seeds for shard in range(config.shards))

    def source(self) -> Source:
        """Decide where the base and the data come from; see `mergelab.experiment.locate.decide_source`."""
        data = {self.task.name: (self.task.path, self.task.config)}
        return decide_source(self.config.source, self.models, data, data_is_local=self.data_dir is not None)

    def folder(self, source: Source) -> Path:
        """Return the folder that the experts are written into."""
        if self.config.output is not None:
            return local_path(self.config.output, "output")
        return Path("outputs", "experts", names.labelled(self.task.name, mini=source == "mini"))

    def recipe(self, source: Source) -> dict[str, Any]:
        """Return the settings of the training, with numbers in the place of what depends on task and models."""
        train, lora = self.config.train, self.config.lora
        usual = _LORA_RATE if lora.r is not None else _RATE
        found = train.model_dump() | {
            "learning_rate": train.learning_rate or (_MINI_RATE if source == "mini" else usual),
            "batch_size": train.batch_size or (_BATCH if self.task.outputs else _TEXT_BATCH),
        }
        adapter = None if lora.r is None else lora.model_dump() | {"alpha": lora.alpha or 2.0 * lora.r}
        return {"lora": adapter, "shards": self.config.shards, "seed": self.config.seed, "train": found}


def plan_finetuning(config: DictConfig) -> FinetunePlan:
    """Check every setting of ``config`` without loading anything.

    Raises:
        ConfigError, DataError: a key, a value or a combination is not usable.
        ModelError: the base is written like a folder, and there is none.
    """
    from mergelab.experiment.compared import typed_keys

    resolved = _plain(config)
    typed = typed_keys()
    if odd := sorted(key for key in typed if key.startswith("models.") and key != "models.base"):
        raise ConfigError(f"{odd[0]}: experts are made here, not merged; base=REFERENCE is the model that is trained")
    if "task.limit" in typed:
        raise ConfigError("task.limit: is of the examples that models are measured on; train.examples=N trains on N")
    group = resolved.pop("models")
    task, tracking = resolved.pop("task"), tracking_config(resolved.pop("tracking"))
    if resolved.get("base") is None:
        resolved["base"] = group.get("base")
    if resolved["base"] is None:
        raise ConfigError("base: needs a value, a hub id or the folder of the model that is to be trained")
    checked = check(FinetuneConfig, resolved)
    _check_settings(checked)
    _check_installed(checked)
    spec, data_dir = _task(task, checked.train.split)
    # A merge needs experts; a fine-tuning makes them.
    models = ModelsConfig.model_construct(
        name=spec.name, base=checked.base, experts={}, mini=group.get("mini"), slices=None
    )
    if tracking.log_model != "none":
        raise ConfigError(f"tracking.log_model={tracking.log_model}: logs merged models; experts stay in their folder")
    return FinetunePlan(checked, models, spec, data_dir, tracking, {**resolved, "task": task})


def _plain(config: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in found.items() if key not in ("hydra", "method")}


def _check_settings(config: FinetuneConfig) -> None:
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds={config.seeds}: must not repeat a seed; the same seed makes the same expert")
    for key in ("alpha", "targets"):
        if config.lora.r is None and getattr(config.lora, key) is not None:
            raise ConfigError(f"lora.{key}: belongs to a LoRA adapter; lora.r=8 asks for one")
    if config.device.startswith("cuda:"):
        number = config.device.partition(":")[2]
        raise ConfigError(f"device={config.device}: write CUDA_VISIBLE_DEVICES={number} before the command, and cuda")
    if config.source != "mini" and isinstance(parse_reference(config.base), Adapted | LayerStack):
        raise ConfigError(f"base={parse_reference(config.base).text}: must be one model; merge it into a folder first")


def _check_installed(config: FinetuneConfig) -> None:
    """Check that what trains is installed.

    Raises:
        ConfigError: it is not.
    """
    from importlib.util import find_spec

    needed = ["accelerate", *(["peft"] if config.lora.r is not None else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ConfigError(
            f"fine-tuning needs the package {listed(missing)}, which is not installed: pip install 'mergelab[finetune]'"
        )


def _task(node: Mapping[str, Any], split: str) -> tuple[TaskSpec, str | None]:
    """Check that the task has something to train on.

    Raises:
        ConfigError: it is a suite, has no examples with answers, or reports on its training split.
    """
    suite = tasks_from_config(node, measured=False)
    if len(suite.tasks) != 1 or suite.name != suite.tasks[0].name:
        members = listed([task.name for task in suite.tasks])
        raise ConfigError(f"task={suite.name}: a suite; fine-tune on one task at a time: task={members}")
    (task,) = suite.tasks
    if task.kind in ("prompts", "lm_eval"):
        raise ConfigError(f"task={task.name}: has no training examples; choose a task with a dataset, such as rte")
    if split in task.splits:
        raise ConfigError(f"task.splits={list(task.splits)}: experts are trained on {split}, so that it cannot report")
    return task, suite.data_dir
