"""The training loop of a run: next batch, step, log line, checkpoint, samples."""

from tqdm import tqdm

from modeling.run.objects import Run
from modeling.run.records import Tracker
from modeling.system.progress import progress_bar
from modeling.system.signals import uninterrupted


class Training:
    """Trains a run from its present state to its last step.

    Args:
        run: the objects of the run.
        tracker: gets the log lines and the grids.
    """

    def __init__(self, run: Run, tracker: Tracker):
        self.run, self.tracker, self.state = run, tracker, run.state
        self.step, self.books = run.make_step(), run.make_books()

    def fit(self) -> None:
        """Trains, logs, saves and samples.

        Raises:
            FloatingPointError: for too many steps in a row whose loss or gradient is not finite. Losses stay on the
                device until the next log line, so it may come up to `train.log_every` steps later.
            Stopped: when the process is asked to end; `state` then is that of the last whole step.
        """
        run, state, books = self.run, self.state, self.books
        steps = range(state.step, run.last_step)
        # One loader for the whole run, so workers neither idle nor restart between epochs.
        loader = run.batches.loader(steps, run.config.runtime.num_workers, run.device)
        run.model.train()
        with progress_bar(total=run.last_step, initial=state.step, unit="step", desc="training") as bar:
            if self.is_sample_due:  # a run may have been stopped between a step and the samples that are due after it
                self.sample()
            for images in loader:
                loss = self.step.backward(images)
                with uninterrupted():  # a stopped run is always between two steps
                    books.count_step(self.step.update(loss), len(images))
                    if books.is_line_due:
                        self.log(bar)
                    if books.is_checkpoint_due:
                        self.save()
                bar.update()
                if self.is_sample_due:
                    self.sample()

    @property
    def is_sample_due(self) -> bool:
        epoch, steps_into_epoch = divmod(self.state.step, self.run.batches.steps_per_epoch)
        is_edge = epoch > 0 and steps_into_epoch == 0 and epoch % self.run.config.train.sample_every == 0
        return is_edge or self.state.step == self.run.last_step

    def log(self, bar: tqdm) -> None:
        """Writes a log line, and shows it at the bar."""
        line = self.books.make_line(self.step.learning_rate(self.state.step - 1))
        with self.books.clock.paused():
            self.tracker.log(self.state.step, line)
            bar.set_postfix_str(
                f"epoch {line['epoch']}, loss {line['train/loss_smoothed']:.4f}, "
                f"lr {line['train/lr']:.1e}, {line['images_per_second']:.0f} images/s"
                + (f", {line['train/skipped']} skipped" if line["train/skipped"] else ""),
                refresh=False,
            )

    def save(self) -> None:
        """Writes a checkpoint of the state between two steps, after the log lines of the steps that it covers."""
        with self.books.clock.paused():
            self.books.collect_losses()
            self.step.store_loss_scale()
            self.tracker.sync()
            self.run.save()
            self.books.note_checkpoint()

    def sample(self) -> None:
        """Writes the grids of this step."""
        with self.books.clock.paused():
            self.run.sample(self.tracker)
