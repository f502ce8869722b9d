"""Streams of tasks in a device's memory, which draws read and move on there.

So nobody waits for a draw, and a CUDA graph can capture it: replayed, it gives the
tasks that follow. Only who asks for the number of the next task waits.
"""

from __future__ import annotations

import torch

from fastmaml import _native
from fastmaml.tasks.philox import TaskStream

_BITS = 2**64


class DeviceStream(TaskStream):
    """A place in the endless stream of tasks of one key, in a device's memory.

    Attributes:
        place: [3] int64 on the device: key and number of the next task, whose 64 bits
            are those of the unsigned numbers, and what a draw counts with, zero behind
            it. Never another tensor.

    Args:
        key: which stream, 64 bits.
        task: number of the next task.
        device: where to keep both.
    """

    place: torch.Tensor

    def __init__(self, key: int, task: int, device: torch.device) -> None:
        self.place = _numbers(key, task, 0).to(device)

    @classmethod
    def of(cls, stream: TaskStream, device: torch.device) -> DeviceStream:
        """The stream itself if it is in a device's memory, else a copy that is."""
        if isinstance(stream, DeviceStream):
            return stream
        return cls(stream.key, stream.task, device)

    @property
    def key(self) -> int:
        """Which stream; waits for the device."""
        return int(self.place[0].item()) % _BITS

    @key.setter
    def key(self, key: int) -> None:
        self.move(key, self.task)

    @property
    def task(self) -> int:
        """Number of the next task; waits for the device."""
        return int(self.place[1].item()) % _BITS

    @task.setter
    def task(self, task: int) -> None:
        self.move(self.key, task)

    def move(self, key: int, task: int) -> None:
        """Goes to a place of any stream, in the same memory."""
        self.place.copy_(_numbers(key, task, 0))

    def address(self) -> int:
        """Where the place is."""
        return _native.own_address(self.place)


def _numbers(*unsigned: int) -> torch.Tensor:
    wrapped = [n - _BITS if n >= _BITS // 2 else n for n in unsigned]
    return torch.tensor(wrapped, dtype=torch.int64)
