"""Few-shot classification of handwritten characters (section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastmaml import models
from fastmaml.recipes.common import Preset, Subset, UserError, train
from fastmaml.recipes.images import ImageExperiment
from fastmaml.tasks.datasets.omniglot import omniglot

PAPER = {
    ("conv", 5, 1): "98.7 ± 0.4",
    ("conv", 5, 5): "99.9 ± 0.1",
    ("conv", 20, 1): "95.8 ± 0.3",
    ("conv", 20, 5): "98.9 ± 0.2",
    ("fc", 5, 1): "89.7 ± 1.1",
    ("fc", 5, 5): "97.5 ± 0.6",
}


@dataclass(frozen=True)
class Omniglot(ImageExperiment):
    """Tell handwritten characters apart after a few drawings of each."""

    data: str | None = None
    """folder with the Omniglot zips, or with what was in them"""
    download: bool = False
    """fetch the official archive into the folder if it is not there"""
    split: Literal["vinyals", "finn", "background"] = "finn"
    """which characters to train, validate and test on"""
    resample: Literal["nearest", "lanczos"] = "nearest"
    """how drawings are made 28 x 28"""
    rotate: bool = True
    """turns by 90, 180 and 270 degrees make further classes, also in the test"""
    network: Literal["conv", "fc"] = "conv"
    """four convolutions, or four fully connected layers"""
    channels: int = 64
    """filters of each convolution"""
    head_std: float = 1.0
    """standard deviation of the convolutional network's last weights at the start"""

    name: ClassVar[str] = "omniglot"
    selectors: ClassVar[dict[str, type]] = {"ways": int, "shots": int}

    @classmethod
    def from_preset(cls, preset: Preset, **selected: Any) -> Omniglot:
        """20 ways take a smaller inner rate and more steps; queries equal shots.

        The code tests with 10 steps whatever the ways.
        """
        ways, shots = selected.get("ways", 5), selected.get("shots", 1)
        many = ways >= 20
        test_steps = 10 if preset == "code" else 5 if many else 3
        return cls(
            preset=preset,
            ways=ways,
            shots=shots,
            queries=shots,
            test_queries=shots,
            inner_lr=0.1 if many else 0.4,
            inner_steps=5 if many else 1,
            test_steps=test_steps,
            meta_batch=16 if many else 32,
        )

    def make_model(self) -> nn.Module:
        """One of the paper's two networks."""
        if self.network == "fc":
            return models.omniglot_fc(self.ways)
        return models.omniglot_conv(
            self.ways, channels=self.channels, head_std=self.head_std
        )

    def rotations(self) -> tuple[int, ...]:
        """All four right angles, or none."""
        return (0, 90, 180, 270) if self.rotate else (0,)

    def images(self, subset: Subset) -> Tensor:
        """Characters of the split, white ink on black."""
        if self.data is None:
            raise UserError(
                "omniglot needs --data DIR, the folder with images_background.zip and "
                "images_evaluation.zip; --download fetches them into it"
            )
        return _load(self.data, self.split, subset, self.resample, self.download)

    def paper_row(self, shots: int) -> str | None:
        """The paper's accuracy in percent for these ways and shots."""
        return PAPER.get((self.network, self.ways, shots))


@lru_cache(maxsize=4)
def _load(root: str, split: Any, subset: Subset, resample: Any, fetch: bool) -> Tensor:
    found = omniglot(
        root, split=split, subset=subset, resample=resample, download=fetch
    )
    return found.images


if __name__ == "__main__":
    import tyro

    raise SystemExit(train(tyro.cli(Omniglot)))
