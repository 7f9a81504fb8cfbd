"""Work that two real processes share, forked from this one: who computes what, who writes it, and how an error ends."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable

import pytest
import torch
from torch import distributed

from modeling.distributed import agreement
from modeling.distributed.processes import ALONE, Processes
from modeling.measures.resumable import draw_in_parts
from modeling.system.errors import Failed, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12


@pytest.fixture
def in_two_processes(tmp_path):
    """Calls a function of `Processes` in two of them; returns what each returned, or the error that ended it."""
    context = multiprocessing.get_context("fork")

    def run(work: Callable[[Processes], object]) -> list:
        results, store = context.Queue(), tmp_path / f"store{len(list(tmp_path.iterdir()))}"

        def process(rank: int) -> None:
            rendezvous = distributed.FileStore(str(store), 2)
            distributed.init_process_group("gloo", store=rendezvous, rank=rank, world_size=2)
            processes = Processes(rank, 2, rendezvous)
            try:
                with processes.ending_together():
                    result = work(processes)
            except (UserError, SystemExit) as error:
                result = type(error)
            results.put((rank, result))
            distributed.destroy_process_group()

        children = [context.Process(target=process, args=(rank,)) for rank in range(2)]
        for child in children:
            child.start()
        found = dict(results.get(timeout=20) for _ in children)
        for child in children:
            child.join()
        return [found[0], found[1]]

    return run


def test_items_go_round_and_every_process_gets_all_results_in_order(in_two_processes):
    def work(processes: Processes) -> list:
        found = list(processes.map(lambda item: (item, processes.rank, torch.tensor(item)), range(5)))
        return [*[(item, rank) for item, rank, value in found if item == value], processes.once(lambda: processes.rank)]

    expected = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), 0]
    assert in_two_processes(work) == [expected, expected]


def test_parts_are_those_of_one_process_and_the_first_alone_writes_them(in_two_processes, tmp_path):
    def draw(folder, processes: Processes = ALONE) -> list[int]:
        drawn = []

        def rows(start: int, count: int) -> torch.Tensor:
            drawn.append(start)
            return torch.arange(start, start + count)[:, None]

        whole = draw_in_parts(tmp_path / folder, {"seed": 1}, 11, 2, rows, processes=processes)
        assert whole.flatten().tolist() == list(range(11))
        return drawn

    assert draw("one") == [0, 2, 4, 6, 8, 10]
    assert in_two_processes(lambda processes: draw("two", processes)) == [[0, 4, 8], [2, 6, 10]]
    content = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.npy")} for name in ("one", "two")]
    assert content[0] == content[1]
    for number in (6, 8, 10):
        (tmp_path / "two" / f"{number:09d}.npy").unlink()
    assert in_two_processes(lambda processes: draw("two", processes)) == [[6, 10], [8]]
    (tmp_path / "two" / f"{2:09d}.npy").unlink()
    assert in_two_processes(lambda processes: draw("two", processes)) == [UserError, Failed]


def test_an_error_of_one_process_ends_the_other(in_two_processes):
    def work(processes: Processes) -> list:
        def compute(item: int) -> int:
            if item == 3:
                raise UserError("broken")
            return item

        return list(processes.map(compute, range(100)))

    assert in_two_processes(work) == [Failed, UserError]


def test_processes_that_see_other_values_end_with_an_error(in_two_processes):
    def work(processes: Processes) -> str:
        processes.check_same("a", 5)
        processes.check_same("b", processes.rank)
        return "done"

    assert in_two_processes(work) == [Failed, UserError]


@pytest.mark.parametrize("how", ["announce_pause", "hold", None])
def test_a_process_may_take_longer_than_a_step_if_it_has_said_so(in_two_processes, monkeypatch, how):
    monkeypatch.setattr(agreement, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(agreement, "NUM_WAITS", 10)
    monkeypatch.setattr(agreement, "SAY_SECONDS", 1)

    def work(processes: Processes) -> str:
        processes.agree()
        if processes.rank == 0 and how:
            getattr(processes, how)()
        processes.agree()
        if processes.rank == 0:
            time.sleep(2)
        processes.agree()
        return "done"

    found = in_two_processes(work)
    assert found == ["done", "done"] if how else UserError in found and "done" not in found


@pytest.mark.parametrize("is_alive", [True, False])
def test_in_a_pause_a_process_must_give_signs_of_life(in_two_processes, monkeypatch, is_alive):
    monkeypatch.setattr(agreement, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(agreement, "NUM_WAITS", 3)
    monkeypatch.setattr(agreement, "NUM_SILENT_WAITS", 10)
    monkeypatch.setattr(agreement, "SAY_SECONDS", 1)

    def work(processes: Processes) -> str:
        with processes.showing_life() if processes.rank == 0 or is_alive else contextlib.nullcontext():
            processes.agree()
            processes.expect_pause()
            if processes.rank:
                time.sleep(3)
            processes.agree()
        return "done"

    found = in_two_processes(work)
    assert found == ["done", "done"] if is_alive else found[0] is UserError and found[1] in (UserError, Failed)
