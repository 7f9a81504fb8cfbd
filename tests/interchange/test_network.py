"""To and from diffusers: the same function under other names, there and back to the bit."""

import functools
import inspect
import json
import math

import pytest
import torch
from torch import nn

import convert
from modeling import interchange
from modeling.checkpoint import export_weights, load_weights
from modeling.config import Config, parse
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import PREDICTIONS, DiffusionModel
from modeling.interchange.network import diffusion_arguments, from_diffusers, scheduler_config, to_diffusers
from modeling.schedules import cosine_betas, linear_betas, schedule_tables
from tests.helpers import Lambda, Payload, equal

# The network's config of google/ddpm-cifar10-32, which a diffusers wrote that had fewer keys.
PUBLISHED = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def arguments(*values) -> dict:
    """All arguments of a DdpmUnet for images of 32x32."""
    names = ("hidden_size", "multipliers", "num_blocks", "attention_resolutions", "dropout")
    return {"in_channels": 3, "out_channels": 3, **dict(zip(names, values, strict=True)), "image_size": 32}


PAPER = arguments(128, [1, 2, 2, 2], 2, [16], 0.1)
TINY = arguments(128, [1], 1, [], 0.0)
NETWORKS = {
    "paper": PAPER,
    "tiny": TINY,
    "attention at both ends": arguments(128, [1, 1, 2], 1, [32, 8], 0.25),
    "uneven": arguments(128, [1, 3, 2], 1, [16, 8], 0.0),
    "wide": arguments(256, [1], 1, [32], 0.0),
}


@functools.cache
def network(name: str) -> DdpmUnet:
    """With no weight at its initial value, and outputs of about 1."""
    torch.manual_seed(1)
    model = DdpmUnet(**NETWORKS[name]).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.7 * layer.weight[0].numel() ** -0.5)
            nn.init.normal_(layer.bias, std=0.2)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, mean=1, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
    return model


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: requirements-dev.txt")


# ---- the network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_that_of_the_unet2dmodel_which_counts_timesteps_from_0(diffusers, name):
    config, weights = to_diffusers(NETWORKS[name], network(name).state_dict())
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config)
    theirs.load_state_dict(weights, assign=True)
    timesteps, x = torch.tensor([1, 2, 508, 1000]), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.eval()(x, timesteps - 1).sample
        found = network(name)(x, timesteps / 1000)
        another = network(name)(x, (timesteps + 1) / 1000 * 0.99)
    assert 0.2 < expected.std() < 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (another - expected).abs().amax((1, 2, 3)).min() > 1e-3  # the time is heard


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_the_same_to_the_bit(name):
    weights = network(name).state_dict()
    config, converted = to_diffusers(NETWORKS[name], weights)
    assert not converted.keys() & {key for key in weights if not key.startswith("conv_")}
    assert from_diffusers(config, converted)[0] == NETWORKS[name]
    assert equal(from_diffusers(config, converted)[1], dict(weights))
    again = json.loads(json.dumps(config))
    assert to_diffusers(*from_diffusers(again, converted))[0] == config


def test_the_papers_network_is_the_published_one():
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    assert config | PUBLISHED == config | {key: PUBLISHED[key] for key in ("_class_name", "_diffusers_version")}
    assert sum(weight.numel() for weight in weights.values()) == 35_746_307
    assert from_diffusers(PUBLISHED, weights)[0] == PAPER | {"dropout": 0.0}


def test_dropout_is_kept(diffusers):
    config, _ = to_diffusers(PAPER, network("paper").state_dict())
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config)
    assert {layer.dropout.p for layer in theirs.modules() if hasattr(layer, "conv_shortcut")} == {0.1}


def test_the_names_that_attention_had_in_older_files_are_known():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    renamed = {}
    for name, weight in weights.items():
        for new in old if ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{old[new]}.")
        renamed[name] = weight
    assert sum("proj_attn" in name for name in renamed) == 12
    assert equal(from_diffusers(config, renamed)[1], dict(network("paper").state_dict()))


def test_the_arguments_are_those_of_our_network():
    ours = inspect.signature(DdpmUnet).parameters
    assert list(inspect.signature(interchange._unet_config).parameters.values()) == list(ours.values())


