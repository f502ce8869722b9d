"""The randomness of actions, a stream for every episode of every task.

Philox4x32-10 under the key of a collection at the counter (i, 0, episode, task): the
i-th block of four words of an episode. Draw d of step t is number t A + d of the
episode's stream. So an episode acts the same in whatever batch it is collected.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastmaml.tasks.philox import philox4x32

_LOW = 0xFFFFFFFF


def collection_seed(seed: int, *numbers: int) -> int:
    """A 63-bit seed for one collection out of a run's seed and what it is for.

    Args:
        seed: of the run, in [0, 2^64).
        numbers: up to three, such as iteration and inner step, below 2^32.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    counter = np.zeros(4, dtype=np.uint64)
    counter[: len(numbers)] = numbers
    counter[3] = 0x726C  # apart from what tasks are drawn from
    words = philox4x32(counter, (seed & _LOW, seed >> 32))
    return (int(words[0]) | int(words[1]) << 32) >> 1


def action_noise(
    seed: int, tasks: int, episodes: int, count: int, *, normal: bool = True
) -> Tensor:
    """Noise of the actions of whole episodes.

    Args:
        seed: of the collection.
        tasks: T.
        episodes: E.
        count: draws of an episode, steps times numbers of an action.
        normal: standard normals (Box and Muller on pairs of words), else uniform
            numbers in [0, 1).

    Returns:
        [T, E, count] float32.
    """
    blocks = -(-count // 4)
    counter = np.empty((tasks, episodes, blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = 0
    counter[..., 2] = np.arange(episodes, dtype=np.uint64)[:, None]
    counter[..., 3] = np.arange(tasks, dtype=np.uint64)[:, None, None]
    words = philox4x32(counter, (seed & _LOW, seed >> 32))
    uniform = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    if normal:
        radius = np.sqrt(-2 * np.log1p(-uniform[..., 0::2]))
        angle = np.float32(2 * math.pi) * uniform[..., 1::2]
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    else:
        drawn = uniform
    flat = drawn.reshape(tasks, episodes, -1)[..., :count]
    return torch.from_numpy(np.ascontiguousarray(flat))
