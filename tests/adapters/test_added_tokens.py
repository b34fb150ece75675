"""Models with added tokens are written as adapters: in PEFT, on the resized base, each is the dense merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergelab.models.adapted import on_base, open_model
from tests import vocabularies
from tests.adapters import made as small
from tests.conftest import Outcome
from tests.vocabularies import FIM, IM_END, IM_START

peft = pytest.importorskip("peft")

Command = Callable[..., Outcome]
CAUSAL = transformers.AutoModelForCausalLM


def models(kind: str, folder: Path) -> tuple[dict[str, Path], Any]:
    """Save a base, and two experts that have further tokens, each others; return the class that loads them, too."""
    if kind.startswith("llama"):
        rows = 264 if kind == "llama, padded" else 257
        tied = kind == "llama, tied"
        base = vocabularies.llama(folder / "base", 0, rows=rows, tied=tied)
        a = vocabularies.llama(folder / "a", 1, [IM_START, IM_END], rows=264, tied=tied)
        b = vocabularies.llama(folder / "b", 2, [FIM], rows=258, tied=tied)
        return {"base": base, "a": a, "b": b}, CAUSAL
    masked = kind == "bert, masked"
    base = vocabularies.bert(folder / "base", 0, masked=masked)
    a = vocabularies.bert(folder / "a", 1, ["dog", "ran"], masked=masked)
    b = vocabularies.bert(folder / "b", 2, ["hat"], masked=masked)
    loader = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForSequenceClassification
    return {"base": base, "a": a, "b": b}, loader


def merged(command: Command, given: Mapping[str, Path], output: str, *settings: str, code: int = 0) -> Outcome:
    experts = ", ".join(f"{name}: {folder}" for name, folder in given.items() if name != "base")
    outcome = command(
        f"models.base={given['base']}",
        f"models.experts={{{experts}}}",
        *("task=rte", "evaluate=false", "tracking=none", f"output={output}", *settings),
    )
    assert outcome.code == code, outcome.err
    return outcome


def tokens_of(base: Path, adapter: Path) -> Path:
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def on_resized(loader: Any, base: Path, adapter: Path) -> Any:
    """Load an adapter as PEFT's users do whose tokenizer has more tokens than the base."""
    model = loader.from_pretrained(base, dtype=torch.float32)
    count = len(transformers.AutoTokenizer.from_pretrained(tokens_of(base, adapter)))
    if count > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(count)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def inputs(count: int) -> dict[str, torch.Tensor]:
    """Texts of which the last tokens are among them."""
    return {"input_ids": torch.tensor([[1, count - 1, 5, count - 2], [count - 3, 0, 2, count - 1]])}


def assert_is(adapter: Path, dense: Path, given: Mapping[str, Path], loader: Any) -> None:
    """Check that an adapter gives the logits of the model that is written whole."""
    whole = loader.from_pretrained(dense).eval()
    places = tokens_of(given["base"], adapter), dense
    own, tokens = (transformers.AutoTokenizer.from_pretrained(each) for each in places)
    assert own.get_vocab() == tokens.get_vocab()
    assert own.special_tokens_map == tokens.special_tokens_map
    expected = small.outputs(whole, **inputs(len(tokens)))
    through = on_resized(loader, given["base"], adapter)
    torch.testing.assert_close(small.outputs(through, **inputs(len(tokens))), expected, rtol=1e-4, atol=1e-5)
    alone = through.merge_and_unload()
    torch.testing.assert_close(small.outputs(alone, **inputs(len(tokens))), expected, rtol=1e-4, atol=1e-5)
    again = open_model(on_base(given["base"], adapter, where="again"))
    assert again.config["vocab_size"] == whole.config.vocab_size
    stored = load_file(dense / "model.safetensors")
    for name in again.keys():  # noqa: SIM118
        torch.testing.assert_close(
            again.get(name), stored[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n} {text}"
        )


CASES = [
    *((kind, "extraction", "union") for kind in ("llama", "llama, tied", "llama, padded", "bert", "bert, masked")),
    *((kind, "sum", "base") for kind in ("llama", "bert, masked")),
    ("llama, tied", "ties", "union"),
    ("bert", "ties", "base"),
]
METHODS: dict[str, tuple[str, ...]] = {
    "extraction": ("method=task_arithmetic", "method.lambda=1"),
    "sum": ("method=task_arithmetic", "method.lambda=0.5"),
    "ties": ("method=ties", "method.density=0.6"),
}


