"""Several processes that share the steps of a run: who computes what, and that it adds up to one process's bits."""

import copy
import itertools

import pytest
import torch
from torch.optim import Adam

from modeling.data import Batches
from modeling.distributed.processes import ALONE, Processes
from modeling.distributed.shares import Share, sum_as_tree
from modeling.ema import Ema
from modeling.run.bookkeeping import TrainState
from modeling.run.step import Step
from modeling.system.errors import UserError
from modeling.training import gradients_of
from tests.helpers import random_images, small_model

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(64, 16), (15, 8), (15, None), (9, 4), (17, 2)])
def test_the_shares_are_the_rows_of_the_batch_in_whole_parts(batch_size, micro_batch_size, count):
    shares = [Processes(rank, count).share(batch_size, micro_batch_size) for rank in range(count)]
    assert list(itertools.chain(*(share.rows for share in shares))) == list(range(batch_size))
    parts = list(itertools.chain(*(share.parts for share in shares)))
    assert parts == list(range(len(parts)))
    whole = torch.arange(batch_size).tensor_split(len(parts))
    ours = [part for share in shares for part in torch.tensor(share.rows).tensor_split(len(share.parts))]
    assert [part.tolist() for part in ours] == [part.tolist() for part in whole]
    assert all(len(part) <= (micro_batch_size or batch_size) for part in ours)
    assert min(len(share.parts) for share in shares) >= 1


def test_two_processes_share_fifteen_images_as_eight_and_seven():
    assert Processes(0, 2).share(15, None) == Share(range(8), range(1))
    assert Processes(1, 2).share(15, None) == Share(range(8, 15), range(1, 2))


def test_a_batch_of_fewer_images_than_processes_is_rejected():
    with pytest.raises(UserError, match="train.batch_size=3: it is shared by 4 processes"):
        Processes(0, 4).share(3, None)


def test_a_process_has_the_rows_of_the_batch_that_one_would_have():
    images = random_images(40, 3, 8, 8)
    whole = Batches(images, 15, seed=0, random_flip=True)
    parts = [Batches(images, 15, 0, True, rows) for rows in (range(8), range(8, 15))]
    for step in (0, 3):
        assert torch.equal(torch.cat([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("precision", "batch_size"), [("bf16", 16), ("fp32", 15)])
def test_shares_of_a_step_add_up_to_the_bits_of_the_whole(precision, batch_size, count):
    """What processes would send each other; 16 images in parts of 4, with dropout."""
    images, model = random_images(batch_size, 3, 32, 32), small_model()
    dropout = torch.nn.Dropout(0.2)
    model.eps_model.register_forward_pre_hook(lambda _, arguments: (dropout(arguments[0]), *arguments[1:]))

    def computed(processes: Processes) -> list[torch.Tensor]:
        ours = copy.deepcopy(model)
        step = Step(ours, Ema(ours.eps_model, 0.9), Adam(ours.parameters()), TrainState(step=5), 0, lambda step: 0.1)
        step.precision, step.micro_batch_size, step.processes, step.batch_size = precision, 4, processes, batch_size
        rows = processes.share(batch_size, 4).rows
        loss = step.backward(images[rows.start : rows.stop])
        return [loss, *gradients_of(ours.parameters())]

    shares = [computed(Processes(rank, count)) for rank in range(count)]
    sums = [sum_as_tree(terms) for terms in zip(*shares, strict=True)]
    assert all(map(torch.equal, sums, computed(ALONE)))
