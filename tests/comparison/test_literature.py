"""What others report stands beside the runs that it may be compared with, and is told from what was recorded here."""

from dataclasses import replace

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
    [
        {"dataset__name": "shapes"},
        {"diffusion__prediction": "v"},
        {"diffusion__num_timesteps": 100},
        {"train__init": "a.safetensors"},
    ],
)
def test_runs_with_another_loss_or_start_have_no_literature(write_run, change):
    assert describe_literature(read_run(write_run([0.03] * 10, **change))) == []


def test_a_point_before_the_run_began_has_no_value(write_run):
    """As for a run that was resumed, by name, from another one's later checkpoint."""
    run = read_run(write_run([0.03] * 40, train__batch_size=8192))
    later = replace(run, curve=replace(run.curve, edges=run.curve.edges + 6_100_000))
    assert [line.split()[2:] for line in describe_literature(later)[3:]] == [["0.0295"], ["0.03", "0.0293"], ["0.0291"]]
