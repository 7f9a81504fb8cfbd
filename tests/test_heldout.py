"""The held-out loss: comparable between runs, and right where the answer is known."""

import pytest
import torch

from modeling.diffusion import DiffusionModel
from modeling.heldout import denoising_loss, linear_loss
from modeling.images import to_model_range
from modeling.measures.linear_denoiser import fit_linear_denoiser
from tests.helpers import Lambda, numpy_tables, random_images

pytestmark = pytest.mark.numeric

IMAGES = random_images(60, 3, 8, 8)


def model(function=lambda x, t: 0 * x, num_timesteps=20):
    return DiffusionModel(Lambda(function), (0.01, 0.3), num_timesteps)


def test_bins_cover_all_timesteps_and_average_to_the_total(device):
    total, bins = denoising_loss(model().to(device), IMAGES, device)
    assert list(bins) == [f"{low}-{low + 1}" for low in range(1, 20, 2)]
    assert total == pytest.approx(sum(bins.values()) / 10)
    assert total == pytest.approx(1, abs=0.05)  # no prediction: the variance of the noise


def test_the_loss_does_not_depend_on_batch_size_or_torchs_generator():
    function = lambda x, t: x * t[:, None, None, None]  # noqa: E731
    torch.manual_seed(1)
    whole, _ = denoising_loss(model(function), IMAGES, "cpu")
    torch.manual_seed(2)
    parts, _ = denoising_loss(model(function), IMAGES, "cpu", batch_size=7)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert denoising_loss(model(function), IMAGES, "cpu")[0] == whole


def test_a_loss_that_is_not_finite_is_an_error():
    broken = model(lambda x, t: x * float("inf"))
    with pytest.raises(FloatingPointError, match="^loss of a is not finite in fp32$"):
        denoising_loss(broken, IMAGES, "cpu", desc="loss of a")


def test_dropout_is_off():
    net = torch.nn.Dropout(0.5)
    measured = model(lambda x, t: net(x))
    measured.eps_model.net = net
    assert denoising_loss(measured, IMAGES, "cpu")[0] == denoising_loss(measured, IMAGES, "cpu")[0]
    assert net.training


def test_a_network_that_knows_the_image_has_no_loss():
    grey = torch.full((40, 3, 8, 8), 51, dtype=torch.uint8)
    x_0 = 51 / 127.5 - 1
    abar = torch.from_numpy(numpy_tables((0.01, 0.3), 20)[2])

    def exact(x, t):
        a = abar[(t * 20).round().long()][:, None, None, None]
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    assert denoising_loss(model(exact), grey, "cpu")[0] < 1e-9


def test_there_are_no_more_bins_than_timesteps_and_no_empty_ones():
    assert list(denoising_loss(model(num_timesteps=3), IMAGES, "cpu")[1]) == ["1-1", "2-2", "3-3"]
    assert list(denoising_loss(model(num_timesteps=20), IMAGES[:2], "cpu")[1]) == ["1-2", "11-12"]


def test_the_linear_loss_is_the_linear_denoiser_s_expectation_over_noise_and_images():
    """Its exact expectation from the matrix B that the denoiser is: eps - B y, with y = sqrt(a) (x_0 - m) + s eps."""
    train = (random_images(50, 3, 2, 2) // 2 + torch.arange(12).reshape(3, 2, 2) * 5).byte()
    heldout = random_images(7, 3, 2, 2)
    abar = torch.from_numpy(numpy_tables((0.01, 0.3), 20)[2])
    net = fit_linear_denoiser(to_model_range(train), abar)
    centred = to_model_range(heldout).flatten(1) - net.mean
    losses = []
    for image in range(7):
        timestep = image * 20 // 7 + 1
        a = abar[timestep].float()
        t = torch.full((12,), timestep / 20)
        matrix = net(a.sqrt() * net.mean + torch.eye(12), t).T
        of_noise = torch.eye(12) - (1 - a).sqrt() * matrix
        losses.append((of_noise.square().sum() + a * (centred @ matrix.T).square().sum(1).mean()) / 12)
    total, bins = linear_loss(train, heldout, abar)
    assert total == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert list(bins.values()) == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    assert list(bins) == list(denoising_loss(model(), heldout, "cpu")[1])
    assert linear_loss(train[:23], heldout, abar) is None  # fewer than twice the 12 numbers
