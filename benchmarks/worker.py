"""One contender in a process of its own; `benchmark.py` says when it runs and for how long.

Lines of JSON on standard input: the contender and its arguments, then numbers of seconds to run for. On standard
output: its FLOPs, when it is warm; for each number the images and the seconds; at the end the peak memory, and what a
step launches on a GPU.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.contender import count_launches
from benchmarks.kernels import group_norm, peak_convolution, peak_matmul, relu
from benchmarks.peers import diffusers_training
from benchmarks.processes import shared_training
from benchmarks.sampling import our_sampling, reference_sampling
from benchmarks.training import our_loading, our_training, reference_loading, reference_training
from modeling.runtime import peak_memory_bytes
from modeling.system.errors import errors_in_one_line

CONTENDERS = {
    "reference loading": reference_loading,
    "our loading": our_loading,
    "reference training": reference_training,
    "our training": our_training,
    "shared training": shared_training,
    "diffusers training": diffusers_training,
    "reference sampling": reference_sampling,
    "our sampling": our_sampling,
    "group norm": group_norm,
    "relu": relu,
    "peak matmul": peak_matmul,
    "peak convolution": peak_convolution,
}
WARM_UP_SECONDS = 5  # a contender whose step takes this long is not warmed up twice


def timed(run: Callable[[int], None], seconds: float) -> tuple[int, float]:
    """Runs for about this long, at least one step: the number of steps and the seconds they took."""
    start = time.perf_counter()
    run(1)
    one = time.perf_counter() - start
    num_steps = max(0, round(seconds / one) - 1)
    if num_steps:
        run(num_steps)
    return 1 + num_steps, time.perf_counter() - start


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Inside, this many other processes need a CPU each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    arguments = json.loads(sys.stdin.readline())
    num_busy = arguments.pop("num_busy", 0)
    with errors_in_one_line():
        contender = CONTENDERS[arguments.pop("name")](**arguments)
    if timed(contender.run, 0)[1] < WARM_UP_SECONDS:  # allocations, kernels chosen, compilation
        contender.run(1)
    print(json.dumps({"flops_per_image": contender.flops_per_image}), flush=True)
    for line in sys.stdin:
        with busy_processes(num_busy):
            num_steps, seconds = timed(contender.run, json.loads(line))
        print(json.dumps({"images": num_steps * contender.images_per_step, "seconds": seconds}), flush=True)
    print(json.dumps({"memory_bytes": peak_memory_bytes(), "launches": count_launches(contender.run)}), flush=True)
    contender.close()


if __name__ == "__main__":
    main()
