"""`convert.py`: the files of a pipeline, there and back to the bit."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import convert
from modeling.checkpoint import export_weights, load_weights, save_checkpoint
from modeling.config import Config, Trained, parse
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.interchange import pipeline
from modeling.interchange.network import to_diffusers
from modeling.interchange.pipeline import SCHEDULER, UNET
from modeling.run.bookkeeping import TrainState
from tests.helpers import Payload, ended_after, equal
from tests.interchange.networks import TINY, network


@pytest.fixture
def call(compose_config, tmp_path, monkeypatch):
    """Calls convert.py in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: convert.main(compose_config(*overrides, name="convert"))


@pytest.fixture
def error_of(call, capsys):
    """Calls convert.py, which must fail; returns its one line of error."""

    def fail(*overrides: str) -> str:
        with pytest.raises(SystemExit, match="^1$"):
            call(*overrides)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return fail


def write_tiny(compose_config, *overrides: str) -> Config:
    """Writes model.safetensors as a run does: the smallest network that diffusers has."""
    model = [f"model.{key}={TINY[key]}" for key in ("hidden_size", "multipliers", "num_blocks")]
    config = parse(compose_config(*model, *overrides))
    export_weights("model.safetensors", network("tiny"), config.model_dump())
    return config


@pytest.fixture
def exported(call, compose_config) -> Path:
    """The folder made of model.safetensors beside it."""
    write_tiny(compose_config)
    call("checkpoint=model.safetensors", "out=exported")
    return Path("exported")


def test_an_exported_run_is_a_pipeline_and_comes_back_to_the_bit(diffusers, call, compose_config, capsys):
    config = write_tiny(compose_config, "model.dropout=0.2", "diffusion.betas=[0.0002,0.03]")
    call("checkpoint=model.safetensors", "out=exported")
    assert capsys.readouterr().out == "exported\n"
    pipeline = diffusers.DDPMPipeline.from_pretrained("exported")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)

    ours = DiffusionModel(network("tiny"), tuple(config.diffusion.betas), 1000)
    x, timestep = torch.randn(2, 3, 32, 32), 700
    with torch.no_grad():
        output = pipeline.unet(x, timestep - 1).sample
        torch.testing.assert_close(output, network("tiny")(x, torch.full((2,), timestep / 1000)), atol=1e-5, rtol=0)
        pipeline.scheduler.set_timesteps(1000)
        step = pipeline.scheduler.step(output, timestep - 1, x, generator=torch.Generator().manual_seed(0))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        mean = ours.p_mean(x, timestep, clip_x0=True)
    torch.testing.assert_close(
        step.prev_sample, mean + ours.p_variance(timestep, "small") ** 0.5 * z, atol=1e-4, rtol=0
    )

    call("checkpoint=exported", "out=back.safetensors")
    values, weights = load_weights("back.safetensors")
    assert equal(weights, dict(network("tiny").state_dict()))
    assert parse(values) == config


def test_a_full_checkpoint_is_exported_as_its_averaged_weights(call, compose_config, exported):
    """Whose convolutions have the channels last, as in training."""
    net = copy.deepcopy(network("tiny")).to(memory_format=torch.channels_last)
    config = write_tiny(compose_config)
    save_checkpoint(
        "last.pt", about={}, config=config.model_dump(), state=TrainState(), model=net, ema=net,
        optimizer=torch.optim.Adam(net.parameters()),
    )  # fmt: skip
    call("checkpoint=last.pt", "out=again")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (Path("again") / name).read_bytes() == (exported / name).read_bytes()


def test_a_network_for_grey_images_of_48x64_goes_there_and_back(diffusers, call, compose_config):
    config = parse(
        compose_config(
            "dataset=folder", "dataset.pictures=pictures", "dataset.image_size=[48,64]", "dataset.channels=1",
            *(f"model.{key}={TINY[key]}" for key in ("hidden_size", "multipliers", "num_blocks")),
        )
    )  # fmt: skip
    model = DdpmUnet(**TINY | {"in_channels": 1, "out_channels": 1, "image_size": 48}).eval()
    export_weights("model.safetensors", model, config.model_dump())
    call("checkpoint=model.safetensors", "out=exported")
    pipeline = diffusers.DDPMPipeline.from_pretrained("exported")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 48, 64, 1)

    call("checkpoint=exported", "out=back.safetensors")
    values, weights = load_weights("back.safetensors")
    assert equal(weights, dict(model.state_dict()))
    assert parse(values, Trained).image_shape == (1, 48, 64)
    assert "name" not in values["dataset"]  # it is not known; evaluate.py asks for data=FOLDER


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_files_may_be_at_the_top_as_in_the_published_folder(exported, call, error_of, kind):
    top = Path("top")
    top.mkdir()
    for path in exported.glob("*/*"):
        path.rename(top / path.name)
    if kind == "bin":
        file = top / "diffusion_pytorch_model.safetensors"
        torch.save(to_diffusers(TINY, network("tiny").state_dict())[1], file.with_suffix(".bin"))
        file.unlink()
    call("checkpoint=top", "out=back.safetensors", "config.seed=5")
    values, weights = load_weights("back.safetensors")
    assert equal(weights, dict(network("tiny").state_dict()))
    assert values["seed"] == 5
    error = error_of("checkpoint=exported", "out=other.safetensors")
    assert error == "exported: there is neither unet/config.json nor config.json\n"


