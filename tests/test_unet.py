"""Both networks: shapes, sizes, how the time reaches the result, which input is rejected."""

from typing import TypeVar

import pytest
import torch
from torch import nn

from modeling.ddpm_unet import AttentionBlock, DdpmUnet, embed_time
from modeling.unet import ConvBlock, UnetModel

pytestmark = pytest.mark.numeric

Model = TypeVar("Model", bound=nn.Module)
SMALL = {"hidden_size": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "attention_resolutions": (16,)}


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_models():
    return [UnetModel(3, 3, 8), DdpmUnet(3, 3, **SMALL)]


def awaken(model: Model) -> Model:
    """Gives the zero-initialised layers weights, so that a result depends on all of the network."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("hidden_size", "expected"), [(32, 714_659), (128, 11_349_635)])
def test_the_assignments_unet_has_its_known_size(hidden_size, expected):
    assert num_parameters(UnetModel(3, 3, hidden_size)) == expected


def test_the_papers_unet_has_its_published_size():
    assert num_parameters(DdpmUnet(3, 3, 128, (1, 2, 2, 2), 2, (16,), 0.1)) == 35_746_307


def test_hidden_size_defaults_to_256():
    assert UnetModel(3, 3).out.in_channels == 512


def test_the_assignments_unet_tells_all_timesteps_apart_in_bf16():
    torch.manual_seed(0)
    embedding, t = UnetModel(3, 3, 32).time_embedding, torch.arange(1, 1001) / 1000
    plain = embedding(t)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(t)
    torch.testing.assert_close(found.float(), plain, atol=0.02, rtol=0.02)
    linear = nn.functional.linear(t[:, None], embedding.frequencies.weight)
    torch.testing.assert_close(embedding.frequencies(t[:, None]), linear)
    assert len({tuple(row) for row in found.tolist()}) > 990


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
@pytest.mark.parametrize("time_shape", [(2,), (2, 1)])
@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_output_has_the_shape_of_the_input(model, device, time_shape, size):
    model = model.to(device)
    x = torch.randn(2, 3, *size)  # starts on the CPU, whatever the model's device
    out = model(x, torch.rand(time_shape).clamp(0.1, 1))
    assert out.shape == x.shape
    assert out.device.type == device


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
def test_no_tensor_is_left_on_another_device(model):
    """The "meta" device rejects a mixture with the CPU as a GPU would."""
    assert model.to("meta")(torch.zeros(2, 3, 32, 32), torch.ones(2)).device.type == "meta"


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
def test_both_shapes_of_t_mean_the_same(model):
    model, x, t = awaken(model), torch.randn(2, 3, 32, 32), torch.tensor([0.2, 0.9])
    assert torch.equal(model(x, t), model(x, t[:, None]))


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
def test_each_image_sees_its_own_time_and_no_other_image(model):
    model = awaken(model).double()
    x, t = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    together = model(x, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], t[i : i + 1]))
    changed = model(x, torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64))
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]])
    assert not torch.allclose(changed[1], together[1])


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
def test_every_parameter_gets_a_gradient(model):
    awaken(model)(torch.randn(2, 3, 32, 32), torch.rand(2)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("model", small_models(), ids=["unet", "ddpm"])
@pytest.mark.parametrize(
    ("x_shape", "t", "message"),
    [
        ((2, 1, 32, 32), [0.5, 0.5], r"\(B, 3, H, W\), got \(2, 1, 32, 32\)"),
        ((3, 32, 32), [0.5], r"\(B, 3, H, W\), got \(3, 32, 32\)"),
        ((2, 3, 33, 32), [0.5, 0.5], r"multiples of \d+, got 33x32"),
        ((2, 3, 0, 32), [0.5, 0.5], r"multiples of \d+, got 0x32"),
        ((2, 3, 32, 32), [0.5], r"\(2,\) or \(2, 1\), got \(1,\)"),
        ((2, 3, 32, 32), [0.0, 0.5], r"\(0, 1\], got values from 0.0 to 0.5"),
        ((2, 3, 32, 32), [0.5, 1.5], r"\(0, 1\], got values from 0.5 to 1.5"),
    ],
)
def test_wrong_input_is_rejected_and_named(model, x_shape, t, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(x_shape), torch.tensor(t))


@pytest.mark.parametrize("hidden_size", [0, -8, 12])
@pytest.mark.parametrize("model", [UnetModel, DdpmUnet])
def test_a_hidden_size_that_is_no_multiple_of_8_is_rejected(model, hidden_size):
    with pytest.raises(ValueError, match=f"multiple of 8, got {hidden_size}"):
        model(3, 3, hidden_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_resolutions": (7,)}, r"must be among \[32, 16, 8\], got \[7\]"),
    ],
)
def test_wrong_options_of_the_papers_unet_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        DdpmUnet(3, 3, **SMALL | options)


def test_the_residual_form_adds_first_and_last_over_root_two():
    block = ConvBlock(3, 8, is_residual=True)
    x = torch.randn(1, 3, 8, 8)
    first = block.first(x)
    torch.testing.assert_close(block(x), (first + block.last(first)) / 2**0.5)


def test_the_untrained_paper_unet_predicts_zero():
    """Its last layer starts at zero, so that the first loss is the variance of the noise, 1."""
    assert not DdpmUnet(3, 3, **SMALL)(torch.randn(2, 3, 32, 32), torch.rand(2)).any()


def test_time_embedding_is_sines_then_cosines_of_a_thousand_t():
    t = torch.tensor([0.001, 0.5])
    embedding = embed_time(t, 8).double()
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 3)
    angles = (1000 * t.double()[:, None] - 1) * frequencies
    torch.testing.assert_close(embedding, torch.cat([angles.sin(), angles.cos()], dim=1), atol=1e-4, rtol=0)


def test_attention_is_softmax_of_query_times_key_over_root_channels():
    block = awaken(AttentionBlock(8)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = block.norm(x)
    query, key, value = (layer(h).reshape(2, 8, 15) for layer in (block.query, block.key, block.value))
    weights = torch.einsum("bci,bcj->bij", query, key).div(8**0.5).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, value).reshape(x.shape)
    torch.testing.assert_close(block(x), x + block.out(mixed))


def test_dropout_acts_in_training_only():
    model = awaken(DdpmUnet(3, 3, **SMALL, dropout=0.5))
    x, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    assert not torch.equal(model.train()(x, t), model(x, t))
    assert torch.equal(model.eval()(x, t), model(x, t))
