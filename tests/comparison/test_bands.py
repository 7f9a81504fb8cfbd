"""Is a run on track: known curves are judged as they must be, and nothing is compared that cannot be."""

import json
import re
import shlex

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import compare
from modeling.comparison.bands import (
    ComparisonError,
    Curve,
    compare_curves,
    compare_ends,
    first_exit,
    read_run,
)
from modeling.comparison.references import image_scatter, make_reference
from modeling.config import parse
from modeling.run.session import train
from tests.helpers import ROOT

NUM_LINES, LOG_EVERY, BATCH_SIZE = 100, 25, 64  # 100 points, so windows of 4 lines: 6,400 images
SCATTER = 2.2  # standard deviation of an image's loss over its mean: that of a small network on CIFAR-10
OTHER_SEED = {"seed": (0, 1)}


def true_loss(num_lines=NUM_LINES, span=LOG_EVERY * BATCH_SIZE):
    """A loss that falls at first steeply and then slowly, at the middle of each line."""
    images = (np.arange(num_lines) + 0.5) * span
    return 0.035 + 0.01 * np.exp(-images / 40_000) + np.exp(-images / 2_000)


def noisy(losses, number, span=LOG_EVERY * BATCH_SIZE):
    """These losses as means over so many images."""
    return losses * (1 + SCATTER / np.sqrt(span) * np.random.default_rng(number).standard_normal(len(losses)))


@pytest.fixture
def write_run(tmp_path):
    """Writes a run's folder: its configuration, a line for each loss (None: all steps skipped), and its metrics."""

    def write(losses, name="run", *, is_finished=True, heldout=0.035, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = OmegaConf.load(ROOT / "params.yaml")
        config.train.update({"log_every": LOG_EVERY, "batch_size": BATCH_SIZE, "num_epochs": 2, "max_steps": None})
        config.dataset.root = str(tmp_path)  # there is no data: the length comes from num_images
        config.dataset.num_images = NUM_LINES * LOG_EVERY * BATCH_SIZE // 2
        for key, value in changes.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        OmegaConf.save(config, folder / "config.yaml")
        rows, skipped = [], 0
        for number, loss in enumerate(losses, start=1):
            skipped += LOG_EVERY if loss is None else 0
            loss = None if loss is None else float(loss)
            row = {"step": number * LOG_EVERY, "train/loss": loss, "train/skipped": skipped, "seconds": number}
            rows.append(json.dumps(row) + "\n")
        (folder / "metrics.jsonl").write_text("".join(rows))
        steps = len(losses) * LOG_EVERY
        metrics = {
            "steps": steps, "images": steps * config.train.batch_size, "seconds": len(losses), "parameters": 1,
            "images_per_second": LOG_EVERY * config.train.batch_size, "data_sha256": "0", "code_sha256": "0",
            "bins": {"eval/heldout_ema": {"1-500": 1.9 * heldout, "501-1000": 0.1 * heldout}},
            "eval/heldout_ema": heldout,
            "device": "x86_64", "threads": 2, "precision": "fp32", "torch": "2.15.0",
        }  # fmt: skip
        if is_finished:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return write


def load(folder):
    return read_run(folder, compare.read_yaml(folder / "config.yaml"))


def reference_of(folder, name="default"):
    return make_reference(load(folder), name, "python main.py", "2026-01-01")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `compare.py` with its references in a folder of its own; returns the exit code and what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments), "--references", str(tmp_path / "refs")])
        code = compare.main()
        return code, "".join(capsys.readouterr())

    return call


# ---- the band


@pytest.mark.parametrize("changed", [{}, OTHER_SEED])
def test_a_run_equal_to_the_reference_lies_in_the_middle_of_the_band(write_run, changed):
    folder = write_run(noisy(true_loss(), 0))
    windows = compare_curves(load(folder), reference_of(folder), changed)
    assert len(windows) == 25
    assert [window.value for window in windows] == pytest.approx([window.reference for window in windows], rel=1e-12)
    assert {window.side for window in windows} == {"in"}
    assert all(window.low < window.reference < window.high for window in windows)


