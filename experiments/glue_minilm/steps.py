"""What the study runs, in the order that makes a part of the page whole as early as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.resumable import Step

TASKS = ("sst2", "stsb", "mrpc", "cola", "rte", "qnli")
# λ and density are swept for some of these.
METHODS = (
    "soup", "task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs", "model_stock", "sce", "consensus",
    "pcb", "iso_c", "tsv_m",
)  # fmt: skip
OF_LABELLED = ("fisher", "regmean")  # which take training examples
BESIDE_ADAMERGING = ("soup", "task_arithmetic", "ties", "tsv_m", "regmean")
REGRESSION = "stsb"  # its expert has no classes, so no entropy, by which AdaMerging learns
SIZES = {
    "fisher": ("method.samples=256",),
    "regmean": ("method.samples=256",),
    "adamerging": ("method.steps=100", "method.samples=1024"),
}
SWEPT = {
    "task_arithmetic": {"lambda": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)},
    "ties": {"lambda": (0.5, 1.0, 1.5, 2.0), "density": (0.1, 0.2, 0.4, 0.8)},
    "dare": {"lambda": (0.3, 1.0), "density": (0.1, 0.3, 0.5, 0.9)},
}
OF_ADAPTERS = ("soup", "task_arithmetic", "ties", "peft_linear", "peft_ties")  # dense weights first, then factors
SEEDS = (0, 1, 2)
# Training examples of each expert. CoLA needs many: of 1,600 MiniLM learns nothing.
ROWS = {"sst2": 1600, "stsb": 1600, "mrpc": 2400, "cola": 8000, "rte": 2490, "qnli": 2400}
SETTINGS = ("eval.protocol=holdout", "eval.preflight=false", "tracking=none")
LENGTH = 128  # tokens of a training example, at most
EXPERTS, SAME, ADAPTERS, SEVERAL = "experts", "same task", "adapters", "multi-task"


@dataclass(frozen=True)
class Study:
    """What is run. Every path is relative to the study's folder, which is the current one.

    Attributes:
        tasks: the tasks' names.
        examples: of each expert's training, at most; None: as many as `ROWS` says.
        epochs: at most.
        limit: validation examples of a task, at most; None: all.
        share: likewise of each task where several are measured together.
        mini: whether base and data are the embedded miniature's.
    """

    tasks: tuple[str, ...] = TASKS
    examples: int | None = None
    epochs: int = 3
    limit: int | None = 1000
    share: int | None = 600
    mini: bool = False

    def expert(self, task: str, seed: int, *, lora: bool = False) -> str:
        """Return an expert's folder."""
        return f"{'adapters' if lora else 'experts'}/{task}/seed-{seed}"


def steps(study: Study) -> Iterator[Step]:
    """Yield all steps in the order in which they are made."""
    for task in study.tasks:
        yield _finetune(study, task, SEEDS[0])
    if len(study.tasks) > 1:
        yield from _multi_task(study)
    first = study.tasks[0]
    for task in study.tasks:
        yield from _same_task(study, task)
        if task == first:
            yield from _of_adapters(study, first)


def _finetune(study: Study, task: str, seed: int, *, lora: bool = False) -> Step:
    found = ["finetune", f"task={task}", "base=./base", "task.data_dir=./data", f"seeds=[{seed}]"]
    rows = ROWS[task] if study.examples is None else min(study.examples, ROWS[task])
    found += [f"train.examples={rows}", f"train.epochs={study.epochs}"]
    # The miniature has other rates, which are its own defaults.
    found += [] if study.mini else [f"train.learning_rate={'1e-3' if lora else '8e-5'}", f"train.max_length={LENGTH}"]
    found += ["lora.r=8"] if lora else []
    output = study.expert(task, seed, lora=lora).rpartition("/")[0]
    arguments = (*found, f"output={output}", "tracking=none")
    # One process at a time writes the experts of a folder.
    earlier = tuple(_finetune(study, task, other, lora=lora) for other in SEEDS[: SEEDS.index(seed)])
    return Step(EXPERTS, task, f"{'adapter' if lora else 'dense'} {seed}", arguments, needs=earlier)


def _same_task(study: Study, task: str) -> Iterator[Step]:
    """Yield what is made of the experts of one task, and first the experts."""
    for seed in SEEDS[1:]:
        yield _finetune(study, task, seed)
    experts = [study.expert(task, seed) for seed in SEEDS]
    models = (f"task={task}", "models.base=./base", f"models.experts=[{','.join(f'./{each}' for each in experts)}]")
    makers = tuple(_finetune(study, task, seed) for seed in SEEDS)
    yield from _merges(SAME, task, (*models, "task.data_dir=./data", *_limited(study.limit)), makers)


def _of_adapters(study: Study, task: str) -> Iterator[Step]:
    experts = ",".join(f"./{study.expert(task, seed, lora=True)}" for seed in SEEDS)
    models = (f"task={task}", "models.base=./base", f"models.experts=[{experts}]", "task.data_dir=./data")
    models = (*models, *_limited(study.limit))
    makers = tuple(_finetune(study, task, seed, lora=True) for seed in SEEDS)
    yield from makers
    for method in OF_ADAPTERS:
        yield Step(ADAPTERS, task, method, (f"method={method}", *models, *SETTINGS), needs=makers)


def _multi_task(study: Study) -> Iterator[Step]:
    """Yield the merges of all tasks, and some of the classification tasks alone, which AdaMerging is made for."""
    yield from _merges(SEVERAL, *_of_several(study, study.tasks))
    classified = tuple(task for task in study.tasks if task != REGRESSION)
    if len(classified) > 1:
        of, models, makers = _of_several(study, classified)
        beside = BESIDE_ADAMERGING if REGRESSION in study.tasks else ()  # they are in the table above otherwise
        for method in (*beside, "adamerging"):
            yield _merge(SEVERAL, of, method, models, makers)


def _of_several(study: Study, tasks: Sequence[str]) -> tuple[str, tuple[str, ...], tuple[Step, ...]]:
    experts = ", ".join(f"{task}: ./{study.expert(task, SEEDS[0])}" for task in tasks)
    of = ("task=suite", f"task.members=[{','.join(tasks)}]", "models.head=per_task")
    models = ("models.base=./base", f"models.experts={{{experts}}}", "task.data_dir=./data")
    makers = tuple(_finetune(study, task, SEEDS[0]) for task in tasks)
    return "+".join(tasks), (*of, *models, *_limited(study.share)), makers


def _merges(part: str, of: str, models: Sequence[str], needs: tuple[Step, ...]) -> Iterator[Step]:
    yield Step(part, of, "analysis", ("analyze", *models, "tracking=none"), needs=needs)
    for method in (*METHODS, *OF_LABELLED):
        yield _merge(part, of, method, models, needs)
    for method, grid in SWEPT.items():
        arguments = ("-m", f"method={method}", *_grid(grid), *models, *SETTINGS)
        yield Step(part, of, f"{method} grid", arguments, needs=needs)


def _merge(part: str, of: str, method: str, models: Sequence[str], needs: tuple[Step, ...]) -> Step:
    sizes = SIZES.get(method, ())
    return Step(part, of, method, (f"method={method}", *sizes, *models, *SETTINGS), keeps=True, needs=needs)


def _limited(limit: int | None) -> tuple[str, ...]:
    return (f"task.limit={limit}",) if limit else ()


def _grid(grid: dict[str, tuple[float, ...]]) -> tuple[str, ...]:
    return tuple(f"method.{name}={','.join(map(str, values))}" for name, values in grid.items())
