"""What a merge method is, and how a function becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mergelab.engine.parameters import INJECTED, Parameters, parameters_of
from mergelab.weights.align import AlignedModels

F = TypeVar("F", bound=Callable[..., Any])


Kind = Literal["tensor", "list", "model", "models"]


MISSING = "???"


@dataclass(frozen=True)
class MergeMethod:
    """What is known about a method before any weight is read.

    Attributes:
        name: its name in configs; a dotted path for a user's own function.
        function: what computes one tensor (or, for kind "model", a whole state dict).
        parameters: the pydantic model of its parameters.
        kind: "tensor": called with ``base`` and ``experts``; "list": with one list of tensors; "model": with one list
            of state dicts; "models": called once with ``models``, it returns a `Substitute`.
        injected: names of the arguments that the engine supplies.
        needs_base: whether there must be a base model.
        returns_task_vector: the function returns a merged task vector, and the engine adds it to the base, times the
            parameter ``lambda`` where there is one; otherwise the function returns the merged tensor.
        needs: what else there must be: "data" (the experts' training examples), "gradients" (of the experts' models),
            "selection" (scores on the examples that select).
        one_model_per_expert: it makes one merged model for each expert, for that expert's task; the function takes
            ``output``, the expert's index, and is called once for each.
        min_experts: fewest experts it merges.
        max_experts: most experts it merges; None for no limit.
        elementwise: an entry of the result depends on the same entry of the inputs alone (and on ``prepared``), so that
            the engine may call the function with parts of a tensor, flattened.
        prepare: called once with ``models``, ``first`` (the expert given first, by name), ``seed`` and any of the
            function's parameters that it names, before the first tensor; its result is the function's ``prepared``. A
            method that draws random numbers can name ``site_of``, which returns a tensor's `Site` with the keys for
            them; one that needs data, ``examples``.
        check: called with ``models`` and any of the function's parameters that it names, one number per expert where
            there may be several, before a tensor is read; reads none, and raises ConfigError. What a parameter's type
            can check is not its business: what weights a method can take is declared by their type
            (`mergelab.ops.expert_values`).
        unsupported_for_generation: called with any parameters it names; returns why models that generate text cannot
            be merged with them, None where they can.
        coefficients: called with ``count``, the number of experts, and any of the function's parameters that it names;
            returns a c_t for each expert with which the result is θ0 + λ·Σ c_t τ_t whatever the base θ0 is; None where
            the parameters make it no such sum. What LoRA adapters add up to is then computed from their factors.
        session: called with ``compiling``, as `mergelab.engine.warm_session.MergeSession` takes it; makes what merges
            there again and again in fewer passes than ``prepare`` and the function do, to the same result.
        order_matters: permuting the experts may change the result; otherwise the engine orders them by their values, so
            that it cannot, not even in the last bit.
        identical_at: parameters with which T identical experts give that expert; None where there are none.
        keeps_models: of kind "models": the `Substitute` has the models that it was given, so that other methods can be
            chained to what it makes of them.
        custom: a user's own function: it gets float32 copies, and its errors are the user's to mend.
        family: heading in the catalogue.
        work: what takes longer than going through the models, such as a decomposition of every matrix.
        paper: authors, year and arXiv id.
        authors: by parameter, the values of the authors' code where the default is another; ``method.preset=authors``.
        tuned: parameters that the authors choose on validation data.
        use: one sentence on when to use it, for the catalogue.
    """

    name: str
    function: Callable[..., Any]
    parameters: type[Parameters]
    kind: Kind = "tensor"
    injected: frozenset[str] = frozenset()
    needs_base: bool = False
    returns_task_vector: bool = False
    needs: frozenset[str] = frozenset()
    one_model_per_expert: bool = False
    min_experts: int = 1
    max_experts: int | None = None
    elementwise: bool = False
    prepare: Callable[..., Any] | None = None
    check: Callable[..., None] | None = None
    unsupported_for_generation: Callable[..., str | None] | None = None
    coefficients: Callable[..., Sequence[float] | None] | None = None
    session: Callable[[bool], Any] | None = None
    order_matters: bool = False
    identical_at: Mapping[str, Any] | None = field(default_factory=dict)
    keeps_models: bool = False
    custom: bool = False
    family: str = ""
    work: str = ""
    paper: str = ""
    authors: Mapping[str, Any] = field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    use: str = ""

    @property
    def documentation(self) -> str:
        """The function's docstring, then those of the dataclasses whose fields are its parameters."""
        described = (self.function, *self.parameters.groups.values())
        return "\n\n".join(inspect.cleandoc(each.__doc__) for each in described if each.__doc__)

    @property
    def takes_adapters(self) -> bool:
        """Whether it combines the factors of experts that are LoRA adapters, instead of weights."""
        return "adapters" in self.injected

    @property
    def takes_weights(self) -> bool:
        """Whether the experts can be weighted."""
        return "weights" in self.parameters.model_fields


