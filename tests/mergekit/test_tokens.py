"""Whose tokens an imported merge has, and their rows: beside mergekit's own, where an interpreter that has it is named.

Rows are compared by token: mergekit's order of models, and so of a union's tokens, differs from run to run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mergelab.errors import ConfigError, MergelabError
from mergelab.mergekit.commands import expanded
from mergelab.mergekit.methods import METHODS
from mergelab.mergekit.tokens import NoEqual
from mergelab.models.chat_templates import FORMATS
from tests.mergekit.configs import config, model, placed, stack
from tests.mergekit.made import exported, planned, saved
from tests.parity import compared
from tests.vocabularies import FIM, IM_END, IM_START, llama

INTERPRETER = os.environ.get("MERGELAB_MERGEKIT", "")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = "<|new|>"
ROW = {"kind": "model_token", "model": "a", "token": IM_START}
PAIR = [model("a", weight=0.3), model("b", weight=0.7)]
THREE = [model("a", weight=0.2), model("b", weight=0.5), model("c", weight=0.3)]
TASK = [model("a", weight=0.4), model("b", weight=0.6), model("c", weight=0.5)]


def with_tokens(whole: dict[str, Any], **tokenizer: Any) -> dict[str, Any]:
    return whole | {"tokenizer": tokenizer}


CONFIGS: Mapping[str, dict[str, Any]] = {
    "linear, union": config("linear", THREE) | {"tokenizer_source": "union"},
    "linear, union, base_model among the models": config("linear", THREE, "c") | {"tokenizer_source": "union"},
    "linear, base is an expert": config("linear", THREE, "b") | {"tokenizer_source": "base"},
    "linear, of a model": config("linear", PAIR) | {"tokenizer_source": "model: b"},
    "task_arithmetic, base": config("task_arithmetic", TASK, "base") | {"tokenizer_source": "base"},
    "task_arithmetic, union": config("task_arithmetic", TASK, "base") | {"tokenizer_source": "union"},
    "ties, of a model": config("ties", TASK, "base", density=0.5) | {"tokenizer_source": "model: a"},
    "slerp, union": config("slerp", PAIR, "b", t=0.3) | {"tokenizer_source": "union"},
    "slerp, base": config("slerp", PAIR, "b", t=0.3) | {"tokenizer_source": "base"},
    "task_arithmetic, multiple": with_tokens(config("task_arithmetic", TASK, "base"), pad_to_multiple_of=32),
    "linear, multiple of what there is": with_tokens(config("linear", PAIR), source="union", pad_to_multiple_of=260),
    "task_arithmetic, rows of tokens": with_tokens(
        config("task_arithmetic", TASK, "base"),
        source="base",
        tokens={
            IM_END: {"source": "model: a", "force": True},
            IM_START: {"source": "model: a", "force": True},
            NEW: {"source": ROW, "force": True},
            "a": {"source": {"kind": "zero"}},
        },
    ),
    "task_arithmetic, rows of what some lack": with_tokens(
        config("task_arithmetic", TASK, "base"),
        source="model: a",
        tokens={IM_END: {"source": "model: b"}, NEW: {"source": ROW}, "a": {"source": {"kind": "zero"}}},
    ),
    "linear, forced": with_tokens(
        config("linear", PAIR),
        source="union",
        tokens={
            IM_END: {"source": "model: b", "force": True},
            FIM: {"source": {"kind": "zero"}, "force": True},
            NEW: {"source": {"kind": "model_token", "model": "b", "token_id": 5}},
        },
        pad_to_multiple_of=64,
    ),
    "slerp, slices, union": stack(
        "slerp", [[model("a", [0, 1]), model("b", [0, 1])], [model("b", [0, 1]), model("a", [0, 1])]], "a", t=0.4
    )
    | {"tokenizer_source": "union"},
    "passthrough, slices of one tokenizer": stack("passthrough", [[model("a", [0, 1])], [model("d", [0, 1])]])
    | {"tokenizer_source": "union", "chat_template": "auto"},
}
TEMPLATES = ["auto", *FORMATS, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A padded base, and experts: two of chat tokens, one of another token, one without further ones."""
    folder = tmp_path_factory.mktemp("tokens")
    llama(folder / "base", 0, rows=264)
    llama(folder / "a", 1, [IM_START, IM_END], rows=259)
    llama(folder / "b", 2, [FIM, IM_END], rows=264)
    llama(folder / "c", 3, [IM_END], rows=272)
    llama(folder / "d", 4, [IM_START, IM_END], rows=259)
    return folder


