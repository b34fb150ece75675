"""The task heads of opened models: each expert's own, and the merged model's as the head policy chooses it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from mergelab.errors import ConfigError, DataError, MergeWarning, ModelError, listed
from mergelab.experiment.label_orders import Labels, label_orders
from mergelab.models.heads import Head, mean_head, read_head
from mergelab.tasks.labels import label_order, numbered_order

if TYPE_CHECKING:
    from mergelab.experiment.locate import LocatedExpert, LocatedModels
    from mergelab.experiment.opening import OpenedModels
    from mergelab.tasks.spec import TaskSpec


class Heads:
    """The merged model's head for each task, ``heads[task.name]``, and those of the models that it comes from.

    A task without classifier outputs has an empty head. Heads that no task here knows (token classification, question
    answering, labels of the user's own) are kept with the experts' own labels, in `to_save`.

    Args:
        opened: the models.
        located: what is known of them besides: the experts' tasks and label names.
        tasks: what is measured.
        policy: ``average``, ``base``, ``per_task`` or ``expert:<name>``.
        measured: whether models are measured on the tasks, which all heads then must be for.

    Attributes:
        policy: as given.

    Raises:
        ConfigError: the policy does not fit the models.
        DataError: a model's labels cannot be matched with a task's. ModelError: nor with another expert's.
        KeyMismatch, ShapeMismatch: heads that are to be averaged differ. NonFinite: a head holds NaN or infinity.
    """

    def __init__(
        self,
        opened: OpenedModels,
        located: LocatedModels,
        tasks: Sequence[TaskSpec],
        policy: str,
        *,
        measured: bool = True,
    ) -> None:
        self.policy = policy
        self._opened, self._located, self._tasks = opened, located, tuple(tasks)
        self._averaged = frozenset(expert.name for expert in located.experts)
        known = any(task.outputs for task in tasks) and (measured or policy == "per_task" or self._match())
        self._own = bool(opened.head_names) and not known
        self._labels: tuple[str, ...] = ()
        self._merged = self._choose()
        if opened.head_names and not (self._own or measured):
            self._say_assumed()

    def __getitem__(self, task: str) -> Head:
        return self._merged[task]

    def to_save(self, task: TaskSpec) -> tuple[Head, dict[str, Any]]:
        """Return the head that is saved for ``task``, and the keys of ``config.json`` that name its outputs."""
        if not self._opened.head_names:
            return Head({}, "none"), {}
        labels = self._labels if self._own else task.labels or ("LABEL_0",)
        return self._merged[task.name], label_config(labels) if labels else {}

    def serves(self, expert: LocatedExpert, task: TaskSpec) -> bool:
        """Return whether an expert's own head is for ``task``."""
        return self.policy != "per_task" or expert.task == task.name

    def of_expert(self, index: int, task: TaskSpec) -> Head:
        """Read an expert's head with its outputs in the order of ``task``'s labels."""
        expert, opened = self._located.experts[index], self._opened
        if not (opened.head_names and task.outputs):
            return Head({}, expert.name)
        kind = opened.experts[index].architecture
        assert kind is not None
        order = label_order(task, kind.id2label, model=expert.label, override=expert.labels)
        return read_head(opened.aligned.experts[index], opened.head_names, order)

    def owners(self) -> dict[str, str]:
        """Return for each task the name of the expert whose head it has, under a policy that chooses one."""
        return {name: head.owner for name, head in self._merged.items()}

    def average_of(self, experts: Collection[str]) -> None:
        """Let the merged model's head, where it is the experts' average, be that of these experts."""
        if frozenset(experts) == self._averaged:
            return
        self._averaged = frozenset(experts)
        if self.policy == "average":
            self._merged = self._choose()

    def _choose(self) -> dict[str, Head]:
        if self._own:
            head, self._labels = self._own_head()
            return {task.name: head for task in self._tasks}
        return {task.name: self._merged_head(task) for task in self._tasks}

    def _merged_head(self, task: TaskSpec) -> Head:
        experts = self._located.experts
        if self.policy == "base":
            return self._base_head(task)
        if self.policy.startswith("expert:"):
            names = [expert.name for expert in experts]
            return self.of_expert(names.index(self.policy.removeprefix("expert:")), task)
        if self.policy == "per_task":
            serving = [index for index, expert in enumerate(experts) if expert.task == task.name]
            if not serving:
                raise ConfigError(
                    f"models.head=per_task: no expert's head is for {task.name!r} (experts serve "
                    f"{listed(str(expert.task) for expert in experts)}); set models.experts.<name>.task"
                )
            return self.of_expert(serving[0], task)
        averaged = [self.of_expert(index, task) for index, e in enumerate(experts) if e.name in self._averaged]
        return mean_head(averaged, self._opened.dtype)

    def _base_head(self, task: TaskSpec) -> Head:
        opened = self._opened
        if not (opened.head_names and task.outputs):
            return Head({}, "base")
        if opened.base is None or opened.aligned.base is None:
            raise ConfigError("models.head=base: there is no base model (models.base is null)")
        kind, label = opened.base.architecture, opened.base.label
        assert kind is not None
        if lacking := sorted(set(opened.head_names) - set(opened.aligned.base.keys())):
            raise ConfigError(f"models.head=base: the base {label} has no {listed(lacking)}")
        return read_head(opened.aligned.base, opened.head_names, label_order(task, kind.id2label, model=label))

    def _match(self) -> bool:
        """Return whether every expert's head is for every task, by its class and the names of its labels."""
        for expert, model in zip(self._located.experts, self._opened.experts, strict=True):
            kind = model.architecture
            if kind is None or not kind.is_classifier:
                continue
            if not kind.is_sequence_classifier:
                return False
            try:
                for task in self._tasks:
                    if task.outputs:
                        label_order(task, kind.id2label, model=expert.label, override=expert.labels)
            except DataError:
                return False
        return True

    def _say_assumed(self) -> None:
        """Warn of experts whose labels are numbers, beside others with names, that nothing shows to be in one order."""
        task = next(task for task in self._tasks if task.outputs)
        names = [
            expert.name
            for expert, model in zip(self._located.experts, self._opened.experts, strict=True)
            if task.labels and not expert.labels and model.labels and numbered_order(model.labels)
        ]
        if names and len(names) < len(self._located.experts):
            warnings.warn(
                f"{listed(names)}: labels are numbers only (LABEL_0, …), which are taken to be {task.name}'s "
                f"({listed(task.labels or ())}), and nothing is measured that would show it; "
                f"models.experts.{names[0]}.labels=[...] says what they are",
                MergeWarning,
                stacklevel=4,
            )

    def _own_head(self) -> tuple[Head, tuple[str, ...]]:
        """Make the merged model's head from the experts', by their own labels; return it with these."""
        opened, names, policy = self._opened, self._opened.head_names, self.policy
        labels = [
            Labels(expert.label, expert.labels or model.labels)
            for expert, model in zip(self._located.experts, opened.experts, strict=True)
        ]
        for own, model in zip(labels, opened.experts, strict=True):
            if len(own.labels) != len(model.labels):
                raise ModelError(f"{own.name} has {len(model.labels)} labels, and {len(own.labels)} are given for it")
        if policy.startswith("expert:"):
            at = [expert.name for expert in self._located.experts].index(policy.removeprefix("expert:"))
            return read_head(opened.aligned.experts[at], names, None), labels[at].labels
        if policy == "per_task":
            raise ConfigError(
                f"models.head=per_task: the task {listed(task.name for task in self._tasks)} has no labels, and the "
                "experts have heads; models.head=average merges these by their own labels, models.head=expert:<name> "
                "keeps one"
            )
        if policy == "base":
            base, source = opened.base, opened.aligned.base
            if base is None or source is None or (lacking := sorted(set(names) - {*source.keys()})):
                raise ConfigError(f"models.head=base: the base has no {listed(lacking if base else names)}")
            return read_head(source, names, None), base.labels
        found = label_orders(labels)
        heads = [read_head(s, names, order) for s, order in zip(opened.aligned.experts, found.orders, strict=True)]
        return mean_head(heads, opened.dtype), found.labels


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """Return the keys of ``config.json`` that name a head's outputs, in their order."""
    return {
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
        "num_labels": len(labels),
    }
