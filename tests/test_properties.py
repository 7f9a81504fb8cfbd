"""Properties of the mathematics and of what is saved, on examples that Hypothesis chooses (the same in every run)."""

import itertools
import math
from copy import deepcopy
from dataclasses import asdict, make_dataclass

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn

from modeling.checkpoint import load_checkpoint, save_checkpoint
from modeling.config import parse, to_yaml
from modeling.diffusion import DiffusionModel
from modeling.evaluation import bits_per_dim
from modeling.images import to_model_range, to_uint8
from modeling.samplers import Sampler, sample
from modeling.schedules import SPACINGS, cosine_betas, linear_betas, respaced_timesteps, schedule_tables
from modeling.seeding import Purpose, derive_seed, draw_integers, draw_normal
from tests.helpers import ROOT, Lambda, equal

hypothesis = pytest.importorskip("hypothesis", reason="Hypothesis is not installed: requirements-dev.txt")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.numeric

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


# The ends of a linear schedule: 1e-4 <= beta_1 < beta_T <= 0.9.
def ends(largest: float) -> st.SearchStrategy[list[float]]:
    """beta_1 and beta_T."""
    numbers = st.integers(1, round(largest * 1e4))
    return st.lists(numbers, min_size=2, max_size=2, unique=True).map(lambda two: [n / 1e4 for n in sorted(two)])


ENDS = ends(0.9)
PREDICTIONS, VARIANCES = st.sampled_from(["eps", "x_0", "v"]), st.sampled_from(["large", "small"])
WORDS = st.integers(0, 2**63 - 1)  # seeds, steps and indices


@st.composite
def processes(draw, max_timesteps: int = 12) -> DiffusionModel:
    """A diffusion process with any linear schedule, and a network that is wrong in some way."""
    scale, shift = draw(st.floats(-2, 2)), draw(st.floats(-1, 1))
    net = Lambda(lambda x, t: torch.tanh(scale * x + shift) * t.reshape(-1, *[1] * (x.ndim - 1)))
    beta1, beta2 = draw(ENDS)
    return DiffusionModel(net, (beta1, beta2), draw(st.integers(2, max_timesteps)), prediction=draw(PREDICTIONS))


@given(ENDS, st.integers(1, 200), st.booleans())
def test_the_signal_falls_and_the_noise_rises_with_every_timestep(ends, num_timesteps, is_cosine):
    betas = cosine_betas(num_timesteps) if is_cosine else linear_betas(*ends, num_timesteps=num_timesteps)
    tables = schedule_tables(betas)
    assert all(torch.isfinite(table).all() and table.shape == (num_timesteps + 1,) for table in tables.values())
    assert (tables["betas"].diff() > 0).all() or (is_cosine and (tables["betas"].diff() >= 0).all())
    assert (tables["alphas_cumprod"].diff() < 0).all()
    assert (tables["sqrt_one_minus_alpha_prod"].diff() >= 0).all()
    assert 0 < tables["alphas_cumprod"][-1] < tables["alphas_cumprod"][0] == 1


@given(processes(), VARIANCES, st.booleans(), st.integers(0, 2**32 - 1))
def test_the_terms_of_the_bound_are_divergences_of_gaussians(model, variance, clip_x0, seed):
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), computed from the two means and the two variances."""
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x_0, terms = to_model_range(images), []
    for t in range(2, model.num_timesteps + 1):
        noise = draw_normal(0, Purpose.EVALUATION, t - 1, torch.arange(2), (3, 2, 2))
        x_t = model.q_sample(x_0, torch.full((2,), t), noise).double()
        difference = model.posterior_mean(x_t, x_0.double(), t) - model.p_mean(x_t, t, clip_x0=clip_x0)
        ratio = model.posterior_variance(t) / model.p_variance(t, variance)
        squares = difference.square().mean().item() / model.p_variance(t, variance)
        terms.append(0.5 * (ratio - 1 - math.log(ratio) + squares) / math.log(2))
    found = bits_per_dim(model, images, variance, clip_x0=clip_x0).terms
    torch.testing.assert_close(found, torch.tensor(terms, dtype=torch.float64), rtol=1e-3, atol=1e-5)


@given(st.integers(1, 2000), st.sampled_from(SPACINGS), st.booleans(), st.data())
def test_timesteps_of_every_spacing_differ_and_descend_from_the_last(num_timesteps, spacing, is_cosine, data):
    betas = cosine_betas(num_timesteps) if is_cosine else linear_betas(1e-4, 0.02, num_timesteps)
    num_steps = data.draw(st.integers(1, num_timesteps))
    timesteps = respaced_timesteps(schedule_tables(betas)["alphas_cumprod"], num_steps, spacing)
    assert len(timesteps) == num_steps
    assert timesteps[0] == num_timesteps
    assert timesteps[-1] >= 1
    assert all(a > b for a, b in itertools.pairwise(timesteps))
    if spacing == "trailing":  # none has to move
        assert timesteps == [round(i * num_timesteps / num_steps) for i in range(num_steps, 0, -1)]


@given(st.lists(st.integers(0, 255), min_size=1), st.lists(st.floats(-1, 1, width=32), min_size=1))
def test_8_bit_values_return_exactly_and_others_to_the_nearest(levels, values):
    images = torch.tensor(levels, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(images)), images)
    x = torch.tensor(values)
    assert (to_model_range(to_uint8(x)) - x).abs().max() <= 1 / 255 + 1e-6


@given(processes(), st.booleans(), st.integers(0, 1000), st.data())
def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance(model, clip_x0, seed, data):
    num_steps = data.draw(st.integers(1, model.num_timesteps))
    noise = lambda timestep: draw_normal(seed, Purpose.SAMPLE, timestep, torch.arange(3), (4,)).double()  # noqa: E731
    ddim, ancestral = (
        sample(model, 3, (4,), "cpu", sampler, noise=noise)
        for sampler in (
            Sampler("ddim", num_steps, clip_x0, eta=1.0, spacing="trailing"),
            Sampler("ancestral", num_steps, clip_x0, "small"),
        )
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-6, atol=1e-6 * ancestral.abs().max().item())


@given(processes(), st.floats(-3, 3), st.floats(-1, 1), st.data())
def test_the_posterior_is_bayes_rule_for_any_schedule(model, x_t, x_0, data):
    """Precisions add up, and so do means weighted with them."""
    t = data.draw(st.integers(2, model.num_timesteps))
    beta = model.schedules_float64["betas"][t].item()
    before = model.schedules_float64["alphas_cumprod"][t - 1].item()
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta) ** 0.5 * x_t / beta + before**0.5 * x_0 / (1 - before)) / precision
    assert model.posterior_variance(t) == pytest.approx(1 / precision, rel=1e-9)
    found = model.posterior_mean(torch.tensor(x_t).double(), torch.tensor(x_0).double(), t).item()
    assert found == pytest.approx(mean, rel=1e-6, abs=1e-6)
    assert model.p_variance(t, "small") <= model.p_variance(t, "large")


@given(processes(), st.integers(0, 1000), st.data())
def test_the_predicted_eps_and_x_0_make_up_x_t(model, seed, data):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, whichever of them, or v, the network predicts."""
    t = data.draw(st.integers(1, model.num_timesteps))
    x_t = draw_normal(seed, Purpose.NOISE, 0, torch.arange(3), (4,)).double()
    eps, x_0 = model.predict(x_t, t)
    abar = model.schedules_float64["alphas_cumprod"][t].item()
    torch.testing.assert_close(abar**0.5 * x_0 + (1 - abar) ** 0.5 * eps, x_t, rtol=1e-9, atol=1e-9)
    for one, many in zip((eps, x_0), model.predict(x_t, torch.full((3,), t)), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4 * one.abs().max().item())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
