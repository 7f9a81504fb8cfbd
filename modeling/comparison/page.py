"""One self-contained page of one run or many: no network, no account, and nothing in a run's name can run."""

import base64
import datetime
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from modeling.comparison.charts import KINDS, Spec, bins_chart, colour_of, line_chart, loss_chart
from modeling.comparison.measure_rows import measure_rows
from modeling.comparison.page_runs import PageRun, read_page_run, rounded
from modeling.comparison.references import load_references
from modeling.comparison.summaries import RunSummary, as_text, differing_keys, telling_keys
from modeling.run.identity import ROOT
from modeling.system.files import write_atomically

_HERE = Path(__file__).parent
_CAPTIONS = {
    "neighbours": "samples (left), each with its nearest training images",
    "samples": "samples that were measured",
    "path": "denoising: from noise to image",
    "between": "images between two samples",
}


@functools.cache
def libraries() -> str:
    """Vega, Vega-Lite and vega-embed, 0.9 MB; it takes a second."""
    return vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]  # stubs lack the default


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A table in a third of the space."""
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else {})}


def _labels(runs: list[PageRun], telling: list[str]) -> list[str]:
    """The name that a run was given, else what tells it from the others, else its folder's."""
    labels = []
    for number, run in enumerate(runs, start=1):
        parts = [(key.rpartition(".")[2], as_text(run.compared.get(key))) for key in telling]
        short = ", ".join(text if name == "name" else f"{name} {text}" for name, text in parts)
        label = run.name or short or run.folder.resolve().name
        labels.append(f"{number} · {label if len(label) <= 60 else label[:59] + '…'}" if len(runs) > 1 else label)
    return labels


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _row(run: PageRun, number: int, label: str, telling: list[str]) -> dict[str, Any]:
    """A run in the table of runs."""
    record, share = run.record, ""
    if record is not None:
        done = record.last_step and f" of {record.last_step:,}"
        share = f"{record.step:,}{done or ''}"
    last = run.lines[-1] if run.lines else {}
    speed = record.curve.edges[-1] / record.seconds if record is not None and record.seconds else None
    return {
        "number": number,
        "label": label,
        "colour": colour_of(number),
        "values": [as_text(run.compared.get(key)) for key in telling],
        "state": run.state,
        "steps": share,
        "loss": _number(last.get("smoothed")),
        "heldout": _number(run.metrics.get("eval/heldout_ema")),
        "seconds": _number(record and record.seconds, ",.0f"),
        "speed": _number(speed, ",.0f"),
        "folder": str(run.folder),
        "reference": _beside(run),
        "problem": run.problem,
        "note": run.problem or run.verdict,
        "command": run.command,
        "grids": run.grids,
        "pictures": [(one, _CAPTIONS.get(one.name, one.name)) for one in run.pictures],
    }


def _beside(run: PageRun) -> str:
    """The run beside its reference, in a few words."""
    if run.comparison is None:
        return "none"
    return f"{run.comparison.reference['name']}: {'on track' if run.is_on_track else 'OFF TRACK'}"


def _bins(run: PageRun, number: int) -> list[dict[str, Any]]:
    """The held-out losses by timestep; t is the middle of a range."""
    rows = []
    for kind in KINDS:
        found = run.metrics.get("bins", {}).get(f"eval/heldout_{kind}", {})
        ranges = {key: [int(part) for part in key.split("-")] for key in found}
        last = max((ends[-1] for ends in ranges.values()), default=1)
        for key, loss in found.items():
            t = (ranges[key][0] + ranges[key][-1]) / 2 / last
            rows.append({"run": number, "kind": kind, "timesteps": key, "t": rounded(t), "loss": rounded(loss)})
    return rows


