"""A comparison as text, as a verdict and as a picture."""

from pathlib import Path

import numpy as np

from modeling.comparison.bands import NUM_ALARM, NUM_ERRORS, SAME_DRAWS, Band, Comparison, first_exit, tolerance
from modeling.comparison.curves import RunRecord
from modeling.comparison.literature import describe_literature
from modeling.comparison.references import BINS, CEILING
from modeling.run.identity import describe_differences


def _line(label: str, band: Band, ceiling: float | None = None) -> str:
    value, linear = ("" if number is None else f"{number:.4g}" for number in (band.value, ceiling))
    numbers = f"{value:>10} {band.reference:>10.4g} {band.low:>10.4g} {band.high:>10.4g}"
    return f"{label:>22} {numbers}  {band.side:<5} {linear:>10}".rstrip()


def ceilings(comparison: Comparison) -> dict[str, float]:
    """The best linear denoiser's loss beside the averaged weights' at the end, by the name of the band.

    Empty where neither file knows it, as those of older runs.
    """
    metrics, reference = comparison.run.metrics or {}, comparison.reference
    bins = metrics.get("bins", {}).get(CEILING) or reference["bins"].get(CEILING, {})
    found = {f"{BINS} {key}": loss for key, loss in bins.items()}
    return found | ({BINS: metrics[CEILING]} if CEILING in metrics else {})


def _steps(band: Band, run: RunRecord) -> str:
    batch_size = run.config["train"]["batch_size"]
    return f"{band.start // batch_size + 1:,}-{min(band.end // batch_size, run.step):,}"


def describe(comparison: Comparison) -> str:
    """Run and reference side by side, without the verdict."""
    run, reference, changed = comparison.run, comparison.reference, comparison.changed
    share = f" of {run.last_step:,} ({run.step / run.last_step:.0%})" if run.last_step else ""
    state, images = "finished" if run.metrics else "not finished", run.curve.edges[-1]
    speed, machine = images / run.seconds, reference["hardware"]
    allowed = tolerance(changed)
    lines = [
        f"run          step {run.step:,}{share}, {images:,.0f} images, {state}",
        f"reference    {reference['name']} ({reference['date']}), {reference['images']:,} images: "
        + reference["command"],
        f"differences  {describe_differences(changed, reference['name']) or 'none'}",
        f"speed        {speed:,.1f} images/s, {speed / reference['images_per_second']:.2f} times the reference's on "
        f"{machine['device']}, {machine['threads']} threads, {machine['precision']}, torch {machine['torch']}",
        f"band         +- {allowed.curve:.0%} and {NUM_ERRORS:g} standard errors"
        f"{' (fewer: the draws are the same)' if allowed is SAME_DRAWS else ''}, in quadrature; "
        f"at the end +- {allowed.end:.0%}, of a bin + {allowed.bin_of_mean:.1%} of the mean",
        f"\n{'training loss':>22} {'run':>10} {'reference':>10} {'from':>10} {'to':>10}",
        *(_line(f"steps {_steps(window, run)}", window) for window in comparison.windows),
    ]
    if images > 1.01 * reference["images"]:
        lines.append(f"the reference ends at {reference['images']:,} images: what comes later is not compared")
    if comparison.why_no_ends:
        lines.append(f"\nlosses at the end: not compared, {comparison.why_no_ends}")
    else:
        linear = ceilings(comparison)
        title = f"{'linear':>62}" if linear else ""
        lines.append(f"\n{'at the end' if run.metrics else 'expected at the end':>22}{title}")
        lines += [_line(band.name.removeprefix("eval/"), band, linear.get(band.name)) for band in comparison.ends]
    return "\n".join(lines + describe_literature(run))


def judge(comparison: Comparison) -> tuple[bool, str]:
    """Whether the run is on track, and the verdict in words: a line for each fault."""
    windows, faults = comparison.windows, []
    if (left := first_exit(windows)) is not None:
        expected = f"{left.value:.4g} instead of {left.low:.4g} to {left.high:.4g}"
        faults.append(f"training loss {left.side} the band from steps {_steps(left, comparison.run)} on ({expected})")
    if outside := [f"{band.name} {band.side}" for band in comparison.ends if band.side not in ("", "in")]:
        faults.append(f"at the end: {', '.join(outside)} the band")
    if faults:
        return False, "\n".join(f"OFF TRACK    {fault}" for fault in faults)
    inside = sum(window.side == "in" for window in windows)
    return True, f"on track     {inside} of {len(windows)} windows in the band, never {NUM_ALARM} in a row outside"


def plot(comparison: Comparison, path: Path) -> None:
    """Draws the training losses with the band, and the held-out losses by timestep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    run, reference, windows = comparison.run, comparison.reference, comparison.windows
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    points, edges = reference["curve"], [windows[0].start, *(window.end for window in windows)]
    steps = {"edges": edges, "baseline": None}
    left.plot([point["images"] for point in points], [point["loss"] for point in points], "C0", lw=0.7)
    low, high = [window.low for window in windows], [window.high for window in windows]
    left.stairs(high, edges, baseline=low, fill=True, color="C0", alpha=0.25, label="band")
    left.stairs([window.reference for window in windows], color="C0", label=f"reference: {reference['name']}", **steps)
    left.plot(run.curve.edges[1:], np.where(run.curve.counts > 0, run.curve.losses, np.nan), "C1", lw=0.7)
    left.stairs([window.value for window in windows], color="C1", lw=2, label="run", **steps)
    if (first := first_exit(windows)) is not None:
        left.axvline(first.start, color="C3", ls="--", label=f"{first.side} the band from here on")
    left.set(title=f"Training, up to step {run.step:,}", xlabel="images seen")
    left.xaxis.set_major_formatter("{x:,.0f}")

    bins = {band.name.split()[1]: band for band in comparison.ends if " " in band.name}
    low, high = np.array([band.low for band in bins.values()]), np.array([band.high for band in bins.values()])
    right.bar(list(bins), high - low, bottom=low, color="C0", alpha=0.25, label="band")
    right.plot(list(bins), [band.reference for band in bins.values()], "C0_", ms=16, label="reference")
    if run.metrics:
        right.plot(list(bins), [band.value for band in bins.values()], "C1o", ms=5, label="run")
    if linear := ceilings(comparison):
        values = [linear.get(band.name) for band in bins.values()]
        right.plot(list(bins), values, "k_", ms=16, label="best linear denoiser")
    right.set(title="At the end: held-out images, averaged weights", xlabel="timesteps")
    right.tick_params(axis="x", rotation=45)
    for axes in (left, right):
        axes.set(ylabel="loss (mean squared error)", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
    if not bins:  # the losses at the end are not compared
        right.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
