"""What several tests share: paths, tiny runs, oracles, injected faults."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modeling.checkpoint import load_checkpoint
from modeling.diffusion import DiffusionModel
from modeling.sections import Dataset
from modeling.unet import UnetModel

ROOT = Path(__file__).parent.parent

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")

# A run that takes a second: 8 steps of a small network.
TINY = [
    "dataset=shapes",
    "dataset.num_images=64",
    "model.hidden_size=8",
    "model.multipliers=[1,2]",
    "diffusion.num_timesteps=20",
    "train.batch_size=16",
    "train.num_epochs=2",
    "train.log_every=3",
    "train.checkpoint_every=5",
    "train.num_samples=4",
    "train.sample_steps=5",
    "train.num_eval_images=40",
    "wandb.mode=disabled",
]


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def equal(first, second) -> bool:
    """Whether two nested structures of tensors and plain values are the same to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def ended_after(function, count: int, error: type[BaseException]):
    """The function, which raises an error instead of its call number `count`, from 0."""
    calls = iter(range(count))

    def call(*args, **options):
        if next(calls, None) is None:
            raise error
        return function(*args, **options)

    return call


# ---- models with known answers

BETAS, T = (1e-4, 0.02), 1000


class Lambda(nn.Module):
    """An eps model that is a function of (x_t, t)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


def zero_model(betas=BETAS, num_timesteps=T) -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.zeros_like(x)), betas, num_timesteps)


def numpy_tables(betas, num_timesteps):
    """beta, alpha, abar in float64, indexed by timestep; index 0 is clean data."""
    beta = np.concatenate([[0.0], np.linspace(betas[0], betas[1], num_timesteps)])
    return beta, 1 - beta, np.cumprod(1 - beta)


def gaussian_oracle(data_std: float, betas=BETAS, num_timesteps=T) -> DiffusionModel:
    """For data N(0, s^2) the best prediction of eps given x_t is sqrt(1 - abar) x_t / (abar s^2 + 1 - abar)."""
    abar = torch.from_numpy(numpy_tables(betas, num_timesteps)[2])

    def best_eps(x, t):
        a = abar.to(t.device)[(t * num_timesteps).round().long()].reshape(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * x / (a * data_std**2 + 1 - a)

    return DiffusionModel(Lambda(best_eps), betas, num_timesteps)


# ---- training


def small_model(num_timesteps=20) -> DiffusionModel:
    torch.manual_seed(1)
    return DiffusionModel(UnetModel(3, 3, hidden_size=8), (1e-4, 0.02), num_timesteps)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# ---- runs

MACHINE_DEPENDENT = {"seconds", "images_per_second", "memory_bytes"}


def result(folder: Path) -> dict:
    """What a run writes, without the values that depend on the speed of the machine."""
    content: dict = {**load_checkpoint(folder / "checkpoints" / "last.pt")}
    del content["config"], content["about"], content["state"]["seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": content,
        "lines": [{key: value for key, value in line.items() if key not in MACHINE_DEPENDENT} for line in lines],
        "weights": (folder / "model.safetensors").read_bytes()[-1000:],
        "samples": {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("samples/*/*.png"))
        },
    }


def train(config, folder: str) -> dict:
    import main

    config.runtime.output_dir = folder
    main.main(config)
    return result(Path(folder))


# ---- scripts in processes of their own


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment of a user's machine: bytecode is written, and no outer DVC, coverage or W&B is visible."""
    hidden = ("DVC_", "COV_", "WANDB_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)} | variables


def start_script(script: str | Path, *overrides: str, **popen_options) -> subprocess.Popen[str]:
    """Starts a script (its path from the repository's root), with output and errors in one pipe, on one thread."""
    options = {"env": clean_environment(OMP_NUM_THREADS="1"), "text": True, "errors": "replace"} | popen_options
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def run_script(
    script: str | Path, *overrides: str, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script (its path from the repository's root) to its end, with `env` added to a clean environment."""
    command, environment = [sys.executable, str(ROOT / script), *overrides], clean_environment(**(env or {}))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def ends_in_error(capsys, message: str) -> Iterator[None]:
    """Inside, a script's `main` must end with exit code 1 and an error that `message` (a pattern) is found in."""
    with pytest.raises(SystemExit) as ended:
        yield
    assert ended.value.code == 1
    assert re.search(message, errors := capsys.readouterr().err), errors


# ---- configurations


def dataset(name: str, root: Path, **values: object) -> Dataset:
    """The section `dataset` of a configuration; keys that are not given are null."""
    return Dataset.model_validate(dict.fromkeys(Dataset.model_fields) | {"name": name, "root": str(root)} | values)


def leaves(section: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in section.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def changed(value):
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value * 2 or 8
        case float():
            return value / 2 or 0.5
        case str():
            return value + "x"
        case list():
            return [*value, *(value or [16])]
    return 3


# ---- faults


def inject(monkeypatch, call: str, code: str) -> None:
    """Makes this system call fail as a full or broken disk would."""

    def fail(*args, **kwargs):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    opened = Path.open

    def open_new(path, mode="r", **options):
        if mode == "xb" and call == "open":
            fail()
        file = opened(path, mode, **options)
        if mode == "xb":
            file.write = fail
        return file

    if call in ("open", "write"):
        monkeypatch.setattr(Path, "open", open_new)
    else:
        monkeypatch.setattr(f"os.{call}", fail)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)
