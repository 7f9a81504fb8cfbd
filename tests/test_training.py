"""The training loop: each part against what it must do exactly."""

import copy
import dataclasses
import math
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from modeling.build import build_optimizer
from modeling.config import parse
from modeling.data import Batches
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.ema import Ema
from modeling.run_step import RunStep, TrainState
from modeling.runtime import place
from modeling.samplers import sample
from modeling.signals import Stopped, stopping_on_signals
from modeling.training import fit, generate_samples, train_epoch, train_step
from modeling.unet import UnetModel
from tests.conftest import equal


def small_model(num_timesteps=20) -> DiffusionModel:
    torch.manual_seed(1)
    return DiffusionModel(UnetModel(3, 3, hidden_size=8), (1e-4, 0.02), num_timesteps)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


IMAGES = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Builds a RunStep that writes down what it is asked to log and save."""

    def __init__(self, model, last_step, batches, **options):
        self.lines, self.saved, self.sampled = [], [], []
        self.ema = Ema(model.eps_model, options.pop("ema_decay", 0.9))
        options = {
            "train_step": train_step,
            "state": TrainState(),
            "learning_rate": lambda step: 0.01,
            "log": lambda step, metrics: self.lines.append({"step": step} | metrics),
            "log_every": 2,
            "checkpoint_every": 3,
        } | options
        self.step = RunStep(
            ema=self.ema,
            seed=batches.seed,
            steps_per_epoch=batches.steps_per_epoch,
            save=lambda state: self.saved.append(state.step),
            last_step=last_step,
            **options,
        )


def run(model, last_step=8, batches=None, optimizer=None, sample_every=1, **options) -> Recorder:
    batches = batches or Batches(IMAGES, 4, seed=0)
    recorder = Recorder(model, last_step, batches, **options)
    fit(
        model,
        batches,
        optimizer or SGD(model.parameters(), lr=0.01),
        "cpu",
        step=recorder.step,
        sample=recorder.sampled.append,
        sample_every=sample_every,
    )
    return recorder


# ---- train_step


def test_a_step_is_one_step_of_gradient_descent(device):
    model, twin = small_model().to(device), small_model().to(device)
    x, timesteps, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([1, 5, 10, 20]), torch.randn(4, 3, 32, 32)
    loss = train_step(model, x, SGD(model.parameters(), lr=0.1), device, timesteps=timesteps, noise=noise)
    expected = twin(x, timesteps=timesteps, noise=noise)
    expected.backward()
    assert not loss.requires_grad
    assert loss.device.type == device
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("micro_batch_size", "sizes"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (6, [4, 3]), (7, [7]), (9, [7])]
)
def test_micro_batches_take_the_step_of_the_whole_batch(micro_batch_size, sizes):
    x, timesteps, noise = torch.rand(7, 3, 32, 32) * 2 - 1, torch.arange(1, 8), torch.randn(7, 3, 32, 32)
    results, seen = [], []
    for size in (None, micro_batch_size):
        model = small_model().double()
        model.eps_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        given = {"timesteps": timesteps, "noise": noise.double(), "micro_batch_size": size}
        loss = train_step(model, x.double(), SGD(model.parameters(), lr=0.1), "cpu", **given)
        results.append((loss, weights(model)))
    assert seen == [7, *sizes]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_one_micro_batch_is_the_plain_step_to_the_bit():
    results = []
    for size in (None, 4):
        model = small_model()
        run(model, last_step=2, micro_batch_size=size)
        results.append(weights(model))
    assert torch.equal(*results)


def test_micro_batches_take_less_memory():
    """The largest sum of what the forward pass keeps for the backward pass."""
    model = small_model()

    def measured(size):
        alive, largest = [0], [0]

        def pack(tensor):
            alive[0] += tensor.nbytes
            largest[0] = max(largest[0], alive[0])
            return tensor

        def unpack(tensor):
            alive[0] -= tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            train_step(model, torch.rand(8, 3, 32, 32), SGD(model.parameters(), lr=0.0), "cpu", micro_batch_size=size)
        return largest[0]

    kept = {size: measured(size) for size in (8, 4, 2)}
    assert kept[4] < 0.6 * kept[8]
    assert kept[2] < 0.35 * kept[8]


def test_gradients_do_not_add_up_over_steps():
    model = small_model()
    given = {"timesteps": torch.tensor([3]), "noise": torch.randn(1, 3, 32, 32)}
    optimizer = SGD(model.parameters(), lr=0.0)
    x = torch.zeros(1, 3, 32, 32)
    train_step(model, x, optimizer, "cpu", **given)
    first = model.eps_model.out.bias.grad.clone()
    train_step(model, x, optimizer, "cpu", **given)
    assert torch.equal(model.eps_model.out.bias.grad, first)


def test_a_learning_rate_of_zero_leaves_every_bit_of_the_weights():
    model = small_model()
    before = weights(model)
    train_step(model, torch.rand(2, 3, 32, 32), Adam(model.parameters(), lr=0.0), "cpu")
    assert torch.equal(weights(model), before)


def test_the_gradient_is_clipped_to_its_norm():
    model = small_model()
    run(model, last_step=1, learning_rate=lambda step: 0.0, max_grad_norm=1e-3)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("network", [lambda: UnetModel(3, 3, 8), lambda: DdpmUnet(3, 3, 8, (1, 2), 1, (16,))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_and_moments_lie_in_memory_as_their_weights_do(network, precision):
    """Fused optimizers take it for granted."""
    model = place(DiffusionModel(network(), (1e-4, 0.02), 20), torch.device("cpu"))
    optimizer = Adam(model.parameters(), fused=True)
    train_step(model, torch.rand(2, 3, 32, 32), optimizer, "cpu", precision=precision)
    for name, parameter in model.named_parameters():
        values = [parameter.grad, *(value for value in optimizer.state[parameter].values() if value.ndim)]
        assert len(values) == 3
        for value in values:
            assert in_memory_order(value) == in_memory_order(parameter), name


def in_memory_order(tensor: torch.Tensor) -> list[int]:
    """Its dimensions longer than 1, the outermost first."""
    longer = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    return sorted(longer, key=lambda dim: -tensor.stride(dim))


def test_bf16_keeps_weights_and_loss_in_float32_and_close_to_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        model = small_model()
        torch.manual_seed(5)
        losses[precision] = train_step(
            model, torch.rand(4, 3, 32, 32), SGD(model.parameters(), lr=0.1), "cpu", precision=precision
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["bf16"].dtype == torch.float32
    assert losses["bf16"] != losses["fp32"]
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.02, atol=0)


# ---- train_epoch


def test_an_epoch_returns_the_mean_over_images_and_shows_a_bar(capsys):
    """The last batch is smaller, so a mean over batches would be another number."""
    losses = iter([1.0, 4.0])
    loader = DataLoader(TensorDataset(torch.zeros(5, 3, 32, 32), torch.arange(5)), batch_size=4)
    seen = []

    def step(model, inputs, optimizer, device):
        seen.append(inputs.shape)
        return torch.tensor(next(losses))

    mean = train_epoch(nn.Identity(), loader, None, "cpu", step=step)
    assert seen == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert isinstance(mean, float)
    assert mean == pytest.approx((4 * 1.0 + 1 * 4.0) / 5)
    assert "2/2" in capsys.readouterr().err


def test_an_epoch_trains_in_train_mode_with_train_step_by_default(device):
    model = small_model().to(device).eval()
    before = weights(model)
    loss = train_epoch(model, [torch.rand(2, 3, 32, 32)], SGD(model.parameters(), lr=0.1), device)
    assert model.training
    assert math.isfinite(loss)
    assert not torch.equal(weights(model), before)


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="fewer images than one batch"):
        train_epoch(nn.Identity(), [], None, "cpu")


# ---- a run


def test_a_run_takes_every_step_once_and_records_what_it_should():
    record = run(small_model(), last_step=8)  # 5 steps an epoch
    assert record.step.state.step == 8
    assert [line["step"] for line in record.lines] == [2, 4, 6, 8]
    assert [line["epoch"] for line in record.lines] == [1, 1, 2, 2]
    assert record.saved == [3, 6, 8]
    assert record.sampled == [5, 8]
    keys = [
        "step",
        "epoch",
        "train/loss",
        "train/loss_smoothed",
        "train/lr",
        "train/skipped",
        "seconds",
        "images_per_second",
    ]
    assert list(record.lines[0]) == [*keys, "memory_bytes"]


def with_losses(losses: list[float]):
    """A train_step of which only the losses are wanted."""
    values = iter(losses)

    def fake(*args, update, **options):
        loss = torch.tensor(next(values))
        update(loss)
        return loss

    return fake


def test_lines_hold_the_mean_loss_since_the_line_before():
    losses = [1.0, 3.0, 5.0, 6.0, 7.0]
    record = run(small_model(), last_step=5, train_step=with_losses(losses))
    assert [line["train/loss"] for line in record.lines] == [2.0, 5.5, 7.0]
    smoothed = 0.0
    for step, loss in enumerate(losses, start=1):
        decay = min(0.99, (step - 1) / (step + 8))
        smoothed = decay * smoothed + (1 - decay) * loss
    assert record.lines[-1]["train/loss_smoothed"] == pytest.approx(smoothed)


def test_each_step_has_its_own_timesteps_noise_and_learning_rate():
    calls = []

    def spy(model, inputs, optimizer, device, update, **options):
        calls.append(options | {"inputs": inputs, "lr": optimizer.param_groups[0]["lr"]})
        update(torch.tensor(1.0))
        return torch.tensor(1.0)

    run(small_model(num_timesteps=1000), last_step=6, learning_rate=lambda step: 0.1 * step, train_step=spy)
    assert [call["lr"] for call in calls] == [0.1 * step for step in range(6)]
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
    assert (record.step.state.step, record.saved, record.sampled) == (3, [3], [3])


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
        record = run(model, ema_decay=decay)
        results.append((weights(model), weights(record.ema.module)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[0][1])  # without decay the average is the last weight
    assert not torch.equal(results[0][1], results[1][1])


def spoiled(kind: str, bad_steps: set[int]):
    """`train_step` whose loss, or a single number of whose gradient, is spoiled in these steps (from 0)."""
    calls = iter(range(10_000))

    def step(model, inputs, optimizer, device, update, **options):
        is_bad = next(calls) in bad_steps

        def spoil_then_update(loss):
            if is_bad and kind.startswith("gradient"):
                next(model.parameters()).grad.flatten()[3] = float(kind.split()[1])
            update(loss * float(kind.split()[1]) if is_bad and kind.startswith("loss") else loss)

        if is_bad and kind == "batch":
            inputs = inputs.clone()
            inputs[1, 0, 5, 5] = math.nan
        return train_step(model, inputs, optimizer, device, update=spoil_then_update, **options)

    return step


FAULTS = ["loss nan", "loss inf", "gradient nan", "gradient inf", "batch"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.fault("not finite")
def test_a_step_that_is_not_finite_changes_no_weight_and_no_average_and_is_counted(fault, max_grad_norm):
    model = small_model()
    optimizer = Adam(model.parameters())
    seen = []

    def watched(*args, update, **options):
        seen.append((weights(model), weights(recorder.ema.module), copy.deepcopy(optimizer.state_dict()["state"])))
        return bad_step(*args, update=update, **options)

    bad_step, batches = spoiled(fault, {1, 2}), Batches(IMAGES, 4, seed=0)
    recorder = Recorder(model, 5, batches, train_step=watched, max_grad_norm=max_grad_norm)
    fit(model, batches, optimizer, "cpu", step=recorder.step, sample=print, sample_every=9)
    assert torch.equal(seen[1][0], seen[3][0])
    assert torch.equal(seen[1][1], seen[3][1])
    assert equal(seen[1][2], seen[3][2])
    assert not torch.equal(seen[3][0], weights(model))  # later steps count again
    assert [line["train/skipped"] for line in recorder.lines] == [1, 2, 2]
    assert all(math.isfinite(line["train/loss"]) for line in recorder.lines)
    assert (recorder.step.state.num_skipped, recorder.step.state.num_skipped_in_row) == (2, 0)


def test_a_line_without_any_finite_loss_has_none():
    record = run(small_model(), last_step=4, train_step=spoiled("loss nan", {2, 3}))
    assert [line["train/loss"] is None for line in record.lines] == [False, True]


@pytest.mark.fault("not finite")
def test_too_many_skipped_steps_in_a_row_end_the_run_with_an_error():
    recorded = []
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row \(4 to 6\)"):
        run(
            small_model(), last_step=8, train_step=spoiled("gradient nan", {1, 3, 4, 5, 6}), max_skipped_in_row=3,
            log=lambda step, metrics: recorded.append(step),
        )  # fmt: skip
    assert recorded == [2, 4]


@pytest.mark.fault("not finite")
def test_a_row_of_skipped_steps_is_counted_across_a_restart():
    first = run(small_model(), last_step=2, train_step=spoiled("loss nan", {0, 1}), max_skipped_in_row=3)
    state = TrainState(**dataclasses.asdict(first.step.state))
    with pytest.raises(FloatingPointError, match=r"\(1 to 3\)"):
        run(small_model(), last_step=4, train_step=spoiled("loss nan", {0}), max_skipped_in_row=3, state=state)


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("bad_steps", [set(), {0, 2}])
@pytest.mark.fault("not finite")
def test_the_update_decided_on_the_device_is_the_same(name, bad_steps, compose_config, device):
    """The path that CUDA takes, which never asks the device whether a step counts."""
    section = parse(compose_config(f"optimizer={name}")).optimizer
    results = []
    for on_device in (False, True):
        model = small_model().to(device)
        optimizer, ema = build_optimizer(section, model), Ema(model.eps_model, 0.9)
        step = Recorder(model, 4, Batches(IMAGES, 4, seed=0)).step
        step.ema = ema
        for number in range(4):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.01 * (number + index + 1))
            is_bad = torch.tensor(number in bad_steps, device=device)
            if is_bad:
                next(model.parameters()).grad[0] = math.nan
            if on_device:
                step._update_on_device(model, optimizer, is_bad)
            elif number not in bad_steps:
                optimizer.step()
                ema.update(model.eps_model, step.state.step)
            step.state.step += 1
        results.append((weights(model), weights(ema.module)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_on_cuda_no_step_between_log_lines_waits_for_the_device(precision, micro_batch_size):
    model = place(small_model(), torch.device("cuda"))
    batches = Batches(IMAGES.cuda(), 4, seed=0)
    step = Recorder(
        model, 8, batches, precision=precision, micro_batch_size=micro_batch_size, log_every=100, checkpoint_every=100
    ).step  # fmt: skip
    optimizer = Adam(model.parameters(), fused=True)
    inputs = [batches[number] for number in range(5)]
    step(model, inputs[0], optimizer, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in inputs[1:]:
            step(model, batch, optimizer, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.state.step == 5


def test_checkpoints_come_on_time_too(monkeypatch):
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr(
        "modeling.run_step.time", SimpleNamespace(monotonic=lambda: float(next(now)), perf_counter=time.perf_counter)
    )
    record = run(small_model(), last_step=6, checkpoint_every=100, checkpoint_seconds=7)
    assert record.saved == [2, 4, 6]


@pytest.mark.parametrize(("place", "expected_step"), [("forward", 2), ("update", 3), ("log", 2)])
@pytest.mark.fault("signal")
def test_a_stop_inside_a_step_comes_between_two_whole_steps(place, expected_step):
    """Weights, average and counters are all of the same step, its line is written, and going on gives the same."""
    straight = run(small_model(), last_step=4, log_every=1)
    model, batches = small_model(), Batches(IMAGES, 4, seed=0)
    optimizer = SGD(model.parameters(), lr=0.01)
    recorder = Recorder(model, 4, batches, log_every=1)

    def kill_after_two_steps(*args, **kwargs):
        if recorder.step.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    if place == "forward":
        hook = model.eps_model.register_forward_pre_hook(kill_after_two_steps)
    elif place == "update":
        hook = optimizer.register_step_post_hook(kill_after_two_steps)
    else:
        log = recorder.step.log
        recorder.step.log = lambda *args: (kill_after_two_steps(), log(*args))
    with stopping_on_signals(), pytest.raises(Stopped) as stopped:
        fit(model, batches, optimizer, "cpu", step=recorder.step, sample=print, sample_every=9)
    assert stopped.value.code == 143
    assert recorder.step.state.step == expected_step
    assert [line["step"] for line in recorder.lines] == list(range(1, expected_step + 1))

    if place != "log":
        hook.remove()
    resumed = Recorder(model, 4, batches, log_every=1, state=recorder.step.state)
    resumed.step.ema = recorder.ema
    fit(model, batches, optimizer, "cpu", step=resumed.step, sample=print, sample_every=9)
    losses = [line["train/loss"] for line in recorder.lines + resumed.lines]
    assert losses == [line["train/loss"] for line in straight.lines]
    assert torch.equal(weights(recorder.ema.module), weights(straight.ema.module))


def test_rates_leave_out_logging_saving_and_sampling(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("modeling.run_step.time.perf_counter", lambda: now[0])

    def one_second(*args, update, **options):
        now[0] += 1
        update(torch.tensor(1.0))
        return torch.tensor(1.0)

    model, batches = small_model(), Batches(IMAGES, 4, seed=0)
    recorder = Recorder(model, 10, batches, train_step=one_second)
    log, recorder.step.save = recorder.step.log, lambda state: now.__setitem__(0, now[0] + 1000)
    recorder.step.log = lambda *args: (now.__setitem__(0, now[0] + 1000), log(*args))
    sample = lambda step: now.__setitem__(0, now[0] + 1000)  # noqa: E731
    fit(model, batches, SGD(model.parameters(), lr=0), "cpu", step=recorder.step, sample=sample, sample_every=1)
    assert [line["images_per_second"] for line in recorder.lines] == [4.0] * 5
    assert recorder.lines[-1]["seconds"] == 10


# ---- generate_samples


def test_samples_are_written_as_a_grid_that_is_returned(tmp_path, device):
    model = small_model(num_timesteps=3).to(device)
    path = tmp_path / "new" / "folder" / "grid.png"
    grid = generate_samples(model, device, path)
    with Image.open(path) as image:
        written = torch.from_numpy(np.array(image))
        assert image.size == (grid.shape[2], grid.shape[1]) == (3 * 34 + 2, 3 * 34 + 2)
    assert torch.equal(written.permute(2, 0, 1), grid)
    assert model.training
    assert {path.name} == {entry.name for entry in path.parent.iterdir()}


def test_samplers_and_their_options_can_be_chosen(tmp_path):
    noise = torch.randn(2, 3, 32, 32)
    grids = [
        generate_samples(
            small_model(), "cpu", tmp_path / "a.png", num_samples=2, sampler=partial(sample, sampler="ddim"),
            num_steps=2, eta=0.0, noise=noise,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*grids)