def test_a_missing_key_means_what_it_means_to_diffusers(diffusers):
    parameters = inspect.signature(diffusers.UNet2DModel).parameters
    assert {key: parameters[key].default for key in interchange._FIXED} == {
        key: default for key, (_, default) in interchange._FIXED.items()
    }
    assert parameters.keys() == interchange._unet_config(3, 3).keys()
    assert parameters["dropout"].default == 0
    scheduler = diffusers.DDPMScheduler().config
    assert diffusion_arguments({}) == diffusion_arguments(scheduler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size must be a multiple of 128 for diffusers, got 64"),
        ({"multipliers": [2, 2]}, r"multipliers must begin with 1 for diffusers, got \[2, 2\]"),
        ({"multipliers": []}, r"multipliers must begin with 1 for diffusers, got \[\]"),
        ({"image_size": 28}, "image_size must be a multiple of 8, got 28"),
        ({"attention_resolutions": [15]}, r"attention_resolutions must be among \[32, 16, 8, 4\], got \[15\]"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_network_that_diffusers_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(PAPER | changes, {})


@pytest.mark.parametrize("key", interchange._FIXED)
def test_every_key_that_makes_another_function_of_it_is_refused(key):
    value = interchange._FIXED[key][0]
    with pytest.raises(ValueError, match=f"^{key} must be {value!r}, got 'other'"):
        from_diffusers(interchange._unet_config(3, 3) | {key: "other"}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freq_shift": ...}, "freq_shift must be 1, got 0"),
        ({"block_out_channels": [128, 192]}, r"block_out_channels must be 1 to 12 multiples.*got \[128, 192\]"),
        ({"block_out_channels": []}, r"block_out_channels must be 1 to 12 multiples.*got \[\]"),
        ({"block_out_channels": [0, 0]}, r"block_out_channels must be 1 to 12 multiples.*got \[0, 0\]"),
        ({"block_out_channels": 128}, "block_out_channels must be 1 to 12 multiples.*got 128"),
        ({"block_out_channels": [64, 64, 64, 64]}, "hidden_size must be a multiple of 128 for diffusers, got 64"),
        ({"block_out_channels": [128, 256, 256]}, "down_block_types must be .*, got "),
        ({"layers_per_block": 10**9}, "layers_per_block must be an integer from 1 to 100, got 1000000000"),
        ({"layers_per_block": True}, "layers_per_block must be an integer from 1 to 100, got True"),
        ({"sample_size": [32, 32]}, r"sample_size must be an integer .*, got \[32, 32\]"),
        ({"sample_size": ...}, "sample_size must be an integer .*, got None"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "up_block_types must be .*, got "),
        ({"down_block_types": ["AttnDownBlock2D", *["ResnetDownsampleBlock2D"] * 3]}, "down_block_types must be"),
        ({"down_block_types": None}, "down_block_types must be .*, got None"),
        ({"novelty": 1}, "novelty=1 is no key of a UNet2DModel"),
    ],
)
def test_a_unet2dmodel_that_is_none_of_ours_is_refused(changes, message):
    config = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        from_diffusers(config, {})


def test_weights_of_another_network_are_refused():
    weights = dict(network("tiny").state_dict())
    config, converted = to_diffusers(TINY, weights)
    attention = "mid_block.attentions.0.to_q.weight"
    for changes, message in (
        ({attention: converted[attention].flatten()}, rf"{attention} is \(torch.float32, \(16384,\)\), expected"),
        ({attention: converted[attention].half()}, rf"{attention} is \(torch.float16, \(128, 128\)\), expected"),
        ({attention.replace("to_q", "query"): converted[attention]}, "query.weight is .*, expected nothing of that"),
    ):
        with pytest.raises(ValueError, match=message):
            from_diffusers(config, converted | changes)
    del converted[attention]
    with pytest.raises(ValueError, match=f"{attention} is missing, expected"):
        from_diffusers(config, converted)
    with pytest.raises(ValueError, match=r"conv_in.bias is missing, expected \(torch.float32, \(128,\)\)"):
        to_diffusers(TINY, {name: weight for name, weight in weights.items() if name != "conv_in.bias"})


# ---- the diffusion process

PROCESSES = {"linear": ([2e-4, 0.03], linear_betas(2e-4, 0.03, 1000)), "cosine": (None, cosine_betas(1000))}


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_of_the_scheduler_is_ours_with_the_large_variance(diffusers, schedule, prediction):
    betas, table = PROCESSES[schedule]
    scheduler = diffusers.DDPMScheduler.from_config(scheduler_config(1000, schedule, betas, prediction))
    torch.testing.assert_close(
        scheduler.alphas_cumprod, schedule_tables(table)["alphas_cumprod"][1:].float(), atol=1e-6, rtol=1e-3
    )
    output = torch.randn(2, 3, 8, 8)
    model = DiffusionModel(Lambda(lambda x, t: output), table, 1000, prediction=prediction)
    x = torch.randn(2, 3, 8, 8)
    for timestep in (1000, 600, 30, 1):
        generator = torch.Generator().manual_seed(timestep)
        expected = scheduler.step(output, timestep - 1, x, generator=generator).prev_sample
        found = model.p_mean(x, timestep, clip_x0=True)
        if timestep > 1:
            z = torch.randn(x.shape, generator=generator.manual_seed(timestep))
            found = found + model.p_variance(timestep, "large") ** 0.5 * z
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_process_comes_back(schedule, prediction):
    process = {"num_timesteps": 1000, "schedule": schedule, "betas": PROCESSES[schedule][0], "prediction": prediction}
    assert diffusion_arguments(scheduler_config(**process)) == process


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((200, "linear", [1e-4, 0.02], "eps"), r"num_timesteps must be one of \[1000\] for diffusers, got 200"),
        (
            (1000, "sigmoid", None, "eps"),
            r"schedule must be one of \['linear', 'cosine'\] for diffusers, got 'sigmoid'",
        ),
        ((1000, "linear", [1e-4, 0.02], "score"), "prediction must be one of .* got 'score'"),
        ((1000, "linear", None, "eps"), "betas must be two numbers with schedule=linear.*got None with linear"),
        ((1000, "cosine", [1e-4, 0.02], "eps"), "betas must be .* else null, got .* with cosine"),
    ],
)
def test_a_process_that_diffusers_does_not_have_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        scheduler_config(*values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 4000}, r"num_train_timesteps must be one of \[1000\], got 4000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule must be one of .* got 'scaled_linear'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of .* got 'flow'"),
        ({"trained_betas": [0.1]}, r"trained_betas must not be set, got \[0.1\]"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must not be set, got True"),
    ],
)
def test_a_scheduler_whose_process_is_none_of_ours_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        diffusion_arguments(config)


