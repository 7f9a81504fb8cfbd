"""Noise schedules: beta at each timestep 1..T, the tables made of it (index 0 is clean data), and fewer timesteps."""

import math

import torch
from torch import Tensor

SPACINGS = ("trailing", "linspace", "quadratic", "log_snr")


def linear_betas(beta1: float, beta2: float, num_timesteps: int) -> Tensor:
    """Returns the paper's schedule (section 4): beta_1..beta_T evenly spaced from beta1 to beta2 (T = 1: beta1).

    Returns:
        (T,) float64.

    Raises:
        ValueError: unless 0 < beta1 < beta2 < 1 and T >= 1.
    """
    _check_num_timesteps(num_timesteps)
    if not 0 < beta1 < beta2 < 1:
        raise ValueError(f"betas must satisfy 0 < beta1 < beta2 < 1, got beta1={beta1}, beta2={beta2}")
    return torch.linspace(beta1, beta2, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Returns the schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17): abar_t falls as a squared cosine.

    As in that paper, beta is at most 0.999, so that alphas_cumprod is always above 0.

    Returns:
        (T,) float64.

    Raises:
        ValueError: unless T >= 1.
    """
    _check_num_timesteps(num_timesteps)
    offset = 0.008
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    abar = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")


def schedule_tables(betas: Tensor) -> dict[str, Tensor]:
    """Computes the tables of `get_schedules` from betas (T,), in float64.

    Raises:
        ValueError: for betas outside (0, 1).
    """
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas must be numbers in (0, 1) of shape (T,), got {betas}")
    betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas.double().cpu()])  # index 0: clean data
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    sqrt_one_minus = (1 - alphas_cumprod).sqrt()
    ratio = betas / sqrt_one_minus
    ratio[0] = 0  # 0 / 0
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alpha_prod": sqrt_one_minus,
        "inv_sqrt_alphas": alphas.rsqrt(),
        "sqrt_betas": betas.sqrt(),
        "one_minus_alpha_over_prod": ratio,
    }


def get_schedules(beta1: float, beta2: float, num_timesteps: int) -> dict[str, Tensor]:
    """Computes the linear schedule of the paper (section 4) and the tables derived from it.

    Args:
        beta1: beta at timestep 1.
        beta2: beta at timestep T; not used with T = 1.
        num_timesteps: T, at least 1.

    Returns:
        float32 tensors of shape (T + 1,), computed in float64 and indexed by timestep; index 0 is clean data:
        betas, alphas = 1 - betas, alphas_cumprod (abar), sqrt_alphas_cumprod = sqrt(abar),
        sqrt_one_minus_alpha_prod = sqrt(1 - abar), inv_sqrt_alphas = 1 / sqrt(alpha), sqrt_betas,
        one_minus_alpha_over_prod = (1 - alpha) / sqrt(1 - abar), the factor of eps in eq. 11.

    Raises:
        ValueError: unless 0 < beta1 < beta2 < 1 and T >= 1.
    """
    tables = schedule_tables(linear_betas(beta1, beta2, num_timesteps))
    return {name: table.float() for name, table in tables.items()}


def respaced_timesteps(abars: Tensor, num_steps: int, spacing: str = "trailing") -> list[int]:
    """Returns n = num_steps of the timesteps 1..T, all different, descending from T.

    The i-th from below is the nearest to T i / n ("trailing"), to the i-th of n even points from 1 to T ("linspace"),
    to T (i / n)^2 ("quadratic"), or, in log-SNR, to the i-th of n points that are even in it ("log_snr"). Where two
    round to the same, one moves to the next that is free: with n = T every spacing is all of 1..T.

    Args:
        abars: abar at the timesteps 0..T, (T + 1,) float64.

    Raises:
        ValueError: unless 1 <= n <= T, or for another spacing.
    """
    last = len(abars) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(f"num_steps must be in 1..{last}, got {num_steps}")
    i = torch.arange(1, num_steps + 1, dtype=torch.float64)
    from_last = (num_steps - i) / max(num_steps - 1, 1)  # from 1, at timestep 1, to 0
    match spacing:
        case "trailing":
            points = i * last / num_steps
        case "linspace":
            points = last - (last - 1) * from_last
        case "quadratic":
            points = last * (i / num_steps) ** 2
        case "log_snr":
            levels = abars[1:].logit()
            points = 1 + (levels - torch.lerp(levels[-1], levels[0], from_last)[:, None]).abs().argmin(dim=1)
        case _:
            raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    timesteps = [0]
    for free_above, point in zip(range(num_steps - 1, -1, -1), points.tolist(), strict=True):
        timesteps.append(max(timesteps[-1] + 1, min(round(point), last - free_above)))
    return timesteps[:0:-1]
