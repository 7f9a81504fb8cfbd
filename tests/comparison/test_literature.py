"""What others report stands beside the runs that it may be compared with, and is told from what was recorded here."""

import numpy as np
import pytest

from modeling.comparison.curves import read_run
from modeling.comparison.literature import describe_literature


def test_reported_losses_are_beside_the_run_up_to_the_next_one(write_run):
    losses = np.repeat([0.05, 0.03, 0.02], [27, 3, 70])  # a line is 204,800 images
    lines = describe_literature(read_run(write_run(losses, train__batch_size=8192)))
    assert lines[0].startswith("\nliterature   tqch/ddpm-torch")
    assert [line.split() for line in lines[2:]] == [
        ["training", "loss", "run", "literature"],
        ["5,990,400", "images", "0.03", "0.0295"],  # the mean of the last 5 %
        ["11,980,800", "images", "0.02", "0.0293"],
        ["23,961,600", "images", "0.0291"],
    ]


@pytest.mark.parametrize(
    "change",
    [{"dataset__name": "shapes"}, {"diffusion__prediction": "v"}, {"diffusion__num_timesteps": 100}],
)
def test_runs_with_another_loss_have_no_literature(write_run, change):
    assert describe_literature(read_run(write_run([0.03] * 10, **change))) == []
