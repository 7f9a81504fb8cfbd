"""Prepared uint8 arrays become training batches; a batch is a function of (seed, step)."""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modeling.seeding import Purpose, draw_integers, draw_permutation
from modeling.system.errors import UserError
from modeling.system.files import naming, sampled_sha256_of, sha256_of
from modeling.system.reading import read_array

if TYPE_CHECKING:  # its module imports OmegaConf, which training does not need
    from modeling.stage import Manifest

WAIT_SECONDS, MAX_WAITS = 5, 60  # for a batch of the loader workers, which takes milliseconds


class Batches(Dataset):
    """Training batches numbered by step: item k is the batch of step k, counted from 0 over the whole run.

    Every epoch has its own order and leaves out the last images that do not fill a batch. A batch depends on the seed
    and the step alone, so any loader with any number of workers can start at any step.

    Args:
        images: (N, C, H, W) uint8; the batches are on the same device.
        batch_size: images a batch, at most N.
        seed: the run's seed.
        random_flip: mirrors half of the images of a batch, left to right.
        rows: of the batch, those that an item has; None for all. They are then the same images with the same flips.

    Raises:
        UserError: for a batch_size outside 1..N.
    """

    def __init__(
        self, images: Tensor, batch_size: int, seed: int, random_flip: bool = False, rows: range | None = None
    ):
        if not 1 <= batch_size <= len(images):
            raise UserError(f"train.batch_size must be in 1..{len(images)} (the training images), got {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.random_flip = random_flip
        self.rows = rows or range(batch_size)
        self.steps_per_epoch = len(images) // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> Tensor:
        """(len(rows), C, H, W) uint8."""
        return self.take(step, self.rows)

    def take(self, step: int, rows: range) -> Tensor:
        """These rows of the batch of a step, (len(rows), C, H, W) uint8."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = draw_permutation(self.seed, epoch, len(self.images)).to(self.images.device)
            self._epoch = epoch
        start = position * self.batch_size
        batch = self.images[self._order[start + rows.start : start + rows.stop]]
        if self.random_flip:
            indices = torch.arange(rows.start, rows.stop)
            is_flipped = draw_integers(self.seed, Purpose.FLIP, step, indices, 2).bool()
            is_flipped = is_flipped.to(batch.device, non_blocking=True)
            batch = torch.where(is_flipped[:, None, None, None], batch.flip(-1), batch)
        return batch

    def loader(
        self, steps: Sequence[int], num_workers: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """Yields the batches of these steps, in this order, pinned for the copy to a CUDA device.

        Raises:
            UserError: when loader workers die or deliver nothing for minutes, as they do without shared memory.
        """
        pin_memory = torch.device(device).type == "cuda" and self.images.device.type == "cpu"
        timeout = WAIT_SECONDS if num_workers else 0
        # Forked, they share the images; started otherwise, as from Python 3.14 on, each would get a copy.
        context = "fork" if num_workers and sys.platform == "linux" else None
        loader = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=num_workers, pin_memory=pin_memory, timeout=timeout,
            multiprocessing_context=context,
        )  # fmt: skip
        with naming(f"runtime.num_workers={num_workers}"):  # no room for a semaphore, or no further process
            batches, num_waits = iter(loader), 0
        if num_workers:  # torch's handler would raise wherever we are when a worker dies; a wait finds it, too
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, EOFError, ConnectionError) as error:
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                    raise
                is_late, num_waits = "timed out" in str(error), num_waits + 1
                if is_late and num_waits < MAX_WAITS:  # many short waits: one is over at once after a suspension
                    continue
                what = f"delivered nothing for {MAX_WAITS * WAIT_SECONDS:g} s" if is_late else "died"
                raise UserError(
                    f"the loader workers {what}, probably for lack of shared memory: give the container more "
                    "(docker run --shm-size=1g), or set runtime.num_workers=0"
                ) from error
            num_waits = 0
            yield batch


def load_images(folder: str | Path, split: str, manifest: "Manifest") -> Tensor:
    """The images of a split, which stay in their file: read when they are used, shared by all processes, never written.

    A file is verified by its SHA-256; a large one, which `prepare_data.py` verifies, by `sampled_sha256_of`.

    Args:
        folder: where `prepare_data.py` wrote them.
        split: "train" or "test".
        manifest: the one in that folder.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        UserError: if the array is missing or is not the one that was prepared.
    """
    path = Path(folder) / f"{split}.npy"
    remedy = "run prepare_data.py again"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    facts = manifest["files"][path.name]
    sampled = facts.get("sampled_sha256")
    is_same = sha256_of(path) == facts["sha256"] if sampled is None else sampled_sha256_of(path) == sampled
    if not is_same:
        raise UserError(f"{path} has changed since it was prepared: {remedy}")
    array = read_array(path, remedy, is_mapped=True)
    with warnings.catch_warnings():  # of an array that cannot be written, which nothing here does
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