@dataclass(frozen=True)
class Substitute:
    """What is merged in the place of the models that a method of kind "models" was given, and how.

    Attributes:
        method: another method.
        parameters: its parameters.
        models: as many experts as were given, in their order.
    """

    method: MergeMethod
    parameters: Parameters
    models: AlignedModels


def merge_method(
    *,
    needs_base: bool = False,
    needs: Sequence[Literal["data", "gradients", "selection"]] = (),
    lambda_: float | None = None,
    experts: tuple[int, int | None] = (1, None),
    elementwise: bool = False,
    prepare: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    unsupported_for_generation: Callable[..., str | None] | None = None,
    coefficients: Callable[..., Sequence[float] | None] | None = None,
    session: Callable[[bool], Any] | None = None,
    order_matters: bool = False,
    identical_at: Mapping[str, Any] | None = None,
    keeps_models: bool = False,
    family: str = "",
    work: str = "",
    paper: str = "",
    authors: Mapping[str, Any] | None = None,
    tuned: Sequence[str] = (),
    use: str = "",
) -> Callable[[F], F]:
    """Declare a function to be a merge method; it comes back unchanged, with a `MergeMethod` as ``.merge_method``.

    The function takes ``base`` and/or ``experts`` (tensors of one shape; parts of them, flattened and in float32 or
    float64, when ``elementwise``, else whole tensors in their stored dtypes), ``site`` and ``prepared`` if it names
    them, and its parameters by keyword. It returns a tensor of the inputs' shape in the dtype it computed in: the
    engine rounds it once to the stored dtype. It must not write into its inputs. A parameter without default that is
    annotated with a dataclass (`mergelab.ops.sign_consensus.SignConsensus`) stands for the dataclass's fields: they are
    what configs set, and the function, ``prepare`` and ``check`` get the object.

    A function that takes ``vectors``, the experts' task vectors τ_t = θ_t − θ0 in float32 or float64, returns the
    merged task vector τ_m, and the result is θ0 + λ·τ_m, with λ the parameter ``lambda``, whose default is ``lambda_``
    (None: there is no such parameter, and λ is 1). It may write into the vectors, which are overwritten later.
    Where ``elementwise`` it may take the `mergelab.ops.workspace.Workspace` that they lie in as ``workspace``, and work
    in it.
    In a session, a change of λ alone costs one scaled addition.

    A function that takes ``adapters`` combines the factors of experts that are LoRA adapters, of equal ranks in each
    layer: for each expert a `mergelab.adapters.changes.LowRank`, or None where it does not adapt the layer. It is
    called for the layers that some expert adapts, and returns A (r, inputs) and B (outputs, r); the result is θ0 + B·A,
    or an adapter with these factors.

    A function that takes ``models`` (and ``seed``) works on all of them before another method merges: it returns a
    `Substitute`, once, before the first tensor.

    The other arguments here are described at `MergeMethod`.
    """

    def declare(function: F) -> F:
        names = set(inspect.signature(function).parameters)
        if not names & {"base", "experts", "vectors", "adapters", "models"}:
            raise TypeError(f"{function.__name__} takes neither base nor experts nor vectors nor adapters nor models")
        whole = "models" in names
        supplied = (*INJECTED, "workspace") if elementwise and "vectors" in names else INJECTED
        if lambda_ is not None and "vectors" not in names:
            raise TypeError(f"{function.__name__}: lambda_ is for functions that take vectors")
        function.merge_method = MergeMethod(  # type: ignore[attr-defined]
            name=function.__name__,
            function=function,
            parameters=parameters_of(
                function, (*INJECTED, "models", "seed", "examples") if whole else supplied, lambda_=lambda_
            ),
            kind="models" if whole else "tensor",
            injected=frozenset(names & set(supplied)),
            needs_base=needs_base or bool(names & {"vectors", "adapters"}),
            returns_task_vector=bool(names & {"vectors", "adapters"}),
            needs=frozenset(needs),
            one_model_per_expert="output" in names,
            min_experts=experts[0],
            max_experts=experts[1],
            elementwise=elementwise,
            prepare=prepare,
            check=check,
            unsupported_for_generation=unsupported_for_generation,
            coefficients=coefficients,
            session=session,
            order_matters=order_matters,
            identical_at=identical_at,
            keeps_models=keeps_models,
            family=family,
            work=work,
            paper=paper,
            authors=dict(authors or {}),
            tuned=tuple(tuned),
            use=use,
        )
        return function

    return declare


def call_with(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Call ``function`` with those of the available arguments that it names."""
    return function(**{name: available[name] for name in inspect.signature(function).parameters if name in available})
