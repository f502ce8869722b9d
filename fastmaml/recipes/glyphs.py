"""Few-shot classification of drawn stroke characters; needs no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastmaml import models
from fastmaml.recipes.common import Preset, Subset, train
from fastmaml.recipes.images import ImageExperiment
from fastmaml.tasks.glyphs import glyph_splits, glyphs


@dataclass(frozen=True)
class Glyphs(ImageExperiment):
    """Tell hand-drawn characters apart after one drawing of each; needs no files."""

    iterations: int = 1000
    """meta-steps"""
    meta_batch: int = 16
    """tasks in a meta-step"""
    meta_lr: float = 3e-3
    """learning rate of Adam, the outer optimizer"""
    queries: int = 5
    """images of a class the adapted parameters are judged on, in training"""
    validate_every: int = 250
    """meta-steps between validations"""
    checkpoint_every: int = 250
    """meta-steps between checkpoints"""
    log_every: int = 20
    """meta-steps a row of metrics is the mean of"""
    channels: int = 32
    """filters of each convolution"""

    characters: int = 1200
    """different characters, all subsets together"""

    name: ClassVar[str] = "glyphs"
    published: ClassVar[str] = ""

    @classmethod
    def from_preset(cls, preset: Preset, **selected: Any) -> Glyphs:
        """The paper has no such experiment: its Omniglot settings, made quick."""
        return cls(preset=preset, test_steps=3 if preset == "paper" else 10)

    def make_model(self) -> nn.Module:
        """The paper's network for Omniglot."""
        return models.omniglot_conv(self.ways, channels=self.channels)

    def images(self, subset: Subset) -> Tensor:
        """The embedded characters, split by class."""
        return glyphs(self.characters)[glyph_splits(self.characters)[subset]]


if __name__ == "__main__":
    import tyro

    raise SystemExit(train(tyro.cli(Glyphs)))
