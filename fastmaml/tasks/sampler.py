"""What training asks of a source of tasks: batches, and a stream that can resume."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastmaml.tasks.batch import TaskBatch

# Keeps fixed sets apart from the stream of a sampler that was given the same seed.
_FIXED_SALT = 0x5DEECE66D1CE4E5B


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

    A subclass writes ``draw``; everything else follows. The random generator lives on
    the sampler's device, so nothing is copied between devices to make a batch, and the
    same seed gives other tasks on another kind of device.

    Attributes:
        input_shape: shape of one sample.
        outputs: number of ways, or of regression outputs.

    Args:
        seed: start of the stream.
        device: where batches are made.
        dtype: floating dtype of the batches.
    """

    input_shape: tuple[int, ...]
    outputs: int

    def __init__(
        self,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")
        self.seed = check_count("seed", seed, least=0)
        self.device = torch.device(device)
        self.dtype = dtype
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @abc.abstractmethod
    def draw(self, tasks: int, generator: torch.Generator) -> TaskBatch:
        """Returns ``tasks`` tasks made of random numbers of ``generator`` alone."""

    def sample(self, tasks: int) -> TaskBatch:
        """Returns the next ``tasks`` tasks of the stream.

        Raises:
            TypeError: ``tasks`` is no integer.
            ValueError: ``tasks`` is less than 1.
        """
        return self.draw(check_count("tasks", tasks), self._generator)

    def fixed(self, tasks: int, seed: int = 0) -> TaskBatch:
        """Returns a fixed set of tasks, for validation and test.

        The same arguments give the same tasks, always; the stream of ``sample`` is
        neither read nor moved, also when it has the same seed.

        Args:
            tasks: how many.
            seed: which set.
        """
        generator = self._fixed_generator(seed)
        return self.draw(check_count("tasks", tasks), generator)

    def fixed_batches(
        self, tasks: int, seed: int = 0, *, batch: int
    ) -> Iterator[TaskBatch]:
        """Yields a fixed set in batches, for sets too large to hold at once.

        Args:
            tasks: tasks of the set; the last batch may be smaller.
            seed: which set. The tasks depend on ``batch`` too.
            batch: tasks of each yielded batch.
        """
        check_count("tasks", tasks)
        check_count("batch", batch)
        generator = self._fixed_generator(seed)
        for start in range(0, tasks, batch):
            yield self.draw(min(batch, tasks - start), generator)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the stream; loading it continues bit for bit."""
        return {
            "sampler": type(self).__name__,
            "device": self.device.type,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved place.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the state is of another kind of sampler or device.
        """
        for key in ("sampler", "device", "generator"):
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
        if state["device"] != self.device.type:
            raise ValueError(
                f"state was saved on {state['device']}, this sampler draws on "
                f"{self.device.type}, where random numbers differ; make the sampler "
                f"with device={state['device']!r} to continue the stream"
            )
        self._generator.set_state(state["generator"].cpu())

    def _fixed_generator(self, seed: int) -> torch.Generator:
        check_count("seed", seed, least=0)
        salted = (seed ^ _FIXED_SALT) & (2**63 - 1)
        return torch.Generator(self.device).manual_seed(salted)
