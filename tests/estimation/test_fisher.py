"""The diagonal Fisher information, against gradients of one example and one class at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from mergelab.estimation import gradient_powers
from mergelab.estimation.fisher import covariance_root, diagonal_fisher, label_scores, sampled_scores
from tests.methods.tiny_classifiers import Expert, classifier, padded_batches, single_examples
from tests.parity import compared

KINDS = ["bert", "roberta", "gpt2", "llama", "albert", "t5"]


def ends_with(kind: str) -> int | None:
    return 1 if kind == "t5" else None  # T5 classifies at the end-of-text token


def reference(module: nn.Module, end: int | None, estimator: str = "expected") -> dict[str, Tensor]:
    """E_x Σ_c p(c|x)(∂ log p(c|x)/∂θ)² (or the label's alone), by torch.func, without padding or batches."""
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    buffers = dict(module.named_buffers())
    totals = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = 0
    for inputs, label in single_examples(end):
        one = inputs

        def log_likelihoods(values: dict[str, Tensor], one: dict[str, Tensor] = one) -> Tensor:
            logits = functional_call(module, (values, buffers), kwargs=one).logits[0]
            return logits if len(logits) == 1 else logits.log_softmax(0)

        jacobian = jacrev(log_likelihoods)(parameters)
        found = log_likelihoods(parameters).detach()
        if estimator == "expected":
            shares = torch.ones(1, dtype=found.dtype) if len(found) == 1 else found.exp()
        elif len(found) == 1:
            shares = (label - found).square()
        else:
            shares = torch.nn.functional.one_hot(label, len(found)).to(found)
        for name, rows in jacobian.items():
            totals[name] += torch.einsum("c,c...->...", shares, rows.square())
        count += 1
    return {name: total / count for name, total in totals.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # a key's bias has gradients of 0 but for rounding
        torch.testing.assert_close(
            found[name], value, rtol=relative, atol=1e-20, msg=lambda text, n=name: f"{n}: {text}"
        )


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], estimator: str, note: str = "") -> None:
    theirs = [expected[name] for name in found]
    note = f"the Fisher information itself; {note}".removesuffix("; ")
    for method in ("fisher", "gradient_matching"):
        compared(method, "torch.func's jacrev", found, theirs, options=f"estimator={estimator}", note=note)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_fisher_is_that_of_single_examples_and_classes(kind: str, outputs: int) -> None:
    module = classifier(kind, outputs)
    expected = reference(module, ends_with(kind))
    found = diagonal_fisher(Expert(module, ends_with=ends_with(kind)))
    compare(found, expected, f"expected, {kind}", "its norms compute in float32" if kind in ("llama", "t5") else "")
    if kind in ("llama", "t5"):  # their norms compute in float32
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_in_float32_it_is_within_1e_5_of_the_largest_entry(kind: str) -> None:
    module = classifier(kind, 2)
    expected = reference(module, None)
    found = diagonal_fisher(Expert(module.float()))
    compare(found, expected, f"expected, {kind}")
    for name, value in expected.items():
        if value.max() > 1e-20:
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("outputs", [1, 2])
def test_empirical_fisher_takes_the_labels(outputs: int) -> None:
    module = classifier("bert", outputs)
    found, expected = diagonal_fisher(Expert(module), estimator="empirical"), reference(module, None, "empirical")
    compare(found, expected, "empirical, bert")
    assert_same(found, expected)


def test_auto_is_the_expected_fisher_for_classes() -> None:
    module = classifier("bert", 3)
    found, expected = diagonal_fisher(Expert(module), estimator="auto"), diagonal_fisher(Expert(module))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sampled_fisher_depends_on_the_seed_alone_and_comes_near_the_expected_one() -> None:
    module = classifier("bert", 2, scale=1.5)
    draws = [diagonal_fisher(Expert(module), estimator="sampled", seed=seed) for seed in range(60)]
    again = diagonal_fisher(Expert(module), estimator="sampled", seed=3)
    expected = diagonal_fisher(Expert(module))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(again[name], draws[3][name])
    assert not torch.equal(draws[3][name], draws[4][name])
    mean = torch.stack([draw[name] for draw in draws]).mean(0)
    assert (mean - expected[name]).norm() < 0.2 * expected[name].norm()


def test_more_padding_changes_nothing() -> None:
    for kind in ("bert", "gpt2"):
        module = classifier(kind)
        assert_same(diagonal_fisher(Expert(module, padding=6)), diagonal_fisher(Expert(module)), 1e-9)


