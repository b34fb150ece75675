"""Statistics of models that write tokens: each side's real tokens count, and an example's gradient is its text's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergelab.errors import ModelError
from mergelab.estimation import fisher
from mergelab.estimation.fisher import diagonal_fisher
from mergelab.estimation.hooks import layer_kind
from mergelab.estimation.input_gram import run_for_gram
from tests.methods.tiny_writers import COUNT, VOCABULARY, Writer, is_pair, padded_texts, single_texts, writer

KINDS = ["gpt2", "llama", "t5", "bert2gpt2"]


def inputs_of_layers(network: nn.Module, kind: str) -> dict[str, Tensor]:
    """Collect what goes into each linear layer, text by text without padding: (n, d)."""
    found: dict[str, list[Tensor]] = {}
    embeddings = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Embedding)}
    handles = []
    for path, layer in network.named_modules():
        if layer_kind(layer) in ("linear", "conv1d") and id(layer.weight) not in embeddings:

            def note(layer: nn.Module, arguments: tuple[Tensor, ...], path: str = path) -> None:
                found.setdefault(f"{path}.weight", []).append(arguments[0].reshape(-1, arguments[0].shape[-1]))

            handles.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        for inputs, _ in single_texts(kind):
            network(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_input_gram_matrices_count_the_real_tokens_of_each_side(kind: str, padding: int) -> None:
    network = writer(kind)
    found = run_for_gram(Writer(network, kind, padding))
    expected = inputs_of_layers(network, kind)
    assert expected.keys() == {*found.shared}
    for name, x in expected.items():
        product = found.of(name)
        assert product is not None
        true = x.T @ x / len(x)
        np.testing.assert_allclose(product.numpy(), true.numpy(), rtol=1e-4, atol=1e-5 * float(true.abs().max()))
    if is_pair(kind):  # the keys of cross-attention see what was read, all else in the decoder what was written
        lengths = {name: len(x) for name, x in expected.items()}
        cross = next(name for name in lengths if "EncDecAttention.k." in name or "crossattention.c_attn" in name)
        assert lengths[cross] == sum(int(batch["attention_mask"].sum()) for batch in padded_texts(kind))
        others = [name for name in lengths if ".k." not in name and ".v." not in name and "c_attn" not in name]
        own = sum(int(batch["decoder_attention_mask"].sum()) for batch in padded_texts(kind))
        assert {lengths[name] for name in others if name.startswith("decoder.")} == {own}


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_layer_that_is_an_embedding_is_averaged_like_one(kind: str) -> None:
    example = Writer(writer(kind), kind)
    (head,) = (name for name in example.parameter_names if name.endswith("lm_head.weight"))
    common = example.parameter_names[head]
    assert (common == head) == (kind == "llama")
    assert (run_for_gram(example).of(common) is not None) == (kind == "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_the_empirical_fisher_squares_the_gradient_of_each_text(kind: str) -> None:
    network = writer(kind)
    found = diagonal_fisher(Writer(network, kind, padding=2), estimator="empirical")
    parameters = dict(network.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for inputs, labels in single_texts(kind):
        logits = network(**inputs).logits[0]
        counted = labels >= 0
        text = logits.log_softmax(1)[counted].gather(1, labels[counted][:, None]).sum()
        if counted.any():
            gradients = torch.autograd.grad(text, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                expected[name] += 0 if gradient is None else gradient.square()
    assert found.keys() == expected.keys()
    rounding = 1e-14 * max(
        float(total.max()) for total in expected.values()
    )  # of gradients that are 0, as of key biases
    for name, total in expected.items():
        true = total / COUNT
        allowed = rounding + 1e-5 * float(true.max())
        np.testing.assert_allclose(found[name].numpy(), true.numpy(), rtol=2e-3, atol=allowed)


def test_tokens_are_drawn_as_the_model_would_and_where_there_is_one_to_follow() -> None:
    logits = torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(0)).expand(2, 30_000, 7)
    labels = torch.zeros(2, 30_000, dtype=torch.long)
    labels[:, ::2] = -100
    scores = fisher._token_scores(logits, labels, "sampled", key=1, position=0)
    assert scores.shape == (2, 30_000, 7, 1)
    assert not scores[:, ::2].any()
    drawn = (scores[:, 1::2, :, 0] + logits[:, 1::2].softmax(2)).round()
    assert torch.equal(drawn.sum(2), torch.ones(2, 15_000))
    share, p = drawn.double().mean((0, 1)), logits[0, 0].double().softmax(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 30_000).sqrt()).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_what_is_drawn_for_a_text_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(3, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, 5, dtype=torch.long)
    together = fisher._token_scores(logits, labels, "sampled", key=1, position=4)
    alone = fisher._token_scores(logits[2:, :3], labels[2:, :3], "sampled", key=1, position=6)
    assert torch.equal(together[2:, :3], alone)


def test_auto_draws_tokens_where_the_expected_fisher_would_take_a_pass_for_each() -> None:
    network = writer("gpt2")
    estimates = {
        name: diagonal_fisher(Writer(network, "gpt2"), estimator=name, seed=3)["transformer.h.0.mlp.c_fc.weight"]
        for name in ("auto", "sampled", "empirical")
    }
    assert torch.equal(estimates["auto"], estimates["sampled"])
    assert not torch.equal(estimates["auto"], estimates["empirical"])


def test_a_text_without_the_tokens_that_follow_is_an_error() -> None:
    with pytest.raises(ModelError, match="needs the token to follow each position"):
        fisher._token_scores(torch.zeros(2, 3, 4), torch.zeros(2), "empirical", key=1, position=0)
