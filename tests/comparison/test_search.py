"""The search: what is drawn, which trials continue, and what a killed process leaves to the next."""

from typing import Any

import pytest

from modeling.config import parse
from modeling.options import SearchConfig
from modeling.system.errors import UserError
from modeling.system.files import LockedError
from modeling.system.reading import read_yaml
from tests.helpers import ROOT

pytest.importorskip("optuna")

from optuna.trial import TrialState

from modeling.comparison.search import Search


def search(folder, **changes) -> Search:
    values = read_yaml(ROOT / "conf" / "search.yaml", dict[str, Any])
    del values["defaults"]
    return Search(parse(values | {"out": str(folder)} | changes, SearchConfig))


def drawn(found: Search, loss: float | None = None) -> dict:
    """Draws a trial as `run` does; with a loss it is stopped at step 200."""
    found.seed_sampler()
    trial = found.study.ask()
    found.suggest(trial)
    if loss is not None:
        trial.report(loss, 200)
        found.study.tell(trial, state=TrialState.PRUNED)
    return trial.params


def test_a_search_started_again_does_not_repeat_its_draws_and_draws_as_the_unbroken_one(tmp_path):
    unbroken = search(tmp_path / "a")
    expected = [drawn(unbroken, loss=1.0) for _ in range(4)]
    assert len({str(params) for params in expected}) == 4
    assert [drawn(search(tmp_path / "b"), loss=1.0) for _ in range(4)] == expected


def test_a_trial_that_was_running_when_its_search_was_killed_is_taken_up_with_its_values(tmp_path):
    params = drawn(search(tmp_path))
    again = search(tmp_path)
    assert [trial.state for trial in again.study.get_trials()] == [TrialState.RUNNING]  # perhaps of a living process
    again.take_up_killed()
    assert [trial.state for trial in again.study.get_trials()] == [TrialState.FAIL, TrialState.WAITING]
    assert drawn(again) == params


def test_a_stopped_trial_is_back_in_play_once_enough_others_are_worse(tmp_path):
    found = search(tmp_path)
    drawn(found, loss=1.0)
    assert found.back_in_play(found.study.get_trials()) is not None  # the only one
    second = drawn(found, loss=0.5)
    for loss in (2.0, 3.0):
        back = found.back_in_play(found.study.get_trials())
        assert back is not None
        assert back.params == second
        drawn(found, loss)
    assert found.is_in_play(found.folder(found.study.get_trials()[0].params), 200, found.study.get_trials())
    assert not found.is_in_play(found.folder(found.study.get_trials()[2].params), 200, found.study.get_trials())


def test_a_trial_that_cannot_begin_ends_the_search_and_is_tried_again_by_the_next(tmp_path):
    message = r"trial 0 failed before its first step: .* holds no prepared data: run .*\.log\)"
    with pytest.raises(UserError, match=message):
        search(tmp_path, overrides=f"dataset.root={tmp_path}").run()
    again = search(tmp_path, overrides=f"dataset.root={tmp_path}")
    again.take_up_killed()
    first, waiting = again.study.get_trials()
    assert (first.state, waiting.state) == (TrialState.FAIL, TrialState.WAITING)
    assert waiting.system_attrs["fixed_params"] == first.params


def test_a_second_process_in_the_folder_leaves_the_first_one_s_trials_alone(tmp_path, monkeypatch):
    def refuse(path):
        raise LockedError("process 1 is working there")

    first = search(tmp_path)
    drawn(first)
    monkeypatch.setattr("modeling.comparison.search.locked", refuse)
    with pytest.raises(LockedError):
        search(tmp_path).run()
    assert [trial.state for trial in first.study.get_trials()] == [TrialState.RUNNING]


def test_a_folder_with_another_search_is_rejected(tmp_path):
    search(tmp_path)
    search(tmp_path, num_trials=40)
    with pytest.raises(UserError, match="holds a search with other values"):
        search(tmp_path, keep=0.25)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.lrr": [1]}, r"optimizer\.lrr: unknown key; the nearest known one is optimizer\.lr"),
        ({"optimizer.lr": []}, r"optimizer\.lr: expected at least one choice"),
        ({"optimizer.lr": {"low": 1, "high": 0}}, "low must be below high"),
        ({"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "above 0 with log"),
    ],
)
def test_a_wrong_space_is_rejected(tmp_path, space, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path, space=space)
