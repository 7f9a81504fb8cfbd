"""The loop of a run: it takes every step once, in the documented order, and stops only between two steps."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, Adam

from modeling.data import Batches
from modeling.distributed.processes import Processes
from modeling.ema import Ema
from modeling.run import bookkeeping
from modeling.run import step as step_module
from modeling.run.step import Step
from modeling.system.signals import Stopped, stopping_on_signals
from tests.helpers import small_model, weights
from tests.run.recorder import IMAGES, Recorder, run, with_losses

pytestmark = pytest.mark.numeric


def test_a_run_takes_every_step_once_and_records_what_is_due():
    record = run(small_model(), last_step=8)  # 5 steps an epoch
    assert record.state.step == 8
    assert [line["step"] for line in record.lines] == [2, 4, 6, 8]
    assert [line["epoch"] for line in record.lines] == [1, 1, 2, 2]
    assert record.saved == [3, 6, 8]
    assert record.sampled == [5, 8]
    assert list(record.lines[0]) == [
        "step", "epoch", "train/loss", "train/loss_smoothed", "train/lr", "train/skipped",
        "seconds", "images_per_second", "memory_bytes",
    ]  # fmt: skip


def test_lines_hold_the_mean_loss_since_the_line_before():
    losses = [1.0, 3.0, 5.0, 6.0, 7.0]
    record = run(small_model(), last_step=5, make=with_losses(losses))
    assert [line["train/loss"] for line in record.lines] == [2.0, 5.5, 7.0]
    smoothed = 0.0
    for step, loss in enumerate(losses, start=1):
        decay = min(0.99, (step - 1) / (step + 8))
        smoothed = decay * smoothed + (1 - decay) * loss
    assert record.lines[-1]["train/loss_smoothed"] == pytest.approx(smoothed)


def test_each_step_has_its_own_timesteps_noise_and_learning_rate(monkeypatch):
    calls, rates = [], []

    def spy(model, inputs, **options):
        calls.append(options | {"inputs": inputs})
        return torch.tensor(1.0)

    monkeypatch.setattr(step_module, "backward", spy)
    model = small_model(num_timesteps=1000)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda set_to_none=True: None
    optimizer.register_step_post_hook(lambda *args: rates.append(optimizer.param_groups[0]["lr"]))
    run(model, last_step=6, optimizer=optimizer, learning_rate=lambda step: 0.1 * step)
    assert rates == [0.1 * step for step in range(6)]
    for call in calls:
        assert call["inputs"].dtype == torch.float32
        assert call["inputs"].min() >= -1
        assert call["inputs"].max() <= 1
        assert call["timesteps"].min() >= 1
        assert call["timesteps"].max() <= 1000
        assert call["noise"].shape == (4, 3, 32, 32)
    for name in ("timesteps", "noise", "inputs"):
        assert len({tuple(call[name].flatten().tolist()) for call in calls}) == 6


def test_the_last_step_ends_the_run_in_the_middle_of_an_epoch():
    record = run(small_model(), last_step=3)
    assert (record.state.step, record.saved, record.sampled) == (3, [3], [3])


def test_two_equal_runs_are_bitwise_equal_and_another_seed_is_not():
    results = []
    for seed in (0, 0, 1):
        model = small_model()
        record = run(model, batches=Batches(IMAGES, 4, seed=seed, random_flip=True), optimizer=Adam(model.parameters()))
        results.append((weights(model), weights(record.ema.module), [line["train/loss"] for line in record.lines]))
    for index in (0, 1):
        assert torch.equal(results[0][index], results[1][index])
        assert not torch.equal(results[0][index], results[2][index])
    assert results[0][2] == results[1][2]


def test_the_state_of_torchs_generator_changes_nothing():
    results = []
    for disturbance in (1, 2):
        model = small_model()
        torch.manual_seed(disturbance)
        run(model, last_step=2)
        results.append(weights(model))
    assert torch.equal(*results)


def test_raw_weights_do_not_depend_on_the_average():
    results = []
    for decay in (0.0, 0.9):
        model = small_model()
        record = run(model, ema=Ema(model.eps_model, decay))
        results.append((weights(model), weights(record.ema.module)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[0][1])  # without decay the average is the last weight
    assert not torch.equal(results[0][1], results[1][1])


def test_checkpoints_come_on_time_too(monkeypatch):
    now = iter(range(0, 10_000, 4))
    clock = SimpleNamespace(monotonic=lambda: float(next(now)), perf_counter=time.perf_counter)
    monkeypatch.setattr(bookkeeping, "time", clock)
    announced = []
    monkeypatch.setattr(Processes, "announce_pause", lambda processes: announced.append(processes.rank))
    record = run(small_model(), last_step=6, checkpoint_every=100, checkpoint_seconds=7)
    assert record.saved == [2, 4, 6]
    assert announced == [0, 0, 0]


@pytest.mark.parametrize(("place", "expected_step"), [("forward", 2), ("update", 3), ("log", 2)])
@pytest.mark.fault("signal")
def test_a_stop_inside_a_step_comes_between_two_whole_steps(monkeypatch, place, expected_step):
    """Weights, average and counters are of one step, whose line is written, and a resumed run gives the same result."""
    straight = run(small_model(), last_step=4, log_every=1)
    model = small_model()
    recorder = Recorder(model, 4, log_every=1, sample_every=9)

    def kill_after_two_steps(*args, **kwargs):
        if recorder.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def log(step, metrics):
        kill_after_two_steps()
        Recorder.log(recorder, step, metrics)

    hooks = []
    if place == "forward":
        hooks += [model.eps_model.register_forward_pre_hook(kill_after_two_steps)]
    elif place == "update":
        hooks += [recorder.optimizer.register_step_post_hook(kill_after_two_steps)]
    else:
        monkeypatch.setattr(recorder, "log", log)
    with stopping_on_signals(), pytest.raises(Stopped) as stopped:
        recorder.fit()
    assert stopped.value.code == 143
    assert recorder.state.step == expected_step
    assert [line["step"] for line in recorder.lines] == list(range(1, expected_step + 1))

    for hook in hooks:
        hook.remove()
    resumed = Recorder(
        model, 4, ema=recorder.ema, optimizer=recorder.optimizer, state=recorder.state, log_every=1
    ).fit()
    losses = [line["train/loss"] for line in recorder.lines + resumed.lines]
    assert losses == [line["train/loss"] for line in straight.lines]
    assert torch.equal(weights(recorder.ema.module), weights(straight.ema.module))


def test_rates_leave_out_logging_saving_and_sampling(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bookkeeping.time, "perf_counter", lambda: now[0])

    class OneSecond(Step):
        def backward(self, images):
            now[0] += 1
            return torch.tensor(1.0)

        def update(self, loss):
            return loss

    class Slow(Recorder):
        def log(self, *args):
            now[0] += 1000
            super().log(*args)

        def save(self):
            now[0] += 1000

        def sample(self, tracker):
            now[0] += 1000

    recorder = Slow(small_model(), 10, make=OneSecond).fit()
    assert [line["images_per_second"] for line in recorder.lines] == [4.0] * 5
    assert recorder.lines[-1]["seconds"] == 10

    first = Slow(small_model(), 3, make=OneSecond, log_every=2)
    first.last_step = first.training.books.last_step = 10  # as a run that is stopped after step 3, between two lines
    first.batches.loader = lambda steps, *options: [IMAGES[:4]] * 3
    first.fit()
    first.training.save()
    resumed = Slow(small_model(), 10, make=OneSecond, state=first.state).fit()
    assert resumed.lines[-1]["seconds"] == 10


def test_a_pause_that_is_stopped_counts_as_none():
    watch = bookkeeping.Stopwatch()
    with pytest.raises(Stopped), watch.paused():
        time.sleep(0.2)
        raise Stopped("SIGTERM", 143)
    assert watch.lap() < 0.1
