"""The command line of a script: a mistake in it is one line with the remedy, and a sweep survives a failed run."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import main
import sample
from tests.helpers import ROOT, run_script


@pytest.fixture
def lines_of(monkeypatch, capsys):
    """Runs a script's `main` on these arguments, which must fail; the lines of its error."""

    def run(script, *arguments: str) -> list[str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # is set by the script, and restored after the test
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        with pytest.raises(SystemExit, match="^1$"):
            script.main()
        return capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr: unknown key; the nearest known one is optimizer.lr"]),
        (["++train.lr=1"], ["train.lr: unknown key; the nearest known one is optimizer.lr"]),
        (["modelx=unet"], ["modelx: unknown key; the nearest known one is model"]),
        (["model=unett"], ["model=unett: unknown option; the nearest known one is unet"]),
        (["model=5"], ["model=5: unknown option; the nearest known one is unet"]),
        (["-m", "model=unet,unett"], ["model=unett: unknown option; the nearest known one is unet"]),
        (["-m", "model=glob(*)", "dataset=null", "optimizer=sgdd"], ["optimizer=sgdd: unknown option"]),
        (["a.b=1", "model=x", "seed=0"], ["a.b: unknown key", "model=x: unknown option"]),
        (["+optimizer.lr=1"], ["+optimizer.lr=1: optimizer.lr is known already; leave out the +"]),
        (["+model=unet"], ["+model=unet: model is known already; leave out the +"]),
        (["~optimizer.lr"], ["optimizer.lr: missing, expected a value"]),
        (["~optimizer.lr=1"], ["~optimizer.lr=1: a key cannot be removed, only set"]),
        (["~nothing"], ["nothing: unknown key"]),
        (["seed"], ["seed: expected key=value"]),
        (["=1"], ["=1: expected key=value"]),
        (["optimizer.=1"], ["optimizer.=1: expected key=value"]),
        (["seed=1,2"], ["seed=1,2: several values need -m, which runs one after the other; a list is written"]),
        (
            ["wandb.name=5"],
            ["wandb.name=5: input should be a valid string; as text it is written 'wandb.name=\"5\"'"],
        ),
        (["wandb.name=${x}"], ["wandb.name: Interpolation key 'x' not found"]),
        (["hydra.x=1"], ["Could not override 'hydra.x'"]),
        (["--config-name=x"], ["Cannot find primary config 'x'"]),
    ],
)
@pytest.mark.fault("wrong input")
def test_a_wrong_argument_is_one_line_with_the_remedy(lines_of, arguments, lines):
    found = lines_of(main, *arguments)
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


def test_a_failed_stage_names_the_way_back_where_it_left_something(lines_of, monkeypatch):
    message = "train.batch_size=0: input should be greater than 0"
    way_back = "`make restore` brings back params.yaml and outputs/ as they were committed"
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))
    assert lines_of(main, "train.batch_size=0") == [message, way_back]
    monkeypatch.setenv("DVC_ROOT", "/the/original")  # a queued experiment, in a copy that DVC deletes
    assert lines_of(main, "train.batch_size=0") == [message]


@pytest.mark.parametrize("value", ["/a(b)", "a=b", "a#b", "été", "it's", "[1", '"', "~a,b"])
@pytest.mark.fault("wrong input")
def test_a_value_that_hydra_cannot_read_is_answered_with_one_that_it_can(lines_of, value):
    (line,) = lines_of(main, f"dataset.pictures={value}")
    problem, _, remedy = line.partition("; a text is written ")
    assert problem == f"dataset.pictures={value}: Hydra cannot read this value"
    (word,) = shlex.split(remedy)
    assert OverridesParser.create().parse_override(word).value() == value


@pytest.mark.parametrize("word", [f"model={'a1' * 20}", f"wandb.name=({'a1' * 20}", "optimizer=of-my-environment"])
@pytest.mark.fault("API key")
def test_a_key_in_a_wrong_argument_is_not_repeated(lines_of, monkeypatch, word):
    monkeypatch.setenv("WANDB_API_KEY", "my-environment")
    (line,) = lines_of(main, word)
    assert "<API key>" in line
    assert "a1a1" not in line
    assert "my-environment" not in line


def test_a_group_of_another_script_is_an_unknown_key(lines_of):
    assert lines_of(sample, "model=unet")[0].startswith("model: unknown key")


def test_the_home_folder_is_written_as_a_tilde(lines_of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of (me)")
    for word in ("dataset.root=~/data", 'dataset.root="~/data"'):
        assert lines_of(main, word)[0].startswith("/home/of (me)/data/cifar10 holds no prepared data")


SWEEP = """
from modeling.options import SampleConfig
from modeling.system.command_line import script
from modeling.system.errors import UserError
from modeling.system.signals import Stopped

def read(values, schema):
    return values.seed

@script("sample", SampleConfig, read)
def main(seed):
    if seed == 1:
        raise UserError("seed=1: wrong")
    if seed == 3:
        raise Stopped("the time limit", 0)
    if seed == 4:
        raise Stopped("SIGTERM", 143)
    if seed == 6:
        raise RuntimeError("a bug")
    print("seed", seed, "done")

main()
"""


@pytest.mark.fault("wrong input")
def test_a_failed_run_does_not_end_a_sweep_but_a_signal_does(tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP)

    def sweep(seeds: str):
        return run_script(tmp_path / "sweep.py", "-m", f"seed={seeds}", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})

    done = sweep("1,2,3,6,5")
    assert done.returncode == 2
    assert done.stderr.startswith("seed=1: wrong\nTraceback")
    assert done.stderr.endswith("\n2 of 5 runs failed:\n  seed=1: seed=1: wrong\n  seed=6: RuntimeError: a bug\n")
    headers = [f"\nrun {number} of 5: seed={seed}\n" for number, seed in enumerate((1, 2, 3, 6, 5), start=1)]
    assert done.stdout == "{}{}seed 2 done\n{}{}{}seed 5 done\n".format(*headers)
    done = sweep("1,4,5")
    assert done.returncode == 143
    assert done.stderr.endswith(
        "1 of 3 runs failed:\n  seed=1: seed=1: wrong\nthe sweep is stopped; the same command resumes it\n"
    )
    assert "seed 5 done" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.py", "runs"}


# ---- params.yaml


def test_params_yaml_is_read_where_it_is_and_a_copy_in_conf_is_not(copied_main):
    shutil.copy(copied_main.with_name("params.yaml"), copied_main.parent / "conf")
    edited = copied_main.with_name("params.yaml").read_text().replace("seed: 0", "seed: 5")
    copied_main.with_name("params.yaml").write_text(edited)
    assert run_script(copied_main, "--cfg", "job").stdout.strip() == edited.strip()  # called from another folder


@pytest.mark.parametrize("content", ["- 1", "a: ["])
@pytest.mark.fault("wrong input")
def test_a_damaged_params_yaml_is_named_in_one_line(copied_main, content):
    copied_main.with_name("params.yaml").write_text(content)
    done = run_script(copied_main)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{copied_main.with_name('params.yaml')} is no YAML of the expected form" in done.stderr
