"""Configurations are compared in all that changes a model's function, however it is written, and in nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from mergelab.models.configs import OF_HEADS, Named, differences, module_settings, writing_differences

# What changes a function, by kind of model: the key, and two values of it.
FUNCTIONAL: list[tuple[str, str, Any, Any]] = [
    ("bert", "num_attention_heads", 12, 8),
    ("bert", "hidden_act", "gelu", "relu"),
    ("bert", "layer_norm_eps", 1e-12, 1e-5),
    ("bert", "problem_type", None, "multi_label_classification"),
    ("roberta", "position_offset_of_my_own", 1, 2),
    ("albert", "num_hidden_groups", 1, 2),
    ("deberta-v2", "relative_attention", False, True),
    ("xlnet", "attn_type", "bi", "uni"),
    ("modernbert", "local_attention", 128, 64),
    ("gpt2", "activation_function", "gelu_new", "relu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", False, True),
    ("gpt_neox", "use_parallel_residual", True, False),
    ("llama", "rope_theta", 10000.0, 500000.0),
    ("llama", "rms_norm_eps", 1e-6, 1e-5),
    ("llama", "rope_scaling", None, {"rope_type": "linear", "factor": 2.0}),
    ("mistral", "sliding_window", 4096, 1024),
    ("gemma2", "attn_logit_softcapping", 50.0, 30.0),
    ("gemma2", "query_pre_attn_scalar", 256, 144),
    ("mixtral", "num_experts_per_tok", 2, 1),
    ("t5", "feed_forward_proj", "relu", "gated-gelu"),
    ("t5", "relative_attention_max_distance", 128, 64),
    ("bart", "scale_embedding", False, True),
    ("esm", "token_dropout", True, False),
    ("nllb-moe", "moe_token_dropout", 0.2, 0.0),
]
HARMLESS: list[tuple[str, str, Any, Any]] = [
    ("bert", "_name_or_path", "a", "b"),
    ("bert", "transformers_version", "4.20.0", "5.1.0"),
    ("bert", "architectures", ["BertModel"], ["BertForSequenceClassification"]),
    ("bert", "id2label", {"0": "no", "1": "yes"}, {"0": "yes", "1": "no"}),
    ("bert", "problem_type", None, "single_label_classification"),
    ("bert", "torch_dtype", "float16", "bfloat16"),
    ("bert", "hidden_dropout_prob", 0.1, 0.3),
    ("bert", "use_cache", True, False),
    ("bert", "gradient_checkpointing", False, True),
    ("llama", "vocab_size", 100, 101),
    ("llama", "initializer_range", 0.02, 0.01),
]
WRITTEN: list[tuple[str, str, Any, Any]] = [
    ("llama", "eos_token_id", 2, 7),
    ("llama", "pad_token_id", None, 0),
    ("bart", "num_beams", 4, 6),
]


def named(kind: str, key: str, *values: Any) -> list[Named]:
    return [Named(name, {"model_type": kind, key: value}) for name, value in zip("ab", values, strict=True)]


def known(kind: str) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")


@pytest.mark.parametrize(("kind", "key", "one", "other"), FUNCTIONAL)
def test_what_changes_the_function_is_a_difference(kind: str, key: str, one: Any, other: Any) -> None:
    known(kind)
    found = differences(named(kind, key, one, other))
    assert found
    assert (found[0].first, found[0].second) == ("a", "b")
    assert str(other if not isinstance(other, dict) else "factor") in "; ".join(map(str, found))
    a, b = named(kind, key, one, other)
    assert module_settings(a.config) != module_settings(b.config) or key == "problem_type"


@pytest.mark.parametrize(("kind", "key", "one", "other"), HARMLESS)
def test_what_does_not_change_it_is_none(kind: str, key: str, one: Any, other: Any) -> None:
    models = named(kind, key, one, other)
    assert differences(models) == []
    assert writing_differences(models) == []


@pytest.mark.parametrize(("kind", "key", "one", "other"), WRITTEN)
def test_tokens_and_settings_of_generation_are_told_apart(kind: str, key: str, one: Any, other: Any) -> None:
    models = named(kind, key, one, other)
    assert differences(models) == []
    assert [found.key for found in writing_differences(models)] == [key]


def test_a_part_of_a_setting_that_one_model_alone_has_is_a_difference() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    a = Named("a", {"model_type": "llama", "rope_scaling": scaling})
    b = Named("b", {"model_type": "llama", "rope_scaling": scaling | {"beta_fast": 16.0}})
    assert [found.key.rpartition(".")[2] for found in differences([a, b])] == ["beta_fast"]


@pytest.mark.parametrize(("kind", "key", "default"), [("llama", "rms_norm_eps", 1e-6), ("bert", "hidden_act", "gelu")])
def test_a_default_is_the_same_written_or_left_out(kind: str, key: str, default: Any) -> None:
    with_it, without = Named("a", {"model_type": kind, key: default}), Named("b", {"model_type": kind, "_x": 1})
    assert differences([with_it, without]) == []
    changed = Named("c", {"model_type": kind, key: 0.5 if isinstance(default, float) else "relu"})
    assert [found.key for found in differences([without, changed])] == [key]


@pytest.mark.parametrize("kind", ["t5", "longt5"])
def test_ties_of_encoder_decoders_count_as_they_say_whether_outputs_are_scaled(kind: str) -> None:
    a, b = (
        Named(name, {"model_type": kind, "is_encoder_decoder": True, "tie_word_embeddings": tied})
        for name, tied in (("a", True), ("b", False))
    )
    assert {found.key for found in differences([a, b])} & {"tie_word_embeddings", "scale_decoder_outputs"}
    assert module_settings(a.config) != module_settings(b.config)
    alone = [Named(each.name, {**each.config, "model_type": "llama", "is_encoder_decoder": False}) for each in (a, b)]
    assert differences(alone) == []  # there the tensors show it


def test_old_and_new_spellings_of_the_rotary_base_are_one() -> None:
    if "rope_parameters" not in transformers.LlamaConfig().to_dict():
        pytest.skip("this version of transformers has the old spelling only")
    old = Named("a", {"model_type": "llama", "rope_theta": 5e5})
    new = Named("b", {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert differences([old, new]) == []


def test_parts_are_compared_too() -> None:
    def pair(heads: int) -> dict[str, Any]:
        part = {"model_type": "bert", "num_attention_heads": heads}
        return {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}, "decoder": part}

    assert [found.key for found in differences([Named("a", pair(12)), Named("b", pair(6))])] == [
        "decoder.num_attention_heads"
    ]
    assert differences([Named("a", pair(12)), Named("b", pair(12) | {"_name_or_path": "x"})]) == []
    of_a_classifier = {"model_type": "bert", "problem_type": "single_label_classification", "classifier_dropout": 0.1}
    assert differences([Named("a", pair(12)), Named("b", pair(12) | {"encoder": of_a_classifier})]) == []


def test_what_another_version_wrote_and_this_one_does_not_know_is_no_difference() -> None:
    old = Named("a", {"model_type": "bert", "setting_of_another_version": "absolute"})
    assert differences([old, Named("b", {"model_type": "bert"})]) == []


def test_what_only_heads_read_need_not_agree_with_the_base() -> None:
    base, expert = named("modernbert", "classifier_pooling", "cls", "mean")
    if "modernbert" not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no ModernBERT")
    assert differences([base, expert], ignore=OF_HEADS) == []
    assert differences([base, expert])


def test_a_model_that_transformers_does_not_know_is_compared_as_it_is_written() -> None:
    a, b = (Named(name, {"model_type": "mine", "heads": heads}) for name, heads in (("a", 2), ("b", 4)))
    assert [str(found) for found in differences([a, b])] == ["heads is 2 in a and 4 in b"]
