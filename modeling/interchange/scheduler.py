"""Our diffusion process is a `DDPMScheduler` of diffusers under other names.

Its timesteps are 0..999 and ours 1..1000, so T must be 1000.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling.system.errors import UserError

# Our name -> the key of a DDPMScheduler, and our value -> its value.
_PROCESS: dict[str, tuple[str, dict]] = {
    "num_timesteps": ("num_train_timesteps", {1000: 1000}),
    "schedule": ("beta_schedule", {"linear": "linear", "cosine": "squaredcos_cap_v2"}),
    "prediction": ("prediction_type", {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}),
}


def scheduler_config(
    num_timesteps: int, schedule: str, betas: Sequence[float] | None, prediction: str
) -> dict[str, Any]:
    """The config of the DDPMScheduler that is this diffusion process, sampled as `sample.py` does by default.

    Args:
        num_timesteps: T, 1000.
        schedule: "linear" or "cosine".
        betas: (beta_1, beta_T) if linear, else None.
        prediction: what the network predicts: "eps", "x_0" or "v".

    Raises:
        UserError: for anything else.
    """
    given = {"num_timesteps": num_timesteps, "schedule": schedule, "prediction": prediction}
    # Trailing is ours, T i/n; their default begins below T, where x_t is no pure noise. After the last step it needs
    # fixed_small: of the other variance diffusers adds noise in every step except one at its timestep 0.
    config = {"variance_type": "fixed_small", "clip_sample": True, "timestep_spacing": "trailing"}
    for name, (key, known) in _PROCESS.items():
        if given[name] not in known:
            raise UserError(f"{name} must be one of {list(known)} for diffusers, got {given[name]!r}")
        config[key] = known[given[name]]
    if (betas is None) != (schedule == "cosine"):
        raise UserError(f"betas must be two numbers with schedule=linear, else null, got {betas} with {schedule}")
    if betas is not None:
        config["beta_start"], config["beta_end"] = betas
    return config


def diffusion_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """num_timesteps, schedule, betas and prediction of a DDPM- or DDIMScheduler's config, however it samples.

    Raises:
        UserError: if we do not have this process, with the key, its value and what was expected.
    """
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"{key} must not be set, got {config[key]!r}")
    arguments = {}
    for name, (key, known) in _PROCESS.items():
        found = config.get(key, next(iter(known.values())))  # the first is also diffusers' default
        if found not in known.values():
            raise UserError(f"{key} must be one of {list(known.values())}, got {found!r}")
        arguments[name] = next(ours for ours, theirs in known.items() if theirs == found)
    betas = [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)]
    return arguments | {"betas": betas if arguments["schedule"] == "linear" else None}
