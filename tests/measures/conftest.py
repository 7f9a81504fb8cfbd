"""Fixtures of the measures' tests."""

from pathlib import Path

import pytest
import torch

from modeling.measures.encoder import Encoder, save_encoder


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory) -> Path:
    """The file of an encoder with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, Encoder(8), {})
    return path
