"""A trained model draws images that depend on their numbers alone, part by part."""

from typing import Any

import pytest
import torch

from modeling.config import parse
from modeling.diffusion import DiffusionModel
from modeling.measures.trained import TrainedModel
from modeling.options import SampleConfig
from modeling.system.errors import UserError
from modeling.system.reading import read_json
from tests.helpers import Lambda

pytestmark = pytest.mark.numeric


@pytest.fixture
def draw(compose_config):
    """Draws with a function as eps model."""

    def draw_with(folder, num_images, *overrides: str, eps=lambda x, t: torch.tanh(0.7 * x) * t[:, None, None, None]):
        machine = ["checkpoint=none", "device=cpu", "precision=fp32", "num_steps=5", "seed=1"]
        options = parse(compose_config(*machine, *overrides, name="sample"), SampleConfig)
        return TrainedModel(options, DiffusionModel(Lambda(eps), (0.01, 0.3), 12), {}).draw(folder, num_images)

    return draw_with


def test_images_do_not_depend_on_the_parts_they_are_drawn_in(draw, tmp_path):
    whole = draw(tmp_path / "a", 7, "batch_size=7")
    assert torch.equal(draw(tmp_path / "b", 7, "batch_size=3"), whole)
    assert torch.equal(draw(tmp_path / "c", 4, "batch_size=3"), whole[:4])
    assert whole.dtype == torch.uint8
    assert len(whole.unique(dim=0)) == 7


def test_samples_that_are_not_finite_are_an_error_and_leave_no_part(draw, tmp_path):
    with pytest.raises(FloatingPointError, match="a sample is not finite in fp32"):
        draw(tmp_path, 2, eps=lambda x, t: x * float("nan"))
    assert not list(tmp_path.glob("*.npy"))


def test_parts_of_before_spacing_was_a_choice_are_of_trailing_timesteps(draw, tmp_path):
    draw(tmp_path, 2, "spacing=trailing")
    known = {"clip_x0", "num_steps", "precision", "sampler", "seed", "variance"}
    assert read_json(tmp_path / "identity.json", dict[str, Any]).keys() == known
    with pytest.raises(UserError, match=r"parts of something else \(spacing differ\)"):
        draw(tmp_path, 2, "spacing=quadratic")


def test_a_record_names_the_gpu(compose_config, monkeypatch):
    options = parse(compose_config("checkpoint=none", "device=cpu", "num_steps=5", name="sample"), SampleConfig)
    trained = TrainedModel(options, DiffusionModel(Lambda(lambda x, t: x), (0.01, 0.3), 12), {})
    assert trained.environment["device"] == "cpu"
    trained.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert trained.environment["device"] == "NVIDIA H100"