def written(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write a config with the models of a folder."""
    file = folder / f"{name}.yml"
    text = placed(content, folder)
    for each in ("base", "a", "b", "c", "d"):
        text = text.replace(f"model: {each}\n", f"model: {folder / each}\n").replace(
            f"'model: {each}'", str(folder / each)
        )
    file.write_text(text)
    return file


def tokens_of(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def theirs(home: Path) -> tuple[str, Mapping[str, Path]]:
    """mergekit's version, and its merges of the configs, all by one process."""
    files = {title: written(home, f"config{at}", content) for at, (title, content) in enumerate(CONFIGS.items())}
    for title, file in list(files.items()):
        files[f"export of {title}"] = home / f"export_{file.name}"
        files[f"export of {title}"].write_text(exported(f"mergekit={file}"))
    plain = config("linear", PAIR[:1])
    for at, text in enumerate(TEMPLATES):
        files[text] = written(home, f"template{at}", plain | {"chat_template": text})
    command = [INTERPRETER, str(Path(__file__).parent / "theirs.py"), *map(str, files.values())]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, timeout=600, env=environment, stdout=subprocess.PIPE, text=True)
    merges = {title: Path(f"{file.with_suffix('')}_theirs") for title, file in files.items()}
    return done.stdout.split()[-1], merges


def compare(title: str, found: Mapping[str, Tensor], tokens: Mapping[str, int], other: Path, version: str) -> None:
    """Compare a merge with mergekit's: the rows of tokens by token, those that fill up by place."""
    expected, ids = read(other), tokens_of(other)
    assert tokens.keys() == ids.keys()
    assert json.loads((other / "config.json").read_text())["vocab_size"] == len(found[EMBEDDING])
    order = [*tokens.values(), *range(len(tokens), len(found[EMBEDDING]))]
    theirs = [*(ids[token] for token in tokens), *range(len(tokens), len(found[EMBEDDING]))]
    assert found.keys() == expected.keys()
    pairs = {
        name: (tensor[order], expected[name][theirs]) if name in (EMBEDDING, HEAD) else (tensor, expected[name])
        for name, tensor in found.items()
    }
    ours, mergekits = zip(*pairs.values(), strict=True)
    method = METHODS[title.split(",")[0]].ours
    compared(
        method, f"mergekit {version}, whole config", ours, mergekits, options=f"tokenizer: {title}", note="by token"
    )
    for name, (one, two) in pairs.items():
        assert one.shape == two.shape, name
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETER, reason="MERGELAB_MERGEKIT names no interpreter that has mergekit")
@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
@pytest.mark.parametrize("title", CONFIGS)
def test_rows_are_mergekits_by_token(
    title: str, theirs: tuple[str, Mapping[str, Path]], home: Path, tmp_path: Path
) -> None:
    file = home / f"config{list(CONFIGS).index(title)}.yml"
    folder = saved(tmp_path / "out", f"mergekit={file}")
    version, merges = theirs
    for other in (merges[title], merges[f"export of {title}"]):
        compare(title, read(folder), tokens_of(folder), other, version)