def test_a_binary_example_that_is_undecided_does_not_give_zero() -> None:
    module = classifier("bert")
    with torch.no_grad():
        module.get_submodule("classifier").weight[1] = module.get_submodule("classifier").weight[0]  # type: ignore[index,operator]
    found = diagonal_fisher(Expert(module))
    inputs, _ = next(single_examples())
    torch.testing.assert_close(module(**inputs).logits.softmax(1), torch.full((1, 2), 0.5, dtype=torch.float64))
    assert_same(found, reference(module, None))
    assert (found["classifier.weight"] > 0).any()


def test_layers_without_a_closed_form_are_differentiated_one_example_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier("bert", 3)
    expected = diagonal_fisher(Expert(module))
    monkeypatch.setattr(gradient_powers, "layer_kind", lambda layer: None)
    assert_same(diagonal_fisher(Expert(module)), expected, 1e-9)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "albert"])
def test_common_architectures_need_no_example_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gradient_powers, "_add_one_by_one")
    assert diagonal_fisher(Expert(classifier(kind)))


class Scaled(nn.Module):
    """A linear layer's weight is also used outside its layer, and one layer takes the batch as its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.mixed = nn.Linear(8, 8)
        self.turned = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = torch.tanh(self.mixed(self.embed(input_ids)))
        hidden = hidden + nn.functional.linear(hidden, self.mixed.weight.tanh())
        hidden = self.turned(hidden.transpose(0, 1)).transpose(0, 1).tanh()
        mask = attention_mask[..., None]
        return SimpleNamespace(logits=self.head((hidden * mask).sum(1) / mask.sum(1)))


def test_weights_that_are_used_beside_their_layer_are_found_out() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Scaled().double()
    assert_same(diagonal_fisher(Expert(module)), reference(module, None))


def test_the_number_of_threads_changes_no_bit() -> None:
    before, module = torch.get_num_threads(), classifier("bert", 3).float()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(diagonal_fisher(Expert(module)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_the_module_is_left_as_it_was() -> None:
    module = classifier("bert")
    module.get_submodule("classifier").requires_grad_(False)
    asked = {name: value.requires_grad for name, value in module.named_parameters()}
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    diagonal_fisher(Expert(module))
    for name, value in module.named_parameters():
        assert value.requires_grad == asked[name]
        assert value.grad is None
        assert torch.equal(value, before[name])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_columns_of_the_root_multiply_to_the_covariance_of_the_classes(classes: int) -> None:
    logits = 9 * torch.randn(50, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root = covariance_root(logits)
    assert root.shape == (50, classes, classes - 1)
    p = logits.softmax(1)
    torch.testing.assert_close(
        root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], atol=1e-15, rtol=1e-9
    )


def test_certain_outputs_give_directions_that_are_finite() -> None:
    for row in ([0.0, 1000.0, 0.0], [1000.0, 0.0, 0.0], [0.0, 0.0, 1000.0]):
        root = covariance_root(torch.tensor([row]))
        assert root.isfinite().all()
        assert root.abs().max() == 0


def test_scores_of_labels_and_of_draws() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    p = logits.softmax(1)
    torch.testing.assert_close(label_scores(logits, torch.tensor([1, 0]))[..., 0], torch.eye(2).flip(0).double() - p)
    torch.testing.assert_close(label_scores(torch.tensor([[2.0]]), torch.tensor([5.0])), torch.tensor([[[3.0]]]))
    many = sampled_scores(torch.zeros(20_000, 3).double() + torch.tensor([0.0, 1.0, -1.0]), 7, 0)[..., 0]
    assert many.mean(0).abs().max() < 0.02
    whole, part = sampled_scores(torch.zeros(40, 2), 7, 0), sampled_scores(torch.zeros(10, 2), 7, 30)
    assert torch.equal(whole[30:], part)
    normal = sampled_scores(torch.zeros(20_000, 1), 7, 0)
    assert abs(float(normal.std()) - 1) < 0.02
    assert abs(float(normal.mean())) < 0.02


def test_no_examples_give_zeros() -> None:
    module = classifier("bert")
    found = gradient_powers.gradient_powers(
        module, [], lambda logits, labels, position: covariance_root(logits), {"classifier.weight": "head"}
    )
    assert found["head"].abs().max() == 0
    assert len(list(padded_batches())) == 6
