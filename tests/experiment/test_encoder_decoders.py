"""Encoder-decoders: transformers' documented examples on tiny models and on their merges, and whole merges to disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergelab as ml
from mergelab.errors import ConfigError, ModelError
from tests.conftest import Outcome
from tests.models import pairs

Command = Callable[..., Outcome]
ALONE = ["evaluate=false", "tracking=none"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two BERTs, two GPT-2s and two encoder-decoders, all of the same sizes."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        pairs.bert(folder / f"bert-{seed}", seed)
        pairs.gpt2(folder / f"gpt2-{seed}", seed)
        pairs.bert2bert(folder / f"bert2bert-{seed}", seed)
    return folder


@pytest.fixture
def place(models: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models in it, and an empty cache."""
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    for folder in models.iterdir():
        shutil.copytree(folder, workplace / folder.name)
    return workplace


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def written_by(folder: Path, prompt: str = "the cat sat on the mat .", **settings: Any) -> tuple[Any, str]:
    """Load a model as its user would, and let it write."""
    from transformers import AutoTokenizer, EncoderDecoderModel

    model, tokenizer = EncoderDecoderModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    mask = {"attention_mask": inputs.attention_mask}
    return model, tokenizer.decode(model.generate(inputs.input_ids, **mask, max_new_tokens=6, **settings)[0])


# --------------------------------------------------------------------------------------------- the documented examples


def random_start(place: Path, seed: int) -> Any:
    """Initialise from two configurations, as in the documentation."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    config_encoder, config_decoder = pairs.bert_config(), pairs.bert_config()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(config_encoder, config_decoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EncoderDecoderModel(config=config)
    assert model.config.decoder.is_decoder
    assert model.config.decoder.add_cross_attention
    return model


def warm_start(place: Path, seed: int) -> Any:
    """Initialise from two checkpoints."""
    from transformers import EncoderDecoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EncoderDecoderModel.from_encoder_decoder_pretrained(f"bert-{seed}", f"bert-{seed}")


def warm_start_of_mergelab(place: Path, seed: int) -> Any:
    """Initialise from two checkpoints, named where a model's name would be."""
    return ml.soup([{"encoder": f"bert-{seed}", "decoder": f"bert-{seed}", "seed": seed}])


def generation_start(place: Path, seed: int) -> Any:
    """Join models that were opened before, as the documentation of BertGeneration does."""
    from transformers import BertGenerationDecoder, BertGenerationEncoder, EncoderDecoderModel

    encoder = BertGenerationEncoder.from_pretrained(f"bert-{seed}", bos_token_id=2, eos_token_id=3)
    decoder = BertGenerationDecoder.from_pretrained(
        f"bert-{seed}", add_cross_attention=True, is_decoder=True, bos_token_id=2, eos_token_id=3
    )
    return EncoderDecoderModel(encoder=encoder, decoder=decoder)


@pytest.mark.parametrize("merged", [False, True], ids=["alone", "merged"])
@pytest.mark.parametrize("start", [random_start, warm_start, warm_start_of_mergelab, generation_start])
def test_the_documented_examples_run_on_tiny_models_and_on_their_merges(
    place: Path, start: Callable[[Path, int], Any], merged: bool
) -> None:
    from transformers import AutoTokenizer, EncoderDecoderModel

    model = start(place, 1)
    if merged:
        first, second = model, start(place, 2)
        model = ml.soup([first, second])
        mean = {name: (value + second.state_dict()[name]) / 2 for name, value in first.state_dict().items()}
        assert isinstance(model, EncoderDecoderModel)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, mean[name], rtol=1e-6, atol=1e-7)
    tokenizer = AutoTokenizer.from_pretrained("bert-1")

    # training
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.vocab_size = model.config.decoder.vocab_size
    input_ids = tokenizer("This is a really long text", return_tensors="pt").input_ids
    labels = tokenizer("This is the corresponding summary", return_tensors="pt").input_ids
    outputs = model(input_ids=input_ids, labels=labels)
    loss, logits = outputs.loss, outputs.logits
    assert logits.shape == (1, labels.shape[1], len(pairs.WORDS))
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "crossatt" in name)

    # save and load from pretrained
    model.save_pretrained("my-model")
    again = EncoderDecoderModel.from_pretrained("my-model")
    assert again(input_ids=input_ids, labels=labels).loss.item() == pytest.approx(loss.item())

    # generation
    generated = again.generate(input_ids, decoder_start_token_id=tokenizer.cls_token_id, max_new_tokens=5)
    assert generated[0, 0] == tokenizer.cls_token_id