# ---- the script


@pytest.fixture
def call(compose_config, tmp_path, monkeypatch):
    """Calls convert.py in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: convert.main(compose_config(*overrides, name="convert"))


def export_tiny(compose_config, *overrides: str) -> Config:
    """Writes model.safetensors as a run does: the smallest network that diffusers has."""
    model = [f"model.{key}={TINY[key]}" for key in ("hidden_size", "multipliers", "num_blocks")]
    config = parse(compose_config(*model, *overrides))
    export_weights("model.safetensors", network("tiny"), config.model_dump())
    return config


def test_an_exported_run_is_a_pipeline_of_diffusers_and_comes_back_to_the_bit(
    diffusers, call, compose_config, tmp_path, capsys
):
    config = export_tiny(compose_config, "model.dropout=0.2", "diffusion.betas=[0.0002,0.03]")
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
    torch.testing.assert_close(step.prev_sample, mean + ours.p_variance(timestep) ** 0.5 * z, atol=1e-4, rtol=0)

    call("checkpoint=exported", "out=back.safetensors")
    values, weights = load_weights("back.safetensors")
    assert equal(weights, dict(network("tiny").state_dict()))
    assert parse(values) == config


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_files_may_lie_at_the_top_as_in_the_published_folder(call, compose_config, tmp_path, kind):
    export_tiny(compose_config)
    call("checkpoint=model.safetensors", "out=exported")
    top = tmp_path / "top"
    top.mkdir()
    for path in (tmp_path / "exported").glob("*/*"):
        path.rename(top / path.name)
    if kind == "bin":
        file = top / "diffusion_pytorch_model.safetensors"
        torch.save(to_diffusers(TINY, network("tiny").state_dict())[1], file.with_suffix(".bin"))
        file.unlink()
    call("checkpoint=top", "out=back.safetensors", "config.seed=5")
    values, weights = load_weights("back.safetensors")
    assert equal(weights, dict(network("tiny").state_dict()))
    assert values["seed"] == 5
    with pytest.raises(SystemExit, match="exported: there is neither unet/config.json nor config.json"):
        call("checkpoint=exported", "out=other.safetensors")


def test_a_file_that_is_no_state_dict_is_refused_and_executes_nothing(call, compose_config, tmp_path):
    export_tiny(compose_config)
    call("checkpoint=model.safetensors", "out=exported")
    file = tmp_path / "exported" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match="diffusion_pytorch_model.safetensors is no file of weights, or damaged"):
        call("checkpoint=exported", "out=back.safetensors")
    file.unlink()
    with pytest.raises(SystemExit, match="there is neither diffusion_pytorch_model.safetensors nor"):
        call("checkpoint=exported", "out=back.safetensors")
    for content, message in (
        ({"a": Payload(tmp_path / "canary")}, "holds more than tensors and plain values"),
        ({"a": 1}, "holds more than named tensors"),
        ({"a": torch.zeros(1)}, "the weights do not fit the configuration: a is"),
    ):
        torch.save(content, file.with_suffix(".bin"))
        with pytest.raises(SystemExit, match=message):
            call("checkpoint=exported", "out=back.safetensors")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "back.safetensors").exists()


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_that_is_another_pipeline_is_refused(call, compose_config, tmp_path):
    export_tiny(compose_config)
    call("checkpoint=model.safetensors", "out=exported")
    unet, scheduler = tmp_path / "exported" / convert.UNET, tmp_path / "exported" / convert.SCHEDULER
    for path, changes, restored, message in (
        (unet, {"sample_size": 64}, {"sample_size": 32}, "config.json: image_size must be 32, got 64"),
        (unet, {"freq_shift": 0}, {"freq_shift": 1}, "^freq_shift must be 1, got 0"),
        (scheduler, {"beta_start": 0.5}, {"beta_start": 1e-4}, "diffusion: betas must satisfy .* got"),
        (scheduler, {"_class_name": "Other"}, {"_class_name": "DDPMScheduler"}, "not the config of a DDPMScheduler"),
    ):
        edit(path, **changes)
        with pytest.raises(SystemExit, match=message):
            call("checkpoint=exported", "out=back.safetensors")
        edit(path, **restored)
    unet.write_text("{")
    with pytest.raises(SystemExit, match="config.json is no JSON"):
        call("checkpoint=exported", "out=back.safetensors")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion.num_timesteps=200"], r"num_timesteps must be one of \[1000\] for diffusers, got 200"),
        (["model=unet"], "model.name must be ddpm for diffusers, got unet"),
        (["model.hidden_size=64"], "hidden_size must be a multiple of 128 for diffusers, got 64"),
    ],
)
def test_a_run_that_diffusers_cannot_express_is_refused_and_writes_nothing(
    call, compose_config, tmp_path, overrides, message
):
    export_weights("model.safetensors", nn.Linear(1, 1), parse(compose_config(*overrides)).model_dump())
    with pytest.raises(SystemExit, match=message):
        call("checkpoint=model.safetensors", "out=exported")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_exists_is_not_overwritten_unasked(call, compose_config, tmp_path):
    export_tiny(compose_config)
    call("checkpoint=model.safetensors", "out=exported")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for checkpoint, out, message in (
        ("model.safetensors", "exported", "out=exported: exists already"),
        ("exported", "model.safetensors", "out=model.safetensors: exists already"),
        ("exported", "model.pt", r"out=model.pt: must name a file \*\.safetensors, because checkpoint=exported is a"),
        ("nowhere", "new", "nowhere: there is no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            call(f"checkpoint={checkpoint}", f"out={out}")
    with pytest.raises(SystemExit, match="must name a folder, because checkpoint=model.safetensors is none"):
        call("checkpoint=model.safetensors", "out=model.safetensors", "overwrite=true")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    call("checkpoint=model.safetensors", "out=exported", "overwrite=true")
    call("checkpoint=exported", "out=model.safetensors", "overwrite=true")
    assert equal(load_weights("model.safetensors")[1], dict(network("tiny").state_dict()))