def test_the_scatter_of_an_image_is_found_whatever_the_trend_and_the_lengths_of_the_lines():
    generator = np.random.default_rng(0)
    counts = generator.integers(800, 3200, 2000)
    edges = np.concatenate([[0], np.cumsum(counts)])
    trend = 5 - edges[1:] / edges[-1]
    straight = Curve(edges, 5 - (edges[1:] + edges[:-1]) / 2 / edges[-1], counts)
    assert image_scatter(straight) == pytest.approx(0, abs=1e-10)
    lines = Curve(edges, trend + 0.3 / np.sqrt(counts) * generator.standard_normal(2000), counts)
    assert np.mean(image_scatter(lines)) == pytest.approx(0.3, rel=0.05)


@pytest.mark.long
def test_another_seeds_noise_stays_on_track(write_run):
    on_track, inside = 0, []
    for draw in range(100):
        reference = reference_of(write_run(noisy(true_loss(), 2 * draw), f"a{draw}"))
        windows = compare_curves(load(write_run(noisy(true_loss(), 2 * draw + 1), f"b{draw}")), reference, OTHER_SEED)
        on_track += first_exit(windows) is None
        inside += [window.side == "in" for window in windows]
    assert on_track == 100
    assert np.mean(inside) > 0.99


@pytest.mark.parametrize(("factor", "side"), [(1.2, "above"), (0.8, "below")])
def test_a_curve_off_by_a_fifth_from_the_middle_on_is_found_there(write_run, factor, side):
    reference = reference_of(write_run(noisy(true_loss(), 0)))
    found = []
    for draw in range(1, 21):
        losses = noisy(true_loss(), draw)
        losses[NUM_LINES // 2 :] *= factor
        first = first_exit(compare_curves(load(write_run(losses, f"run{draw}")), reference, OTHER_SEED))
        assert first is not None
        assert first.side == side
        found.append((first.start - 80_000) / 6_400)  # windows after the middle, which lies in the middle of one
    assert min(found) >= -0.5
    assert np.median(found) <= 1.5
    assert max(found) <= 4.5


def test_with_the_same_draws_a_departure_is_found_that_is_noise_with_others(write_run):
    losses = noisy(true_loss(), 0)
    reference, run = reference_of(write_run(losses)), load(write_run(1.07 * losses, "off"))
    assert first_exit(compare_curves(run, reference, {})) is not None
    assert first_exit(compare_curves(run, reference, {"optimizer.lr": (1e-3, 2e-3)})) is not None
    for key in ("seed", "train.batch_size", "dataset.num_images", "diffusion.num_timesteps"):
        assert first_exit(compare_curves(run, reference, {key: (0, 1)})) is None


def test_two_windows_outside_are_no_alarm_and_three_are(write_run):
    losses = noisy(true_loss(), 0)
    reference = reference_of(write_run(losses))
    for num_windows in (1, 2, 3):
        high = losses.copy()
        high[40 : 40 + 4 * num_windows] *= 2
        windows = compare_curves(load(write_run(high, f"high{num_windows}")), reference, {})
        assert [number for number, window in enumerate(windows) if window.side != "in"] == list(
            range(10, 10 + num_windows)
        )
        first = first_exit(windows)
        assert (first is None) == (num_windows < 3)
    assert (first.start, first.end, first.side) == (64_000, 70_400, "above")
    mixed = losses.copy()
    mixed[40:44] *= 2
    mixed[44:48] /= 2
    mixed[48:52] *= 2
    assert first_exit(compare_curves(load(write_run(mixed, "mixed")), reference, {})) is None


# ---- curves that are not the reference's in length, batches or steps


def test_curves_are_compared_at_equal_numbers_of_images(write_run):
    losses = noisy(true_loss(), 0)
    folder = write_run(losses)
    reference = reference_of(folder)
    pairs = write_run(losses.reshape(-1, 2).mean(1), "pairs", train__batch_size=2 * BATCH_SIZE)
    windows = compare_curves(load(pairs), reference, {"train.batch_size": (64, 128)})
    assert [window.value for window in windows] == pytest.approx([window.reference for window in windows], rel=1e-12)
    rest = compare_curves(load(folder), reference_of(write_run(losses[:97], "short")), {})
    assert [rest[-1].start, rest[-1].end] == [92 * 1600, 97 * 1600]  # a rest of one line is no window of its own
    coarse = write_run(losses.reshape(-1, 10).mean(1), "coarse", train__batch_size=10 * BATCH_SIZE)
    windows = compare_curves(load(coarse), reference, {"train.batch_size": (64, 640)})
    assert [window.end for window in windows] == list(range(16_000, 160_001, 16_000))  # no shorter than its lines
    assert [window.value for window in windows] == pytest.approx([window.reference for window in windows], rel=1e-12)


def test_a_long_curve_is_thinned_without_a_change_of_its_means(write_run):
    losses = noisy(true_loss(1_007), 0)
    folder = write_run(losses, dataset__num_images=10**7)
    curve = reference_of(folder)["curve"]
    assert len(curve) <= 100
    assert curve[-1]["step"] == 1_007 * LOG_EVERY
    assert curve[-1]["images"] == sum(point["count"] for point in curve) == 1_007 * LOG_EVERY * BATCH_SIZE
    assert sum(point["count"] * point["loss"] for point in curve) == pytest.approx(
        losses.sum() * LOG_EVERY * BATCH_SIZE
    )
    late = [point["standard_error"] / point["loss"] * point["count"] ** 0.5 for point in curve[10:]]
    assert np.mean(late) == pytest.approx(SCATTER, rel=0.1)


def test_skipped_steps_do_not_count_and_a_loss_that_stays_away_is_above_the_band(write_run):
    losses = noisy(true_loss(), 0)
    reference = reference_of(write_run(losses))
    some = [None if number % 4 == 1 else loss for number, loss in enumerate(losses)]
    windows = compare_curves(load(write_run(some, "some")), reference, {})
    kept = [np.delete(losses[start : start + 4], 1).mean() for start in range(0, NUM_LINES, 4)]
    assert [window.value for window in windows] == pytest.approx(kept)
    partly = write_run(losses, "partly")
    rows = [json.loads(line) for line in (partly / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"train/skipped": 10 * (row["step"] >= 50)} for row in rows]
    (partly / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(partly).curve.counts[:4].tolist() == [25 * 64, 15 * 64, 25 * 64, 25 * 64]
    gone = [*losses[:60], *[None] * 40]
    windows = compare_curves(load(write_run(gone, "gone")), reference, {})
    assert (first_exit(windows).start, first_exit(windows).side) == (96_000, "above")
    literal = write_run(losses, "literal")
    text = (literal / "metrics.jsonl").read_text().splitlines()
    text[60] = text[60].replace(f"{losses[60]}", "NaN")
    (literal / "metrics.jsonl").write_text("\n".join(text))
    assert load(literal).curve.counts[60] == 0


def test_a_run_in_progress_is_judged_as_far_as_it_is(write_run, command):
    losses = noisy(true_loss(), 0)
    assert command(write_run(losses), "--save", "default")[0] == 0
    folder = write_run(losses[:50], "half", is_finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1275, "train/lo')  # being written
    code, text = command(folder)
    assert code == 0
    assert "step 1,250 of 2,500 (50%), 80,000 images, not finished" in text
    assert "12 of 12 windows in the band" in text  # the 13th ends at 83,200 images
    assert re.search(r"expected at the end\n +heldout_ema +0\.035 +0\.03325 +0\.03675\n", text)
    off = write_run(1.3 * losses[:50], "off", is_finished=False)
    code, text = command(off)
    assert code == 1
    assert "OFF TRACK    training loss above the band from steps" in text


def test_the_metrics_of_a_shorter_run_that_goes_on_are_not_its_end(write_run):
    losses = noisy(true_loss(), 0)
    folder = write_run(losses)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-1]))
    run = load(folder)
    assert (run.metrics, run.step, run.last_step) == (None, 2_475, 2_500)


