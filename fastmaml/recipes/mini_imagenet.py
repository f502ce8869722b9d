"""Few-shot classification of natural images (section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from fastmaml import models
from fastmaml.recipes.common import Preset, Subset, UserError, train
from fastmaml.recipes.images import ImageExperiment
from fastmaml.tasks.datasets.mini_imagenet import mini_imagenet

PAPER = {
    (False, 5, 1): "48.70 ± 1.84",
    (False, 5, 5): "63.11 ± 0.92",
    (True, 5, 1): "48.07 ± 1.75",
    (True, 5, 5): "63.15 ± 0.91",
}


@dataclass(frozen=True)
class MiniImagenet(ImageExperiment):
    """Tell classes of MiniImagenet apart after a few images of each."""

    data: str | None = None
    """folder with the images, or their zips, and the csv lists"""
    inner_lr: float = 0.01
    """learning rate of the inner loop"""
    inner_steps: int = 5
    """inner steps in training"""
    test_steps: int = 10
    """inner steps in validation and test"""
    meta_batch: int = 4
    """tasks in a meta-step"""
    queries: int = 15
    """images of a class the adapted parameters are judged on, in training"""
    clip_gradient: float | None = 10.0
    """hold each element of the meta-gradient within this, plus or minus"""
    channels: int = 32
    """filters of each convolution"""

    name: ClassVar[str] = "mini-imagenet"
    selectors: ClassVar[dict[str, type]] = {"shots": int}
    evaluation_chunk: ClassVar[int] = 10

    @classmethod
    def from_preset(cls, preset: Preset, **selected: Any) -> MiniImagenet:
        """With 5 shots the paper takes 2 tasks a meta-step, its code 4."""
        shots = selected.get("shots", 1)
        few = preset == "paper" and shots == 5
        return cls(
            preset=preset, shots=shots, test_queries=shots, meta_batch=2 if few else 4
        )

    def make_model(self) -> nn.Module:
        """The paper's four convolutions and max pooling."""
        return models.mini_imagenet_conv(self.ways, channels=self.channels)

    def images(self, subset: Subset) -> Tensor:
        """Images of the published split, 84 x 84 in colour."""
        if self.data is None:
            raise UserError(
                "mini-imagenet needs --data DIR, the folder with the images, or their "
                "zips, and the csv lists of the split"
            )
        return _load(self.data, subset)

    def paper_row(self, shots: int) -> str | None:
        """The paper's accuracy in percent for these ways and shots."""
        return PAPER.get((self.first_order, self.ways, shots))


@lru_cache(maxsize=3)
def _load(root: str, subset: Subset) -> Tensor:
    return mini_imagenet(root, subset=subset).images


if __name__ == "__main__":
    import tyro

    raise SystemExit(train(tyro.cli(MiniImagenet)))
