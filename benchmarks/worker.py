"""One contender in a process of its own, told by `benchmark.py` when to run and for how long.

    python -m benchmarks.worker '{"name": "our training", "overrides": [...], ...}'

Lines on standard input: a number of seconds. Lines on standard output: JSON; first the contender's FLOPs, then for each
number what was done, at the end the peak memory.
"""

import json
import sys
import time

from benchmarks.contenders import CONTENDERS
from modeling.config import ConfigError
from modeling.run_folder import RunError
from modeling.runtime import peak_memory_bytes


def timed(run, seconds: float) -> tuple[int, float]:
    """Runs for about so long, at least one step; the steps done and the seconds they took."""
    start = time.perf_counter()
    run(1)
    one = time.perf_counter() - start
    num_steps = max(0, round(seconds / one) - 1)
    if num_steps:
        run(num_steps)
    return 1 + num_steps, time.perf_counter() - start


def main(arguments: dict) -> None:
    try:
        contender = CONTENDERS[arguments.pop("name")](**arguments)
    except (ConfigError, RunError) as error:
        sys.exit(str(error))
    contender.run(1)  # allocations, kernels chosen, compilation
    contender.run(1)
    print(json.dumps({"flops_per_image": contender.flops_per_image}), flush=True)
    for line in sys.stdin:
        num_steps, seconds = timed(contender.run, float(line))
        print(json.dumps({"images": num_steps * contender.images_per_step, "seconds": seconds}), flush=True)
    print(json.dumps({"memory_bytes": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
