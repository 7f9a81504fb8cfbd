"""Which measures are to be taken, and their order: what `evaluation.json` holds already is not measured again."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from modeling.measures.evaluation_file import FILE, Record, is_of, read_records
from modeling.measures.network_measures import BitsMeasure, LossMeasure, OptimalBitsMeasure
from modeling.measures.sample_measures import EncoderMeasure, InceptionMeasure
from modeling.measures.solver_error import SolverMeasure
from modeling.measures.subject import Subject
from modeling.system.errors import UserError
from modeling.system.files import locked, write_json


class Measure(Protocol):
    """A measure of a subject, ready to be taken."""

    identity: dict[str, Any]  # everything that its numbers depend on, up to rounding, as far as it is known before

    def take(self) -> Record: ...


MEASURES: dict[str, Callable[[Subject], Measure]] = {
    "bits_per_dim": BitsMeasure,
    "bits_optimal": OptimalBitsMeasure,
    "heldout_loss": LossMeasure,
    "train_loss": partial(LossMeasure, split="train"),
    "solver_error": SolverMeasure,
    "encoder": EncoderMeasure,
    "fid": InceptionMeasure,
}


def take_measures(subject: Subject) -> Iterator[tuple[str, Record]]:
    """Takes the measures that the options name and the folder's file does not hold; writes each as soon as it is taken.

    Several processes share a measure's batches; all have its record, and process 0 writes it.

    Yields:
        Name and record of every measure that the options name.

    Raises:
        UserError: before anything is measured, where the file holds one of them of another model or with other
            options, or a measure's files are missing or damaged; also as the measures do.
        LockedError: when another process works in the folder.
    """
    folder, options, processes = subject.folder, subject.options, subject.trained.processes
    with processes.first():  # which may download Inception's weights
        measures = {name: MEASURES[name](subject) for name in options.measures}
    path = folder / FILE
    with locked(folder / "lock") if processes.rank == 0 else contextlib.nullcontext():
        records = processes.once(lambda: read_records(path))
        held = [name for name in measures if name in records]
        done = [name for name in held if is_of(records[name], measures[name].identity)]
        other = [name for name in held if name not in done]
        if other and not options.overwrite:
            raise UserError(
                f"out={options.out}: holds {', '.join(other)} of another model or with other options; name another "
                "folder or set overwrite=true, which replaces these and keeps the rest"
            )
        if any("samples" in measures[name].identity for name in measures if name not in done):
            subject.samples.held()  # or an error, before anything is measured
        for name, measure in measures.items():
            if name not in done:
                records[name] = measure.take()
                if processes.rank == 0:
                    write_json(path, records)
                    shutil.rmtree(folder / f"{name}.partial", ignore_errors=True)
            yield name, records[name]
