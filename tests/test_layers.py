"""Our GroupNorm and ReLU are the functions of PyTorch's own, and weights cast at once those of autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from modeling.ddpm_unet import DdpmUnet
from modeling.layers import GroupNorm, ReLU, _ChannelsLastGroupNorm, _IntegerReLU, half_copies
from modeling.unet import UnetModel

pytestmark = pytest.mark.numeric

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.fixture
def calls(monkeypatch) -> list:
    """The shapes of what is computed on contiguous copies."""
    seen, apply = [], _ChannelsLastGroupNorm.apply
    monkeypatch.setattr(_ChannelsLastGroupNorm, "apply", lambda *args: seen.append(args[0].shape) or apply(*args))
    return seen


def outcome(norm: nn.GroupNorm, x: torch.Tensor) -> list[torch.Tensor | None]:
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [1, 8, 32])
@pytest.mark.parametrize(("num_groups", "channels"), [(8, 32), (8, 64), (8, 128)])
def test_it_is_the_function_and_the_gradient_of_group_norm(layout, pixels, num_groups, channels):
    ours, plain = (kind(num_groups, channels, eps=1e-6).double() for kind in (GroupNorm, nn.GroupNorm))
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, channels, pixels, pixels, dtype=torch.float64)
    found = outcome(ours, x.to(memory_format=LAYOUTS[layout]))
    for ours_is, theirs_is in zip(found, outcome(plain, x), strict=True):
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_finite_differences(calls):
    norm = GroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    function = lambda x, weight, bias: _ChannelsLastGroupNorm.apply(x, weight, bias, 2, 1e-5)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, norm.weight, norm.bias))
    assert calls


@pytest.mark.parametrize(
    ("channels", "layout", "is_copied"),
    [(32, "channels last", True), (128, "channels last", False), (32, "contiguous", False)],
)
def test_only_slow_layouts_are_copied_and_the_layout_stays(calls, channels, layout, is_copied):
    x = torch.randn(2, channels, 4, 4).to(memory_format=LAYOUTS[layout])
    y = GroupNorm(8, channels)(x)
    assert bool(calls) == is_copied
    assert y.stride() == x.stride()


def test_bf16_stays_bf16_with_statistics_in_float32(calls):
    """One rounding at the end: statistics in bf16 would be off by parts in a hundred."""
    norm = GroupNorm(8, 32)
    x = (torch.randn(2, 32, 8, 8) + 10).bfloat16().to(memory_format=torch.channels_last)
    y = norm(x)
    assert calls
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.group_norm(x.float(), 8), rtol=2**-7, atol=2**-7)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_cuda_keeps_the_precision_and_the_layout(dtype):
    norm = GroupNorm(8, 32).cuda()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 32, 8, 8, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=dtype):
        y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), nn.GroupNorm.forward(norm, x.float()), rtol=2**-6, atol=2**-6)


def test_a_frozen_layer_passes_the_gradient_on():
    norm = GroupNorm(8, 32).requires_grad_(False)
    x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


def test_relu_is_relu_for_every_bfloat16():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    expected = F.relu(x)
    found = ReLU()(x.clone())
    assert torch.equal(found.isnan(), expected.isnan())
    assert expected.isnan().sum() == 254  # with and without a sign
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_relu_is_that_of_pytorch_to_the_bit(layout):
    x = torch.randn(2, 8, 5, 7).bfloat16().to(memory_format=LAYOUTS[layout])
    x[0, 0] = 0
    grad = torch.randn_like(x)
    found = []
    for relu in (ReLU(), nn.ReLU(inplace=True)):
        leaf = x.clone().requires_grad_()
        y = relu(leaf * 1)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, grad)])
        assert y.stride() == x.stride()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("dtype", "is_ours"), [(torch.bfloat16, True), (torch.float32, False), (torch.float16, False)])
def test_relu_works_in_place_and_only_bfloat16_goes_through_integers(dtype, is_ours, monkeypatch):
    calls, apply = [], _IntegerReLU.apply
    monkeypatch.setattr(_IntegerReLU, "apply", lambda x: calls.append(x) or apply(x))
    x = torch.randn(10).to(dtype)
    assert ReLU()(x).data_ptr() == x.data_ptr()
    assert bool(calls) == is_ours
    assert x.min() == 0


def test_weights_cast_at_once_give_the_loss_and_the_gradient_of_autocast_to_the_bit():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(900, 5))
    network.to(memory_format=torch.channels_last)
    x, results = torch.randn(2, 3, 16, 16), []
    for is_at_once in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            weights = half_copies(network, torch.bfloat16) if is_at_once else {}
            loss = functional_call(network, weights, (x,)).float().square().mean()
        loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())
        results.append([loss, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("model", [UnetModel(3, 3, 8), DdpmUnet(3, 3, 8)], ids=["unet", "ddpm"])
def test_all_weights_are_cast_at_once_but_the_frequencies_of_the_time(model):
    names = half_copies(model, torch.bfloat16)
    assert {name for name, _ in model.named_parameters()} - set(names) <= {"time_embedding.frequencies.weight"}
