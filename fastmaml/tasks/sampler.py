"""What training asks of a source of tasks: batches, and a stream that can resume.

Every task has a number, and is made of the random words that the generator gives for
that number (`fastmaml.tasks.philox`). So a stream of tasks is the same however it is
cut into batches, with any number of threads and on every device.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastmaml import _native
from fastmaml.engines.placement import Placement, backend_for, missing
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.device import DeviceStream
from fastmaml.tasks.philox import NAME, TaskStream

# Keeps fixed sets apart from the stream of a sampler that was given the same seed.
_FIXED_SALT = 0x5DEECE66D1CE4E5B
_KEYS = 2**64  # there are as many streams


def check_count(name: str, value: int, least: int = 1) -> int:
    """Returns ``value`` if it is an integer of at least ``least``.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class TaskSampler(abc.ABC):
    """A seeded, endless stream of tasks.

    A subclass writes ``draw``; everything else follows. The same seed gives the same
    tasks on every device (floating numbers to rounding), and ``sample(7)`` the same as
    ``sample(3)`` and then ``sample(4)``.

    Attributes:
        input_shape: shape of one sample.
        outputs: number of ways, or of regression outputs.

    Args:
        seed: which stream, below 2^64.
        device: where batches are made.
        dtype: floating dtype of the batches.
    """

    input_shape: tuple[int, ...]
    outputs: int
    _place: Placement | None  # of kernels that draw; None: the host draws
    _stream: TaskStream
    _drawer: Any  # draws on the host, in the extension; None: Python draws

    def __init__(
        self,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")
        self.seed = _check_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self._stream = TaskStream(seed)
        self._place = None
        self._drawer = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is this process's own, so that others can be given a copy."""
        return {**vars(self), "_drawer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, which draws with the extension of its own process."""
        vars(self).update(state)
        self._drawer = self._make_drawer()

    @abc.abstractmethod
    def draw(self, tasks: int, stream: TaskStream) -> TaskBatch:
        """Returns the next ``tasks`` tasks of ``stream``, made of its words alone."""

    def sample(self, tasks: int) -> TaskBatch:
        """Returns the next ``tasks`` tasks of the stream.

        Raises:
            TypeError: ``tasks`` is no integer.
            ValueError: ``tasks`` is less than 1.
        """
        return self.draw(check_count("tasks", tasks), self._stream)

    def fixed(self, tasks: int, seed: int = 0) -> TaskBatch:
        """Returns a fixed set of tasks, for validation and test.

        The same arguments give the same tasks, always; the stream of ``sample`` is
        neither read nor moved, also when it has the same seed.

        Args:
            tasks: how many.
            seed: which set.
        """
        return self.draw(check_count("tasks", tasks), self._fixed_stream(seed))

    def fixed_batches(
        self, tasks: int, seed: int = 0, *, batch: int
    ) -> Iterator[TaskBatch]:
        """Yields the tasks of ``fixed`` in batches, for sets too large to hold at once.

        Args:
            tasks: tasks of the set; the last batch may be smaller.
            seed: which set.
            batch: tasks of each yielded batch.
        """
        check_count("tasks", tasks)
        check_count("batch", batch)
        stream = self._fixed_stream(seed)
        for start in range(0, tasks, batch):
            yield self.draw(min(batch, tasks - start), stream)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the stream; loading it continues bit for bit."""
        return {
            "sampler": type(self).__name__,
            "generator": NAME,
            "key": self._stream.key,
            "task": self._stream.task,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved place.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the state is of another kind of sampler or generator.
        """
        if isinstance(state.get("generator"), torch.Tensor):
            raise ValueError(
                "state is of torch's generator, which samplers used before they drew "
                f"from {NAME}; that stream can't go on here: start the run again, or "
                "resume it with the version of fastmaml that began it"
            )
        for key in ("sampler", "generator", "key", "task"):
            if key not in state:
                raise ValueError(
                    f"state lacks {key!r}; pass what state_dict() of a "
                    f"{type(self).__name__} returned"
                )
        if state["sampler"] != type(self).__name__:
            raise ValueError(
                f"state is of a {state['sampler']}, this sampler is a "
                f"{type(self).__name__}"
            )
        if state["generator"] != NAME:
            raise ValueError(
                f"state is of the generator {state['generator']!r}, this sampler draws "
                f"from {NAME!r}"
            )
        stream = self._stream
        if isinstance(stream, DeviceStream):
            stream.move(state["key"], state["task"])  # where captured draws read it
        else:
            self._stream = TaskStream(state["key"], state["task"])

    def _make_drawer(self) -> Any:
        """What draws on the host in the extension, ``None`` if nothing does."""
        return None

    def _draw_by_kernels(self) -> None:
        """Draws by the kernels of the device's backend, if it has any for tasks.

        The stream is then in the device's memory. A subclass that can draw so calls
        this when it is built.
        """
        backend = backend_for(self.device)
        if self.dtype not in (torch.float32, torch.float64) or missing(backend):
            return
        place = Placement(backend, self.device)
        if place.samples:
            self._place = place
            self._stream = DeviceStream.of(self._stream, self.device)

    def _fixed_stream(self, seed: int) -> TaskStream:
        return TaskStream(_check_seed(seed) ^ _FIXED_SALT)


def native_core(device: torch.device, dtype: torch.dtype) -> Any:
    """The extension if it draws tasks on this device in this dtype, else ``None``."""
    drawn = device.type == "cpu" and dtype in (torch.float32, torch.float64)
    if not drawn or _native.unavailable() is not None:
        return None
    return _native.core()


def _check_seed(seed: int) -> int:
    if check_count("seed", seed, least=0) >= _KEYS:
        raise ValueError(f"seed must be below 2^64, got {seed}")
    return seed