def test_a_run_that_began_from_another_ones_checkpoint_is_compared_from_there_on(write_run):
    losses = noisy(true_loss(), 0)
    reference = reference_of(write_run(losses))
    folder = write_run(losses, "later")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[40:]))
    windows = compare_curves(load(folder), reference, {})
    assert windows[0].start == 64_000
    assert [window.value for window in windows] == pytest.approx([window.reference for window in windows], rel=1e-12)
    with pytest.raises(ComparisonError, match="from image 64,000 on"):
        reference_of(folder)


# ---- the end of the run


def test_losses_at_the_end_outside_their_band_are_off_track(write_run, command):
    losses = noisy(true_loss(), 0)
    command(write_run(losses), "--save", "default")
    assert command(write_run(losses, "near", heldout=0.0365))[0] == 0
    far = write_run(losses, "far", heldout=0.037)
    code, text = command(far)
    assert code == 1
    assert "OFF TRACK    at the end: eval/heldout_ema above" in text
    assert command(write_run(noisy(true_loss(), 1), "other", heldout=0.037, seed=1))[0] == 0  # seeds differ by more
    assert command(write_run(noisy(true_loss(), 1), "worse", heldout=0.041, seed=1))[0] == 1
    metrics = json.loads((far / "metrics.json").read_text())
    metrics |= {"eval/heldout_ema": 0.035, "bins": {"eval/heldout_ema": {"1-500": 0.0655, "501-1000": 0.0045}}}
    (far / "metrics.json").write_text(json.dumps(metrics))
    code, text = command(far)
    assert (code, "OFF TRACK    at the end: eval/heldout_ema 501-1000 above the band" in text) == (1, True)


