"""Random numbers of tasks and of resets, drawn for all rows at once.

All come from Philox4x32-10 (`fastmaml.tasks.philox`): tasks under the key ``seed`` with
the task's number as counter, the start of an episode under one fixed key with the row's
seed as counter. So neither depends on the batch it is drawn in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaml.tasks.philox import philox4x32, task_words, uniform

_RESET_KEY = 0x65736574, 0x726F7773  # apart from the streams of tasks
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

Floats = NDArray[np.float64]


def task_uniforms(seed: int, tasks: int, count: int) -> Floats:
    """Uniform numbers in [0, 1) of tasks 0 .. tasks - 1, [tasks, count].

    Raises:
        ValueError: the seed is not in [0, 2^64), or there are no tasks.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    if tasks < 1:
        raise ValueError(f"n: the number of tasks must be at least 1, got {tasks}")
    high = task_words(seed, 0, tasks, count)
    return uniform(high, task_words(seed, 0, tasks, count, plane=1))


def reset_uniforms(seeds: NDArray[Any], count: int) -> Floats:
    """Uniform numbers in [0, 1) of rows' seeds [R] below 2^64, [R, count]."""
    number = np.asarray(seeds).astype(np.uint64)
    blocks = -(-count // 4)
    counter = np.empty((2, len(number), blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[0, ..., 1], counter[1, ..., 1] = 0, 1
    counter[..., 2] = (number & _LOW)[:, None]
    counter[..., 3] = (number >> _SHIFT)[:, None]
    words = philox4x32(counter, _RESET_KEY).reshape(2, len(number), -1)[..., :count]
    return uniform(words[0], words[1])


def normals(uniforms: Floats) -> Floats:
    """Standard normals [R, n / 2 rounded down, times 2] by Box and Muller.

    Args:
        uniforms: [R, n] in [0, 1).
    """
    half = uniforms.shape[1] // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniforms[:, :half]))
    angle = 2.0 * math.pi * uniforms[:, half : 2 * half]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
