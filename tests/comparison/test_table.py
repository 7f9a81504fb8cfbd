"""The table of runs, as `report.py` prints it and as a CSV file."""

import csv
import json

import pytest

from modeling.comparison.summaries import find_runs, read_summaries
from modeling.comparison.table import WIDTH, make_table
from modeling.system.files import sha256_of
from tests.comparison.runs import noisy


@pytest.fixture
def runs(tmp_path, monkeypatch, write_run):
    """Writes runs below runs/, in which the test then is."""
    monkeypatch.chdir(tmp_path)

    def write(name, losses=None, **options):
        return write_run(noisy(0) if losses is None else losses, f"runs/{name}", **options)

    return write


@pytest.fixture
def table(command):
    """The words of each line that `report.py` prints, up to the first empty one, and the lines behind it."""

    def call(*arguments):
        code, text = command(*arguments)
        assert code == 0, text
        lines, _, rest = text.partition("\n\n")
        return [line.split() for line in lines.splitlines()], rest

    return call


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluate(folder, place, num_images, total):
    """An evaluation.json of this run's weights."""
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    identity = {"checkpoint_sha256": sha256_of(folder / "model.safetensors"), "num_images": num_images}
    bound = {"total": total, "standard_error": None}
    values = {"large, clipped": bound, "small, raw": {"total": 9.0}}
    place.mkdir(parents=True, exist_ok=True)
    (place / "evaluation.json").write_text(json.dumps({"bits_per_dim": {"values": values, "identity": identity}}))


def test_the_table_has_what_differs_then_the_results_then_the_name(runs, table):
    runs("b-0123456789", optimizer__lr=0.5, heldout=0.03, runtime__device="cpu")
    runs("search/a", seed=3, runtime__name="seeds")
    rows, rest = table()
    assert rows == [
        ["lr", "seed", "state", "steps", "held-out", "seconds", "img/s", "name"],
        ["0.004", "3", "finished", "2,500", "0.03500", "100", "1,600", "seeds", "search/a"],
        ["0.5", "0", "finished", "2,500", "0.03000", "100", "1,600", "b-0123456789"],
    ]
    assert rest == ""


def test_every_run_has_a_line_whatever_has_become_of_it(runs, table, tmp_path):
    runs("begun", [], is_finished=False)
    damaged = runs("damaged", seed=1)
    (damaged / "metrics.jsonl").write_text("{}\n")
    failed = runs("failed", noisy(0)[:5], is_finished=False)
    (failed / "error.txt").write_text("the loss was not finite\n")
    runs("finished")
    runs("stopped", noisy(0)[:25], is_finished=False)
    unreadable = runs("unreadable")
    (unreadable / "config.yaml").write_text("seed: 0\n")
    rows, rest = table()
    states = {row[-1]: row[1:-1] for row in rows[1:]}
    assert states["begun"] == ["stopped"]
    assert states["damaged"] == ["damaged"]
    assert states["failed"][:3] == ["failed", "5%", "125"]
    assert states["finished"][:2] == ["finished", "2,500"]
    assert states["stopped"][:3] == ["stopped", "25%", "625"]
    starts = [
        "runs/begun: stopped: too early: ",
        "runs/damaged: damaged: runs/damaged/metrics.jsonl: line 1 is damaged: ",
        "runs/failed: failed: the loss was not finite",
        "runs/unreadable/config.yaml is no YAML of the expected form, or damaged: ",
    ]
    for line, start in zip(rest.splitlines(), starts, strict=True):
        assert line.startswith(start)


def test_a_table_of_no_run_ends_with_2(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert command() == (2, "runs: expected a run's folder, or one with runs in it\n")
    assert command("a", "b", "c")[0] == 2


def test_the_table_fits_a_hundred_columns_and_the_csv_file_has_everything(runs, command, tmp_path):
    keys = ["train__batch_size", "train__ema_decay", "diffusion__num_timesteps", "optimizer__lr", "model__hidden_size"]
    for number in range(3):
        values = dict.fromkeys(keys, 8 * number + 8) | {"diffusion__betas": [0.1234567890123, number]}
        folder = runs("a-very-long-name-" * 5 + f"{number:010}", **values)
        evaluate(folder, folder / "evaluation", 10, 4.0 + number)
    code, text = command("--csv", "runs.csv")
    lines = text.splitlines()
    assert code == 0
    assert max(map(len, lines[:4])) == WIDTH
    assert lines[3].split()[-1].endswith("…00002")
    left_out = text.partition("too wide, in --csv only: ")[2].splitlines()[0].split(", ")
    assert set(lines[0].split()).isdisjoint(key.rpartition(".")[2] for key in left_out)
    rows = read_csv(tmp_path / "runs.csv")
    assert {*left_out, "optimizer.lr", "steps", "eval/heldout_ema", "bits_per_dim: small, raw"} <= rows[0].keys()
    assert [row["diffusion.betas"] for row in rows] == [f"[0.1234567890123, {number}]" for number in range(3)]
    assert [row["bits_per_dim: large, clipped"] for row in rows] == ["4.0", "5.0", "6.0"]
    assert rows[2]["folder"] == "runs/" + "a-very-long-name-" * 5 + "0000000002"


def test_a_table_is_sorted_by_a_title_or_a_key_and_what_has_no_value_comes_last(runs, command, table):
    runs("a", heldout=0.2)
    runs("b", heldout=0.1)
    runs("c", noisy(0)[:50], is_finished=False)
    for arguments, order in (
        (["held-out"], "bac"), (["eval/heldout_ema"], "bac"), (["held-out", "--descending"], "abc"),
        (["name", "--descending"], "cba"), (["steps"], "cab"),
    ):  # fmt: skip
        rows, _ = table("--sort", *arguments)
        assert "".join(row[-1] for row in rows[1:]) == order
    assert command("--sort", "heldout") == (2, "--sort heldout: no such column; the nearest one is held-out\n")


def test_numbers_that_depend_on_other_images_are_in_columns_of_their_own(runs, table, tmp_path):
    for number, name in enumerate("abc"):
        folder = runs(name, seed=number)
        evaluate(folder, tmp_path / "evaluation" / name, 500 if name != "c" else 20, 4.0 + number)
    rows, notes = table()
    start = rows[0].index("bits/dim")
    assert rows[0][start : start + 4] == ["bits/dim", "1", "bits/dim", "2"]
    assert notes == "bits/dim 1: num_images 500\nbits/dim 2: num_images 20\n"
    columns = {column.title: column.values for column in make_table(read_summaries(find_runs([tmp_path]))[0]).columns}
    assert (columns["bits/dim 1"], columns["bits/dim 2"]) == ([4.0, 5.0, None], [None, None, 6.0])


def test_fd_is_the_encoder_s_distance_alone(runs, table):
    folder = runs("a")
    (folder / "model.safetensors").write_bytes(b"a")
    identity = {"checkpoint_sha256": sha256_of(folder / "model.safetensors")}
    values = {"encoder/frechet_distance": 1.5, "inception-2015/frechet_distance": 20.0}
    records = {"encoder": {"values": values, "identity": identity}}
    (folder / "evaluation.json").write_text(json.dumps(records))
    assert table()[0][0].count("FD") == 1


def test_two_settings_with_one_last_part_are_told_apart(runs, table):
    runs("a", dataset__seed=5)
    runs("b", dataset__seed=6, seed=1)
    assert table()[0][0][:2] == ["dataset.seed", "seed"]