def test_where_the_loss_falls_steeply_runs_may_differ_in_when(write_run):
    losses = noisy(true_loss(), 0)
    reference = reference_of(write_run(losses))
    late = losses.copy()
    late[:3] = losses[:3] * [1.1, 1.3, 1.3]
    windows = compare_curves(load(write_run(late, "late")), reference, {})
    assert windows[0].value > 1.1 * windows[0].reference
    assert windows[0].side == "in"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train__num_eval_images": 17}, r"other images \(train.num_eval_images\)"),
        ({"train__num_epochs": 4}, "the run is 320,000 images long, the reference 160,000"),
    ],
)
def test_losses_at_the_end_of_other_images_or_another_length_are_not_compared(write_run, changes, reason):
    losses = noisy(true_loss(), 0)
    reference, run = reference_of(write_run(losses)), load(write_run(losses, "other", is_finished=False, **changes))
    _, changed = compare.choose_reference({"default": reference}, run.config)
    bands, why_none = compare_ends(run, reference, changed)
    assert bands == []
    assert re.search(reason, why_none)


# ---- which reference


def test_the_reference_with_the_fewest_differing_keys_is_taken_and_they_are_listed(write_run, command):
    losses = noisy(true_loss(), 0)
    command(write_run(losses, "a"), "--save", "default")
    command(write_run(losses, "b", optimizer__lr=0.5, train__ema_decay=0.5), "--save", "far")
    run = write_run(losses, "run", optimizer__lr=0.5)
    # Where the run is made and looked at is no difference.
    OmegaConf.save(
        OmegaConf.merge(
            OmegaConf.load(run / "config.yaml"), {"runtime": {"device": "cuda"}, "train": {"sample_every": 9}}
        ),
        run / "config.yaml",
    )
    with pytest.raises(ComparisonError, match="default, far differ in 1 keys each: choose one with --reference"):
        compare.choose_reference(compare.load_references(run.parent / "refs"), load(run).config)
    code, text = command(run, "--reference", "far")
    assert code == 0
    assert "reference    far (" in text
    near = write_run(losses, "near", optimizer__lr=0.25)
    code, text = command(near)
    assert code == 0
    lr = OmegaConf.load(ROOT / "params.yaml").optimizer.lr
    assert "reference    default (" in text
    assert f"differences  optimizer.lr: {lr} there, 0.25 here\n" in text


def test_losses_of_another_data_set_or_diffusion_are_not_compared(write_run, command):
    losses = noisy(true_loss(), 0)
    run = write_run(losses)
    assert command(run) == (2, "no comparable reference: there is none at all\n")
    command(run, "--save", "default")
    for name, changes, text in (
        ("shapes", {"dataset__name": "shapes"}, 'default (dataset.name: "cifar10" there, "shapes" here)'),
        ("short", {"diffusion__num_timesteps": 20}, "default (diffusion.num_timesteps: 1000 there, 20 here)"),
    ):
        assert command(write_run(losses, name, **changes)) == (2, f"no comparable reference: {text}\n")
    assert command(run, "--reference", "other") == (2, "--reference other: unknown, there are: default\n")


