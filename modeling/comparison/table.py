"""The table of runs: what differs in their configurations and what they measured, as text and as CSV."""

import csv
import io
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modeling.comparison.measure_rows import measure_rows
from modeling.comparison.summaries import RunSummary, as_text, differing_keys, order, telling_keys
from modeling.system.errors import UserError
from modeling.system.overrides import nearest

WIDTH = 100  # of the text; more in a wider terminal
_MAX_VALUE, _MIN_NAME, _NAME_END, _GAP = 14, 14, 5, "  "

# The numbers of metrics.json in the order of the table: title in the text (empty: in CSV only) and form there.
RESULTS = {
    "train/loss_smoothed": ("train", "#.4g"),
    "eval/heldout_ema": ("held-out", "#.4g"),
    "eval/heldout_raw": ("", "#.4g"),
    "eval/train_ema": ("", "#.4g"),
    "eval/train_raw": ("", "#.4g"),
    "eval/heldout_linear": ("", "#.4g"),
    "seconds": ("seconds", ",.0f"),
    "images_per_second": ("img/s", ",.0f"),
    "images": ("", ",.0f"),
    "skipped_steps": ("", ",.0f"),
    "parameters": ("", ",.0f"),
    "memory_bytes": ("", ",.0f"),
}
# Of what evaluate.py measures the text has the bound that docs/results.md gives, and the distances.
_MEASURES = {"bits_per_dim: large, clipped": "bits/dim", "fid: fid": "FID", "encoder/frechet_distance": "FD"}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        key: its name in the CSV file and for `--sort`; empty where that leaves it out.
        title: its name in the text; empty where the text leaves it out.
        values: one for each run; None where there is none.
        form: of a number in the text.
        is_setting: whether it is of the configuration.
    """

    key: str
    title: str
    values: list[Any]
    form: str = ""
    is_setting: bool = False

    @property
    def texts(self) -> list[str]:
        """Title and values, as the text has them."""
        return [self.title, *("" if value is None else self._shown(value) for value in self.values)]

    def _shown(self, value: Any) -> str:
        text = format(value, self.form) if self.form else as_text(value)
        if self.is_setting and isinstance(value, float):
            text = min(text, format(value, ".4g"), key=len)  # a drawn value has 16 digits
        is_long = self.is_setting and len(text) > _MAX_VALUE
        return text[: _MAX_VALUE - 1] + "…" if is_long else text

    @property
    def width(self) -> int:
        return max(map(len, self.texts))

    def lines(self, width: int) -> list[str]:
        """The texts, as wide as this; of a longer one beginning and end stay: a name, and some of the hash."""
        begin = width - 1 - _NAME_END
        texts = [text if len(text) <= width else f"{text[:begin]}…{text[-_NAME_END:]}" for text in self.texts]
        is_number = all(isinstance(value, int | float | None) for value in self.values)
        return [text.rjust(width) if is_number else text.ljust(width) for text in texts]


@dataclass(frozen=True)
class Table:
    """Runs, one a line.

    Args:
        columns: the last one is the name.
        notes: what a title does not say.
    """

    columns: list[Column]
    notes: list[str]

    def sorted_by(self, key: str, *, descending: bool = False) -> "Table":
        """The same runs in the order of a column, given by its key or title; those without a value come last.

        Raises:
            UserError: for an unknown column.
        """
        found = next((column.values for column in self.columns if key in (column.key, column.title)), None)
        if found is None:
            known = [name for column in self.columns for name in (column.key, column.title) if name]
            raise UserError(f"--sort {key}: no such column; the nearest one is {nearest(key, known)}")
        places = [place for place, value in enumerate(found) if value is not None]
        places.sort(key=lambda place: order(found[place]), reverse=descending)
        places += [place for place, value in enumerate(found) if value is None]
        columns = [replace(column, values=[column.values[place] for place in places]) for column in self.columns]
        return replace(self, columns=columns)

    def describe(self) -> str:
        """As text: where the width is too small, the name is shortened, then settings are left out and named below."""
        *columns, name = (column for column in self.columns if column.title and any(column.texts[1:]))
        notes, left_out = list(self.notes), []
        room = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        while (used := sum(column.width + len(_GAP) for column in columns)) > room - min(name.width, _MIN_NAME):
            last = ([column for column in columns if column.is_setting] or columns)[-1]
            columns.remove(last)
            left_out.insert(0, last.key)
        if left_out:
            notes.append(f"too wide, in --csv only: {', '.join(left_out)}")
        parts = [column.lines(column.width) for column in columns] + [name.lines(min(name.width, room - used))]
        lines = [_GAP.join(line).rstrip() for line in zip(*parts, strict=True)]
        return "\n".join([*lines, "", *notes] if notes else lines)

    def as_csv(self) -> str:
        """Every column that has a key, with whole values."""
        columns = [column for column in self.columns if column.key]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column.key for column in columns)
        for row in zip(*(column.values for column in columns), strict=True):
            writer.writerow("" if value is None else as_text(value) for value in row)
        return file.getvalue()


# ---- from runs to columns


def results_of(run: RunSummary) -> dict[str, float | None]:
    """The numbers of RESULTS: metrics.json's, or before a run's end what its last line says."""
    record = run.record
    if record is None:
        return {}
    images = float(record.curve.edges[-1])
    so_far = {
        "train/loss_smoothed": record.loss_smoothed,
        "seconds": record.seconds,
        "images_per_second": images / record.seconds if record.seconds else None,
        "images": images,
    }
    return so_far | {key: run.metrics[key] for key in RESULTS if key in run.metrics}


def label_of(run: RunSummary) -> str:
    """Its folder, without runs/; after the name that it was given, if the folder has another."""
    folder = run.folder.relative_to("runs") if run.folder.is_relative_to("runs") else run.folder
    return str(folder) if run.name is None or run.name in folder.name else f"{run.name} {folder}"


def _state(run: RunSummary) -> str:
    """The state, and how much is done where that is not all."""
    if run.metrics or run.record is None or not run.record.last_step:
        return run.state
    return f"{run.state} {run.record.step / run.record.last_step:.0%}"


def _settings(runs: Sequence[RunSummary]) -> list[Column]:
    """What differs in the configurations; the text has what tells the runs apart, what takes most values first."""
    values = [run.compared for run in runs]
    telling = sorted(telling_keys(values), key=lambda key: -len({as_text(one.get(key)) for one in values}))
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in telling}
    titles = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    keys = telling + [key for key in differing_keys(values) if key not in telling]
    return [Column(key, titles.get(key, ""), [one.get(key) for one in values], is_setting=True) for key in keys]


def _measures(runs: Sequence[RunSummary]) -> tuple[list[Column], list[str]]:
    """A column for each number and everything that it depends on; notes say what tells two of one name apart."""
    rows = measure_rows([run.measures for run in runs])
    counts, seen, columns, notes = Counter(row["name"] for row in rows), Counter[str](), [], []
    for row in rows:
        key = name = row["name"]
        title = _MEASURES.get(name, "")
        if counts[name] > 1:
            seen[name] += 1
            parts = differing_keys([one["identity"] for one in rows if one["name"] == name])
            how = ", ".join(f"{part} {as_text(row['identity'].get(part))}" for part in parts)
            key = f"{name} ({how})"
            if title:
                title = f"{title} {seen[name]}"
                notes.append(f"{title}: {how}")
        values = [row["cells"][place]["total"] if place in row["cells"] else None for place in range(len(runs))]
        columns.append(Column(key, title, values, "#.4g"))
    return columns, notes


def make_table(runs: Sequence[RunSummary]) -> Table:
    """The table of these runs, in this order."""
    results, records = [results_of(run) for run in runs], [run.record for run in runs]
    losses_and_speeds = [
        Column(key, title, [found.get(key) for found in results], form) for key, (title, form) in RESULTS.items()
    ]
    speed_at = [column.key for column in losses_and_speeds].index("seconds")
    measures, notes = _measures(runs)
    columns = [
        *_settings(runs),
        Column("state", "", [run.state for run in runs]),
        Column("", "state", [_state(run) for run in runs]),
        Column("steps", "steps", [record and record.step for record in records], ",.0f"),
        Column("last_step", "", [record and record.last_step for record in records]),
        *losses_and_speeds[:speed_at],
        *measures,
        *losses_and_speeds[speed_at:],
        Column("folder", "", [str(run.folder) for run in runs]),
        Column("name", "name", [label_of(run) for run in runs]),
    ]
    return Table(columns, notes)
