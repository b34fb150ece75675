"""Whatever the JSON files of a model's folder hold, reading ends in one line or in what transformers would read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergelab.errors import MergelabError, ModelError
from mergelab.experiment.sources import from_folder
from mergelab.models.configs import Named, differences, module_settings, writing_differences
from mergelab.models.tokenizer_parts import differing_parts
from mergelab.models.tokens import chat_template, load_tokenizer, read_tokens
from mergelab.weights.json_files import read_config
from tests.vocabularies import bert

WRONG: list[tuple[str, Any]] = [
    ("architectures", "BertModel"),
    ("architectures", [3]),
    ("architectures", {"a": 1}),
    ("id2label", ["yes", "no"]),
    ("id2label", {"first": "yes"}),
    ("id2label", 5),
    ("label2id", ["yes"]),
    ("num_labels", "two"),
    ("num_labels", 0),
    ("vocab_size", "many"),
    ("vocab_size", 1.5),
    ("vocab_size", True),
    ("vocab_size", -4),
    ("model_type", 7),
    ("model_type", ["bert"]),
    ("tie_word_embeddings", "yes"),
    ("is_encoder_decoder", 1),
    ("quantization_config", "fp8"),
    ("auto_map", ["x"]),
    ("torch_dtype", 16),
    ("pad_token_id", "zero"),
    ("eos_token_id", [1, "two"]),
    ("text_config", {"vocab_size": "many"}),
    ("encoder", {"architectures": 4}),
    ("attn_implementation", "someone/kernel"),  # code that transformers would fetch and run
    ("_attn_implementation", "flash|someone/kernel@main"),
    ("attn_implementation", {"": "sdpa", "vision_config": "someone/kernel"}),
    ("experts_implementation", "someone/kernel"),
    ("audio_config", {"inner": {"attn_implementation": "someone/kernel"}}),
]


def test_implementations_of_transformers_itself_may_be_named(tmp_path: Path) -> None:
    folder = bert(tmp_path / "model", 0)
    content = json.loads((folder / "config.json").read_text())
    named = {"attn_implementation": {"": "sdpa", "text_config": "eager"}, "_attn_implementation": "eager"}
    (folder / "config.json").write_text(json.dumps(content | named))
    assert read_config(folder, "a")["_attn_implementation"] == "eager"


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_setting_of_another_type_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = bert(tmp_path / "model", 0)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(ModelError) as caught:
        from_folder(folder, "a")
    assert str(caught.value).startswith(f"a: {folder / 'config.json'}: {key}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"a"', "null", "{'a': 1}", "[" * 100_000, '{"a":' * 50_000, "\ud800", '{"a": NaN'],
    ids=repr,
)
def test_what_is_no_json_object_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(
        ModelError, match=r"^a: .*config\.json (is not readable JSON|must hold a JSON object)"
    ) as caught:
        read_config(tmp_path, "a")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("architectures", "id2label", "vocab_size", "model_type", "hidden_act", "num_attention_heads", "rope_scaling")
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@MANY
@given(key=st.sampled_from(KEYS), value=VALUES, kind=st.sampled_from(["bert", "llama", "t5", "encoder-decoder", "x"]))
def test_configs_are_compared_or_refused(key: str, value: Any, kind: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, key: value}))
    try:
        config = read_config(folder, "a")
        module_settings(config)
        models = [Named("a", config), Named("b", {"model_type": kind, "hidden_act": "relu"})]
        differences(models)
        writing_differences(models)
    except MergelabError as error:
        assert "\n" not in str(error)  # noqa: PT017


@MANY
@given(
    file=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "added_tokens.json"]),
    key=st.sampled_from(
        ["chat_template", "pad_token", "added_tokens_decoder", "model", "normalizer", "tokenizer_class"]
    ),
    value=VALUES,
)
def test_tokenizers_are_read_or_refused(file: str, key: str, value: Any, tmp_path_factory: Any) -> None:
    folder = bert(tmp_path_factory.mktemp("tokenizer") / "model", 0, ["new"])
    own = folder / file
    content = json.loads(own.read_text()) if own.exists() else {}
    own.write_text(json.dumps({**content, key: value}))
    for read in (read_tokens, chat_template, lambda folder: load_tokenizer([folder], "a")):
        try:
            read(folder)
        except MergelabError as error:
            assert "\n" not in str(error)  # noqa: PT017
    differing_parts({"a": folder, "b": bert(folder.parent / "other", 0, ["new"])})


@pytest.mark.parametrize("content", [b"{bad", b"{}", b"[]", b"null", b"\xff", b"[" * 10_000])
def test_a_damaged_tokenizer_is_named_among_differences(tmp_path: Path, content: bytes) -> None:
    folders = {name: bert(tmp_path / name, 0, ["new"]) for name in "ab"}
    (folders["b"] / "tokenizer.json").write_bytes(content)
    assert differing_parts(folders) == ["tokenizer.json of b cannot be read"]
    shutil.copy(folders["a"] / "tokenizer.json", folders["b"])
    assert differing_parts(folders) == []


@pytest.mark.parametrize("value", ["x", [5], {"a": 1}])
def test_a_tokenizers_length_must_be_a_number(tmp_path: Path, value: Any) -> None:
    folder = bert(tmp_path / "model", 0, ["new"])
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {"model_max_length": value}))
    with pytest.raises(ModelError, match=r"^models a: the tokenizer in .* cannot be read: "):
        load_tokenizer([folder], "a")