def test_a_file_that_is_no_state_dict_is_rejected_and_executes_nothing(exported, error_of, tmp_path):
    convert_back = ("checkpoint=exported", "out=back.safetensors")
    file = exported / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1")
    assert "diffusion_pytorch_model.safetensors is no file of weights, or damaged" in error_of(*convert_back)
    file.unlink()
    assert "there is none of diffusion_pytorch_model.safetensors, " in error_of(*convert_back)
    for content, message in (
        ({"a": Payload(tmp_path / "canary")}, "holds more than tensors and plain values"),
        ({"a": 1}, "holds more than named tensors"),
        ({1: torch.zeros(1)}, "holds more than named tensors"),
        ({"a": torch.zeros(1)}, "the weights do not fit the configuration: a is"),
    ):
        torch.save(content, file.with_suffix(".bin"))
        assert message in error_of(*convert_back)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "back.safetensors").exists()


def test_weights_in_parts_or_of_half_length_are_read(diffusers, exported, call, error_of):
    convert_back = ("checkpoint=exported", "out=back.safetensors", "overwrite=true")
    file, expected = exported / "unet" / "diffusion_pytorch_model.safetensors", dict(network("tiny").state_dict())
    theirs = diffusers.UNet2DModel.from_pretrained(file.parent)
    theirs.save_pretrained(file.parent, max_shard_size="2MB")
    file.unlink()
    parts = sorted(file.parent.glob("diffusion_pytorch_model-*.safetensors"))
    assert len(parts) > 1
    call(*convert_back)
    assert equal(load_weights("back.safetensors")[1], expected)
    parts[1].rename("elsewhere.safetensors")
    assert error_of(*convert_back) == f"{parts[1]}: No such file or directory\n"
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    edit(index, weight_map={"a": "../../elsewhere.safetensors"})
    assert "weight_map must name files *.safetensors beside it, got ../../else" in error_of(*convert_back)
    index.unlink()
    theirs.half().save_pretrained(file.parent, variant="fp16")
    call(*convert_back)
    halves = {name: weight.half().float() for name, weight in expected.items()}
    assert equal(load_weights("back.safetensors")[1], halves)


def test_a_folder_sampled_by_ddim_has_the_same_process(exported, call):
    edit(exported / SCHEDULER, _class_name="DDIMScheduler", set_alpha_to_one=True)
    call("checkpoint=exported", "out=back.safetensors")
    assert load_weights("back.safetensors")[0] == load_weights("model.safetensors")[0]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_that_is_another_pipeline_is_rejected(exported, error_of):
    unet, scheduler = exported / UNET, exported / SCHEDULER
    other, own = {"attention_head_dim": 64, "norm_eps": 1e-5}, {"attention_head_dim": None, "norm_eps": 1e-6}
    for path, changes, restored, message in (
        (unet, {"in_channels": 4} | other, {"in_channels": 3} | own, "in_channels must be 1 or 3, got 4"),
        (unet, {"sample_size": 2000}, {"sample_size": 32}, r"image_size=\[2000, 2000\]: must be a whole number"),
        (unet, {"sample_size": [32, 0]}, {"sample_size": 32}, r"image_size=\[32, 0\]: must be"),
        (unet, {"out_channels": 6}, {"out_channels": 3}, "out_channels must be 3, got 6: a learned variance is not"),
        (unet, {"freq_shift": 0}, {"freq_shift": 1}, "freq_shift must be 1, got 0"),
        (scheduler, {"beta_start": 0.5}, {"beta_start": 1e-4}, "diffusion: betas must satisfy .* got"),
        (scheduler, {"_class_name": "Other"}, {}, "config of a DDPMScheduler or DDIMScheduler, got Other"),
    ):
        edit(path, **changes)
        assert re.search(message, error_of("checkpoint=exported", "out=back.safetensors"))
        edit(path, **restored)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion.num_timesteps=200"], "num_timesteps must be one of [1000] for diffusers, got 200"),
        (["model=unet"], "model.name must be ddpm for diffusers, got unet"),
        (["model.hidden_size=64"], "hidden_size must be a multiple of 128 for diffusers, got 64"),
    ],
)
def test_a_run_that_diffusers_cannot_express_writes_nothing(error_of, compose_config, tmp_path, overrides, message):
    export_weights("model.safetensors", nn.Linear(1, 1), parse(compose_config(*overrides)).model_dump())
    assert message in error_of("checkpoint=model.safetensors", "out=exported")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_existing_output_is_not_overwritten_unasked(exported, call, error_of, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for checkpoint, out, message in (
        ("model.safetensors", "exported", "out=exported: exists already"),
        ("exported", "model.safetensors", "out=model.safetensors: exists already"),
        ("exported", "model.pt", "out=model.pt: must name a file *.safetensors, because checkpoint=exported is a"),
        ("nowhere", "new", "nowhere: No such file or directory"),
    ):
        assert message in error_of(f"checkpoint={checkpoint}", f"out={out}")
    error = error_of("checkpoint=model.safetensors", "out=model.safetensors", "overwrite=true")
    assert "model.safetensors: is a file, and a folder is to be written" in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "write_atomically", ended_after(print, 0, KeyboardInterrupt))
        call("checkpoint=model.safetensors", "out=exported", "overwrite=true")
    assert not (exported / "model_index.json").exists()  # a mixture of two is no pipeline
    call("checkpoint=model.safetensors", "out=exported", "overwrite=true")
    call("checkpoint=exported", "out=model.safetensors", "overwrite=true")
    assert equal(load_weights("model.safetensors")[1], dict(network("tiny").state_dict()))
