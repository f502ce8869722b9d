"""The experiments, one file each; the settings dataclass in it is the command line."""

from __future__ import annotations

import importlib
from typing import Any

from fastmaml.recipes.common import Experiment

_RECIPES = {
    "sinusoid": ("fastmaml.recipes.sinusoid", "Sinusoid"),
    "glyphs": ("fastmaml.recipes.glyphs", "Glyphs"),
    "omniglot": ("fastmaml.recipes.omniglot", "Omniglot"),
    "mini-imagenet": ("fastmaml.recipes.mini_imagenet", "MiniImagenet"),
    "navigation": ("fastmaml.recipes.navigation", "Navigation"),
    "cheetah-dir": ("fastmaml.recipes.locomotion", "CheetahDirection"),
    "cheetah-vel": ("fastmaml.recipes.locomotion", "CheetahVelocity"),
    "ant-dir": ("fastmaml.recipes.locomotion", "AntDirection"),
    "ant-vel": ("fastmaml.recipes.locomotion", "AntVelocity"),
    "ant-goal": ("fastmaml.recipes.locomotion", "AntGoal"),
}


def names() -> tuple[str, ...]:
    """Names of the experiments, as ``fastmaml train`` takes them."""
    return tuple(_RECIPES)


def recipe(name: str) -> Any:
    """The settings class of an experiment.

    Raises:
        ValueError: there is no experiment of this name.
    """
    if name not in _RECIPES:
        raise ValueError(f"no experiment {name!r}: choose one of {', '.join(_RECIPES)}")
    module, attribute = _RECIPES[name]
    return getattr(importlib.import_module(module), attribute)


__all__ = ["Experiment", "names", "recipe"]
