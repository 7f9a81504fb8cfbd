"""A step of a run: what it changes, and what it leaves when its numbers are not finite."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.optim import Adam

from modeling.build import build_optimizer
from modeling.config import parse
from modeling.data import Batches
from modeling.ema import Ema
from modeling.muon import Muon
from modeling.run.bookkeeping import TrainState
from modeling.run.step import Step
from modeling.runtime import place
from tests.helpers import equal, small_model, weights
from tests.run.recorder import IMAGES, Recorder, run, spoiled

pytestmark = pytest.mark.numeric


def test_one_micro_batch_is_the_plain_step_to_the_bit():
    results = []
    for size in (None, 4):
        model = small_model()
        run(model, last_step=2, micro_batch_size=size)
        results.append(weights(model))
    assert torch.equal(*results)


def test_the_gradient_is_clipped_to_its_norm():
    model = small_model()
    run(model, last_step=1, learning_rate=lambda step: 0.0, max_grad_norm=1e-3)
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("fault", ["loss nan", "loss inf", "gradient nan", "gradient inf", "batch"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.fault("not finite")
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(fault, max_grad_norm):
    model = small_model()
    optimizer = Adam(model.parameters())
    seen = []

    class Watched(spoiled(fault, {1, 2})):
        def backward(self, images):
            seen.append((weights(model), weights(self.ema.module), copy.deepcopy(optimizer.state_dict()["state"])))
            return super().backward(images)

    recorder = run(model, 5, optimizer=optimizer, make=Watched, max_grad_norm=max_grad_norm, sample_every=9)
    assert torch.equal(seen[1][0], seen[3][0])
    assert torch.equal(seen[1][1], seen[3][1])
    assert equal(seen[1][2], seen[3][2])
    assert not torch.equal(seen[3][0], weights(model))  # later steps count again
    assert [line["train/skipped"] for line in recorder.lines] == [1, 2, 2]
    assert all(math.isfinite(line["train/loss"]) for line in recorder.lines)
    assert (recorder.state.num_skipped, recorder.state.num_skipped_in_row) == (2, 0)


def test_a_line_without_any_finite_loss_has_none():
    record = run(small_model(), last_step=4, make=spoiled("loss nan", {2, 3}))
    assert [line["train/loss"] is None for line in record.lines] == [False, True]


@pytest.mark.fault("not finite")
def test_too_many_skipped_steps_in_a_row_end_the_run_with_an_error():
    recorder = Recorder(small_model(), make=spoiled("gradient nan", {1, 3, 4, 5, 6}), max_skipped_in_row=3)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row \(4 to 6\)"):
        recorder.fit()
    assert [line["step"] for line in recorder.lines] == [2, 4]


@pytest.mark.fault("not finite")
def test_a_row_of_skipped_steps_is_counted_across_a_restart():
    first = run(small_model(), last_step=2, make=spoiled("loss nan", {0, 1}), max_skipped_in_row=3)
    state = TrainState(**dataclasses.asdict(first.state))
    with pytest.raises(FloatingPointError, match=r"\(1 to 3\)"):
        run(small_model(), last_step=4, make=spoiled("loss nan", {0}), max_skipped_in_row=3, state=state)


@pytest.mark.parametrize("name", ["adam", "muon", "sgd"])
@pytest.mark.parametrize("bad_steps", [set(), {0, 2}])
@pytest.mark.fault("not finite")
def test_the_update_decided_on_the_device_is_the_same(name, bad_steps, compose_config, device):
    """The path that CUDA takes, which never asks the device whether a step counts."""
    section = parse(compose_config(f"optimizer={name}")).optimizer
    results = []
    for on_device in (False, True):
        model = small_model().to(device)
        optimizer, ema = build_optimizer(section, model), Ema(model.eps_model, 0.9)
        step = Step(model, ema, optimizer, TrainState(), 0, lambda step: 0.01)
        for number in range(4):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.01 * (number + index + 1))
                if index == 0 and number in bad_steps:
                    parameter.grad[0] = math.nan
            is_bad = torch.tensor(number in bad_steps, device=device)
            if on_device:
                step._update_on_device(is_bad)
            elif number not in bad_steps:
                optimizer.step()
                ema.update(model.eps_model, step.state.step)
            step.state.step += 1
        results.append((weights(model), weights(ema.module)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # of set_sync_debug_mode
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("kind", [Adam, Muon])
def test_no_step_between_log_lines_waits_for_the_cuda_device(precision, micro_batch_size, kind):
    model = place(small_model(), torch.device("cuda"))
    batches, optimizer = Batches(IMAGES.cuda(), 4, seed=0), kind(model.parameters(), 0.001, fused=True)
    options = {"precision": precision, "micro_batch_size": micro_batch_size, "log_every": 100, "checkpoint_every": 100}
    training = Recorder(model, 8, batches, optimizer, **options).training

    def take(images):
        training.books.count_step(training.step.update(training.step.backward(images)), len(images))

    inputs = [batches[number] for number in range(5)]
    take(inputs[0])
    try:
        torch.cuda.set_sync_debug_mode("error")
        for images in inputs[1:]:
            take(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.state.step == 5
