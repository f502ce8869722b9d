"""What a data set hands out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FewShotData:
    """Images of one subset of a data set, ready for ``FewShotImages``.

    Attributes:
        images: [classes, n, C, H, W] uint8.
        names: of the classes, in the order of ``images``.
    """

    images: Tensor
    names: list[str]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)
