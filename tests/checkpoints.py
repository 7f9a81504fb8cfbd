"""Small checkpoints for the tests of checkpoint.py."""

import io
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Adam

from modeling.checkpoint import _seal, save_checkpoint


@dataclass
class State:
    step: int = 3


def save(path, spoil=None):
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = State()
    if spoil is not None:
        spoil(model, ema, optimizer, state)
    about = {"run": "name", "wandb_id": "1"}
    save_checkpoint(path, about=about, config={"seed": 1}, state=state, model=model, ema=ema, optimizer=optimizer)
    return model, ema, optimizer


def seal(path) -> None:
    """Gives a file made by `torch.save` the checksum of a checkpoint, as an attacker would."""
    content = io.BytesIO(path.read_bytes())
    _seal(content)
    path.write_bytes(content.getvalue())