STATES = st.dictionaries(st.text(), PLAIN, max_size=4)
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


@given(STATES, STATES, st.integers(), FINITE, st.lists(FINITE, min_size=6, max_size=6), st.booleans())
def test_a_checkpoint_of_any_state_is_loaded_to_the_bit(tmp_path_factory, about, config, step, loss, values, is_adam):
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values).reshape(2, 3))
    optimizer = torch.optim.Adam(model.parameters()) if is_adam else torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 3)).mean().backward()
    optimizer.step()
    state = make_dataclass("State", ["step", "loss"])(step, loss)
    path = tmp_path_factory.mktemp("any") / "last.pt"
    save_checkpoint(path, about=about, config=config, state=state, model=model, ema=ema, optimizer=optimizer)
    found = load_checkpoint(path)
    # By their text: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    assert [repr(found[key]) for key in ("about", "config", "state")] == [
        repr(about),
        repr(config),
        repr(asdict(state)),
    ]
    assert found["model"]["weight"].numpy().tobytes() == model.weight.detach().numpy().tobytes()
    assert equal(found["ema"], ema.state_dict())
    assert equal(found["optimizer"], optimizer.state_dict())


PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
CHANGES = {
    "seed": st.integers(0, 2**31),
    "optimizer.lr": st.floats(0, 1),
    "optimizer.warmup_steps": st.integers(0, 10**6),
    "model.dropout": st.floats(0, 1, exclude_max=True),
    "model.attention_resolutions": st.lists(st.sampled_from([32, 16, 8])),
    "diffusion.betas": ends(0.1),  # more leaves nothing of the image after 1000 steps
    "diffusion.prediction": PREDICTIONS,
    "train.batch_size": st.integers(1, 10_000),
    "train.random_flip": st.booleans(),
    "runtime.max_seconds": st.none() | st.floats(1e-3, 1e9),
    "wandb.name": st.none() | st.text("abc 123:#-'\"\\/é日", min_size=1),
}


@given(st.fixed_dictionaries({}, optional=CHANGES))
def test_any_configuration_is_the_same_after_yaml(changes):
    values = deepcopy(PARAMS)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    config = parse(values)
    loaded = OmegaConf.create(to_yaml(config))
    assert isinstance(loaded, DictConfig)
    assert repr(parse(loaded)) == repr(config)


@given(
    WORDS, st.sampled_from(Purpose), WORDS, st.lists(WORDS, min_size=1, max_size=20), st.integers(1, 2**31), st.data()
)
def test_a_draw_depends_on_its_address_and_not_on_the_batch(seed, purpose, step, indices, high, data):
    cut = data.draw(st.integers(0, len(indices)))
    index = torch.tensor(indices)
    whole = draw_integers(seed, purpose, step, index, high)
    assert torch.equal(
        torch.cat([draw_integers(seed, purpose, step, part, high) for part in (index[:cut], index[cut:])]), whole
    )
    assert whole.min() >= 0
    assert whole.max() < high
    normals = draw_normal(seed, purpose, step, index, (3,))
    assert torch.equal(torch.cat([draw_normal(seed, purpose, step, part, (3,)) for part in index.split(1)]), normals)
    seeds = {derive_seed(seed, purpose, step, i) for i in indices}
    assert len(seeds) == len(set(indices))
