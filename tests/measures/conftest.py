"""Fixtures of the measures' tests."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
from modeling.measures.encoder import Encoder, save_encoder


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory) -> Path:
    """The file of an encoder with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, Encoder(8), {})
    return path


@pytest.fixture
def measure(finished_run, encoder_path, compose_config, monkeypatch, tmp_path):
    """evaluate.py on that run, in a fresh working folder: the record."""
    monkeypatch.chdir(tmp_path)

    def measure_with(*overrides: str) -> dict:
        options = [
            f"checkpoint={finished_run}/checkpoints/last.pt",
            "num_images=12",
            "num_steps=4",
        ]
        options += ["bits_images=8", "bits_timesteps=null", "loss_images=20", "device=cpu", "precision=fp32"]
        if not any(one.startswith("measures=") and "encoder" not in one for one in overrides):
            options.append(f"encoder={encoder_path}")
        values = compose_config(*options, *overrides, name="evaluate")
        evaluate.main(values)
        return json.loads((Path(values.out) / "evaluation.json").read_text())

    return measure_with
