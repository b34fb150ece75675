"""Whatever is typed, it ends in a plan of an experiment or in one line; nothing is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergelab.cli.ambiguous import check_flags, refuse_ambiguous
from mergelab.cli.command import line_of
from mergelab.cli.overrides import in_jobs
from mergelab.cli.quoting import as_text
from mergelab.config import CONF_DIR
from mergelab.errors import LONGEST_LINE, ConfigError, one_line
from mergelab.experiment.plan import Plan, plan_experiment

MANY = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(autouse=True)
def _hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield
    assert not list(tmp_path.iterdir())


def planned(*overrides: str) -> Plan | None:
    """Plan what the overrides ask for; None where one line refuses it."""
    try:
        quoted = as_text(overrides)
        check_flags(quoted)
        refuse_ambiguous(quoted, multirun=False)
        return plan_experiment(compose("config", quoted))
    except Exception as error:
        line = line_of(error)
        if line is None:
            raise
        assert line.strip()
        assert one_line(line).isprintable()
        assert len(one_line(line)) <= LONGEST_LINE
        return None


KEYS = st.sampled_from(
    """method task models eval save tracking sweep experiment method.density method.lambda method.scope method.weights
    models.base models.experts models.experts.howey models.experts.howey.weight models.experts.new models.head
    models.vocab models.leave_out models.passthrough task.limit task.data_dir task.splits task.labels task.metrics
    eval.bootstrap eval.max_length eval.protocol save.dtype save.max_shard_size save.tokenizer tracking.uri seed device
    source evaluate output method. .x x hydra.run.dir hydra/launcher""".split()  # noqa: SIM905
)
SCALARS = st.sampled_from(
    """null true 0 -1 1 1.5 nan inf -inf 1e12 1e400 99999999999999999999999 '' '?' a ~nobody/x ../x /proc/x /dev/null
    ${seed} ${nope} ${oc.env:NO_SUCH} ??? é 🤖 a\\,b 5GB 0kB org/name org/name@ cuda:99 expert:howey union""".split()  # noqa: SIM905
) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(["a", "howey", "reference", "weight", "encoder"]), inner), max_size=3).map(
            lambda items: "{" + ",".join(f"{key}: {value}" for key, value in items) + "}"
        )
    ),
    max_leaves=4,
)
OVERRIDES = st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), KEYS, VALUES).map("{0[0]}{0[1]}={0[2]}".format)


@settings(MANY, max_examples=100)
@given(overrides=st.lists(OVERRIDES | st.text(max_size=12), min_size=1, max_size=2))
def test_overrides_end_in_a_plan_or_in_one_line(overrides: list[str]) -> None:
    planned(*overrides)


@settings(MANY, max_examples=300)
@given(arguments=st.lists(OVERRIDES | st.text(max_size=20), max_size=3), multirun=st.booleans())
def test_what_reads_overrides_before_hydra_raises_nothing_else(arguments: list[str], multirun: bool) -> None:
    try:
        quoted = as_text(arguments)
        refuse_ambiguous(quoted, multirun=multirun)
        in_jobs(quoted)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.experts={x: a/b, x: c/d}", "models.experts: x is there twice"),
        ("models.experts={x: {reference: a/b, weight: 1, weight: 2}}", "models.experts: weight is there twice"),
        ("models.experts={x: {reference: a/b}, y: c/d, x: e/f}", "models.experts: x is there twice"),
        ("method.density={howey: 0.1, howey: 0.2}", "method.density: howey is there twice"),
        ("method=[ties,dare]", "-m method=ties,dare"),
        ("task=[rte,mrpc]", "-m task=rte,mrpc"),
        ("method=null", "method=null: must be the name of an option"),
        ("models=3", "models=3: must be the name of an option"),
        ("eval=null", "eval=null: must be the name of an option (there are standard)"),
        ("output='~nobody_of_that_name/x'", "output=~nobody_of_that_name/x: there is no user of that name"),
        ("eval.bootstrap=1000000000000", "eval.bootstrap=1000000000000: must be at most 1000000"),
        ("eval.bootstrap=1e12", "eval.bootstrap="),
        ("seed=99999999999999999999999", "seed=99999999999999999999999: must be less than"),
        ("save.max_shard_size=0kB", "save.max_shard_size='0kB': must be above 0"),
        (f"save.max_shard_size={'9' * 400}TB", "save.max_shard_size="),
        (f"output={'a' * 250}", "File name too long"),
        ("models.experts.howey.task=rtee", "models.experts.howey.task=rtee: no such task; did you mean 'rte'?"),
        ("method.density=" + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("--flag", "unrecognized arguments: --flag"),
    ],
)
def test_the_line_says_what_is_wrong(override: str, said: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011, PT012
        check_flags([override])
        refuse_ambiguous([override], multirun=False)
        plan_experiment(compose("config", [override]))
    assert said in str(line_of(caught.value))


def test_jobs_of_a_grid_have_a_folder_each() -> None:
    with pytest.raises(ConfigError, match=r"output=o: all jobs of method=ties,dare would write into one folder"):
        refuse_ambiguous(["method=ties,dare", "output=o"], multirun=True)
    refuse_ambiguous(["method=ties,dare", "output=o/${hydra:job.num}"], multirun=True)
    refuse_ambiguous(["method=ties", "output=a,b"], multirun=True)
    refuse_ambiguous(["sweep=ties", "method.density=interval(0,1)", "output=o"], multirun=True)
