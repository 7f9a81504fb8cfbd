"""The average of the weights against its recursion."""

import pytest
import torch
from torch import nn

from modeling.ema import Ema

pytestmark = pytest.mark.numeric


def averaged_weight(ema: Ema) -> torch.Tensor:
    return ema.module.get_parameter("weight")


def test_the_average_follows_its_recursion_with_warm_up():
    module = nn.Linear(2, 1, bias=False)
    ema, expected = Ema(module, 0.5), module.weight.detach().double().clone()
    for step in range(20):
        nn.init.normal_(module.weight)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    torch.testing.assert_close(averaged_weight(ema).double(), expected, atol=1e-6, rtol=0)


def test_after_one_step_it_is_mostly_the_new_weights():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.9999)
    nn.init.ones_(module.weight)
    ema.update(module, 0)
    assert averaged_weight(ema).item() == pytest.approx(0.9)


def test_equal_weights_stay_equal_to_the_bit():
    module = nn.Linear(50, 50)
    ema = Ema(module, 0.999)
    for step in range(50):
        ema.update(module, step)
    assert torch.equal(averaged_weight(ema), module.weight)


def test_the_average_is_apart_from_the_module_and_needs_no_gradient():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = Ema(module, 0.9)
    nn.init.zeros_(module.get_parameter("0.weight"))
    assert ema.module.get_parameter("0.weight").any()
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
    assert module[0].weight.requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_rejected(decay):
    with pytest.raises(ValueError, match=f"must be in .* got {decay}"):
        Ema(nn.Linear(1, 1), decay)
