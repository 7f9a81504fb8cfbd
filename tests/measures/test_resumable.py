"""Work in parts: a stopped process leaves them to the next one, and other or damaged parts are rejected."""

import numpy as np
import pytest
import torch

from modeling.measures.resumable import draw_in_parts
from modeling.system.errors import UserError

pytestmark = pytest.mark.numeric

IDENTITY = {"seed": 1, "sampler": "ddim"}


def draw(folder, identity=IDENTITY):
    return draw_in_parts(folder, identity, 7, 3, lambda start, count: torch.arange(start, start + count)[:, None])


def test_a_stopped_process_leaves_its_parts_to_the_next(tmp_path):
    drawn = []

    def from_zero(start, count):
        drawn.append((start, count))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return torch.arange(start, start + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    with pytest.raises(KeyboardInterrupt):
        draw_in_parts(tmp_path, {"seed": 1}, 10, 3, from_zero)
    images = draw_in_parts(tmp_path, {"seed": 1}, 10, 4, from_zero)
    assert drawn == [(0, 3), (3, 3), (6, 3), (6, 4)]
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.equal(draw_in_parts(tmp_path, {"seed": 1}, 10, 4, lambda *part: pytest.fail("drawn again")), images)
    assert len(draw_in_parts(tmp_path, {"seed": 1}, 5, 4, lambda *part: pytest.fail("drawn again"))) == 5


def test_parts_of_another_identity_are_rejected_or_replaced(tmp_path):
    draw(tmp_path)
    other = {"seed": 2, "sampler": "ddim", "eta": 0.5}
    with pytest.raises(UserError, match=r"holds parts of something else \(seed, eta differ\)"):
        draw(tmp_path, other)
    ones = draw_in_parts(tmp_path, other, 7, 3, lambda start, count: torch.ones(count, 1), replace=True)
    assert ones.tolist() == [[1.0]] * 7


def test_missing_and_other_parts_are_rejected(tmp_path):
    draw(tmp_path)
    part = tmp_path / "000000003.npy"
    for other in (np.zeros((3, 1)), np.zeros((3, 2), np.int64), np.int64(3)):
        np.save(part, other)
        with pytest.raises(UserError, match=r"000000003\.npy does not fit the parts before it: .*; delete"):
            draw(tmp_path)
    part.unlink()
    with pytest.raises(UserError, match=r"part 000000003\.npy is missing; delete"):
        draw(tmp_path)
