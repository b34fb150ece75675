"""A trial belongs to the process that began its last attempt last."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from mergelab.sweep import leases
from mergelab.sweep.attempts import BEGUN, FORGIVEN, Superseded, attempting, has_begun, measured_by, tries
from mergelab.sweep.leases import Watch, renewing
from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import ATTEMPTS, RENEWED
from mergelab.tracking.processes import process_tags


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    study.ask()
    return storage


def trial(storage: optuna.storages.BaseStorage) -> FrozenTrial:
    return storage.get_trial(0)


def new_attempt(storage: optuna.storages.BaseStorage) -> None:
    storage.set_trial_user_attr(0, ATTEMPTS, int(trial(storage).user_attrs.get(ATTEMPTS, 0)) + 1)


def test_the_first_attempt_is_not_again_and_leaves_no_process_behind(storage: optuna.storages.BaseStorage) -> None:
    new_attempt(storage)
    assert not has_begun(trial(storage))
    with attempting(storage, 0, 1) as held:
        assert not held.again
        held.check()
        assert trial(storage).user_attrs[BEGUN]["by"] == process_tags()
    assert trial(storage).user_attrs[BEGUN]["by"] is None
    assert has_begun(trial(storage))
    assert tries(trial(storage)) == 1


def test_an_attempt_is_over_once_a_later_one_has_begun_and_cannot_begin_after_it(
    storage: optuna.storages.BaseStorage,
) -> None:
    with attempting(storage, 0, 1) as first:
        with attempting(storage, 0, 2) as second:
            assert second.again
            with pytest.raises(Superseded):
                first.check()
            second.check()
        assert trial(storage).user_attrs[BEGUN]["attempt"] == 2
    assert trial(storage).user_attrs[BEGUN]["attempt"] == 2  # the first leaves the second's mark alone
    with pytest.raises(Superseded), attempting(storage, 0, 1):
        pass


@pytest.mark.parametrize("url", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_what_another_process_has_written_is_seen(url: str, tmp_path: Path) -> None:
    own, other = (open_storage.__wrapped__(url.format(tmp_path)) for _ in range(2))
    study = optuna.create_study(storage=own)
    study.ask()
    trial_id = own.get_trial_id_from_study_id_trial_number(study._study_id, 0)
    other.get_all_trials(study._study_id)  # what is kept of it now is old then
    with attempting(own, trial_id, 1) as first, attempting(other, trial_id, 2) as second:
        with pytest.raises(Superseded):
            first.check()
        second.check()
        study.tell(0, 1.0)
        with pytest.raises(Superseded):
            second.check()


def test_a_job_that_the_launcher_starts_again_takes_the_trial_over_and_counts(
    storage: optuna.storages.BaseStorage,
) -> None:
    new_attempt(storage)
    with attempting(storage, 0, 1) as first, attempting(storage, 0, 1) as second:
        assert second.again
        with pytest.raises(Superseded):
            first.check()
    assert tries(trial(storage)) == 2


def test_a_trial_with_a_result_belongs_to_nobody(storage: optuna.storages.BaseStorage) -> None:
    with attempting(storage, 0, 1) as held:
        storage.set_trial_state_values(0, TrialState.COMPLETE, [1.0])
        with pytest.raises(Superseded):
            held.check()
    with pytest.raises(Superseded), attempting(storage, 0, 2):
        pass


def test_what_the_user_ended_does_not_count(storage: optuna.storages.BaseStorage) -> None:
    new_attempt(storage)
    with attempting(storage, 0, 1):
        pass
    storage.set_trial_user_attr(0, FORGIVEN, 1)
    assert tries(trial(storage)) == 0
    new_attempt(storage)
    assert tries(trial(storage)) == 0  # it has not begun: its models are being loaded
    with attempting(storage, 0, 2):
        assert tries(trial(storage)) == 1


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "GRACE_S", 1.0)


def marked(storage: optuna.storages.BaseStorage, process: subprocess.Popen[bytes], **changes: str) -> FrozenTrial:
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    place = {f"mergelab.{name}": value for name, value in changes.items()}
    tags = process_tags() | {"mergelab.pid": str(process.pid), "mergelab.process_start_ticks": ticks, **place}
    storage.set_trial_user_attr(0, BEGUN, {"attempt": 1, "count": 1, "by": tags})
    return trial(storage)


@pytest.mark.parametrize("changes", [{}, {"host": "another name in the same container"}], ids=["same", "renamed"])
def test_a_process_here_is_alive_as_long_as_its_number_is_its_own(
    storage: optuna.storages.BaseStorage, changes: Mapping[str, str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        found = marked(storage, other, **changes)
        assert measured_by(found, Watch(), {}) == str(other.pid)
        assert measured_by(found, Watch(), found.user_attrs[BEGUN]["by"]) is None  # known to be dead
        begun = found.user_attrs[BEGUN]
        earlier = begun["by"] | {"mergelab.process_start_ticks": "1"}
        storage.set_trial_user_attr(0, BEGUN, begun | {"by": earlier})
        assert measured_by(trial(storage), Watch(), {}) is None  # another process has the number now
        storage.set_trial_user_attr(0, BEGUN, begun | {"by": process_tags()})
        assert measured_by(trial(storage), Watch(), {}) is None  # a job of the sweeper's own process
        other.kill()
    storage.set_trial_user_attr(0, BEGUN, begun)
    assert measured_by(trial(storage), Watch(), {}) is None


@pytest.mark.parametrize("changes", [{"boot": "another machine"}, {"pid_namespace": "pid:[1]"}], ids=str)
@pytest.mark.parametrize("running", [True, False], ids=["number taken here", "number free here"])
def test_whether_a_process_elsewhere_lives_is_seen_by_its_lease_alone(
    storage: optuna.storages.BaseStorage, changes: Mapping[str, str], running: bool, soon: None
) -> None:
    watch = Watch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        marked(storage, other, **changes)
        if not running:
            other.kill()
            other.wait()
        with renewing(lambda count: storage.set_trial_user_attr(0, RENEWED, count)):
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                assert str(measured_by(trial(storage), watch, {})).startswith(f"{other.pid} on ")
                time.sleep(0.1)
        while measured_by(trial(storage), watch, {}):
            time.sleep(0.1)
        other.kill()


def test_a_process_renews_its_lease_while_it_measures_and_no_longer(
    storage: optuna.storages.BaseStorage, soon: None
) -> None:
    with attempting(storage, 0, 1):
        while (trial(storage).user_attrs.get(RENEWED) or [0, 0])[1] < 3:
            time.sleep(0.02)
    last = trial(storage).user_attrs[RENEWED]
    time.sleep(0.3)
    assert trial(storage).user_attrs[RENEWED] == last
