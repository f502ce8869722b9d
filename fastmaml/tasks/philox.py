"""The stream of random numbers that tasks are made of, restated in numpy.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
2, 3", 2011) turns a counter of four words and a key of two into four random words.
Word i of task t, under a 64-bit key, is word i mod 4 of the block with

    counter = (i div 4, plane, t mod 2^32, t div 2^32)
    key     = (key mod 2^32, key div 2^32)

in plane 0; plane 1 holds the lower bits of numbers of double precision. So a task
depends on the key and on its own number, not on its batch, thread or device. The C++
samplers draw the same words; this is for where they can't be used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NAME = "philox4x32-10"
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = np.ndarray[Any, np.dtype[np.uint32]]


class TaskStream:
    """A place in the endless stream of tasks of one key.

    Attributes:
        key: which stream, 64 bits.
        task: number of the next task.
    """

    def __init__(self, key: int, task: int = 0) -> None:
        self.key = key
        self.task = task

    def take(self, tasks: int) -> int:
        """Moves past the next tasks and returns the number of the first of them."""
        first = self.task
        self.task = first + tasks
        return first

    def words(self, tasks: int, count: int) -> Words:
        """Moves past the next tasks and returns their words [tasks, count]."""
        return task_words(self.key, self.take(tasks), tasks, count)


def philox4x32(counter: Any, key: Any) -> Words:
    """Random words of counters.

    Args:
        counter: [..., 4] below 2^32.
        key: two numbers below 2^32.

    Returns:
        [..., 4] uint32.
    """
    c = [part.astype(np.uint64) for part in np.moveaxis(np.asarray(counter), -1, 0)]
    k = [int(part) for part in key]
    for _ in range(10):
        p0, p1 = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [
            (p1 >> _SHIFT) ^ c[1] ^ np.uint64(k[0]),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c[3] ^ np.uint64(k[1]),
            p0 & _LOW,
        ]
        k = [(part + step) & 0xFFFFFFFF for part, step in zip(k, _WEYL, strict=True)]
    return np.stack(c, -1).astype(np.uint32)


def task_words(
    key: int, first: int, tasks: int, count: int, *, plane: int = 0
) -> Words:
    """Words 0 .. count - 1 of ``tasks`` tasks from ``first`` on, [tasks, count]."""
    blocks = -(-count // 4)
    number = np.arange(tasks, dtype=np.uint64) + np.uint64(first)
    counter = np.empty((tasks, blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = plane
    counter[..., 2] = (number & _LOW)[:, None]
    counter[..., 3] = (number >> _SHIFT)[:, None]
    words = philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))
    return words.reshape(tasks, -1)[:, :count]


def uniform(high: Words, low: Words | None) -> np.ndarray[Any, Any]:
    """Numbers in [0, 1): float32 of 24 bits, or float64 of 53 with words of plane 1."""
    upper = (high >> np.uint32(8)).astype(np.float64) * 2.0**-24
    if low is None:
        return upper.astype(np.float32)
    return upper + (low >> np.uint32(3)).astype(np.float64) * 2.0**-53


def distinct(words: Words, choices: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Distinct numbers below ``choices`` out of words [rows, count], one each.

    Word i picks, in ascending order, number ``word * (choices - i) div 2^32`` of those
    that are left, so every ordered selection is equally likely, up to 2^-32.
    """
    rows, count = words.shape
    picks = np.empty((rows, count), dtype=np.int64)
    for i in range(count):
        left = np.uint64(choices - i)
        pick = ((words[:, i].astype(np.uint64) * left) >> _SHIFT).astype(np.int64)
        for taken in np.sort(picks[:, :i], axis=1).T:
            pick += pick >= taken
        picks[:, i] = pick
    return picks