TALK = [
    [{"role": "user", "content": " hello "}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": "so"},
    ],
    [{"role": "system", "content": " be kind"}, {"role": "user", "content": "a\n\nb"}],
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " done "}],
]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETER, reason="MERGELAB_MERGEKIT names no interpreter that has mergekit")
@pytest.mark.parametrize("template", TEMPLATES, ids=["auto", *FORMATS, "text"])
def test_templates_say_what_mergekits_say(
    template: str, theirs: tuple[str, Mapping[str, Path]], home: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = saved(tmp_path / "out", f"mergekit={home / f'template{TEMPLATES.index(template)}.yml'}")
    ours, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(theirs[1][template])
    assert ours.chat_template != AutoTokenizer.from_pretrained(home / "b").chat_template
    for ours_or_theirs in (ours, other):
        ours_or_theirs.bos_token, ours_or_theirs.eos_token = "<s>", "</s>"
    for messages in TALK:
        for prompt in (False, True):
            texts = [
                each.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                for each in (ours, other)
            ]
            assert texts[0] == texts[1]


def test_a_config_says_the_tokens_in_the_settings_here(home: Path, tmp_path: Path) -> None:
    content = with_tokens(
        config("linear", PAIR, "a"),
        tokens={IM_END: {"source": "model: b", "force": True}, NEW: {"source": ROW}},
        pad_to_multiple_of=8,
    )
    plan = planned(f"mergekit={written(home, 'said', content | {'chat_template': 'chatml'})}")
    vocab = plan.config.models.vocab
    assert vocab is not None
    assert vocab.model_dump(exclude_defaults=True) == {
        "source": "union",
        "first": "a",
        "unknown": "zero",
        "padding": "drop",
        "pad_to_multiple_of": 8,
        "tokens": [
            {"token": IM_END, "model": "b", "everywhere": True},
            {"token": NEW, "model": "a", "like": IM_START},
        ],
    }
    assert plan.config.save.chat_template == "chatml"


def test_the_template_that_most_models_have_is_saved_with_the_merged_one(home: Path, tmp_path: Path) -> None:
    content = config("linear", [model(name, weight=1) for name in "bad"]) | {"chat_template": "auto"}
    content["tokenizer_source"] = "union"
    folder = saved(tmp_path / "out", f"mergekit={written(home, 'auto', content)}")
    assert (folder / "chat_template.jinja").read_text() == (home / "a" / "chat_template.jinja").read_text()
    plain = config("linear", [model(name, weight=1) for name in "ad"]) | {"chat_template": "alpaca"}
    folder = saved(tmp_path / "plain", f"mergekit={written(home, 'plain', plain)}")
    assert (folder / "chat_template.jinja").read_text() == FORMATS["alpaca"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "tokenizer_source: unoin",
            "tokenizer_source=unoin: must be base, union, or one of the models that are merged",
        ),
        ("tokenizer: {source: other/model}", "tokenizer.source=other/model: must be base, union, or one of the models"),
        ("tokenizer: {pad_to_multiple_of: 0}", "tokenizer.pad_to_multiple_of=0: must be a whole number above 0"),
        ("tokenizer: {tokens: {x: {force: true}}}", "tokenizer.tokens.x={'force': True}: needs source"),
        ("tokenizer: {tokens: {x: {source: q}}}", "tokenizer.tokens.x.source=q: must be one of the models"),
        ("tokenizer: {tokens: {x: {source: {kind: nul}}}}", "must be a model, {kind: zero} or {kind: model_token"),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: y, token_id: 3}}}}",
            "tokenizer.tokens.x.source: needs one of token and token_id",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: -3}}}}",
            "tokenizer.tokens.x.source.token_id=-3: must be a whole number from 0 on",
        ),
        ("tokenizer: {tokens: {x: {source: a, force: 2}}}", "tokenizer.tokens.x.force=2: must be true or false"),
        ("tokenizer: {tokens: [x]}", "tokenizer.tokens=['x']: must be a mapping"),
        ("tokenizer: {source: union, tokens: {x: {source: a, focre: true}}}\nstrict", "did you mean 'force'?"),
        ("chat_template: chatlm", "chat_template=chatlm: must be auto, chatml"),
        ("chat_template: '{% for m in messages %}'", "chat_template: is no template, line 1"),
        ("chat_template: 3", "chat_template=3: must be text"),
    ],
)
def test_what_a_config_says_wrong_of_the_tokenizer_is_one_line(settings: str, said: str, tmp_path: Path) -> None:
    settings, _, strict = settings.partition("\n")
    (tmp_path / "m.yml").write_text(f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n{settings}\n")
    text = (tmp_path / "m.yml").read_text().replace("{model: a}", "{model: a, parameters: {weight: 1}}")
    (tmp_path / "m.yml").write_text(text.replace("{model: b}", "{model: b, parameters: {weight: 1}}"))
    with pytest.raises(ConfigError) as caught:
        expanded([f"mergekit={tmp_path / 'm.yml'}", *(["strict=true"] if strict else [])])
    assert said in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_ends_of_a_stack_that_have_other_tokens_are_refused(home: Path) -> None:
    content = stack("passthrough", [[model("a", [0, 1])], [model("b", [0, 1])]])
    with pytest.raises(MergelabError, match="the first model has the embedding and the last one the head, but"):
        exported(f"mergekit={written(home, 'ends', content)}")


def test_an_adapter_cannot_have_other_rows_than_its_base(home: Path) -> None:
    settings = ["models=custom", f"models.base={home / 'base'}", f"models.experts=[{home / 'a'}]", "save.form=lora_svd"]
    with pytest.raises(ConfigError, match=r"models\.vocab\.padding: an adapter on the base keeps its rows"):
        planned(*settings, "save.rank=2", "method=task_arithmetic", "models.vocab={source: base, padding: drop}")


def test_an_export_that_mergekit_would_make_otherwise_is_none(home: Path) -> None:
    models = [f"models.base={home / 'base'}", f"models.experts=[{home / 'a'},{home / 'c'}]", "models=custom"]
    for vocab, said in {
        "base": "models.vocab.padding=keep: mergekit has drop alone",
        "{source: union, padding: drop, lacking: mean, first: a}": "models.vocab.lacking=mean",
    }.items():
        with pytest.raises(NoEqual, match=said):
            exported(*models, "method=task_arithmetic", f"models.vocab={vocab}")
    content = yaml.safe_load(exported(*models, "method=task_arithmetic", "models.vocab={source: a, padding: drop}"))
    assert content["tokenizer_source"] == str(home / "a")
