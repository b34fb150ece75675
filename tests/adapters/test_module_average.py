"""Bottleneck adapters of the Adapters library are averaged where they are alike, and refused in one line where not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergelab as ml
from mergelab import errors
from tests.adapters import adapterhub_made as library
from tests.adapters import made as small
from tests.adapters.adapterhub_made import BOTTLENECK, LORA, bottleneck, merged, with_head, written
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    small.bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_modules_are_averaged_with_their_weights_and_heads(
    base: Path, tmp_path: Path, mergelab_command: Command
) -> None:
    given, heads = {}, {}
    for seed, name in enumerate("ab"):
        written(tmp_path / name, bottleneck(name=name, seed=seed), BOTTLENECK, name=name)
        heads[name] = {"classifier.weight": library.drawn(2, 16, seed=seed), "classifier.bias": library.drawn(2)}
        with_head(tmp_path / name, heads[name])
        given[name] = f"{{reference: {tmp_path / name}, weight: {3 - 2 * seed}}}"
    merged(mergelab_command, base, given, "method=soup", "save.form=module_average")
    found = torch.load("out/pytorch_adapter.bin", weights_only=True)
    first, second = bottleneck(name="a"), bottleneck(name="b", seed=1)
    assert len(found) == len(first)
    for name, tensor in found.items():
        parts = [own[name.replace(".merged.", f".{of}.")].double() for of, own in (("a", first), ("b", second))]
        torch.testing.assert_close(tensor.double(), (3 * parts[0] + parts[1]) / 4, rtol=1e-6, atol=1e-7)
    classifier = torch.load("out/pytorch_model_head.bin", weights_only=True)["classifier.weight"].double()
    expected = (3 * heads["a"]["classifier.weight"].double() + heads["b"]["classifier.weight"].double()) / 4
    torch.testing.assert_close(classifier, expected, rtol=1e-6, atol=1e-7)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["name"], config["config"]) == ("merged", BOTTLENECK)


def test_the_function_writes_what_the_command_does(base: Path, tmp_path: Path, mergelab_command: Command) -> None:
    given = {name: written(tmp_path / name, bottleneck(name=name, seed=seed), BOTTLENECK, name=name)
             for seed, name in enumerate("ab")}  # fmt: skip
    for seed, name in enumerate("ab"):
        with_head(
            given[name], {"classifier.weight": library.drawn(2, 16, seed=seed), "classifier.bias": library.drawn(2)}
        )
    merged(mergelab_command, base, given, "method=soup", "method.weights=[3,1]", "save.form=module_average")
    expected = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    for of_the_run in ("README.md", "mergelab.json"):
        expected.pop(of_the_run)
    for at, (adapters, weights) in enumerate(
        [(given, {"a": 3.0}), ([str(each) for each in given.values()], [3.0, 1.0]), (list(given.values()), (3, 1))]
    ):
        folder = ml.module_average(adapters, tmp_path / f"own{at}", weights=weights)
        assert folder == tmp_path / f"own{at}"
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    headless = ml.module_average(given, str(tmp_path / "headless"), head="base")
    assert {file.name for file in headless.iterdir()} == {"adapter_config.json", "pytorch_adapter.bin"}
    first = ml.module_average(given, tmp_path / "first", head="expert:b")
    head = torch.load(first / "pytorch_model_head.bin", weights_only=True)
    assert torch.equal(head["classifier.weight"], library.drawn(2, 16, seed=1))


@pytest.mark.parametrize(
    ("adapters", "settings", "error", "line"),
    [
        ([], {}, errors.ConfigError, "experts"),
        ("a", {}, errors.ConfigError, "experts"),
        (["a", "b"], {"weights": [1.0]}, errors.ConfigError, "must have one number per expert, 2, not 1"),
        (["a", "b"], {"weights": [1.0, -1.0]}, errors.ConfigError, "sum|add up"),
        (["a", "b"], {"weights": {"c": 1.0}}, errors.ConfigError, "no expert is called 'c'"),
        (["a", "b"], {"head": "expert:c"}, errors.ConfigError, "head='expert:c': no expert 'c'"),
        (["a", "b"], {"head": "per_task"}, errors.ModelError, "an adapter has one head"),
        (["a", "base"], {}, errors.ModelError, "base"),
        (["a", "nowhere"], {}, errors.MergelabError, "nowhere"),
    ],
)
def test_what_the_function_cannot_average_is_one_line(
    adapters: Any, settings: dict[str, Any], error: type[Exception], line: str, base: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        written(tmp_path / name, bottleneck(name=name, seed=seed), BOTTLENECK, name=name)
    given = adapters if isinstance(adapters, str) else [str(tmp_path / name) for name in adapters]
    with pytest.raises(error, match=line) as caught:
        ml.module_average(given, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_adapter_is_its_own_average(base: Path, tmp_path: Path, mergelab_command: Command) -> None:
    given = {"a": written(tmp_path / "a", bottleneck(), BOTTLENECK)}
    merged(mergelab_command, base, given, "method=soup", "save.form=module_average")
    found = torch.load("out/pytorch_adapter.bin", weights_only=True)
    assert {name.replace(".merged.", ".a."): tensor for name, tensor in found.items()}.keys() == bottleneck().keys()
    assert all(torch.equal(tensor, bottleneck()[name.replace(".merged.", ".a.")]) for name, tensor in found.items())


def test_activations_of_files_without_a_version_have_their_present_names(
    base: Path, tmp_path: Path, mergelab_command: Command
) -> None:
    given = {"a": written(tmp_path / "a", bottleneck(), {**BOTTLENECK, "non_linearity": "gelu"})}
    file = given["a"] / "adapter_config.json"
    file.write_text(json.dumps({key: each for key, each in json.loads(file.read_text()).items() if key != "version"}))
    merged(mergelab_command, base, given, "method=soup", "save.form=module_average")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["version"], config["config"]["non_linearity"]) == ("adapters.1.3.0", "gelu_new")


NOT_AVERAGED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "dense": ({}, ("save.form=dense",), r"models.experts.a: it has a bottleneck part"),
    "method": ({}, ("method=ties",), r"modules are averaged by method=soup with method.normalize=true alone"),
    "not normalised": ({}, ("method.normalize=false",), r"method=soup with method.normalize=true alone"),
    "evaluated": ({}, ("evaluate=true",), r"needs evaluate=false"),
    "library": ({}, ("save.library=peft",), r"is for adapters of the Adapters library"),
    "layers": ({}, ("models.leave_out=[0]",), r"models.leave_out: is for models"),
    "per task": ({}, ("models.head=per_task",), r"models.head=per_task: an adapter has one head"),
    "weights": ({}, ("method.weights=[1,-1]",), r"sum"),
    "settings": (
        {"config": {**BOTTLENECK, "non_linearity": "gelu"}},
        (),
        r"a and b are configured differently and cannot be averaged \(non_linearity: 'relu' and 'gelu'\)",
    ),
    "model": ({"model_type": "roberta"}, (), r"model_type: 'bert' and 'roberta'"),
    "lora": ({"config": LORA}, (), r"b: it has LoRA or IA³, which change weights"),
    "gate": ({"config": {**BOTTLENECK, "use_gating": True}}, (), r"b: use_gating=true .* adapters with gates"),
    "reft": ({"config": {"architecture": "reft"}}, (), r"b: it is of architecture 'reft'"),
}


@pytest.mark.parametrize("what", NOT_AVERAGED)
def test_modules_that_cannot_be_averaged_are_one_line(
    what: str, base: Path, tmp_path: Path, mergelab_command: Command
) -> None:
    described, arguments, line = NOT_AVERAGED[what]
    given = {"a": written(tmp_path / "a", bottleneck(), BOTTLENECK)}
    given["b"] = written(tmp_path / "b", bottleneck(name="b", seed=1), BOTTLENECK, name="b")
    file = given["b"] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | described))
    outcome = merged(mergelab_command, base, given, "method=soup", "save.form=module_average", *arguments, code=2)
    (found,) = [each for each in outcome.err.splitlines() if each.strip() and "Writing model" not in each]
    assert re.search(line, found), found
    assert len(found) <= 400
    assert not Path("out").exists()


@pytest.mark.parametrize("spoilt", ["names", "shapes", "labels"])
def test_modules_of_other_layers_or_labels_are_not_averaged(
    spoilt: str, base: Path, tmp_path: Path, mergelab_command: Command
) -> None:
    own = bottleneck(name="b", seed=1)
    first = next(iter(own))
    if spoilt == "names":
        del own[first]
    if spoilt == "shapes":
        own[first] = torch.ones(5, 16)
    given = {"a": written(tmp_path / "a", bottleneck(), BOTTLENECK)}
    given["b"] = written(tmp_path / "b", own, BOTTLENECK, name="b")
    for name, labels in (("a", {"x": 0, "y": 1}), ("b", {"x": 0, "y": 1} if spoilt != "labels" else {"x": 1, "y": 0})):
        with_head(given[name], {"classifier.weight": torch.ones(2, 16)}, label2id=labels)
    outcome = merged(mergelab_command, base, given, "method=soup", "save.form=module_average", code=2)
    line = {
        "names": r"layer.0.output.adapters.merged.adapter_down.0.weight is in one of a and b alone",
        "shapes": r"is \[4, 16\] in a and \[5, 16\] in b",
        "labels": r"the heads of a and b differ in label2id, and cannot be averaged; choose models.head=expert:<name>",
    }[spoilt]
    assert re.search(line, outcome.err), outcome.err
    if spoilt == "labels":
        merged(mergelab_command, base, given, "method=soup", "save.form=module_average", "models.head=expert:b")
        assert json.loads(Path("out/head_config.json").read_text())["label2id"] == {"x": 1, "y": 0}