def _bands(runs: list[PageRun], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The band of each reference, in the windows of the run that has come furthest beside it.

    A band that reaches to 0, which a logarithm cannot show, ends at the least loss of the lines.
    """
    windows, least = {}, min((line["loss"] for line in lines if line["loss"] is not None), default=0)
    for run in runs:
        if run.comparison is not None:
            name, found = run.comparison.reference["name"], run.comparison.windows
            if name not in windows or found[-1].end > windows[name][-1].end:
                windows[name] = found
    return [
        {
            "name": name, "start": window.start, "end": window.end, "reference": rounded(window.reference),
            "low": rounded(window.low or min(least, window.reference)), "high": rounded(window.high),
        }
        for name, found in windows.items()
        for window in found
    ]  # fmt: skip


def _charts(labels: list[str], datasets: dict[str, list[dict[str, Any]]]) -> dict[str, Spec]:
    """The charts for which there is data; each one's description names its last values."""

    def ends(rows: list[dict[str, Any]], field: str) -> str:
        last = {row["run"]: row[field] for row in rows if row[field] is not None}
        return "; ".join(f"{labels[number]}: {value:.4g}" for number, value in last.items())

    lines, bins, charts = datasets["lines"], datasets["bins"], {}
    if lines:
        about = f"Training loss against images seen. Last smoothed losses: {ends(lines, 'smoothed')}"
        charts["loss"] = loss_chart(len(labels), about, has_band=bool(datasets["band"]))
        for field, title in (("lr", "learning rate"), ("speed", "images/s")):
            about = f"{title} against images seen. Last values: {ends(lines, field)}"
            charts[field] = line_chart(len(labels), field, title, about)
    if bins:
        charts["bins"] = bins_chart(len(labels), "Held-out loss by timestep; the totals are in the table of measures.")
    return charts


def _inputs(runs: list[PageRun]) -> list[str]:
    """Training images, one picture of each data set."""
    found = {}
    for run in runs:
        for one in run.inputs:
            found.setdefault(run.compared.get("dataset.name"), one.address)
    return list(found.values())


def render_page(runs: list[PageRun]) -> str:
    """The page's text."""
    telling = telling_keys([run.compared for run in runs])
    labels = _labels(runs, telling)
    lines = [{"run": number, **line} for number, run in enumerate(runs) for line in run.lines]
    for line in lines:  # a logarithm's axis has no place for others
        line |= {key: None for key in ("loss", "smoothed") if (line[key] or 0) <= 0}
    bins = [row for number, run in enumerate(runs) for row in _bins(run, number) if (row["loss"] or 0) > 0]
    datasets = {"lines": lines, "bins": bins, "band": _bands(runs, lines)}
    steps = {one.step for run in runs for grids in run.grids.values() for one in grids}
    keys = sorted({key for run in runs for key in run.values})
    changed = differing_keys([run.values for run in runs])
    charts = _charts(labels, datasets)
    scripts = [libraries(), (_HERE / "page.js").read_text()]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html").render(
        runs=[_row(run, number, labels[number], telling) for number, run in enumerate(runs)],
        title=f"{len(runs)} runs" if len(runs) > 1 else labels[0],
        written=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        telling=telling,
        charts=charts,
        has_band=bool(datasets["band"]),
        steps=sorted(steps),
        inputs=_inputs(runs),
        measures=measure_rows([run.numbers for run in runs]),
        changed=[(key, [as_text(run.values.get(key)) for run in runs]) for key in changed],
        same=[(key, as_text(runs[0].values.get(key))) for key in keys if key not in changed],
        data={
            "charts": charts,
            "labels": labels,
            "tables": {name: _columns(rows) for name, rows in datasets.items()},
            "steps": sorted(steps),
        },
        scripts=scripts,
        policy=" ".join(f"'sha256-{digest}'" for digest in hashes),
        style=(_HERE / "page.css").read_text(),
    )


def write_page(runs: list[RunSummary], out: Path, references: Path = ROOT / "references") -> None:
    """Writes the page of these runs, in this order, each beside the nearest reference in that folder.

    Raises:
        UserError: if a file of a run is damaged.
        OSError: if a file cannot be read or the page cannot be written.
    """
    loaded = load_references(references)
    write_atomically(out, render_page([read_page_run(run, loaded) for run in runs]).encode())
