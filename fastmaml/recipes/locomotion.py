"""Locomotion of simulated robots (Finn et al. 2017, section 5.3), by MuJoCo.

The presets ``paper``, ``code`` and ``fast`` run the tasks of the paper's code (one
physics step per action, 200 steps), ``gym`` those of later work (five, 100 steps).
Returns of the two are not comparable.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fastmaml.recipes.reinforcement import Preset, RLExperiment
from fastmaml.recipes.rl_settings import FAST

L = TypeVar("L", bound="Locomotion")


@dataclass(frozen=True)
class Locomotion(RLExperiment):
    """Settings the robots share."""

    code_settings: ClassVar[dict[str, Any]] = {}
    """where the paper's code differs from the paper"""

    @classmethod
    def from_preset(cls: type[L], preset: Preset, **selected: Any) -> L:
        """The family of tasks, and its policy."""
        settings = cls(preset=preset)
        if preset == "code":
            return dataclasses.replace(settings, **cls.code_settings)
        if preset == "fast":
            return dataclasses.replace(settings, **FAST)
        if preset == "gym":
            return dataclasses.replace(settings, hidden=(64, 64), activation="tanh")
        return settings

    def environment_settings(self) -> dict[str, Any]:
        """The family of tasks, and the simulator's threads."""
        family = "gym" if self.preset == "gym" else "finn2017"
        return {"preset": family, "threads": self.threads}


@dataclass(frozen=True)
class CheetahDirection(Locomotion):
    """Learn to run forward or backward, whichever is rewarded."""

    max_kl: float = 0.02
    """mean divergence of post-update policies that a trust-region step may reach"""

    name: ClassVar[str] = "cheetah-dir"
    environment: ClassVar[str] = "fastmaml/HalfCheetahDir-v0"
    published: ClassVar[dict[str, tuple[float, ...]]] = {
        "paper, MAML": (-50.69, 293.19, 313.48, 315.65),
        "paper, context vector": (-40.49, -44.08, -38.27, -42.50),
    }


@dataclass(frozen=True)
class CheetahVelocity(Locomotion):
    """Learn to run at the velocity that is rewarded."""

    name: ClassVar[str] = "cheetah-vel"
    environment: ClassVar[str] = "fastmaml/HalfCheetahVel-v0"
    code_settings: ClassVar[dict[str, Any]] = {"episodes": 10}


@dataclass(frozen=True)
class AntDirection(Locomotion):
    """Learn to walk forward or backward, whichever is rewarded."""

    episodes: int = 40
    """trajectories of a task before, and after, each inner step"""

    name: ClassVar[str] = "ant-dir"
    environment: ClassVar[str] = "fastmaml/AntDir-v0"


@dataclass(frozen=True)
class AntVelocity(Locomotion):
    """Learn to walk at the velocity that is rewarded."""

    name: ClassVar[str] = "ant-vel"
    environment: ClassVar[str] = "fastmaml/AntVel-v0"


@dataclass(frozen=True)
class AntGoal(Locomotion):
    """Learn to walk to a place that is rewarded."""

    name: ClassVar[str] = "ant-goal"
    environment: ClassVar[str] = "fastmaml/AntGoal-v0"
