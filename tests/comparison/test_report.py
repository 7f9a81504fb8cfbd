"""What `report.py` says of a run, and the code that it ends with."""

import json
import re
import sys

import pytest
from PIL import Image

import report
from modeling.config import parse
from modeling.run.session import train
from modeling.stage import read_manifest
from tests.comparison.runs import noisy


def test_a_run_in_progress_is_judged_as_far_as_it_is(write_run, command):
    losses = noisy(0)
    assert command(write_run(losses), "--save", "default")[0] == 0
    folder = write_run(losses[:50], "half", is_finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1275, "train/lo')  # being written
    code, text = command(folder)
    assert code == 0
    assert "step 1,250 of 2,500 (50%), 80,000 images, not finished" in text
    assert "12 of 12 windows in the band" in text  # the 13th ends at 83,200 images
    assert re.search(r"expected at the end\n +heldout_ema +0\.035 +0\.03325 +0\.03675\n", text)
    assert re.search(r"not recorded here.*\n.*\n +5,990,400 images +0\.0295$", text.partition("\n\non track")[0])
    off = write_run(1.3 * losses[:50], "off", is_finished=False)
    code, text = command(off)
    assert code == 1
    assert "OFF TRACK    training loss above the band from steps" in text


def test_losses_at_the_end_outside_their_band_are_off_track(write_run, command):
    losses = noisy(0)
    command(write_run(losses), "--save", "default")
    assert command(write_run(losses, "near", heldout=0.0365))[0] == 0
    far = write_run(losses, "far", heldout=0.037)
    code, text = command(far)
    assert code == 1
    assert "OFF TRACK    at the end: eval/heldout_ema above" in text
    assert command(write_run(noisy(1), "other", heldout=0.037, seed=1))[0] == 0  # seeds differ by more
    assert command(write_run(noisy(1), "worse", heldout=0.041, seed=1))[0] == 1
    metrics = json.loads((far / "metrics.json").read_text()) | {"eval/heldout_ema": 0.035}
    (far / "metrics.json").write_text(json.dumps(metrics))
    (far / "details.json").write_text('{"bins": {"eval/heldout_ema": {"1-500": 0.0655, "501-1000": 0.0045}}}')
    code, text = command(far)
    assert (code, "OFF TRACK    at the end: eval/heldout_ema 501-1000 above the band" in text) == (1, True)


def test_the_best_linear_denoiser_is_beside_the_losses_at_the_end(write_run, command, tmp_path):
    losses = noisy(0)
    command(write_run(losses, linear=0.045), "--save", "default")
    assert "heldout_linear" not in json.loads((tmp_path / "refs" / "default.json").read_text())["losses"]
    text = command(write_run(losses, "new", linear=0.046), "--plot", tmp_path / "plot.png")[1]
    assert re.search(r"\n +at the end +linear\n +heldout_ema .* in +0\.046\n", text)
    assert re.search(r" heldout_ema 501-1000 .* in +0\.0046\n", text)
    text = command(write_run(losses, "old"))[1]  # which does not know it: the reference's, of the same images
    assert re.search(r" heldout_ema .* in\n +heldout_ema 1-500 .* in +0\.0855\n", text)


def test_missing_damaged_and_early_runs_end_with_2_and_the_reason(write_run, command, tmp_path):
    losses = noisy(0)
    command(write_run(losses), "--save", "default")
    code, text = command(tmp_path / "nowhere")
    assert (code, "nowhere: expected a run's folder, or one with runs in it" in text) == (2, True)
    for name, content, message in (
        ("empty", "", f"too early: {tmp_path}/empty/metrics.jsonl is empty, its first line comes at step 25\n"),
        ("strange", '{"loss": 1}\n', "strange/metrics.jsonl: line 1 is damaged"),
        ("twice", '{"step": 25, "train/loss": 1, "train/skipped": 0, "seconds": 1}\n' * 2, "its steps do not rise"),
    ):
        folder = write_run(losses[:60], name, is_finished=False)
        (folder / "metrics.jsonl").write_text(content)
        code, text = command(folder)
        assert (code, message in text) == (2, True)
    code, text = command(write_run(losses[:3], "young", is_finished=False))
    assert (code, text) == (2, "too early: losses of images 0 to 4,800, and the first window is 6,400 images long\n")
    assert command(write_run(losses[:4], "older", is_finished=False))[0] == 0
    (tmp_path / "refs" / "other.json").write_text('{"name": "other"}')
    code, text = command(tmp_path / "run")
    assert (code, "other.json is no reference, or damaged: command: Field required; delete it" in text) == (2, True)


@pytest.mark.parametrize(
    "arguments", [("--save", "a", "--plot", "a.png"), ("--command", "make"), ("--plot", "a.pdf")], ids=" ".join
)
def test_options_that_do_not_go_together_are_rejected(arguments, command, tmp_path):
    code, text = command(tmp_path, *arguments)
    assert (code, "report.py: error: --" in text) == (2, True)


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_plot_shows_run_reference_and_where_it_leaves_the_band(write_run, command, tmp_path, is_finished):
    losses = noisy(0)
    command(write_run(losses), "--save", "default")
    losses[40:] *= 1.5
    folder, picture = write_run(losses, "off", is_finished=is_finished), tmp_path / "plots" / "off.png"
    code, text = command(folder, "--plot", picture)
    assert (code, f"\n{picture}\n" in text) == (1, True)
    pixels = {color for _, color in Image.open(picture).convert("RGB").getcolors(2**20)}
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= pixels  # reference, run, where it leaves the band


@pytest.mark.long
@pytest.mark.slow
def test_a_real_run_becomes_a_reference_and_is_on_track(tiny, command, tmp_path):
    overrides = "train.log_every=1", "train.num_epochs=10", f"runtime.output_dir={tmp_path / 'real'}"
    config = parse(tiny(*overrides))
    train(config, read_manifest(config.dataset))
    code, text = command(tmp_path / "real", "--save", "tiny")
    assert (code, " dataset.name=shapes " in text) == (0, True)
    code, text = command(tmp_path / "real")
    assert code == 0
    assert "step 40 of 40 (100%), 640 images, finished" in text
    assert "differences  none" in text
    assert "20 of 20 windows in the band" in text


def test_a_plot_that_cannot_be_written_is_found_before_the_comparison(write_run, command):
    assert command(write_run(noisy(0)), "--plot", "/dev/null/x.png") == (2, "/dev/null/x.png: Not a directory\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "a.png"], "--plot needs one run, and no option of the table"),
        (["a", "b", "--save", "default"], "--save needs one run, and no option of the table"),
        (["a", "--sort", "seconds", "--plot", "a.png"], "--plot needs one run, and no option of the table"),
        (["--descending"], "--descending belongs to --sort"),
        (["--csv", "table.txt"], "expected a name that ends with .csv"),
        (["--html", "page.pdf"], "expected a name that ends with .html"),
        (["a", "--html", "a.html", "--save", "default"], "--html is a page of its own"),
        (["--html", "a.html", "--sort", "seconds"], "--html is a page of its own"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert message in capsys.readouterr().err


def test_options_of_one_run_are_rejected_for_a_folder_of_runs(write_run, command, tmp_path):
    write_run(noisy(0), "some/a")
    code, text = command(tmp_path / "some", "--save", "default")
    assert (code, "--save needs one run: " in text) == (2, True)


def test_the_page_is_of_all_runs_or_of_those_named(write_run, command, monkeypatch, tmp_path):
    for name in ("a", "b"):
        write_run(noisy(0), f"runs/{name}")
    monkeypatch.chdir(tmp_path)
    assert command("--html", "all.html") == (0, "all.html\n")
    assert command("runs/b", "--html", "one.html") == (0, "one.html\n")
    pages = [(tmp_path / name).read_text() for name in ("all.html", "one.html")]
    assert ["runs/a" in page for page in pages] == [True, False]
