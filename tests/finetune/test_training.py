"""What an expert is: the weights that a plain loop gives, the same bits each time, and the best of its epochs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch.nn import functional

from mergelab.finetune import training
from mergelab.finetune.examples import EpochBatches
from mergelab.tasks.splits import holdout, shards
from tests.conftest import Outcome
from tests.finetune.conftest import FEW, ROWS

Finetune = Callable[..., Outcome]
WEIGHTS = "model.safetensors"


def made(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome
    return outcome.out


def training_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mergelab_training.json").read_text())
    return found


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def rows_of_rte(place: Path, members: np.ndarray) -> tuple[list[str], list[str], torch.Tensor]:
    table = pq.read_table(place / "data" / "rte" / "train.parquet").to_pydict()
    first, second = ([table[name][at] for at in members] for name in ("sentence1", "sentence2"))
    return first, second, torch.tensor([table["label"][at] for at in members])


def plain_loop(place: Path, seed: int, epochs: int, rate: float) -> dict[str, torch.Tensor]:
    """Fine-tune as the documentation of PyTorch and BERT's authors do it, in a loop of its own."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    labels = torch.tensor(pq.read_table(place / "data" / "rte" / "train.parquet")["label"].to_pylist()).numpy()
    _, rest = holdout(labels, 0.2, 0)
    first, second, wanted = rows_of_rte(place, rest)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(place / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", config=config)
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    decays = [p for name, p in model.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    others = [p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=False)
    steps = math.ceil(len(rest) / 16) * epochs
    warmup = round(0.1 * steps)
    scale = lambda step: step / warmup if step < warmup else (steps - step) / (steps - warmup)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(rest))
        for start in range(0, len(rest), 16):
            chosen = order[start : start + 16]
            texts = [[side[at] for at in chosen] for side in (first, second)]
            inputs = tokenizer(*texts, padding=True, return_tensors="pt")
            loss = functional.cross_entropy(model(**inputs).logits, wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return dict(model.state_dict())


@pytest.fixture
def no_dropout(place: Path) -> None:
    """A base whose training draws no random numbers but for its head."""
    target = (place / "bert").resolve()
    (place / "bert").unlink()
    (place / "bert").mkdir()
    for file in target.iterdir():
        (place / "bert" / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "bert" / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("no_dropout")
def test_an_expert_has_the_weights_of_a_plain_loop(finetune: Finetune, place: Path) -> None:
    made(finetune("task=rte", "base=./bert", "seeds=[3]", "train.learning_rate=1e-3", "output=x", "tracking=none"))
    found = load_file(place / "x" / "seed-3" / WEIGHTS)
    epoch = training_of(place / "x" / "seed-3")["epoch"]
    assert epoch == 2, "the loop below is that of the last epoch"
    expected = plain_loop(place, 3, epochs=2, rate=1e-3)
    base = load_file(place / "bert" / WEIGHTS)
    assert found.keys() == {name for name in expected if not name.endswith("position_ids")}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(value, base[name]) for name, value in found.items() if name in base)


def test_the_same_command_makes_the_same_bits_and_other_seeds_and_parts_others(finetune: Finetune, place: Path) -> None:
    recipe = ("task=rte", "base=./bert", "tracking=none")
    made(finetune(*recipe, "seeds=[0,1]", "output=x"))
    made(finetune(*recipe, "seeds=[1]", "output=y"))
    again = (place / "y" / "seed-1" / WEIGHTS).read_bytes()
    assert again == (place / "x" / "seed-1" / WEIGHTS).read_bytes()
    assert again != (place / "x" / "seed-0" / WEIGHTS).read_bytes()
    made(finetune(*recipe, "seeds=[1]", "shards=2", "output=z"))
    parts = [(place / "z" / f"seed-1-shard-{number}" / WEIGHTS).read_bytes() for number in (1, 2)]
    assert parts[0] != parts[1]
    assert again not in parts
    for output in ("g", "h"):
        made(finetune(*recipe, "seeds=[1]", f"output={output}", "train.group_by_length=true"))
    grouped = [(place / output / "seed-1" / WEIGHTS).read_bytes() for output in ("g", "h")]
    assert grouped[0] == grouped[1] != again


def test_batches_of_like_lengths_have_every_example_once_and_less_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 1003)
    plain, grouped = EpochBatches(1003, 32, 7), EpochBatches(1003, 32, 7, lengths)

    def padded(batches: list[list[int]]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    seen = []
    for epoch in (0, 1):
        for sampler in (plain, grouped):
            sampler.set_epoch(epoch)
        found = list(grouped)
        assert sorted(at for batch in found for at in batch) == list(range(1003))
        assert len(found) == len(grouped)
        assert padded(found) < 1.15 * lengths.sum() < 0.75 * padded(list(plain))
        longest = [int(lengths[batch].max()) for batch in found]
        assert longest not in (sorted(longest), sorted(longest, reverse=True)), "the batches come in random order"
        assert list(grouped) == found
        seen.append({frozenset(batch) for batch in found})
    assert not seen[0] & seen[1], "other epochs have other batches"


def test_the_best_epoch_is_kept_and_its_loss_is_that_of_the_folder(finetune: Finetune, place: Path) -> None:
    # A rate that is much too high: the first epochs are the best.
    out = made(
        finetune("task=rte", "base=./bert", "output=x", "tracking=none", "train.epochs=6", "train.learning_rate=0.2",
                 "train.patience=1", "train.schedule=constant", "train.warmup=0")
    )  # fmt: skip
    found = training_of(place / "x" / "seed-0")
    losses = [row["loss"] for row in found["curve"]]
    assert found["epoch"] == 1 + losses.index(min(losses))
    assert len(losses) == found["epochs"] < 6
    assert losses[-1] >= min(losses[:-1]), "one epoch without improvement is enough to stop"
    assert f"{min(losses):.4f}" in out

    labels = rows_of_rte(place, np.arange(ROWS))[2].numpy()
    first, second, wanted = rows_of_rte(place, holdout(labels, 0.2, 0)[0])
    model, tokenizer = opened(place / "x" / "seed-0")
    model.double()
    with torch.inference_mode():
        inputs = [tokenizer(one, other, return_tensors="pt") for one, other in zip(first, second, strict=True)]
        logits = torch.cat([model(**each).logits for each in inputs])
    assert float(functional.cross_entropy(logits, wanted)) == pytest.approx(min(losses), rel=1e-5)
    assert float((logits.argmax(1) == wanted).float().mean()) == pytest.approx(found["held_out"]["accuracy"])


def stopped_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the process's training, in the middle of everything, before a step."""
    own = training._Keeper.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        own(self, args, state, control, **more)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Keeper, "on_step_end", stop)


@pytest.mark.parametrize("lora", [(), pytest.param(("lora.r=2",), marks=pytest.mark.slow)], ids=["weights", "adapter"])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    finetune: Finetune, place: Path, monkeypatch: pytest.MonkeyPatch, lora: tuple[str, ...]
) -> None:
    weights = "adapter_model.safetensors" if lora else WEIGHTS
    recipe = ("task=rte", "base=./bert", "seeds=[0,1]", "train.epochs=3", *lora)
    made(finetune(*recipe, "output=whole", "tracking=none"))
    with monkeypatch.context() as patch:
        stopped_at(patch, 8)  # of 3 steps in each of 3 epochs
        assert finetune(*recipe, "output=x").code == 130
    assert not (place / "x" / "seed-0").exists()
    left = place / "x" / ".seed-0.training"
    assert sorted(path.name for path in left.iterdir()) == ["checkpoint-6"], "the best, and the last"
    (left / "checkpoint-7").mkdir()  # begun, and not finished
    with monkeypatch.context() as patch:
        steps: list[int] = []
        patch.setattr(
            training._Keeper, "on_step_end", lambda _, __, state, *___, **____: steps.append(state.global_step)
        )
        made(finetune(*recipe, "output=x"))
    assert steps == [7, 8, 9, *range(1, 10)]
    for member in ("seed-0", "seed-1"):
        assert (place / "x" / member / weights).read_bytes() == (place / "whole" / member / weights).read_bytes()
        assert training_of(place / "x" / member) == training_of(place / "whole" / member)
    assert not list((place / "x").glob(".seed*"))

    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("rte").experiment_id])
    assert {run.data.tags["mergelab.kind"] for run in runs} == {"finetuning"}
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]
    for run in runs:
        for metric in ("train/loss", "heldout/loss"):
            points = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(points) == len(set(points))
        assert [point.step for point in client.get_metric_history(run.info.run_id, "heldout/loss")] == [3, 6, 9]

    before = (place / "x" / "seed-0" / weights).stat().st_mtime_ns
    made(finetune(*recipe, "output=x"))
    assert (place / "x" / "seed-0" / weights).stat().st_mtime_ns == before, "finished experts are not made again"
    assert len(client.search_runs([client.get_experiment_by_name("rte").experiment_id])) == 2


