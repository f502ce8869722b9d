"""2D navigation to a goal that is not seen (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastmaml.recipes.reinforcement import Preset, RLExperiment, train


@dataclass(frozen=True)
class Navigation(RLExperiment):
    """Learn to reach an unknown goal in the plane from a few tries."""

    preset: Literal["paper", "code"] = "paper"
    """settings of the paper, or of its reference code where the two differ"""
    meta_batch: int = 20
    """tasks in a meta-iteration"""
    iterations: int = 500
    """meta-iterations"""
    test_rates: tuple[float, ...] = (0.1, 0.05, 0.05, 0.05)
    """learning rates of the inner steps in validation and test"""
    test_episodes: int | None = 40
    """trajectories of a task in the test; as in training unless told"""
    reward: Literal["code", "paper"] = "code"
    """the distance, which published returns are in, or its square, as the text says"""

    name: ClassVar[str] = "navigation"
    presets: ClassVar[tuple[str, ...]] = ("paper", "code")
    environment: ClassVar[str] = "fastmaml/Navigation2D-v0"
    published: ClassVar[dict[str, tuple[float, ...]]] = {
        "paper, MAML": (-40.41, -11.68, -3.33, -3.23),
        "paper, context vector": (-42.42, -13.90, -5.17, -3.18),
    }

    @classmethod
    def from_preset(cls, preset: Preset, **selected: Any) -> Navigation:
        """The code has a larger meta-batch and inner rate."""
        if preset == "code":
            return cls(
                preset="code",
                meta_batch=40,
                inner_lr=0.5,
                test_rates=(0.5, 0.25, 0.25, 0.25),
            )
        return cls()

    def comparable(self) -> bool:
        """The published returns are distances."""
        return super().comparable() and self.reward == "code"

    def environment_settings(self) -> dict[str, Any]:
        """The reward decides the environment's preset."""
        return {"preset": self.reward}


if __name__ == "__main__":
    import tyro

    raise SystemExit(train(tyro.cli(Navigation)))
