"""Random numbers as functions of their address: distribution, independence, no dependence on the batch."""

import pytest
import torch

from modeling.seeding import (
    Purpose,
    derive_seed,
    draw_bits,
    draw_integers,
    draw_normal,
    draw_permutation,
    draw_stratified,
    image_noise,
)

pytestmark = pytest.mark.numeric

INDEX = torch.arange(512)


def test_a_row_depends_on_its_index_and_not_on_the_batch():
    """Bitwise, for any split and any order; else another batch size or number of processes would change a run."""
    whole = draw_normal(0, Purpose.NOISE, 7, INDEX, (3, 32, 32))
    for cut in (1, 3, 17, 100, 511):
        parts = [draw_normal(0, Purpose.NOISE, 7, part, (3, 32, 32)) for part in (INDEX[:cut], INDEX[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(512)
    assert torch.equal(draw_normal(0, Purpose.NOISE, 7, order, (3, 32, 32)), whole[order])
    assert torch.equal(draw_normal(0, Purpose.NOISE, 7, torch.tensor([200]), (3, 32, 32)), whole[200:201])


def test_known_values():
    """A change of these numbers makes every recorded run irreproducible: it must be meant."""
    assert derive_seed(0, Purpose.NOISE, 1, 2) == 10219387197042190808
    assert draw_bits(1, Purpose.FLIP, 2, torch.tensor([3]), 2).tolist() == [
        [-8804264384892840776, -7600242373146423439]
    ]
    assert draw_permutation(0, 0, 8).tolist() == [7, 2, 1, 5, 0, 3, 4, 6]


def test_normals_are_standard_normal():
    draws = draw_normal(0, Purpose.NOISE, 0, INDEX, (2000,)).flatten().double()
    count = len(draws)
    assert draws.mean().item() == pytest.approx(0, abs=5 / count**0.5)
    assert draws.var().item() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert (draws**3).mean().item() == pytest.approx(0, abs=5 * (15 / count) ** 0.5)
    assert (draws**4).mean().item() == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    uniform = torch.special.ndtr(draws).sort().values  # Kolmogorov-Smirnov, at about 5 sigma
    assert (uniform - torch.linspace(0, 1, count, dtype=torch.float64)).abs().max() < 2.6 / count**0.5


@pytest.mark.parametrize("axis", ["element", "index", "step", "seed", "purpose"])
def test_neighbouring_addresses_are_uncorrelated(axis):
    first = draw_normal(5, Purpose.NOISE, 9, INDEX, (1000,))
    second = {
        "element": lambda: first.roll(1, dims=1),
        "index": lambda: draw_normal(5, Purpose.NOISE, 9, INDEX + 1, (1000,)),
        "step": lambda: draw_normal(5, Purpose.NOISE, 10, INDEX, (1000,)),
        "seed": lambda: draw_normal(6, Purpose.NOISE, 9, INDEX, (1000,)),
        "purpose": lambda: draw_normal(5, Purpose.SAMPLE, 9, INDEX, (1000,)),
    }[axis]()
    assert (first.double() * second.double()).mean().abs() < 5 / first.numel() ** 0.5


def test_integers_are_uniform():
    draws = draw_integers(0, Purpose.TIMESTEP, 0, torch.arange(100_000), 10)
    frequency = draws.bincount(minlength=10) / 100_000
    assert draws.min() == 0
    assert draws.max() == 9
    torch.testing.assert_close(frequency, torch.full((10,), 0.1), atol=0.005, rtol=0)


@pytest.mark.parametrize(("count", "high"), [(1, 10), (7, 1000), (64, 1000), (1000, 10), (1 << 20, 1 << 20)])
def test_stratified_integers_are_one_in_each_stratum_and_do_not_depend_on_the_part(count, high):
    draws = draw_stratified(0, Purpose.TIMESTEP, 3, torch.arange(count), count, high)
    assert draws.min() >= 0
    assert draws.max() < high
    places = draws * count / high - torch.arange(count)  # within a stratum, up to the rounding of an integer
    assert places.min() > -count / high
    assert places.max() < 1
    assert torch.equal(
        draws[count // 2 :], draw_stratified(0, Purpose.TIMESTEP, 3, torch.arange(count)[count // 2 :], count, high)
    )
    assert draw_stratified(0, Purpose.TIMESTEP, 3, torch.arange(0), count, high).shape == (0,)


def test_stratified_integers_are_uniform_over_the_steps():
    draws = torch.cat([draw_stratified(0, Purpose.TIMESTEP, step, torch.arange(7), 7, 20) for step in range(5_000)])
    torch.testing.assert_close(draws.bincount(minlength=20) / 35_000, torch.full((20,), 0.05), atol=0.002, rtol=0)


def test_a_permutation_has_every_number_once_and_differs_by_epoch_and_seed():
    orders = [draw_permutation(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert order.sort().values.tolist() == list(range(1000))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_odd_shapes_are_filled():
    assert draw_normal(0, Purpose.NOISE, 0, INDEX[:2], (3, 5)).shape == (2, 3, 5)


def test_seeds_use_the_full_range_and_large_ones_are_distinct():
    assert derive_seed(2**63 - 1, Purpose.NOISE) != derive_seed(2**63 - 2, Purpose.NOISE)
    assert 0 <= derive_seed(0, Purpose.ORDER) < 2**64


def test_image_noise_differs_by_timestep_and_image():
    noise = image_noise(0, torch.tensor([4, 5]), (3, 8, 8))
    assert torch.equal(noise(3)[1:], image_noise(0, torch.tensor([5]), (3, 8, 8))(3))
    assert not torch.equal(noise(3), noise(4))
    assert not torch.equal(noise(3)[0], noise(3)[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_cuda_draws_the_same_bits_and_the_same_normals_to_rounding():
    cpu, cuda = INDEX, INDEX.cuda()
    assert torch.equal(draw_bits(0, Purpose.NOISE, 1, cuda, 64).cpu(), draw_bits(0, Purpose.NOISE, 1, cpu, 64))
    torch.testing.assert_close(
        draw_normal(0, Purpose.NOISE, 1, cuda, (64,)).cpu(), draw_normal(0, Purpose.NOISE, 1, cpu, (64,)),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip
