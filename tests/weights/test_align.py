from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergelab.errors import KeyMismatch, ModelError, NonFinite, ShapeMismatch
from mergelab.weights.align import align, check_finite, names_outside_backbone
from mergelab.weights.checkpoint import open_checkpoint
from mergelab.weights.naming import backbone_prefix
from mergelab.weights.source import DictSource


def source(name: str, model_or_tensors) -> DictSource:
    tensors = model_or_tensors if isinstance(model_or_tensors, dict) else model_or_tensors.state_dict()
    return DictSource(name, tensors)


def renamed(tensors: dict[str, Tensor], change) -> dict[str, Tensor]:
    return {change(key): value for key, value in tensors.items()}


def old_spelling(key: str) -> str:
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_bert_as_the_hub_stores_it_meets_its_experts(bert, bert_base):
    """google-bert/bert-base-uncased: gamma and beta, two pretraining heads, an int64 position buffer."""
    base = renamed(bert_base().state_dict(), old_spelling)
    base["bert.embeddings.position_ids"] = torch.arange(16)[None]
    experts = [source(f"expert-{i}", bert(seed=i)) for i in range(3)]
    models = align(source("base", base), experts)
    assert set(models.names) == set(bert().state_dict()) - {"classifier.weight", "classifier.bias"}
    assert models.experts_only == ("classifier.weight", "classifier.bias")
    assert "cls.seq_relationship.weight" in models.base_only
    assert all(key.startswith("cls.") for key in models.base_only)
    assert models.dropped == ("bert.embeddings.position_ids",)
    assert models.backbone == "bert."
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert torch.equal(models.base.get(name), base["bert.encoder.layer.0.output.LayerNorm.gamma"])
    assert torch.equal(models.experts[2].get(name), bert(seed=2).state_dict()[name])


def test_gpt2_as_the_hub_stores_it_meets_its_experts(gpt2, gpt2_classifier):
    """openai-community/gpt2: no ``transformer.`` prefix, causal masks as float buffers, no output layer."""
    base = renamed(gpt2().transformer.state_dict(), lambda key: key)
    for layer in (0, 1):
        base[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        base[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    models = align(source("base", base), [source(f"expert-{i}", gpt2_classifier(seed=i)) for i in range(2)])
    assert set(models.names) == set(gpt2_classifier().state_dict()) - {"score.weight"}
    assert models.experts_only == ("score.weight",)
    assert models.base_only == ()
    assert len(models.dropped) == 4
    assert torch.equal(models.base.get("transformer.h.1.attn.c_attn.bias"), base["h.1.attn.c_attn.bias"])
    assert models.base.shape("transformer.wte.weight") == (12, 8)


def test_prefixes_are_left_out_where_the_experts_have_none(bert_base, bert):
    experts = [source(f"expert-{i}", bert(seed=i).bert) for i in range(2)]
    models = align(source("base", bert_base()), experts)
    assert set(models.names) == set(bert().bert.state_dict())
    assert all(key.startswith("cls.") for key in models.base_only)


def test_an_expert_saved_without_the_prefix_follows_the_others(bert):
    bare = {**bert(seed=1).bert.state_dict(), "classifier.weight": torch.ones(2, 8), "classifier.bias": torch.ones(2)}
    for order in ([0, 1], [1, 0]):
        experts = [source("full", bert()), source("bare", bare)]
        models = align(None, [experts[i] for i in order])
        assert set(models.names) == set(bert().state_dict())
        assert models.base is None


def test_names_follow_the_first_expert_and_do_not_depend_on_the_others_order(bert):
    tensors = bert().state_dict()
    backwards = dict(reversed(tensors.items()))
    models = align(source("base", backwards), [source("a", tensors), source("b", backwards)])
    assert models.names == tuple(tensors)


def test_tied_tensors_are_merged_once(gpt2, t5, bin_folder, folder):
    stored_twice, stored_once = open_checkpoint(bin_folder(gpt2())), open_checkpoint(folder(gpt2(seed=1)))
    for base, expert in ([stored_once, stored_twice], [stored_twice, stored_twice]):
        models = align(base, [expert])
        assert models.aliases == {"lm_head.weight": "transformer.wte.weight"}
        assert "lm_head.weight" not in models.names
        assert torch.equal(models.base.get("lm_head.weight"), models.base.get("transformer.wte.weight"))
        assert models.base.aliases() == models.aliases
    models = align(source("a", t5()), [source("b", t5(seed=1))])
    assert sum("embed" in name or "shared" in name or "lm_head" in name for name in models.names) == 1
    assert len(models.aliases) == 3


def test_a_tied_name_that_the_base_alone_has_is_none_of_the_results(gpt2, gpt2_classifier, bin_folder, folder):
    base = open_checkpoint(bin_folder(gpt2()))
    for expert in (gpt2_classifier(), gpt2(seed=1)):
        models = align(base, [open_checkpoint(folder(expert))])
        assert models.aliases == {}
        assert models.base_only == ("lm_head.weight",)
        assert "transformer.wte.weight" in models.names
        assert "lm_head.weight" not in {*models.experts[0].keys(), *models.experts[0].aliases()}


def test_the_name_of_a_tied_tensor_is_one_that_every_model_has(gpt2):
    output_first = dict(reversed(gpt2().state_dict().items()))
    only_output = gpt2(seed=1).state_dict()
    del only_output["transformer.wte.weight"]
    models = align(source("a", only_output), [source("b", output_first)])
    assert "lm_head.weight" in models.names
    assert models.aliases == {"transformer.wte.weight": "lm_head.weight"}
    assert torch.equal(models.base.get("transformer.wte.weight"), only_output["lm_head.weight"])


def test_a_copy_of_a_tied_tensor_counts_as_tied(gpt2, folder):
    copied = {key: value.clone() for key, value in gpt2().state_dict().items()}
    models = align(open_checkpoint(folder(gpt2(seed=1))), [source("copied", copied)])
    assert models.aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_a_tensor_that_one_model_ties_and_another_does_not_is_merged_on_its_own(gpt2):
    untied = {key: value.clone() for key, value in gpt2(seed=1).state_dict().items()}
    untied["lm_head.weight"] += 1
    models = align(source("tied", gpt2()), [source("untied", untied)])
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(models.names)
    assert models.aliases == {}


def test_ignored_patterns_are_no_part_of_the_comparison(bert):
    experts = [source("two", bert()), source("three", bert(num_labels=3))]
    with pytest.raises(ShapeMismatch, match=r"classifier\.weight is float32\[2, 8\] in 'two' but float32\[3, 8\] in"):
        align(None, experts)
    models = align(None, experts, ignore=["classifier.*"])
    assert models.ignored == ("classifier.weight", "classifier.bias")
    assert "classifier.weight" not in models.names
    assert models.experts[1].shape("classifier.weight") == (3, 8)


@pytest.mark.parametrize("part", ["bert.encoder.layer.0.output.dense.bias", "classifier.bias"])
def test_missing_keys_are_listed_with_their_model(bert, part):
    tensors = bert(seed=1).state_dict()
    del tensors[part]
    experts = [source("good", bert()), source("torn", tensors), source("fine", bert(seed=2))]
    with pytest.raises(KeyMismatch, match=f"'torn' lacks {part}$"):
        align(None, experts)


@pytest.mark.parametrize("part", ["bert.encoder.layer.1.output.dense.bias", "adapter.down.weight"])
def test_additional_keys_are_listed_with_their_model(bert, part):
    experts = [source("good", bert()), source("more", {**bert().state_dict(), part: torch.ones(1)})]
    experts.append(source("fine", bert(seed=2)))
    with pytest.raises(KeyMismatch, match=f"'more' has {part} in addition$"):
        align(source("base", bert(seed=3)), experts)


def test_a_backbone_tensor_that_all_experts_lack_is_an_error(bert, bert_base):
    part = "bert.encoder.layer.0.output.dense.bias"
    torn = [{key: value for key, value in bert(seed=i).state_dict().items() if key != part} for i in range(2)]
    with pytest.raises(KeyMismatch, match=f"'a' lacks {part}; 'b' lacks {part}|'base' has {part} in addition"):
        align(source("base", bert_base()), [source("a", torn[0]), source("b", torn[1])])


def test_a_backbone_tensor_that_the_base_lacks_is_an_error(bert, bert_base):
    part = "bert.encoder.layer.0.output.dense.bias"
    base = bert_base().state_dict()
    del base[part]
    with pytest.raises(KeyMismatch, match=f"'base' lacks {part}"):
        align(source("base", base), [source("a", bert()), source("b", bert(seed=1))])


def test_a_pooler_may_be_on_one_side_only(bert, bert_base):
    without = {key: value for key, value in bert().state_dict().items() if ".pooler." not in key}
    models = align(source("base", bert_base()), [source("a", without)])
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(models.base_only)
    base = {key: value for key, value in bert_base().state_dict().items() if ".pooler." not in key}
    models = align(source("base", base), [source("a", bert())])
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(models.experts_only)


def test_models_whose_names_show_no_backbone_must_agree_in_everything():
    base = {"a.weight": torch.ones(2), "a.bias": torch.ones(2), "b.weight": torch.ones(2)}
    with pytest.raises(KeyMismatch, match=r"lacks b\.weight"):
        align(source("base", base), [source("x", {key: base[key] for key in ("a.weight", "a.bias")})])
    with pytest.raises(KeyMismatch, match=r"'base' lacks c\.weight"):
        align(source("base", base), [source("x", {**base, "c.weight": torch.ones(2)})])


def test_the_backbones_prefix_can_be_given():
    base = {"net.a": torch.ones(2), "old.w": torch.ones(2)}
    expert = {"net.a": torch.ones(2), "new.w": torch.ones(2)}
    models = align(source("base", base), [source("x", expert)], backbone_prefix="net.")
    assert (models.names, models.base_only, models.experts_only) == (("net.a",), ("old.w",), ("new.w",))
    assert models.backbone == "net."


def test_models_of_other_shapes_are_refused_with_every_name():
    a, b = {"w": torch.ones(2, 3), "v": torch.ones(1)}, {"w": torch.ones(3, 3), "v": torch.ones(2)}
    with pytest.raises(ShapeMismatch, match=r"w is float32\[2, 3\] in 'a' but float32\[3, 3\] in 'b'; v is"):
        align(None, [source("a", a), source("b", b)])


def test_half_and_single_precision_go_together_but_floats_and_integers_do_not():
    a, b = {"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert align(source("a", a), [source("b", b)]).names == ("w",)
    with pytest.raises(ShapeMismatch, match=r"w is float32\[2\] in 'a' but int64\[2\] in 'b'"):
        align(None, [source("a", a), source("b", {"w": torch.ones(2, dtype=torch.int64)})])


def test_integer_tensors_are_copied_and_must_be_equal():
    a = {"w": torch.ones(2), "position_ids": torch.arange(4), "mask": torch.tensor([True, False])}
    models = align(source("a", a), [source("b", dict(a))])
    assert models.names == ("w",)
    assert models.integers == ("position_ids", "mask")
    with pytest.raises(ModelError, match=r"position_ids holds integers.*'c' differs from 'a'"):
        align(source("a", a), [source("c", {**a, "position_ids": torch.arange(4) + 1})])


def test_a_parameter_with_the_name_of_a_mask_is_merged():
    tensors = {"layer.attn.bias": torch.ones(8), "attention.masked_bias": torch.ones(8)}
    assert set(align(None, [source("a", tensors), source("b", tensors)]).names) == set(tensors)


def test_a_layer_scale_called_gamma_keeps_its_name():
    assert align(None, [source("a", {"ls1.gamma": torch.ones(2)})]).names == ("ls1.gamma",)


def test_one_tensor_in_two_spellings_is_an_error():
    both = {"LayerNorm.gamma": torch.ones(2), "LayerNorm.weight": torch.ones(2)}
    with pytest.raises(KeyMismatch, match="same tensor in two spellings"):
        align(None, [source("a", both)])


def test_there_must_be_an_expert(bert):
    with pytest.raises(ModelError, match="no experts"):
        align(source("base", bert()), [])


def test_heads_are_what_stands_outside_the_backbone(bert, bert_base, gpt2, gpt2_classifier, t5):
    assert names_outside_backbone(source("m", bert())) == ["classifier.weight", "classifier.bias"]
    assert all(key.startswith("cls.") for key in names_outside_backbone(source("m", bert_base())))
    assert names_outside_backbone(source("m", gpt2_classifier())) == ["score.weight"]
    assert names_outside_backbone(source("m", gpt2())) == ["lm_head.weight"]
    assert names_outside_backbone(source("m", t5())) == []
    assert names_outside_backbone(source("m", {"net.a": torch.ones(1), "out": torch.ones(1)}), "net.") == ["out"]


def test_bare_backbones_have_no_prefix(bert, gpt2, t5):
    for model in (bert().bert, gpt2().transformer, t5()):
        assert backbone_prefix(model.state_dict().keys()) == ""
    distilbert = [f"transformer.layer.{i}.ffn.lin{j}.weight" for i in range(6) for j in (1, 2)]
    distilbert += [f"transformer.layer.{i}.attention.{p}_lin.weight" for i in range(6) for p in "qkv"]
    assert backbone_prefix(["embeddings.word_embeddings.weight", *distilbert]) == ""
    assert backbone_prefix([f"layer.{i}.weight" for i in range(40)] + ["embed.weight"]) == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_value_that_is_not_finite_is_named_with_its_model(bad, dtype):
    tensor = torch.ones(3, 4, dtype=dtype)
    tensor[1, 2] = bad
    with pytest.raises(NonFinite, match=r"mine: bert\.w holds NaN .*\(1 of 12 entries, the first at \[1, 2\]"):
        check_finite(source("mine", {}), "bert.w", tensor)


def test_infinities_of_both_signs_are_found():
    with pytest.raises(NonFinite, match="2 of 2"):
        check_finite(source("mine", {}), "w", torch.tensor([math.inf, -math.inf]))


def test_large_finite_values_integers_and_empty_tensors_pass():
    here = source("mine", {})
    check_finite(here, "w", torch.full((10,), 3e38))
    check_finite(here, "w", torch.full((10,), 65504.0, dtype=torch.float16))
    check_finite(here, "w", torch.ones(2).to(torch.float8_e4m3fn))
    check_finite(here, "w", torch.arange(3))
    check_finite(here, "w", torch.empty(0))


def test_a_buffer_that_some_models_lack_is_dropped_whatever_the_patterns_say() -> None:
    plain = {"emb.word": torch.ones(2), "w": torch.ones(2)}
    old = {**plain, "emb.position_ids": torch.arange(4), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    models = align(source("old", old), [source("new", plain)], ignore=["emb.*", "*bias"])
    assert models.ignored == ("emb.word",)
    assert models.dropped == ("emb.position_ids", "h.0.attn.bias")
