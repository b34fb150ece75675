"""A Hydra app whose jobs record runs as mergelab's own do."""

from __future__ import annotations

import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mergelab.tracking import experiment_name, open_tracking, tracking_config
from mergelab.tracking.names import PRIMARY


def decide_source(config: DictConfig) -> str:
    with Path("decisions").open("a") as file:
        file.write("asked\n")
    return "mini"


def job(config: DictConfig) -> None:
    settings = tracking_config(config.tracking)
    tracker = open_tracking(settings)
    hydra_node = HydraConfig.get()
    parent = tracker.grid_parent(hydra_node.sweep.dir) if hydra_node.mode.name == "MULTIRUN" else None
    source = parent.source if parent else decide_source(config)
    experiment = parent.experiment if parent else experiment_name(settings, config.task.name, mini=source == "mini")
    with tracker.start_run(
        f"{config.method.name} density={config.method.density}",
        experiment=experiment,
        parent=parent.id if parent else None,
        tags={"mergelab.task": config.task.name, "mergelab.source": source, PRIMARY: "report/accuracy"},
        params=OmegaConf.to_container(config, resolve=True),
    ) as run:
        run.log_dataset(
            "mini/rte",
            origin="mini",
            location="mergelab.miniature",
            fingerprint="0123456789abcdef" * 4,
            rows=277,
            split="validation",
            columns={"sentence1": "string", "sentence2": "string", "label": "long"},
        )
        if config.behaviour == "fail" and config.method.name == "ties":
            raise ValueError("no consensus\nsecond line")
        if config.behaviour == "hang" and config.method.name == "ties":
            Path(f"hanging-{run.id}").touch()
            time.sleep(120)
        accuracy = {"soup": 0.6, "ties": 0.7, "dare": 0.65}[config.method.name] + config.method.density / 10
        run.log_metrics({"report/accuracy": accuracy, "report/accuracy_low": accuracy - 0.05})
        run.log_metrics({"report/accuracy_high": accuracy + 0.05, "time/merge_s": 1.5, "memory/peak_mb": 900.0})
        run.log_text(OmegaConf.to_yaml(config, resolve=True), "config.yaml")


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=".", config_name="config")(job)()
