"""The signs that a ReLU behind a Linear layer saves for later passes, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # outputs in a word of signs


def words(channels: int) -> int:
    return -(-channels // WORD)


def packed_signs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a ReLU saves of its outputs [T, rows, channels]: bits, seen as ``dtype``."""
    tasks, rows, channels = x.shape
    bits = torch.zeros(tasks, rows, words(channels) * WORD, dtype=torch.int64)
    bits[..., :channels] = x > 0
    whole = (bits.view(tasks, -1, WORD) << torch.arange(WORD)).sum(-1)
    room = torch.zeros(tasks, whole.shape[1] * dtype.itemsize // 4, dtype=torch.int32)
    room[:, : whole.shape[1]] = whole.to(torch.int32)
    return room.view(dtype)


def unpacked_signs(saved: Tensor, rows: int, channels: int) -> Tensor:
    """The inverse, of [T, saved]: bool [T, rows, channels]."""
    whole = saved.contiguous().view(torch.int32)[:, : rows * words(channels)]
    bits = whole.view(len(saved), rows, -1, 1) >> torch.arange(WORD, dtype=torch.int32)
    return (bits & 1).flatten(2)[..., :channels].bool()