@pytest.mark.parametrize(("kind", "method", "vocab"), CASES)
def test_of_full_rank_it_is_the_dense_merge(
    kind: str, method: str, vocab: str, tmp_path: Path, mergelab_command: Command
) -> None:
    given, loader = models(kind, tmp_path)
    if method == "extraction":
        del given["b"]
    settings = (*METHODS[method], f"models.vocab={vocab}")
    outcome = merged(mergelab_command, given, "adapter", *settings, "save.form=lora_svd", "save.energy=1.0")
    merged(mergelab_command, given, "dense", *settings)
    assert_is(Path("adapter"), Path("dense"), given, loader)
    size = loader.from_pretrained("dense").config.vocab_size
    grows = size > transformers.AutoConfig.from_pretrained(given["base"]).vocab_size
    assert grows == (vocab == "union" and kind != "llama, padded")
    assert (f"base.resize_token_embeddings({size})" in outcome.out + outcome.err) == grows


def test_peft_finds_and_resizes_the_base_by_itself(tmp_path: Path, mergelab_command: Command) -> None:
    given, _ = models("llama", tmp_path)
    settings = (*METHODS["sum"], "models.vocab=union")
    merged(mergelab_command, given, "adapter", *settings, "save.form=lora_svd", "save.energy=1.0")
    merged(mergelab_command, given, "dense", *settings)
    found = peft.AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.float32).eval()
    expected = small.outputs(CAUSAL.from_pretrained("dense").eval(), **inputs(260))
    torch.testing.assert_close(small.outputs(found, **inputs(260)), expected, rtol=1e-4, atol=1e-5)


def test_on_a_base_without_the_tokens_peft_says_that_sizes_differ(tmp_path: Path, mergelab_command: Command) -> None:
    given, _ = models("llama", tmp_path)
    settings = (*METHODS["sum"], "models.vocab=union", "save.form=lora_svd", "save.rank=2")
    merged(mergelab_command, given, "adapter", *settings)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(CAUSAL.from_pretrained(given["base"]), "adapter")


def test_adapters_with_tokens_of_their_own_are_joined(tmp_path: Path, mergelab_command: Command) -> None:
    base = vocabularies.llama(tmp_path / "base", 0, rows=257)
    given = {"base": base}
    for seed, (name, token) in enumerate((("a", IM_START), ("b", FIM)), 1):
        model = CAUSAL.from_pretrained(base, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        model.resize_token_embeddings(len(tokenizer))
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        given[name], _ = small.adapter(tmp_path / name, model, config, seed=seed)
        tokenizer.save_pretrained(given[name])
    settings = ("method=task_arithmetic", "method.lambda=1", "method.weights=[0.7,-0.4]", "models.vocab=union")
    merged(mergelab_command, given, "adapter", *settings, "save.form=lora_cat")
    merged(mergelab_command, given, "dense", *settings)
    assert_is(Path("adapter"), Path("dense"), given, CAUSAL)
    ranks = json.loads(Path("adapter/mergelab_sites.json").read_text())
    assert {site["rank"] for site in ranks.values()} == {4}  # joined as they are, not fitted to a dense change


def test_of_added_tokens_alone_no_adapter_is_made(tmp_path: Path, mergelab_command: Command) -> None:
    base = vocabularies.llama(tmp_path / "base", 0, rows=257)
    grown = vocabularies.llama(tmp_path / "a", 0, [IM_START], rows=258)
    model = CAUSAL.from_pretrained(base)
    model.resize_token_embeddings(258)
    model.save_pretrained(grown)
    settings = (*METHODS["extraction"], "models.vocab=union", "save.form=lora_svd", "save.rank=2")
    outcome = merged(mergelab_command, {"base": base, "a": grown}, "adapter", *settings, code=2)
    assert "an adapter adapts layers, and only lm_head.weight, model.embed_tokens.weight change" in outcome.err
    assert "save.form=dense can hold them" in outcome.err
    assert not Path("adapter").exists()


def test_the_base_with_the_adapter_scores_as_the_dense_merge(tmp_path: Path, mergelab_command: Command) -> None:
    import pyarrow.parquet as pq

    from tests.standins import glue_table

    given, _ = models("bert", tmp_path)
    pq.write_table(glue_table("rte", 40, 1), "validation.parquet")
    found = []
    for form in (("save.form=dense",), ("save.form=lora_svd", "save.energy=1.0")):
        settings = ("evaluate=true", "task.data_dir=.", "eval.preflight=false", "models.vocab=union", *METHODS["sum"])
        merged(mergelab_command, given, f"out{len(found)}", *settings, *form, f"hydra.run.dir=run{len(found)}")
        found.append(json.loads(Path(f"run{len(found)}/result.json").read_text())["models"][-1]["results"])
    assert found[0] == found[1]
