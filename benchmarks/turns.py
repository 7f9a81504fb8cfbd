"""Contenders that take turns, each in a process of its own."""

import contextlib
import json
import os
import statistics
import subprocess
import sys

import torch

from modeling.system.errors import UserError

_ROOM_BYTES = 40e9  # of a GPU that holds all contenders of a table at once


class Worker:
    """A contender's process."""

    def __init__(self, label: str, case: dict):
        self.label, self.case = label, case
        self.rates: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            env=os.environ | case.get("environment", {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout

    def read(self) -> dict:
        line = self.answers.readline()
        if not line:
            raise UserError(f"{self.label}: ended with {self.process.wait()} (-9: out of memory)")
        return json.loads(line)

    def ask(self, question: object) -> dict:
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read, either
            self.questions.write(f"{json.dumps(question)}\n")
            self.questions.flush()
        return self.read()

    def take_turn(self, seconds: float) -> None:
        done = self.ask(seconds)
        self.rates.append(done["images"] / done["seconds"])

    def finish(self) -> dict:
        self.questions.close()
        found = self.read()
        self.process.wait()
        return found


def measure(title: str, cases: dict[str, dict], rounds: int, seconds: float) -> list[dict]:
    """Runs the cases in turns; one after the other where a GPU has no room for all of them.

    Args:
        title: for the progress on standard error.
        cases: label -> the contender's name and arguments, for `benchmarks.worker`.
        rounds: turns that each takes.
        seconds: length of a turn; at least one step is done.

    Returns:
        A row for each: label, images_per_second (median), lowest, highest, gflops (a second), memory_bytes, launches.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < _ROOM_BYTES:
        return [row for label in cases for row in _take_turns(title, {label: cases[label]}, rounds, seconds)]
    return _take_turns(title, cases, rounds, seconds)


def _take_turns(title: str, cases: dict[str, dict], rounds: int, seconds: float) -> list[dict]:
    workers, flops = [], []
    try:
        workers += [Worker(label, case) for label, case in cases.items()]
        for worker in workers:  # one after the other: each needs all cores to warm up
            print(f"{title}: warming up {worker.label}", file=sys.stderr, flush=True)
            question = {key: value for key, value in worker.case.items() if key != "environment"}
            flops.append(worker.ask(question)["flops_per_image"])
        for number in range(rounds):
            print(f"{title}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for worker in workers:
                worker.take_turn(seconds)
        endings = [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
    return [
        {
            "label": worker.label,
            "case": worker.case,
            "images_per_second": statistics.median(worker.rates),
            "lowest": min(worker.rates),
            "highest": max(worker.rates),
            "gflops": statistics.median(worker.rates) * per_image / 1e9,
            **ending,
        }
        for worker, per_image, ending in zip(workers, flops, endings, strict=True)
    ]
