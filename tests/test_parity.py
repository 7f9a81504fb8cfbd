"""Networks made fast train like plain float32 ones, with the same random numbers."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from modeling.build import build_learning_rate
from modeling.data import Batches
from modeling.datasets.shapes import draw_shapes
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.ema import Ema
from modeling.heldout import denoising_loss
from modeling.runtime import place
from modeling.sections import Optimizer
from modeling.unet import UnetModel
from tests.helpers import needs_compiler
from tests.run.recorder import run

NUM_STEPS, BATCH_SIZE = 200, 16
OPTIMIZER = Optimizer(
    name="adam", lr=1e-3, momentum=None, weight_decay=None, lr_schedule="cosine", warmup_steps=20, max_grad_norm=1.0
)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ddpm": lambda: DdpmUnet(3, 3, 16, (1, 2), 1, ()),
    "unet": lambda: UnetModel(3, 3, 8),
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Shapes of 32x32."""
    return torch.from_numpy(draw_shapes(0, 0, 600))


@pytest.fixture(scope="module")
def plain(images) -> Callable[[str, int], tuple[float, float]]:
    """(network, seed) -> the losses in contiguous float32, each computed once."""
    return functools.cache(functools.partial(train, images))


def train(images, network, seed, precision="fp32", is_placed=False, is_compiled=False) -> tuple[float, float]:
    """Mean training loss and held-out loss of the averaged weights; the weights depend on the seed alone."""
    if network == "ddpm":
        images = images[:, :, ::2, ::2]  # four times as fast
    torch.manual_seed(seed)
    model = DiffusionModel(NETWORKS[network](), (1e-4, 0.02), 1000)
    if is_placed:
        model = place(model, torch.device("cpu"))
    if is_compiled:
        model.compile()
    record = run(
        model,
        NUM_STEPS,
        batches=Batches(images[:500], BATCH_SIZE, seed, random_flip=True),
        optimizer=torch.optim.Adam(model.parameters(), fused=True),
        ema=Ema(model.eps_model, 0.99),
        learning_rate=build_learning_rate(OPTIMIZER, NUM_STEPS),
        log_every=NUM_STEPS,
        checkpoint_every=NUM_STEPS,
        precision=precision,
        max_grad_norm=OPTIMIZER.max_grad_norm,
    )
    ema_model = DiffusionModel(record.ema.module, (1e-4, 0.02), 1000)
    held_out, _ = denoising_loss(ema_model, images[500:], "cpu", precision=precision)
    (line,) = record.lines
    return line["train/loss"], held_out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("network", ["ddpm", "unet"])
@pytest.mark.parametrize(
    ("precision", "is_compiled"),
    [("fp32", False), ("bf16", False), ("fp16", False), pytest.param("bf16", True, marks=needs_compiler)],
)
def test_the_fast_network_trains_like_the_plain_one(images, plain, network, precision, is_compiled):
    loss, held_out = train(images, network, 0, precision, is_placed=True, is_compiled=is_compiled)
    plain_loss, plain_held_out = plain(network, 0)
    print(f"{network}, {precision}: {loss:.5f} and {held_out:.5f}, plain {plain_loss:.5f} and {plain_held_out:.5f}")
    assert loss == pytest.approx(plain_loss, rel=0.01)
    seeds = [plain_held_out, plain(network, 1)[1], plain(network, 2)[1]]
    assert abs(held_out - plain_held_out) < max(seeds) - min(seeds)
