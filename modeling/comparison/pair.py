"""Two runs beside each other: what differs in their configurations, and by how much their results do."""

import math

import numpy as np

from modeling.comparison.curves import RunRecord
from modeling.comparison.measure_rows import measure_rows
from modeling.comparison.summaries import RunSummary, as_text, differing_keys
from modeling.comparison.table import RESULTS, label_of, results_of

_OF_THE_MACHINE = (
    "data_sha256", "code_sha256", "torch", "device", "precision", "micro_batch_size", "threads", "processes",
)  # fmt: skip
_MAX_VALUE = 24


def _line(label: str, texts: tuple[str, str], difference: str = "") -> str:
    first, second = (text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…" for text in texts)
    label = label if len(label) <= 34 else label[:33] + "…"
    return f"{label:<34} {first:>{_MAX_VALUE}} {second:>{_MAX_VALUE}} {difference:>9}".rstrip()


def _number_line(label: str, pair: tuple[float | None, float | None], form: str = ".5g") -> str:
    first, second = pair
    difference = "" if not first or second is None else f"{(second - first) / abs(first):+.1%}"
    texts = tuple("" if value is None else format(value, form) for value in pair)
    return _line(label, (texts[0], texts[1]), difference)


def _training_loss(first: RunRecord | None, second: RunRecord | None) -> list[str]:
    """Both runs' mean over the last tenth of the images that both have seen."""
    if first is None or second is None:
        return []
    end = min(first.curve.edges[-1], second.curve.edges[-1])
    edges = np.array([0.9 * end, end])
    a, b = (float(record.curve.average(edges)[0][0]) for record in (first, second))
    pair = (None if math.isnan(a) else a, None if math.isnan(b) else b)
    return [_number_line(f"train/loss, images {edges[0]:,.0f}-{end:,.0f}", pair)]


def describe_pair(first: RunSummary, second: RunSummary) -> str:
    """Both runs, in at most 100 signs a line; the last column is the second's number beside the first's."""
    pair, facts = (first, second), ({}, {})
    if first.metrics and second.metrics:
        facts = tuple({key: run.metrics.get(key) for key in _OF_THE_MACHINE} for run in pair)
    values = [first.values | facts[0], second.values | facts[1]]
    differing = differing_keys(values)
    lines = [f"A  {label_of(first)}", f"B  {label_of(second)}", "", _line("", ("A", "B"))]
    lines.append(_line("state", (first.state, second.state)))
    steps = [run.record.step if run.record else 0 for run in pair]
    lines += [_number_line("steps", (steps[0], steps[1]), ",.0f"), "", "what differs"]
    for key in differing:
        lines.append(_line(key, (as_text(values[0].get(key)), as_text(values[1].get(key)))))
    lines += [*([] if differing else ["nothing"]), "", _line("results", ("", ""), "B to A")]
    a, b = results_of(first), results_of(second)
    for key, (_, form) in RESULTS.items():
        if key in a or key in b:
            lines.append(_number_line(key, (a.get(key), b.get(key)), form))
    lines += _training_loss(first.record, second.record)
    for row in measure_rows([run.measures for run in pair]):
        if row["cells"].keys() == {0, 1}:
            lines.append(_number_line(row["name"], (row["cells"][0]["total"], row["cells"][1]["total"])))
    if other := [key for key in differing if key.startswith(("dataset.", "train.num_eval_images", "data_sha256"))]:
        lines += ["", f"the losses at the end may be of other images ({', '.join(other)})"]
    return "\n".join(lines + [f"{run.folder}: {run.state}: {run.problem}" for run in pair if run.problem])
