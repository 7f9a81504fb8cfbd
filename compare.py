"""Is a run on track? Sets its losses beside those of a reference run, also while it is still training.

    python compare.py runs/<run>                                     # beside the reference of the nearest configuration
    python compare.py runs/<run> --reference default --plot compare.png
    python compare.py runs/<run> --save default                      # makes a finished run a reference

The losses are averaged over windows of equal numbers of images seen. The band is the reference's +- 5 % and 2.5
standard errors, narrower for a run of the same seed and batches. A run is off track when it leaves the band in three
windows in a row on one side, or when a loss at its end lies outside. Ends with 0 (on track), 1 (off track) or 2
(nothing to compare).
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modeling.comparison import bands as comparison
from modeling.comparison.bands import Band, ComparisonError, RunRecord, comparable
from modeling.comparison.references import choose_reference, load_references, make_reference, save_reference
from modeling.run.identity import describe_differences, differences

ROOT = Path(__file__).parent


def read_yaml(path: Path) -> dict:
    """A YAML file's values.

    Raises:
        ComparisonError: when it is missing or damaged.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ComparisonError(f"{path}: {error.strerror}; expected the folder of a run that has begun") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise ComparisonError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def command_of(config: dict) -> str:
    """The command that trains with this configuration, beside the machine's part: what differs from params.yaml."""
    default = comparable(read_yaml(ROOT / "params.yaml"))
    wanted = {  # what an older configuration does not know stays as it is
        key: value | config[key] if isinstance(value, dict) else config[key] for key, value in default.items()
    }
    changed = differences(default, comparable(wanted))
    values = {
        key: new if isinstance(new, str) else json.dumps(new, separators=(",", ":"))
        for key, (_, new) in changed.items()
    }
    return shlex.join(["python", "main.py", *(f"{key}={value}" for key, value in values.items())])


def _line(label: str, band: Band) -> str:
    value = "" if band.value is None else f"{band.value:.4g}"
    return f"{label:>22} {value:>10} {band.reference:>10.4g} {band.low:>10.4g} {band.high:>10.4g}  {band.side}".rstrip()


def _steps(band: Band, run: RunRecord) -> str:
    batch_size = run.config["train"]["batch_size"]
    return f"{band.start // batch_size + 1:,}-{min(band.end // batch_size, run.step):,}"


def describe(
    run: RunRecord, reference: dict, changed: dict, windows: list[Band], ends: list[Band], why_none: str
) -> str:
    """Run and reference side by side, without the verdict."""
    share = f" of {run.last_step:,} ({run.step / run.last_step:.0%})" if run.last_step else ""
    state, images = "finished" if run.metrics else "not finished", run.curve.edges[-1]
    speed, machine = images / run.seconds, reference["hardware"]
    allowed = comparison.tolerance(changed)
    lines = [
        f"run          step {run.step:,}{share}, {images:,.0f} images, {state}",
        f"reference    {reference['name']} ({reference['date']}), {reference['images']:,} images: "
        + reference["command"],
        f"differences  {describe_differences(changed, reference['name']) or 'none'}",
        f"speed        {speed:,.1f} images/s, {speed / reference['images_per_second']:.2f} times the reference's on "
        f"{machine['device']}, {machine['threads']} threads, {machine['precision']}, torch {machine['torch']}",
        f"band         +- {allowed.curve:.0%} and {comparison.NUM_ERRORS:g} standard errors"
        f"{' (fewer: the draws are the same)' if allowed is comparison.SAME else ''}, in quadrature; "
        f"at the end +- {allowed.end:.0%}, of a bin + {allowed.bin_of_mean:.1%} of the mean",
        f"\n{'training loss':>22} {'run':>10} {'reference':>10} {'from':>10} {'to':>10}",
        *(_line(f"steps {_steps(window, run)}", window) for window in windows),
    ]
    if images > 1.01 * reference["images"]:
        lines.append(f"the reference ends at {reference['images']:,} images: what comes later is not compared")
    if why_none:
        lines.append(f"\nlosses at the end: not compared, {why_none}")
    else:
        lines.append(f"\n{'at the end' if run.metrics else 'expected at the end':>22}")
        lines += [_line(band.name.removeprefix("eval/"), band) for band in ends]
    return "\n".join(lines)


