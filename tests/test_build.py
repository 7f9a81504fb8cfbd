"""Configuration to objects."""

import math

import pytest
import torch

from modeling import build
from modeling.config import parse
from modeling.ddpm_unet import DdpmUnet
from modeling.muon import Muon
from modeling.unet import UnetModel


@pytest.mark.parametrize(("name", "kind"), [("unet", UnetModel), ("ddpm", DdpmUnet)])
def test_the_named_network_is_built_in_the_configured_size(compose_config, name, kind):
    model = build.build_model(parse(compose_config(f"model={name}", "model.hidden_size=16")))
    assert type(model.eps_model) is kind
    assert model.num_timesteps == 1000
    assert model.betas[1].item() == pytest.approx(1e-4)


def test_weights_are_a_function_of_the_seed(compose_config):
    first, again, other = (
        build.build_model(parse(compose_config("model.hidden_size=8", f"seed={seed}"))).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("overrides", "kind", "expected"),
    [
        (["optimizer=adam"], torch.optim.Adam, {"weight_decay": 0}),
        (["optimizer=adamw", "optimizer.weight_decay=0.3"], torch.optim.AdamW, {"weight_decay": 0.3}),
        (["optimizer=muon", "optimizer.momentum=0.9"], Muon, {"momentum": 0.9}),
        (["optimizer=sgd", "optimizer.momentum=0.7"], torch.optim.SGD, {"momentum": 0.7, "weight_decay": 0}),
    ],
)
def test_the_named_optimizer_gets_its_values(compose_config, overrides, kind, expected):
    section = parse(compose_config(*overrides, "optimizer.lr=0.25")).optimizer
    optimizer = build.build_optimizer(section, torch.nn.Linear(1, 1))
    assert type(optimizer) is kind
    assert (expected | {"lr": 0.25}).items() <= optimizer.param_groups[0].items()


def test_the_learning_rate_warms_up_and_decays(compose_config):
    def rates(*overrides, last_step=100):
        section = parse(compose_config("optimizer.lr=2.0", "optimizer.warmup_steps=10", *overrides)).optimizer
        rate = build.build_learning_rate(section, last_step)
        return [rate(step) for step in range(last_step)]

    constant, cosine = rates("optimizer.lr_schedule=constant"), rates("optimizer.lr_schedule=cosine")
    assert constant[:10] == cosine[:10] == [pytest.approx(0.2 * (step + 1)) for step in range(10)]
    assert set(constant[10:]) == {2.0}
    assert cosine[10] == 2.0
    assert cosine[55] == pytest.approx(1 + math.cos(math.pi / 2))
    assert cosine[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert sorted(cosine[10:], reverse=True) == cosine[10:]


def test_a_warm_up_longer_than_the_run_is_cut_to_it(compose_config):
    section = parse(compose_config("optimizer.lr=1.0", "optimizer.warmup_steps=1000")).optimizer
    rate = build.build_learning_rate(section, 4)
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.long
@pytest.mark.slow
def test_a_compiled_run_trains_the_same_function(tiny):
    """Compilation changes rounding only."""
    import json

    import main

    losses = []
    for is_compiled in (False, True):
        main.main(
            tiny(
                f"runtime.compile={is_compiled}",
                "runtime.precision=fp32",
                "train.max_steps=3",
                f"runtime.output_dir=compiled-{is_compiled}",
            )
        )
        with open(f"compiled-{is_compiled}/metrics.jsonl") as file:
            losses.append(json.loads(file.readline())["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_a_compiled_run_compiles_its_step_and_nothing_else(tiny, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    import main

    counter = CompileCounter()
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=counter))
    main.main(tiny("runtime.compile=true", "train.max_steps=3"))
    assert counter.frame_count == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("free", "kind"), [(4 * 9 * 2, "cuda"), (4 * 9 * 2 - 1, "cpu")])
def test_images_go_to_a_gpu_that_has_room_for_them(compose_config, monkeypatch, free, kind):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    config, images = parse(compose_config("train.batch_size=2")), torch.zeros(4, 1, 3, 3, dtype=torch.uint8)
    batches = build.build_batches(config, images, torch.device("cuda"))
    assert batches.images.device.type == kind
    (batch,) = batches.loader(range(1), 0, "cuda")
    assert batch.is_pinned() == (kind == "cpu")
