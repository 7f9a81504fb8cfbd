"""modeling.muon: against a singular value decomposition, torch's own Muon and torch's Adam."""

import copy

import pytest
import torch
from torch import nn

from modeling.checkpoint import load_fitting
from modeling.muon import Muon, orthogonalise


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
    return network.to(memory_format=torch.channels_last)


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(generator=generator)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        set_gradients(network, step)
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("shape", [(2, 24, 60), (3, 60, 24), (1, 1, 5)])
def test_singular_values_become_nearly_one_and_their_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ orthogonalise(matrices) @ v.mT
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("smallest", "low", "high"), [(0.0016, 0.65, 1.25), (0.0005, 0.0, 0.3)])
def test_singular_values_below_0_0015_of_the_norm_stay_smaller(smallest, low, high):
    _, found = orthogonalise(torch.diag(torch.tensor([1.0, smallest]))[None])[0].diagonal()
    assert low < found < high


def test_a_gradient_of_nearly_nothing_moves_nothing():
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
    for size in (1e-38, 1e-24, 1e-20):  # their squares are no float32 numbers
        found = orthogonalise(size * torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0)))
        assert found.abs().max() < 0.1


def test_matrices_move_as_with_torch_s_muon():
    """Which computes in bfloat16 and takes matrices only."""
    ours = nn.ModuleList([nn.Linear(6, 20, bias=False), nn.Linear(30, 8, bias=False)])
    theirs = copy.deepcopy(ours)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    after = train(ours, Muon(ours.parameters(), lr=0.01, momentum=0.9), range(3))
    adjusted = torch.optim.Muon(
        theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for start, found, expected in zip(before, after, train(theirs, adjusted, range(3)), strict=True):
        torch.testing.assert_close(found - start, expected - start, atol=2e-4, rtol=0.03)


def test_a_convolution_moves_as_the_matrix_of_its_first_dimension_by_the_others(network):
    layer = network[2]
    matrix = nn.Parameter(layer.weight.detach().flatten(1).clone())
    set_gradients(layer, 0)
    matrix.grad = layer.weight.grad.flatten(1)
    for parameters in (layer.parameters(), [matrix]):
        Muon(parameters, 0.01).step()
    torch.testing.assert_close(layer.weight.flatten(1), matrix)


@pytest.mark.parametrize("fused", [False, True])
def test_biases_and_norms_move_as_with_adam(network, fused):
    expected = train(copied := copy.deepcopy(network), torch.optim.Adam(copied.parameters(), 0.01), range(3))
    found = train(network, Muon(network.parameters(), 0.01, fused=fused), range(3))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ndim == 1) == torch.allclose(ours, theirs)


def test_an_update_has_the_size_of_adam_s(network):
    before = [parameter.detach().clone() for parameter in network.parameters()]
    found = train(network, Muon(network.parameters(), 0.01), range(1))
    for start, end in zip(before, found, strict=True):
        if start.ndim > 1:
            assert 0.7 * 0.002 < (end - start).square().mean().sqrt() < 1.2 * 0.002


def test_it_continues_from_its_state(network):
    expected = train(copied := copy.deepcopy(network), Muon(copied.parameters(), 0.01), range(4))
    first = Muon(network.parameters(), 0.01)
    train(network, first, range(2))
    second = Muon(network.parameters(), 0.01)
    load_fitting(second, first.state_dict(), "x")
    assert all(map(torch.equal, train(network, second, range(2, 4)), expected))


def test_a_loaded_state_leaves_the_optimizer_its_own_values(network):
    state = Muon(network.parameters(), 0.01, momentum=0.9).state_dict()
    load_fitting(second := Muon(network.parameters(), 0.02, momentum=0.8), state, "x")
    assert [(group["lr"], group["momentum"]) for group in second.param_groups] == [(0.02, 0.8)] * 2


@pytest.mark.parametrize("was_fused", [False, True])
def test_step_counts_are_loaded_onto_the_device_of_the_weights(network, was_fused):
    state = Muon(network.parameters(), 0.01, fused=was_fused).state_dict()
    moved = Muon(network.to("meta").parameters(), 0.01, fused=True)
    load_fitting(moved, state, "x")
    assert all(values["step"].is_meta for values in moved.state.values() if "step" in values)


def test_a_parameter_without_a_gradient_stays(network):
    set_gradients(network, 0)
    before = copy.deepcopy(network[2].state_dict())
    network[2].weight.grad = network[2].bias.grad = None
    Muon(network.parameters(), 0.01).step()
    assert all(torch.equal(before[name], value) for name, value in network[2].state_dict().items())