def judge(run: RunRecord, windows: list[Band], ends: list[Band]) -> list[str]:
    """Where the run is off track, a line for each; nothing where it is on track."""
    faults = []
    if (left := comparison.first_exit(windows)) is not None:
        expected = f"{left.value:.4g} instead of {left.low:.4g} to {left.high:.4g}"
        faults.append(f"training loss {left.side} the band from steps {_steps(left, run)} on ({expected})")
    if outside := [f"{band.name} {band.side}" for band in ends if band.side not in ("", "in")]:
        faults.append(f"at the end: {', '.join(outside)} the band")
    return faults


def plot(path: Path, run: RunRecord, reference: dict, windows: list[Band], ends: list[Band]) -> None:
    """Draws the training losses with the band, and the held-out losses by timestep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    points, edges = reference["curve"], [windows[0].start, *(window.end for window in windows)]
    steps = {"edges": edges, "baseline": None}
    left.plot([point["images"] for point in points], [point["loss"] for point in points], "C0", lw=0.7)
    low, high = ([getattr(window, side) for window in windows] for side in ("low", "high"))
    left.stairs(high, edges, baseline=low, fill=True, color="C0", alpha=0.25, label="band")
    left.stairs([window.reference for window in windows], color="C0", label=f"reference: {reference['name']}", **steps)
    left.plot(run.curve.edges[1:], np.where(run.curve.counts > 0, run.curve.losses, np.nan), "C1", lw=0.7)
    left.stairs([window.value for window in windows], color="C1", lw=2, label="run", **steps)
    if (first := comparison.first_exit(windows)) is not None:
        left.axvline(first.start, color="C3", ls="--", label=f"{first.side} the band from here on")
    left.set(title=f"Training, up to step {run.step:,}", xlabel="images seen")
    left.xaxis.set_major_formatter("{x:,.0f}")

    bins = {band.name.split()[1]: band for band in ends if " " in band.name}
    low, high = (np.array([getattr(band, side) for band in bins.values()]) for side in ("low", "high"))
    right.bar(list(bins), high - low, bottom=low, color="C0", alpha=0.25, label="band")
    right.plot(list(bins), [band.reference for band in bins.values()], "C0_", ms=16, label="reference")
    if run.metrics:
        right.plot(list(bins), [band.value for band in bins.values()], "C1o", ms=5, label="run")
    right.set(title="At the end: held-out images, averaged weights", xlabel="timesteps")
    right.tick_params(axis="x", rotation=45)
    for axes in (left, right):
        axes.set(ylabel="loss (mean squared error)", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
    if not bins:  # see `compare_ends`
        right.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, such as outputs or runs/<name>")
    parser.add_argument("--reference", metavar="NAME", help="default: the one that differs in the fewest keys")
    parser.add_argument("--save", metavar="NAME", help="make this finished run a reference")
    parser.add_argument("--command", help="what --save writes down as the run's command; default: from its config.yaml")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both")
    parser.add_argument("--references", type=Path, default=ROOT / "references", metavar="FOLDER", help="where they lie")
    options = parser.parse_args()
    if options.save and (options.reference or options.plot):
        parser.error("--save compares nothing: leave out --reference and --plot")
    if options.command and not options.save:
        parser.error("--command belongs to --save")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot {options.plot}: expected a name that ends with .png")
    try:
        run = comparison.read_run(options.run, read_yaml(options.run / "config.yaml"))
        if options.save:
            command = options.command or command_of(run.config)
            reference = make_reference(run, options.save, command, datetime.date.today().isoformat())
            print(f"{save_reference(reference, options.references)}: {command}")
            return 0
        reference, changed = choose_reference(load_references(options.references), run.config, options.reference)
        windows = comparison.compare_curves(run, reference, changed)
        ends, why_none = comparison.compare_ends(run, reference, changed)
    except ComparisonError as error:
        print(error, file=sys.stderr)
        return 2
    print(describe(run, reference, changed, windows, ends, why_none))
    if options.plot:
        plot(options.plot, run, reference, windows, ends)
        print(f"\n{options.plot}")
    if faults := judge(run, windows, ends):
        print("\n" + "\n".join(f"OFF TRACK    {fault}" for fault in faults))
        return 1
    inside = sum(window.side == "in" for window in windows)
    print(
        f"\non track     {inside} of {len(windows)} windows in the band, never {comparison.NUM_ALARM} in a row outside"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
