"""Fixtures of the tests of a run: an uninterrupted one, Weights & Biases and its server."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import main
from tests.helpers import TINY, result
from tests.run.wandb_server import KEY, FakeWandb


@pytest.fixture(scope="session")
def straight_folder(tiny_data, compose_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    main.main(compose_config(*TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}"))
    return folder


@pytest.fixture
def straight(straight_folder, tmp_path) -> dict:
    """The result of the uninterrupted run TINY; its folder is in the working folder, as `straight`."""
    shutil.copytree(straight_folder, tmp_path / "straight")
    return result(straight_folder)


@pytest.fixture(autouse=True)
def _wandb_environment() -> Iterator[None]:
    """W&B's variables: none is read from the machine, and none is left behind."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    yield
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def fake_wandb(monkeypatch) -> Iterator[Callable[..., FakeWandb]]:
    """Makes a FakeWandb, to which the environment then leads."""
    servers = []

    def make(**options) -> FakeWandb:
        servers.append(FakeWandb(**options))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return servers[-1]

    yield make
    for server in servers:
        server.close()
