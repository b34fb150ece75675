"""What is merged equals NumPy, tensor by tensor, and the folder is the model that it says: loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.architectures import numpy_merges
from tests.architectures.loading import by_label, labels, load, load_tokenizer, tied_groups
from tests.architectures.numpy_merges import Array, Tensors, read_tensors
from tests.architectures.workshop import DARE_DENSITY, METHODS, TIES_DENSITY, Workshop
from tests.architectures.zoo import BY_NAME, CLASSIFIERS, GENERATORS, KINDS, LABELS, head_names

pytestmark = pytest.mark.slow

NAMES = [kind.name for kind in KINDS]


def tensors(folder: Path) -> tuple[Tensors, list[Tensors]]:
    return read_tensors(folder / "base"), [read_tensors(folder / name) for name in ("a", "b")]


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7)


def check_head(workshop: Workshop, name: str, method: str, key: str, expected: Array) -> None:
    """Compare a tensor of a merged head with that of its experts, output by output of the same label."""
    folder = workshop.merged(name, method)
    found = by_label(read_tensors(folder)[key], labels(folder))
    close(found, by_label(expected, labels(workshop.models(name) / "a")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_merge_has_the_tensors_of_its_models_and_no_other(workshop: Workshop, name: str, method: str) -> None:
    merged, base = read_tensors(workshop.merged(name, method)), read_tensors(workshop.models(name) / "base")
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in base.items()}


@pytest.mark.parametrize("name", NAMES)
def test_soup_and_ties_equal_numpy(workshop: Workshop, name: str) -> None:
    base, experts = tensors(workshop.models(name))
    head = head_names(BY_NAME[name], base)
    backbone = [key for key in base if key not in head]
    expected = {
        "soup": numpy_merges.soup(experts, base),
        "ties": numpy_merges.ties(base, experts, backbone, TIES_DENSITY) | numpy_merges.soup(experts, head),
    }
    for method, values in expected.items():
        merged = read_tensors(workshop.merged(name, method))
        for key, value in values.items():
            if key in head:
                check_head(workshop, name, method, key, value)
            else:
                close(merged[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_dare_drops_and_rescales(workshop: Workshop, name: str) -> None:
    base, experts = tensors(workshop.models(name))
    merged, head = read_tensors(workshop.merged(name, "dare")), head_names(BY_NAME[name], base)
    kept = []
    for key, start in base.items():
        if key in head:
            check_head(workshop, name, "dare", key, numpy_merges.soup(experts, [key])[key])
            continue
        own = [expert[key] for expert in experts]
        masks, distance = numpy_merges.dare_masks(start, own, merged[key], DARE_DENSITY)
        assert distance.max() < 1e-6, key
        if any(not np.array_equal(one, start) for one in own):
            kept.append(masks.reshape(2, -1))
    together = np.concatenate(kept, axis=1)
    spread = 5 * (DARE_DENSITY * (1 - DARE_DENSITY) / together.shape[1]) ** 0.5
    assert np.abs(together.mean(axis=1) - DARE_DENSITY).max() < spread
    both = (together[0] & together[1]).mean()  # the experts' masks are independent of each other
    assert abs(both - DARE_DENSITY**2) < spread


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_merge_loads_as_its_experts_do(workshop: Workshop, name: str, method: str) -> None:
    kind, folder = BY_NAME[name], workshop.models(name)
    merged, expert = load(kind, workshop.merged(name, method)), load(kind, folder / "a")
    assert type(merged) is type(expert)
    assert tied_groups(merged) == tied_groups(expert)
    own, other = (model.config.to_dict() for model in (merged, expert))
    ignored = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id")
    assert {k: v for k, v in own.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}
    tokenizer, others = load_tokenizer(workshop.merged(name, method)), load_tokenizer(folder / "a")
    text = "the cat sleeps on the road"
    assert tokenizer(text) == others(text)
    assert tokenizer.padding_side == others.padding_side
    assert tokenizer.model_max_length == others.model_max_length


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_keeps_how_it_generates(workshop: Workshop, name: str, method: str) -> None:
    own, other = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (workshop.merged(name, method), workshop.models(name) / "a")
    )
    assert own == other
    assert own["do_sample"] is True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_keeps_its_labels(workshop: Workshop, name: str, method: str) -> None:
    folder = workshop.merged(name, method)
    assert sorted(labels(folder)) == sorted(LABELS.values())
    assert json.loads((folder / "config.json").read_text())["architectures"] == [BY_NAME[name].model]


def test_dare_with_the_same_seed_is_the_same_and_with_another_is_not(workshop: Workshop) -> None:
    from tests.architectures.workshop import models, run

    folder = workshop.models("bart")
    first = read_tensors(workshop.merged("bart", "dare"))
    for seed, is_same in ((0, True), (1, False)):
        output = folder / f"again-{seed}"
        settings = ("evaluate=false", "tracking=none", f"seed={seed}", f"output={output}")
        run(folder, *models(folder), *METHODS["dare"], *settings)
        again = read_tensors(output)
        assert all(np.array_equal(first[key], again[key]) for key in first) is is_same