# ---- making a reference


def test_a_saved_reference_is_read_as_it_was_made_and_says_where_it_comes_from(write_run, command, tmp_path):
    folder = write_run(noisy(true_loss(), 0), seed=7)
    path = tmp_path / "refs" / "mine.json"
    code, text = command(folder, "--save", "mine")
    assert (code, text) == (0, f"{path}: {json.loads(path.read_text())['command']}\n")
    reference = compare.load_references(path.parent)["mine"]
    assert reference == reference_of(folder) | {key: reference[key] for key in ("name", "command", "date")}
    assert reference["hardware"] == {"device": "x86_64", "threads": 2, "precision": "fp32", "torch": "2.15.0"}
    assert reference["config"]["seed"] == 7
    assert not {"runtime", "wandb"} & reference["config"].keys()
    assert str(tmp_path) not in path.read_text()
    assert max(map(len, path.read_text().splitlines())) < 1500


def test_the_command_of_a_reference_trains_with_its_configuration(compose_config):
    plain = lambda config: compare.comparable(OmegaConf.to_container(config))  # noqa: E731
    wanted = compose_config("model=unet", "optimizer=sgd", "optimizer.lr=1e-05", "dataset=shapes", "train.max_steps=7")
    written = compare.command_of(OmegaConf.to_container(wanted))
    words = shlex.split(written)
    assert words[:2] == ["python", "main.py"]
    assert plain(compose_config(*words[2:])) == plain(wanted)
    assert compare.command_of(OmegaConf.to_container(compose_config())) == "python main.py"


def test_what_cannot_become_a_reference_is_refused(write_run, command, tmp_path):
    losses = noisy(true_loss(), 0)
    finished = write_run(losses)
    command(finished, "--save", "taken")
    before = (tmp_path / "refs" / "taken.json").read_bytes()
    holes = [*losses[:9], None, *losses[10:]]
    for folder, name, message in (
        (finished, "taken", "exists already; choose another name or delete it"),
        (finished, "../up", "expected a name of letters, digits and . _ -"),
        (write_run(losses[:80], "b", is_finished=False), "new", "needs a finished run; this one stands at step 2,000"),
        (write_run(losses[:29], "c"), "new", "at least 30 lines in metrics.jsonl, from step 1 on, each with a loss"),
        (write_run(holes, "d"), "new", "this run has 99 of 100"),
    ):
        code, text = command(folder, "--save", name)
        assert (code, message in text) == (2, True)
    assert [path.name for path in (tmp_path / "refs").iterdir()] == ["taken.json"]
    assert (tmp_path / "refs" / "taken.json").read_bytes() == before


# ---- the script


def test_what_is_missing_damaged_or_too_early_is_said_and_ends_with_2(write_run, command, tmp_path):
    losses = noisy(true_loss(), 0)
    command(write_run(losses), "--save", "default")
    code, text = command(tmp_path / "nowhere")
    assert (code, "nowhere/config.yaml: No such file or directory; expected" in text) == (2, True)
    for name, content, message in (
        ("empty", "", "too early"),
        ("broken", '{"step": }\n', "damaged"),
        ("strange", '{"loss": 1}\n', "damaged: KeyError('step')"),
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
    assert (code, "other.json is no reference: it lacks bins, code_sha256, command" in text) == (2, True)


@pytest.mark.parametrize(
    "arguments", [("--save", "a", "--plot", "a.png"), ("--command", "make"), ("--plot", "a.pdf")], ids=" ".join
)
def test_options_that_do_not_go_together_are_refused(arguments, command, tmp_path):
    with pytest.raises(SystemExit) as ended:
        command(tmp_path, *arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_plot_shows_run_reference_and_where_it_leaves_the_band(write_run, command, tmp_path, is_finished):
    losses = noisy(true_loss(), 0)
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
    from modeling.stage import read_manifest

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
