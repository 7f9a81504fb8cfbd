"""The training loop of a run: next batch, step, log line, checkpoint, samples."""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from modeling.run.bookkeeping import describe_line
from modeling.run.objects import Run
from modeling.run.records import Tracker
from modeling.system.progress import progress_bar
from modeling.system.signals import Stopped, uninterrupted


class Training:
    """Trains a run from its present state to its last step.

    Args:
        run: the objects of the run.
        tracker: gets the log lines and the grids; None in a process that shares the work and writes nothing.
    """

    def __init__(self, run: Run, tracker: Tracker | None):
        self.run, self.tracker, self.state = run, tracker, run.state
        self.step, self.books = run.make_step(), run.make_books()

    def fit(self) -> None:
        """Trains, logs, saves and samples.

        Raises:
            FloatingPointError: for too many steps in a row whose loss or gradient is not finite. Losses stay on the
                device until the next log line, so it may come up to `train.log_every` steps later.
            Stopped: when the process is asked to end; `state` then is that of the last whole step.
        """
        run, state, step, books = self.run, self.state, self.step, self.books
        # One loader for the whole run, so workers neither idle nor restart between epochs.
        loader = run.batches.loader(range(state.step, run.last_step), run.config.runtime.num_workers, run.device)
        run.model.train()
        with progress_bar(total=run.last_step, initial=state.step, unit="step", desc="training") as bar:
            if books.are_samples_due:  # a run may have been stopped between a step and the samples due after it
                self.sample()
            for images in loader:
                loss = step.backward(images)
                with uninterrupted():  # a stopped run is always between two steps
                    is_late = self.tracker is not None and books.is_checkpoint_late
                    if is_late:  # by the clock of the process that writes, so the others hear of it with the step
                        step.processes.announce_pause()
                    books.count_step(step.update(loss), run.batches.batch_size)
                    if books.is_line_due:
                        self.log(bar)
                    if books.is_checkpoint_due or is_late:
                        self.save()
                bar.update()
                if books.are_samples_due:
                    self.sample()

    def log(self, bar: tqdm) -> None:
        """Writes a log line and shows it beside the bar."""
        line = self.books.make_line(self.step.learning_rate(self.state.step - 1))
        if self.tracker is None:
            return
        with self.books.clock.paused():
            self.tracker.log(self.state.step, line)
            bar.set_postfix_str(describe_line(line), refresh=False)

    def save(self) -> None:
        """Writes a checkpoint of the state between two steps, after the log lines of the steps that it covers."""
        self.step.processes.expect_pause()
        if self.tracker is None:
            return
        self.books.count_time()
        with self.books.clock.paused():
            self.books.collect_losses()
            self.step.store_loss_scale()
            self.tracker.sync()
            self.run.save()
            self.books.note_checkpoint()

    @contextlib.contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """When the section is stopped, saves the state, and says where it is."""
        try:
            yield
        except Stopped as stopped:
            run, at = self.run, "no step was done yet"
            if run.state.step:
                self.step.processes.hold()
                self.save()
                at = f"saved at step {run.state.step:,} of {run.last_step:,} in {run.folder.last_checkpoint}"
            print(f"stopped by {stopped.reason}: {at}; the same command resumes it", flush=True)
            raise

    def sample(self) -> None:
        """Samples the grids of this step, which the processes share."""
        with self.books.clock.paused():
            self.run.sample(self.tracker)
