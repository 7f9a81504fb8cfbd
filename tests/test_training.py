"""The plain training loop: each part against what it must do exactly."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.runtime import place
from modeling.samplers import Sampler, sample
from modeling.training import backward, generate_samples, train_epoch, train_step
from modeling.unet import UnetModel
from tests.helpers import small_model, weights

pytestmark = pytest.mark.numeric

# ---- train_step


def test_a_step_is_one_step_of_gradient_descent(device):
    model, twin = small_model().to(device), small_model().to(device)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    loss = train_step(model, x, SGD(model.parameters(), lr=0.1), device)
    torch.manual_seed(0)
    expected = twin(x)
    expected.backward()
    assert not loss.requires_grad
    assert loss.device.type == device
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("micro_batch_size", "sizes"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (6, [4, 3]), (7, [7]), (9, [7])]
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(micro_batch_size, sizes):
    x, timesteps, noise = torch.rand(7, 3, 32, 32) * 2 - 1, torch.arange(1, 8), torch.randn(7, 3, 32, 32)
    results, seen = [], []
    for size in (None, micro_batch_size):
        model = small_model().double()
        model.eps_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        loss = backward(model, x.double(), timesteps=timesteps, noise=noise.double(), micro_batch_size=size)
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert seen == [7, *sizes]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


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
            backward(model, torch.rand(8, 3, 32, 32), micro_batch_size=size)
        return largest[0]

    kept = {size: measured(size) for size in (8, 4, 2)}
    assert kept[4] < 0.6 * kept[8]
    assert kept[2] < 0.35 * kept[8]


def test_gradients_do_not_add_up_over_steps():
    model = small_model()
    bias = model.get_parameter("eps_model.out.bias")
    optimizer = SGD(model.parameters(), lr=0.0)
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        train_step(model, torch.zeros(1, 3, 32, 32), optimizer, "cpu")
        assert bias.grad is not None
        gradients.append(bias.grad.clone())
    assert torch.equal(*gradients)


def test_a_learning_rate_of_zero_leaves_every_bit_of_the_weights():
    model = small_model()
    before = weights(model)
    train_step(model, torch.rand(2, 3, 32, 32), Adam(model.parameters(), lr=0.0), "cpu")
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("network", [lambda: UnetModel(3, 3, 8), lambda: DdpmUnet(3, 3, 8, (1, 2), 1, (16,))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_and_moments_have_the_memory_order_of_their_weights(network, precision):
    """Fused optimizers rely on it."""
    model = place(DiffusionModel(network(), (1e-4, 0.02), 20), torch.device("cpu"))
    optimizer = Adam(model.parameters(), fused=True)
    backward(model, torch.rand(2, 3, 32, 32), precision=precision)
    optimizer.step()
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
        losses[precision] = backward(model, torch.rand(4, 3, 32, 32), precision=precision)
        assert {tensor.dtype for weight in model.parameters() for tensor in (weight, weight.grad)} == {torch.float32}
    assert losses["bf16"].dtype == torch.float32
    assert losses["bf16"] != losses["fp32"]
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.02, atol=0)


# ---- train_epoch


def test_an_epoch_returns_the_mean_over_images_and_shows_a_bar(capsys):
    """The last batch is smaller, so a mean over batches would be another number."""
    losses, seen = iter([1.0, 4.0]), []

    class Given(DiffusionModel):
        """A model whose loss is given."""

        def forward(self, x, *, timesteps=None, noise=None):
            seen.append(x.shape)
            return self.eps_model.get_parameter("weight").sum() * 0 + next(losses)

    loader = DataLoader(TensorDataset(torch.zeros(5, 3, 32, 32), torch.arange(5)), batch_size=4)
    model = Given(nn.Linear(1, 1), (0.1, 0.2), 3)
    mean = train_epoch(model, loader, SGD(model.parameters(), lr=0.0), "cpu")
    assert seen == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert isinstance(mean, float)
    assert mean == pytest.approx((4 * 1.0 + 1 * 4.0) / 5)
    assert "2/2" in capsys.readouterr().err


def test_an_epoch_trains_in_train_mode(device):
    model = small_model().to(device).eval()
    before = weights(model)
    loss = train_epoch(model, [torch.rand(2, 3, 32, 32)], SGD(model.parameters(), lr=0.1), device)
    assert model.training
    assert math.isfinite(loss)
    assert not torch.equal(weights(model), before)


def test_an_empty_loader_is_an_error():
    model = small_model()
    with pytest.raises(ValueError, match="fewer images than one batch"):
        train_epoch(model, [], SGD(model.parameters(), lr=0.1), "cpu")


# ---- generate_samples


def test_samples_are_written_as_a_grid_that_is_returned(tmp_path, device):
    model = small_model(num_timesteps=3).to(device)
    path = tmp_path / "new" / "folder" / "grid.png"
    grid = generate_samples(model, device, path)
    with Image.open(path) as image:
        written = torch.from_numpy(np.array(image))
        assert image.size == (grid.shape[2], grid.shape[1]) == (5 * (3 * 34 + 2), 5 * (3 * 34 + 2))
    assert torch.equal(written.permute(2, 0, 1), grid)
    assert model.training
    assert {path.name} == {entry.name for entry in path.parent.iterdir()}


def test_another_sampler_can_be_chosen(tmp_path):
    noise = torch.randn(2, 3, 32, 32)
    sampler = partial(sample, sampler=Sampler("ddim", num_steps=2, eta=0.0), noise=lambda timestep: noise)
    grids = [
        generate_samples(small_model(), "cpu", tmp_path / "a.png", num_samples=2, sampler=sampler) for _ in range(2)
    ]
    assert torch.equal(*grids)
