"""An expert's folder: weights, configuration, tokenizer, card, provenance, and how its training went."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.config import local_path
from mergelab.console.formats import for_a_page
from mergelab.finetune.training import Outcome
from mergelab.models.architecture import pipeline_tag, read_config
from mergelab.models.references import parse_reference
from mergelab.report.card import block, common_license, read_metadata
from mergelab.report.local_paths import LocalPaths, is_local_path, name_of
from mergelab.report.provenance import Merge, SourceModel, plain
from mergelab.tracking import names
from mergelab.weights.adapters import ADAPTER_CONFIG
from mergelab.weights.companions import PROVENANCE, README, companion_files, copy_files
from mergelab.weights.unfinished import unfinished_folder

if TYPE_CHECKING:
    from mergelab.experiment.locate import LocatedModel, Source
    from mergelab.finetune.plan import FinetunePlan, Member
    from mergelab.tasks.data import TaskData
    from mergelab.tracking import Run, Tracker

TRAINING = "mergelab_training.json"
_METHOD = "finetune"
_MINIATURE = (
    "> **Miniature.** The base is mergelab's embedded miniature, a small transformer trained on generated text, and so "
    "are the examples. The figures below say nothing about the real task."
)


@dataclass(frozen=True)
class Made:
    """What one training has made, for its folder.

    Attributes:
        plan: the fine-tuning.
        member: which of its experts.
        source: where base and data come from.
        base: the located base.
        sha256: of the base's weights.
        data: the training split.
        trained_on, held_out: how many of its examples were used for what.
        outcome: what the training has come to.
        run, tracker: where it is recorded, if it is.
    """

    plan: FinetunePlan
    member: Member
    source: Source
    base: LocatedModel
    sha256: str
    data: TaskData
    trained_on: int
    held_out: int
    outcome: Outcome
    run: Run
    tracker: Tracker

    @property
    def _is_mini(self) -> bool:
        return self.source == "mini"

    @property
    def _paths(self) -> LocalPaths:
        return LocalPaths(self.plan.resolved)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of this expert's training."""
        recipe = self.plan.recipe(self.source)
        adapter = {f"lora.{key}": value for key, value in (recipe["lora"] or {}).items()}
        part = {} if self.member.shards == 1 else {"shard": f"{self.member.shard + 1} of {self.member.shards}"}
        return {"task": self.plan.task.name, "seed": self.member.seed, **part, **recipe["train"], **adapter}

    def provenance(self) -> Merge:
        """Return the record that merges of this expert show in their own."""
        store = self.tracker.store
        return Merge(
            method=_METHOD,
            parameters={key: value for key, value in self.recipe.items() if value is not None},
            base=SourceModel(name="base", model=self._shown, revision=self.base.revision, sha256=self.sha256),
            run=self.run.id,
            tracking=self._paths.masked(store.shown) if self.run.id and store else None,
            mergelab=version("mergelab"),
        )

    @property
    def _shown(self) -> str:
        if self._is_mini:
            return self.base.label
        models = parse_reference(self.plan.config.base).models
        return " + ".join(one.text if one.folder is None else name_of(str(one.folder)) for one in models)

    def card(self, config: Mapping[str, Any]) -> str:
        """Return the text of the expert's README.md.

        Args:
            config: its configuration, or its base's.
        """
        from huggingface_hub import ModelCard, ModelCardData

        adapter = self.plan.config.lora.r is not None
        models = () if self._is_mini else parse_reference(self.plan.config.base).models
        bases = [one.repository for one in models if one.repository]
        further: dict[str, Any] = {} if self._is_mini else common_license([read_metadata(self.base.folder)])
        if bases:
            further["base_model_relation"] = "adapter" if adapter else "finetune"
        of_hub = self.data.origin == "hub" and not is_local_path(self.plan.task.path)
        data = ModelCardData(
            base_model=bases or None,
            datasets=[self.plan.task.path] if of_hub else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag=pipeline_tag(config),
            tags=["mergelab", "lora" if adapter else _METHOD, *(["miniature"] if self._is_mini else [])],
            **further,
        )
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self._text('a LoRA adapter' if adapter else 'a model')}"))

    def _text(self, kind: str) -> str:
        from omegaconf import OmegaConf

        task = names.labelled(self.plan.task.name, mini=self._is_mini)
        outcome = self.outcome
        header = list(outcome.curve[0])
        rows = [[f"{row[key]:.4f}" if key != "epoch" else str(row[key]) for key in header] for row in outcome.curve]
        note = (
            f"Epoch {outcome.epoch} has the lowest loss on the {self.held_out} held-out training examples; "
            "this folder has its weights. No other split was looked at."
        )
        run = self.run
        recorded = f", in MLflow run `{run.id}` of experiment `{plain(run.experiment)}`" if run.id else ""
        parts = [
            f"# {plain(self.plan.task.name)}: {self.member.name}",
            *([_MINIATURE] if self._is_mini else []),
            f"This is {kind} that mergelab fine-tuned from `{plain(self._shown)}` on {self.trained_on} examples of the "
            f"training split of `{plain(task)}`, to be merged with others from the same base.",
            "## Training",
            for_a_page("markdown", header, rows, note).rstrip(),
            "## Where it comes from",
            block("text", "\n".join(self.provenance().tree())),
            "## How to make it again",
            block("bash", self._command),
            "<details><summary>All settings</summary>",
            block("yaml", OmegaConf.to_yaml(OmegaConf.create(self._paths.of_values(self._settings))).rstrip()),
            "</details>",
            f"Made with mergelab {version('mergelab')}{recorded}.",
        ]
        return "\n\n".join(parts) + "\n"

    @property
    def _settings(self) -> dict[str, Any]:
        resolved: Any = json.loads(json.dumps(dict(self.plan.resolved), default=str))
        return {key: value for key, value in resolved.items() if key != "output"}

    @property
    def _command(self) -> str:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        typed: Any = []
        if HydraConfig.initialized():
            typed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        kept = [self._paths.masked(each) for each in typed if not each.startswith(("tracking", "output", "hydra"))]
        return " ".join(["python -m mergelab.finetune", *map(shlex.quote, kept)])


def write_expert(made: Made, model: Any, folder: Path) -> None:
    """Write an expert's folder, which appears when it is complete.

    Args:
        made: what was trained.
        model: the trained module, for the configuration of an adapter's model.
        folder: does not exist yet.

    Raises:
        OSError: it cannot be written.
    """
    base, checkpoint = made.base.folder, made.outcome.checkpoint
    with unfinished_folder(folder) as partial:
        for file in sorted(checkpoint.iterdir()):
            if file.name.endswith((".safetensors", ".safetensors.index.json")) or file.name in _DESCRIBING:
                shutil.copyfile(file, partial / file.name)
        if (checkpoint / ADAPTER_CONFIG).is_file():
            model.get_base_model().config.save_pretrained(partial)  # has the names of the labels
        else:
            copy_files(base, companion_files(base), partial)
        (partial / PROVENANCE).write_text(made.provenance().to_json(), encoding="utf-8")
        told = {**asdict(made.outcome), "checkpoint": made.outcome.checkpoint.name}
        (partial / TRAINING).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (partial / README).write_text(made.card(read_config(partial, made.member.name)), encoding="utf-8")


_DESCRIBING = ("config.json", "generation_config.json", ADAPTER_CONFIG)


def read_outcome(folder: Path) -> Outcome:
    """Read how the training of a finished expert went."""
    told = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    return Outcome(**{**told, "checkpoint": local_path(str(folder), "output")})
