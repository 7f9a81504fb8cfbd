"""Fixtures: a fixed seed for every test, the available devices, composed configurations, small prepared data."""

import os
import shutil
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch reads it: the tests of several processes share the CPUs
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hydra import compose, initialize_config_dir

from modeling.config import parse, to_yaml
from modeling.system.startup import available_cpus
from tests.helpers import ROOT, TINY, dataset, run_script
from tests.pipeline import command

MAX_WORKERS = 8  # each holds torch, half a gigabyte


def pytest_xdist_auto_num_workers(config):
    """A process for each CPU where the whole suite runs; none for one file, one suite of its own, or a debugger."""
    is_whole = config.args_source is config.ArgsSource.TESTPATHS and config.getoption("markexpr").startswith("not ")
    return min(available_cpus(), MAX_WORKERS) if is_whole and not config.getoption("usepdb") else 0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
            ],
        ),
    ]
)
def device(request) -> str:
    return request.param


def pytest_runtest_makereport(item, call):
    """Notes which row of docs/faults.md a test holds."""
    if call.when == "setup":
        item.user_properties += [("fault", marker.args[0]) for marker in item.iter_markers("fault")]


def pytest_terminal_summary(terminalreporter, config):
    """`make test-faults` ends with the matrix of faults and outcomes."""
    if config.getoption("markexpr") != "fault":
        return
    rows: dict[str, dict] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            is_result = report.when == "call" or outcome != "passed"
            for name, value in report.user_properties if is_result else ():
                if name == "fault":
                    row = rows.setdefault(value, {"passed": 0, "failed": 0, "skipped": 0, "error": 0, "outcomes": []})
                    row[outcome] += 1
                    row["outcomes"] += [text for key, text in report.user_properties if key == "outcome"]
    terminalreporter.section("faults and outcomes")
    for fault, row in sorted(rows.items()):
        counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped", "error") if row[name])
        terminalreporter.write_line(f"{fault}: {counts}")
        for text in row["outcomes"]:
            terminalreporter.write_line(f"    {text}")


@pytest.fixture(scope="session")
def compose_config():
    """Composes the project's configuration with overrides, as the command line does."""

    def compose_with(*overrides: str, name: str = "config"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(name, overrides=list(overrides))

    return compose_with


@pytest.fixture
def copied_main(tmp_path) -> Path:
    """main.py in a copy of the code, without the repository's git, DVC and data."""
    for name in ("modeling", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path / "main.py"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The data of TINY, prepared: the folder for dataset.root."""
    from modeling.datasets.preparation import prepare

    root = tmp_path_factory.mktemp("data")
    prepare(dataset("shapes", root, num_images=64, seed=0))
    return root


@pytest.fixture
def tiny(tiny_data, compose_config, tmp_path, monkeypatch):
    """Composes TINY on its data with further overrides; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: compose_config(*TINY, f"dataset.root={tiny_data}", *overrides)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_data) -> Path:
    """The folder of a small finished run, made by the scripts themselves in fresh processes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    result = run_script("main.py", *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}")
    assert result.returncode == 0, result.stderr
    folder.with_name("out").write_text(result.stdout)
    folder.with_name("err").write_text(result.stderr)
    return folder


@pytest.fixture(scope="session")
def cifar10_archive() -> Path:
    for candidate in (os.environ.get("CIFAR10_ARCHIVE"), ROOT / "downloads" / "cifar-10-python.tar.gz"):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    pytest.skip("no CIFAR-10 archive: set CIFAR10_ARCHIVE or put it at downloads/cifar-10-python.tar.gz")


@pytest.fixture(scope="module")
def repository(tmp_path_factory, compose_config) -> Path:
    """A clone with a small configuration whose pipeline has run once."""
    root = tmp_path_factory.mktemp("pipeline") / "repository"
    command("git", "init", "-q", str(root), cwd=ROOT)
    of_root = ("--git-dir", str(root / ".git"), "--work-tree", ".")  # which may have no Git of its own
    for name in command("git", *of_root, "ls-files", "-z", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and not name.startswith("outputs/") and (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name, follow_symlinks=False)
    (root / "dvc.lock").unlink(missing_ok=True)
    (root / "params.yaml").write_text(to_yaml(parse(compose_config(*TINY))))
    for words in (
        ("git", "config", "user.email", "test@example.com"),
        ("git", "config", "user.name", "Test"),
        ("dvc", "repro", "-q"),
        ("git", "add", "-A"),
        ("git", "commit", "-qm", "first run"),
    ):
        command(*words, cwd=root)
    return root
