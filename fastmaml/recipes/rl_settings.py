"""Which settings of reinforcement learning make sense."""

from __future__ import annotations

import math
from typing import Any

from fastmaml.tasks.sampler import check_count

VALIDATION_SEED = 1 << 61  # above the seeds of runs

FAST: dict[str, Any] = {
    "preconditioner": "kronecker",
    "cg_iterations": 3,
    "fisher_subsample": 0.05,
    "search_subsample": 0.25,
}
"""Of the preset ``fast``: the meta-gradient is of all samples, the Fisher products of
every twentieth, and the step is tried on a quarter of the tasks. One product of every
tenth is less work, but its step gains less once the policy has learned something
(``bench.trust_region``)."""

_COUNTS = {
    "iterations": 0,
    "inner_steps": 0,
    "validation_tasks": 0,
    "test_tasks": 0,
    "meta_batch": 1,
    "episodes": 1,
    "horizon": 1,
    "test_episodes": 1,
    "cg_iterations": 1,
    "ppo_epochs": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
}
_POSITIVE = "a finite number above 0"
_SHARE = "a number in [0, 1]"


def check_settings(settings: Any) -> None:
    """Refuses what would fail, or mean nothing, in the middle of a run.

    Args:
        settings: an ``RLExperiment``.

    Raises:
        ValueError: naming the setting, what it is and what it may be.
    """
    if settings.preset not in settings.presets:
        known = ", ".join(settings.presets)
        raise ValueError(
            f"preset must be one of {known} for {settings.name}, got "
            f"{settings.preset!r}"
        )
    for name, least in _COUNTS.items():
        value = getattr(settings, name)
        if value is not None:
            check_count(name, value, least)
    for width in settings.hidden:
        check_count("hidden", width)
    if settings.test_tasks == 1:
        raise ValueError(
            "test_tasks must be 2 or more, as its interval needs, or 0 to leave the "
            "evaluation out, got 1"
        )
    for name in ("inner_lr", "max_kl", "meta_lr"):
        value = getattr(settings, name)
        if value is not None:
            _check(name, value, _POSITIVE)
    for rate in settings.test_rates:
        _check("test_rates", rate, _POSITIVE)
    for name in ("gamma", "gae_lambda"):
        _check(name, getattr(settings, name), _SHARE)
    if not 0 <= settings.damping < math.inf:
        raise ValueError(f"damping must be 0 or more, got {settings.damping}")
    for name in ("fisher_subsample", "search_subsample"):
        if not 0 < (value := getattr(settings, name)) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    if not 0 <= settings.seed < VALIDATION_SEED:
        raise ValueError(f"seed must be in [0, 2^61), got {settings.seed}")


def _check(name: str, value: float, what: str) -> None:
    good = 0 < value < math.inf if what == _POSITIVE else 0 <= value <= 1
    if not good:
        raise ValueError(f"{name} must be {what}, got {value}")
