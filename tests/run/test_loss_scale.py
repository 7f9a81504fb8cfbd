"""Training in fp16: the scale of the loss by itself, and in a run."""

import dataclasses

import pytest
import torch
from torch import nn

from modeling.diffusion import DiffusionModel
from modeling.run.bookkeeping import TrainState
from modeling.run.loss_scale import LossScale
from modeling.training import backward
from tests.helpers import weights
from tests.run.recorder import Recorder, run

pytestmark = pytest.mark.numeric


class ConvModel(nn.Module):
    """An eps model of one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        return self.conv(x)


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_2000_steps(device):
    scale = LossScale(8.0, 1998, device)
    seen = []
    for is_skipped in (False, False, False, True, True, *[False] * 2000):
        scale.update(torch.tensor(is_skipped, device=device))
        seen.append((scale.scale.item(), scale.num_finite.item()))
    assert seen[:6] == [(8.0, 1999), (16.0, 0), (16.0, 1), (8.0, 0), (4.0, 0), (4.0, 1)]
    assert seen[-2:] == [(4.0, 1999), (8.0, 0)]
    gradients = [torch.tensor([8.0, -4.0], device=device), torch.tensor(1.0, device=device)]
    scale.unscale(gradients)
    assert [gradient.tolist() for gradient in gradients] == [[1.0, -0.5], 0.125]


def conv_run(last_step, **options) -> tuple[DiffusionModel, Recorder]:
    model = DiffusionModel(ConvModel(), (1e-4, 0.02), 20)
    return model, run(model, last_step, log_every=1, checkpoint_every=1, **options)


def test_fp16_trains_like_fp32_and_skips_what_overflows():
    """A scale of 2^40 overflows fp16 by far: it is halved, and no weight moves, until it fits."""
    plain = conv_run(8)
    model, record = conv_run(8, precision="fp16")
    torch.testing.assert_close(weights(model), weights(plain[0]), rtol=1e-3, atol=1e-4)
    assert [line["train/loss"] for line in record.lines] == pytest.approx(
        [line["train/loss"] for line in plain[1].lines], rel=1e-2
    )
    assert record.state.num_skipped == 0
    before = weights(DiffusionModel(ConvModel(), (1e-4, 0.02), 20))
    state = TrainState(loss_scale=2.0**40)
    model, record = conv_run(5, precision="fp16", state=state)
    assert torch.equal(weights(model), before)
    assert (record.state.num_skipped, record.state.loss_scale) == (5, 2.0**35)


def test_the_loss_scale_keeps_small_gradients():
    """Without it, gradients below 2^-24 are zero in fp16."""
    found = {}
    for scale in (1.0, 2.0**16):
        network = ConvModel()
        model = DiffusionModel(network, (1e-4, 0.02), 20, weighting="min_snr_5")
        model.loss_weights *= 1e-6
        with torch.no_grad():
            network.conv.weight *= 0.01
        timesteps, noise = torch.full((4,), 20), torch.ones(4, 3, 8, 8)
        backward(model, 0 * noise, timesteps=timesteps, noise=noise, precision="fp16", loss_scale=torch.tensor(scale))
        assert network.conv.weight.grad is not None
        found[scale] = network.conv.weight.grad.abs().max().item() / scale
    assert found[1.0] == 0
    assert found[2.0**16] > 0


def test_a_resumed_fp16_run_keeps_its_scale():
    straight, _ = conv_run(6, precision="fp16", state=TrainState(loss_scale=2.0**25))
    model, first = conv_run(2, precision="fp16", state=TrainState(loss_scale=2.0**25))
    state = TrainState(**dataclasses.asdict(first.state))
    assert state.loss_scale < 2.0**25
    run(model, 6, ema=first.ema, optimizer=first.optimizer, precision="fp16", state=state)
    assert torch.equal(weights(model), weights(straight))
