"""How far the samplers end in few steps from the solution of the model's own ODE."""

import itertools

import torch
from torch import Tensor

from modeling.measures.evaluation_file import Record
from modeling.measures.resumable import advancing
from modeling.measures.subject import Subject
from modeling.runtime import check_finite
from modeling.samplers import Sampler, sample_images
from modeling.schedules import SPACINGS
from modeling.system.progress import progress_bar

_SOLVERS, _NUM_STEPS = ("ddim", "dpm_solver"), (10, 20, 50)


class SolverMeasure:
    """The error of each deterministic sampler by number of steps and spacing.

    It is the root mean square over an image's numbers, in [-1, 1], of its difference from the solution of the model's
    probability-flow ODE (Song et al. 2021, arXiv 2011.13456) that begins with the same noise; its mean over images and
    the standard error of that. With `clip_x0` it is the ODE of the model whose predicted x_0 is clipped. `dpm_solver`
    with all T timesteps is taken for the solution. How far `ddim` with all T ends from it ("ddim T") says how far it
    can be trusted, up to the last step, from timestep 1 to x_0, which is the same in both.
    """

    def __init__(self, subject: Subject):
        self.trained, options, last = subject.trained, subject.options, subject.trained.model.num_timesteps
        few = itertools.product(_SOLVERS, [n for n in _NUM_STEPS if n < last], SPACINGS)
        solvers = [("dpm_solver", last, "trailing"), *few, ("ddim", last, "trailing")]
        self.solvers = [Sampler(name, n, options.clip_x0, spacing=spacing) for name, n, spacing in solvers]
        self.num_images = options.solver_images
        self.identity = self.trained.identity | {"num_images": self.num_images, "seed": options.seed}
        self.identity |= {"clip_x0": options.clip_x0, "solution": f"dpm_solver, {last} steps"}

    def take(self) -> Record:
        """Raises FloatingPointError for a sample that is not finite."""
        errors, values = self._measure_errors().double(), {}
        check_finite(errors, "a sample", self.trained.precision)
        for solver, error in zip(self.solvers[1:], errors, strict=True):
            name = f"{solver.name} {solver.num_steps}"
            values.setdefault(f"rms, {name}", {})[solver.spacing] = error.mean().item()
            standard_error = error.std() / self.num_images**0.5
            values.setdefault(f"standard error, {name}", {})[solver.spacing] = standard_error.item()
        return {"values": values, "identity": self.identity | self.trained.environment}

    def _measure_errors(self) -> Tensor:
        """(solvers less the first, images)."""
        trained, num_images = self.trained, self.num_images
        evaluations = sum(solver.num_steps or 0 for solver in self.solvers)
        with progress_bar(total=num_images * evaluations, desc="solver error", unit="evaluation") as bar:

            def measure(start: int) -> Tensor:
                count = min(trained.batch_size, num_images - start)
                advance = advancing(bar, start * evaluations, count * trained.processes.count)
                solution, *others = (
                    sample_images(
                        trained.model, count, trained.image_shape, trained.device, solver, seed=trained.options.seed,
                        first_image=start, precision=trained.precision, bar=advance,
                    )
                    for solver in self.solvers
                )  # fmt: skip
                return torch.stack([(x - solution).square().flatten(1).mean(1).sqrt().cpu() for x in others])

            parts = trained.processes.map(measure, range(0, num_images, trained.batch_size))
            return torch.cat(list(parts), dim=1)
