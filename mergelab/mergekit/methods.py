"""mergekit's methods with their parameters, and what they are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
Base = Literal["needed", "optional", "expert", "first"]


@dataclass(frozen=True)
class Setting:
    """A parameter of a method of mergekit.

    Attributes:
        theirs: mergekit's name.
        ours: the config key here.
        default: mergekit's; `REQUIRED` where there is none.
        by_expert: whether each model has its own.
        values: for a flag, what its two values are here: (false, true); None for numbers.
        none: whether no value means that nothing is done.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    by_expert: bool = False
    values: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Method:
    """A method of mergekit.

    Attributes:
        ours: the method's name here.
        settings: its parameters.
        base: "needed": task vectors from it; "optional"; "expert": it is a model as the others; "first": the first of
            two models, in whatever order they are listed.
        constants: what else is set here, for the same result.
        fewest, most: how many models besides a base.
    """

    ours: str
    settings: tuple[Setting, ...] = ()
    base: Base = "needed"
    constants: Mapping[str, Any] = field(default_factory=dict)
    fewest: int = 1
    most: int | None = None


_WEIGHT = Setting("weight", "weights", by_expert=True)
_LAMBDA = Setting("lambda", "lambda", 1.0)
_DENSITY = Setting("density", "density", 1.0, by_expert=True)
_GAMMA = Setting("gamma", "gamma", 0.01, by_expert=True)
_EPSILON = Setting("epsilon", "epsilon", 0.15, by_expert=True)
_VOTES = {"tie_break": "positive", "weights_stage": "elect"}


def _sum(normalize: bool = False) -> Setting:
    return Setting("normalize", "normalize", normalize, values=(False, True))


def _mean(normalize: bool) -> Setting:
    return Setting("normalize", "reduce", normalize, values=("sum", "mean"))


def _rescale(rescale: bool) -> Setting:
    return Setting("rescale", "rescale", rescale, values=(False, "magnitudes"))


METHODS: Mapping[str, Method] = {
    "linear": Method("soup", (_WEIGHT, _sum(True)), "expert"),
    "slerp": Method("slerp", (Setting("t", "t"),), "first", fewest=2, most=2),
    "task_arithmetic": Method("task_arithmetic", (_WEIGHT, _LAMBDA, _sum())),
    "ties": Method("ties", (_WEIGHT, _DENSITY, _LAMBDA, _mean(True)), constants={"scope": "tensor", **_VOTES}),
    "dare_ties": Method("dare_ties", (_WEIGHT, _DENSITY, _LAMBDA, _mean(False), _rescale(True)), constants=_VOTES),
    "dare_linear": Method("dare", (_WEIGHT, _DENSITY, _LAMBDA, _sum(), _rescale(True))),
    "breadcrumbs": Method("breadcrumbs", (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _sum()), constants={"scope": "tensor"}),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties",
        (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _mean(False)),
        constants={"scope": "tensor", **_VOTES},
    ),
    "della": Method("della", (_WEIGHT, _DENSITY, _EPSILON, _LAMBDA, _mean(True), _rescale(True)), constants=_VOTES),
    "della_linear": Method("della_linear", (_WEIGHT, _DENSITY, _EPSILON, _LAMBDA, _sum(), _rescale(True))),
    "model_stock": Method(
        "model_stock",
        (Setting("filter_wise", "scope", False, values=("tensor", "row")),),
        constants={"clamp": False},
        fewest=2,
    ),
    "nuslerp": Method(
        "nuslerp",
        (
            _WEIGHT,
            Setting("nuslerp_row_wise", "row_wise", False, values=(True, False)),  # its code has the axes exchanged
            Setting("nuslerp_flatten", "flatten", True, values=(False, True)),
        ),
        "optional",
        fewest=2,
        most=2,
    ),
    "multislerp": Method(
        "multislerp",
        (_WEIGHT, Setting("normalize_weights", "normalize", True, values=(False, True)), Setting("eps", "eps", 1e-8)),
        "optional",
    ),
    "karcher": Method(
        "karcher", (Setting("max_iter", "max_iterations", 10), Setting("tol", "tolerance", 1e-5)), "expert"
    ),
    "sce": Method("sce", (Setting("select_topk", "select_topk", 1.0),)),
    "nearswap": Method("nearswap", (Setting("t", "t"),), most=1),
    "arcee_fusion": Method("arcee_fusion", most=1),
    "ram": Method("ram", (Setting("epsilon", "epsilon", 1e-5),)),
    "ramplus_tl": Method(
        "ram_plus",
        (Setting("epsilon", "epsilon", 1e-5), Setting("r", "r", 0.1), Setting("alpha", "alpha", 0.2)),
        constants={"scope": "tensor"},
    ),
    "passthrough": Method("passthrough", (Setting("scale", "scale", None, by_expert=True),), "expert", most=1),
}

# passthrough where modules are of different models: each has the weight 0 in the others' modules.
BY_WEIGHTS = Method("soup", (Setting("scale", "weights", 1.0, by_expert=True),), "expert", {"normalize": False})

# Parameters that a method of mergekit has and that change nothing at their defaults, which alone can be had here.
ONLY_DEFAULT: Mapping[str, Mapping[str, Any]] = {
    "ties": {"rescale": False},
    "breadcrumbs": {"rescale": False},
    "breadcrumbs_ties": {"rescale": False},
}
# Parameters that change nothing in a method whatever they are.
WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {"task_arithmetic": ("density", "rescale")}


def known_parameters() -> dict[str, list[str]]:
    """Return the parameters of each method of mergekit."""
    return {
        name: [
            *(setting.theirs for setting in method.settings),
            *ONLY_DEFAULT.get(name, ()),
            *WITHOUT_EFFECT.get(name, ()),
        ]
        for name, method in METHODS.items()
    }