# ------------------------------------------------------------------------------------------------------ whole merges


def test_warm_starts_of_a_pair_are_merged_and_what_is_new_passes_through(
    mergelab_command: Command, place: Path
) -> None:
    pair = "encoder: ./bert-{}, decoder: ./gpt2-{}"
    outcome = mergelab_command(
        *ALONE, "method=soup", "output=merged", f"models.base={{{pair.format(1, 1)}}}",
        f"models.experts=[{{{pair.format(1, 2)}, seed: 1}},{{{pair.format(2, 1)}, seed: 2}}]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    merged = weights(place / "merged")
    base, first, second = (ml.soup([{"encoder": f"bert-{e}", "decoder": f"gpt2-{d}", "seed": seed}]).state_dict()
                           for e, d, seed in ((1, 1, 0), (1, 2, 1), (2, 1, 2)))  # fmt: skip
    new = {name for name in merged if "cross" in name or "pooler" in name}
    assert new
    for name, value in merged.items():
        expected = base[name] if name in new else (first[name] + second[name]) / 2
        torch.testing.assert_close(value, expected)
    model, _ = written_by(place / "merged")
    assert model.generation_config.decoder_start_token_id == model.config.eos_token_id == 256
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(place / "merged", subfolder="decoder_tokenizer").vocab_size == 257


def test_what_is_new_can_be_merged_like_any_other_weight(mergelab_command: Command, place: Path) -> None:
    pair = "{{encoder: ./bert-1, decoder: ./bert-1, seed: {}}}"
    merge = [*ALONE, "method=soup", "models.base=null", f"models.experts=[{pair.format(1)},{pair.format(2)}]"]
    for more in ([], ["models.merge_new=true"]):
        outcome = mergelab_command(*merge, *more, f"output=merged{len(more)}")
        assert outcome.code == 0, outcome.err
    one, two = (ml.soup([{"encoder": "bert-1", "decoder": "bert-1", "seed": s}]).state_dict() for s in (1, 2))
    name = "decoder.bert.encoder.layer.0.crossattention.self.query.weight"
    torch.testing.assert_close(weights(place / "merged0")[name], one[name])
    torch.testing.assert_close(weights(place / "merged1")[name], (one[name] + two[name]) / 2)


def test_trained_cross_attention_is_not_diluted_by_that_of_a_warm_start(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(
        *ALONE, "method=task_arithmetic", "method.lambda=0.5", "output=merged",
        "models.base={encoder: ./bert-1, decoder: ./bert-1}",
        "models.experts={tuned: ./bert2bert-1, its_encoder: {encoder: ./bert2bert-1, decoder: ./bert-1}}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    merged, tuned = weights(place / "merged"), weights(place / "bert2bert-1")
    assert all(torch.equal(merged[name], tuned[name]) for name in merged if "crossattention" in name)
    model, _ = written_by(place / "merged")
    assert (model.generation_config.num_beams, model.generation_config.length_penalty) == (3, 2.0)


def test_checkpoints_of_one_part_are_merged_into_that_part_alone(mergelab_command: Command, place: Path) -> None:
    outcome = mergelab_command(
        *ALONE, "method=task_arithmetic", "method.lambda=0.5", "output=merged",
        "models.base={encoder: ./bert-1, decoder: ./gpt2-1}",
        "models.experts={e: {reference: ./bert-2, part: encoder}, d: {reference: ./gpt2-2, part: decoder}}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    merged = weights(place / "merged")
    e1, e2, d1, d2 = (weights(place / name) for name in ("bert-1", "bert-2", "gpt2-1", "gpt2-2"))
    bert, gpt2 = "encoder.layer.1.output.dense.weight", "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(merged[f"encoder.{bert}"], (e1[f"bert.{bert}"] + e2[f"bert.{bert}"]) / 2)
    torch.testing.assert_close(merged[f"decoder.{gpt2}"], (d1[gpt2] + d2[gpt2]) / 2)
    written_by(place / "merged")


def test_layers_that_are_left_out_are_counted_in_encoder_and_decoder_apart(
    mergelab_command: Command, place: Path
) -> None:
    merge = [*ALONE, "method=soup", "models.base=./bert2bert-1", "models.experts=[./bert2bert-2]"]
    outcome = mergelab_command(*merge, "models.leave_out=[0]", "output=both")
    assert outcome.code == 0, outcome.err
    assert mergelab_command(*merge, "models.leave_out={encoder: [1], decoder: []}", "output=one").code == 0
    base, expert = weights(place / "bert2bert-1"), weights(place / "bert2bert-2")
    kept = {"both": (".encoder.layer.0.", "."), "one": ("encoder.encoder.layer.1.", "encoder.")}
    for folder, (layer, start) in kept.items():
        for name, value in weights(place / folder).items():
            own = base if layer in name and name.startswith(start.strip(".")) else expert
            assert torch.equal(value, own[name]), name


def test_shared_layers_are_merged_once_and_stored_for_encoder_and_decoder(
    mergelab_command: Command, place: Path
) -> None:
    for seed in (1, 2):  # as checkpoints of older versions are, with the layers under two names
        folder = place / f"bert2bert-{seed}"
        tensors = weights(folder)
        twins = {n: n.replace("encoder.", "decoder.bert.", 1) for n in tensors if n.startswith("encoder.enc")}
        tensors |= {twin: tensors[name] for name, twin in twins.items()}
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_encoder_decoder": True}))
    merge = [*ALONE, "method=soup", "models.base=null", "models.experts=[./bert2bert-1,./bert2bert-2]"]
    outcome = mergelab_command(*merge, "output=merged")
    assert outcome.code == 0, outcome.err
    model, _ = written_by(place / "merged")
    encoder, decoder = model.encoder.state_dict(), model.decoder.bert.state_dict()
    one, two = (torch.load(place / f"bert2bert-{seed}" / "pytorch_model.bin") for seed in (1, 2))
    for name in twins:
        inner = name.removeprefix("encoder.")
        assert torch.equal(encoder[inner], decoder[inner])
        torch.testing.assert_close(encoder[inner], (one[name] + two[name]) / 2)


def test_tokens_that_one_model_does_not_name_are_anothers(mergelab_command: Command, place: Path) -> None:
    from transformers import EncoderDecoderModel

    bare = EncoderDecoderModel.from_encoder_decoder_pretrained("bert-1", "bert-1")  # as the documentation saves it
    for folder in ("bare", "bare-2"):
        bare.save_pretrained(folder)
        shutil.copy("bert-1/vocab.txt", folder)
        shutil.copy("bert-1/tokenizer_config.json", folder)
    merge = [*ALONE, "method=soup", "models.base=null"]
    outcome = mergelab_command(*merge, "models.experts=[./bare,./bert2bert-1]", "output=merged")
    assert outcome.code == 0, outcome.err
    model, _ = written_by(place / "merged")
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(model.generation_config, name) for name in names] == [2, 3, 0]
    assert model.config.decoder_start_token_id == 2
    outcome = mergelab_command(*merge, "models.experts=[./bare,./bare-2]", "output=again")
    assert outcome.code == 0, outcome.err
    told = " ".join(outcome.err.replace("│", " ").split())
    assert "no model says its decoder_start_token_id, which the merged model needs to write" in told


def other_words(folder: Path) -> None:
    pairs.words(folder, [*pairs.WORDS[:5], *reversed(pairs.WORDS[5:])])


def test_tokenizers_that_differ_are_an_error_that_says_how_to_go_on(mergelab_command: Command, place: Path) -> None:
    merge = [*ALONE, "method=soup", "models.base=null", "output=merged"]
    for file in (place / "bert-2").glob("*token*"):
        file.unlink()
    other_words(place / "bert-2")
    pair = "{{encoder: ./bert-{}, decoder: ./bert-{}}}"
    for first, part in (("1", "encoders"), ("2", "decoders")):
        experts = f"models.experts=[{pair.format(1, 1)},{pair.format('2' if part == 'encoders' else '1', '2')}]"
        outcome = mergelab_command(*merge, experts)
        assert outcome.code == 2, first
        assert f"the models' tokens of the {part} differ in 20 rows: 5 is 'the'" in outcome.err
        assert "models.experts.<name>.part=encoder or decoder" in outcome.err
        assert not (place / "merged").exists()
    outcome = mergelab_command(*merge, f"models.experts=[{pair.format(1, 1)}]", "models.vocab=union")
    assert outcome.code == 2
    assert "models.vocab=union: bert-1-bert-1 is an encoder-decoder" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models.base={encoder: ./gpt2-1, decoder: ./gpt2-1}"], "models.base.encoder: gpt2-1 is a decoder-only model"),
        (["models.base={encoder: ./bert-1}"], "models.base.decoder: needs a value"),
        (["models.base={encoder: ./bert-1, decoder: ./none}"], "model './none': the folder does not exist"),
        (["models.base={encoder: ./bert-1, decodr: ./gpt2-1}"], "models.base.decodr: no such key; did you mean"),
        (["models.base=./bert-1"], "models.base: ./bert-1 is a BertForMaskedLM, and the experts are encoder-decoders"),
        (["models.experts={a: {reference: ./gpt2-1, part: encoder}}"], "'models.experts.a' lacks embeddings.LayerNorm"),
        (["models.experts={a: {reference: ./bert-1, part: middle}}"], "models.experts.a.part='middle': must be one of"),
        (["models.leave_out=[0,5]"], "models.leave_out=[0, 5]: there is no layer 5; the models have layers 0 to 1"),
        (["models.base=null", "models.leave_out=[0]"], "models.leave_out=[0]: there is no base model"),
        (["models.base=null", "models.experts={a: {reference: ./bert-1, part: encoder}}"], "a has part=encoder, and"),
    ],
)
def test_bad_input_is_one_line(mergelab_command: Command, place: Path, arguments: list[str], said: str) -> None:
    good = ["models.base=./bert2bert-1", "models.experts=[./bert2bert-2]"]
    named = [argument.partition("=")[0] for argument in arguments]
    chosen = [*(each for each in good if each.partition("=")[0] not in named), *arguments]
    outcome = mergelab_command(*ALONE, "method=soup", "output=merged", *chosen)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (place / "merged").exists()


@pytest.mark.filterwarnings("ignore::mergelab.errors.MergeWarning")
def test_methods_that_learn_from_data_are_given_prompts_with_their_answers(
    mergelab_command: Command, place: Path
) -> None:
    texts = [f"the {a} {verb} on the {b} ." for a in ("cat", "dog") for verb in ("sat", "ran") for b in ("mat", "text")]
    (place / "data").mkdir()
    table = pa.table({"id": texts, "dialogue": texts, "summary": [text[4:11] for text in texts]})
    pq.write_table(table, place / "data" / "train.parquet")
    learn = [*ALONE, "task=samsum", "task.data_dir=data", "models.experts=[./bert2bert-1,./bert2bert-2]"]
    learn += ["models.base=null", "method.samples=6"]
    outcome = mergelab_command(*learn, "method=fisher", "method.estimator=expected", "output=none")
    assert outcome.code == 2
    assert "method.estimator=expected: takes a pass for every token" in outcome.err
    assert not (place / "none").exists()
    one, two = weights(place / "bert2bert-1"), weights(place / "bert2bert-2")
    for name in ("fisher", "regmean"):
        outcome = mergelab_command(*learn, f"method={name}", f"output={name}")
        assert outcome.code == 0, outcome.err
        merged = weights(place / name)
        learnt = [key for key in merged if not torch.allclose(merged[key], (one[key] + two[key]) / 2, atol=1e-6)]
        parts = ("encoder.encoder.layer.1.output", "crossattention.self.key.weight", "crossattention.self.query.weight")
        assert all(any(part in key for key in learnt) for part in parts)
        assert ("decoder.bert.embeddings.word_embeddings.weight" in learnt) == (name == "fisher")
        written_by(place / name)


# -------------------------------------------------------------------------------------------------------- the library


def test_the_library_takes_pairs_folders_and_modules(place: Path) -> None:
    from transformers import EncoderDecoderModel

    pair = {"encoder": "bert-1", "decoder": Path("bert-1")}
    merged = ml.task_arithmetic([pair, "bert2bert-1", "bert2bert-2"], lambda_=0.5)
    assert isinstance(merged, EncoderDecoderModel)
    base, one, two = ml.soup([pair]).state_dict(), weights(place / "bert2bert-1"), weights(place / "bert2bert-2")
    for name, value in merged.named_parameters():
        tuned = (one[name] + two[name]) / 2
        start = base[name]
        skips = "crossattention" in name or "pooler" in name
        torch.testing.assert_close(
            value.detach(), tuned if skips else start + 0.5 * ((one[name] - start) + (two[name] - start))
        )
    modules = [EncoderDecoderModel.from_pretrained(f"bert2bert-{seed}") for seed in (1, 2)]
    again = ml.soup(modules, base_index=0, leave_out={"decoder": [0, 1]})
    assert torch.equal(
        again.decoder.bert.encoder.layer[1].output.dense.weight,
        modules[0].decoder.bert.encoder.layer[1].output.dense.weight,
    )
    assert torch.equal(
        again.encoder.encoder.layer[1].output.dense.weight, modules[1].encoder.encoder.layer[1].output.dense.weight
    )
    with pytest.raises(ConfigError, match="leave_out: there is no base model"):
        ml.soup(modules, leave_out=[0])
    with pytest.raises(ModelError, match=r"models\[0\]\.encoder: gpt2-1 is a decoder-only model"):
        ml.soup([{"encoder": "gpt2-1", "decoder": "gpt2-1"}])
    with pytest.raises(ConfigError, match=r"models\[0\]\.decodr: no such key"):
        ml.soup([{"encoder": "gpt2-1", "decoder": "gpt2-1", "decodr": "x"}])


def test_the_library_takes_experts_for_one_part(place: Path) -> None:
    from transformers import EncoderDecoderModel

    pair = {"encoder": "bert-1", "decoder": Path("gpt2-1")}
    for_one_part = [{"reference": Path("bert-2"), "part": "encoder"}, {"reference": "gpt2-2", "part": "decoder"}]
    merged = ml.task_arithmetic([*for_one_part, pair], base_index=-1, lambda_=0.5)
    assert isinstance(merged, EncoderDecoderModel)
    found, base = merged.state_dict(), ml.soup([pair]).state_dict()
    of_parts = {f"encoder.{name.removeprefix('bert.')}": value for name, value in weights(place / "bert-2").items()}
    of_parts |= {f"decoder.{name}": value for name, value in weights(place / "gpt2-2").items()}
    of_parts = {name: value for name, value in of_parts.items() if name in found}
    assert len(of_parts) > 50
    for name, value in found.items():
        tied = name.replace("lm_head.weight", "transformer.wte.weight")
        torch.testing.assert_close(value, (base[name] + of_parts.get(tied, base[name])) / 2)
    with pytest.raises(ConfigError, match=r"models\[0\] has part=encoder, and there is no base model"):
        ml.soup([for_one_part[0], pair])
    with pytest.raises(ConfigError, match=r"models\[1\]\.part='middle': must be one of"):
        ml.soup([pair, {"reference": "bert-2", "part": "middle"}], base_index=0)