def test_a_training_killed_after_its_last_epoch_trains_no_further(
    finetune: Finetune, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ("task=rte", "base=./bert", "output=x", "tracking=none", "train.learning_rate=0.2", "train.epochs=6",
              "train.patience=1", "train.schedule=constant", "train.warmup=0")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("mergelab.finetune.expert.write_expert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert finetune(*recipe).code == 130
    with monkeypatch.context() as patch:
        stopped_at(patch, 10**6)
        patch.setattr(training._Keeper, "on_step_end", lambda *_, **__: pytest.fail("it trains"))
        made(finetune(*recipe))
    assert training_of(place / "x" / "seed-0")["epochs"] < 6


def test_an_expert_that_was_written_and_not_recorded_is_recorded(
    finetune: Finetune, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ("task=rte", "base=./bert", "output=x", "train.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr("mergelab.finetune.run.record_expert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert finetune(*recipe).code == 130
    before = (place / "x" / "seed-0" / WEIGHTS).stat().st_mtime_ns
    made(finetune(*recipe))
    assert (place / "x" / "seed-0" / WEIGHTS).stat().st_mtime_ns == before
    assert not list((place / "x").glob(".seed*"))
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("rte").experiment_id])
    assert (run.info.status, run.data.metrics["best_epoch"]) == ("FINISHED", 1)
    assert run.inputs.dataset_inputs[0].dataset.name == "rte"


def test_the_parts_are_disjoint_and_none_has_what_is_held_out(place: Path) -> None:
    labels = rows_of_rte(place, np.arange(ROWS))[2].numpy()
    held_out, rest = holdout(labels, 0.2, 0)
    parts = [rest[part] for part in shards(labels[rest], 3, 0)]
    assert sorted([*held_out, *np.concatenate(parts)]) == list(range(ROWS))
    assert {len(part) for part in parts} == {len(rest) // 3}
    counts = [int(labels[part].sum()) for part in parts]
    assert max(counts) - min(counts) <= 1, "every label has its share in each part"


def test_random_generators_and_settings_are_left_as_they_were(finetune: Finetune) -> None:
    import random

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    made(finetune("task=rte", "base=./bert", "output=x", "tracking=none", "train.epochs=1"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert FEW
