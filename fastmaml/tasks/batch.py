"""A meta-batch of tasks, tasks first: the one thing learners and engines are fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIELDS = ("support_x", "support_y", "query_x", "query_y")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TaskBatch:
    """Support and query samples of T tasks.

    Immutable and checked when it is made, so that nothing behind it checks again. The
    tensors themselves are shared, not copied.

    Attributes:
        support_x: [T, S, ...] inputs the inner loop adapts on.
        support_y: [T, S] int64 classes, or [T, S, outputs] floating targets.
        query_x: [T, Q, ...] inputs the adapted parameters are judged on.
        query_y: [T, Q] int64 classes, or [T, Q, outputs] floating targets.

    Raises:
        TypeError: a field is no tensor, or its dtype is none of the above.
        ValueError: shapes or devices of the fields do not belong together.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        """Checks dtypes, shapes and devices of the four tensors."""
        support_x, support_y = self.support_x, self.support_y
        query_x, query_y = self.query_x, self.query_y
        for name, field in zip(
            _FIELDS, (support_x, support_y, query_x, query_y), strict=True
        ):
            if not isinstance(field, Tensor):
                got = type(field).__name__
                raise TypeError(f"{name} must be a torch.Tensor, got {got}")
        _check_pair(support_x, support_y, "support")
        _check_pair(query_x, query_y, "query")
        _check_halves(support_x, query_x, "x")
        _check_halves(support_y, query_y, "y")
        if support_x.device != support_y.device:
            raise ValueError(
                f"support_y is on {support_y.device}, support_x on {support_x.device}: "
                "move all four to one device"
            )

    @property
    def tasks(self) -> int:
        """Number of tasks, T."""
        return self.support_x.shape[0]

    @property
    def support_size(self) -> int:
        """Support samples of a task, S (all classes together)."""
        return self.support_x.shape[1]

    @property
    def query_size(self) -> int:
        """Query samples of a task, Q (all classes together)."""
        return self.query_x.shape[1]

    @property
    def device(self) -> torch.device:
        """Device all four tensors are on."""
        return self.support_x.device

    def __repr__(self) -> str:
        """Shapes, not values."""
        fields = ", ".join(
            f"{name}={tuple(field.shape)}"
            for name, field in ((name, getattr(self, name)) for name in _FIELDS)
        )
        dtype = str(self.support_x.dtype).removeprefix("torch.")
        return f"TaskBatch({fields}, {dtype}, {self.device})"

    def __len__(self) -> int:
        """Number of tasks, T."""
        return self.support_x.shape[0]

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> TaskBatch:
        """Returns the chosen tasks as a batch.

        Args:
            index: a slice (views), or an integer or boolean index tensor or a list of
                integers (copies).

        Raises:
            TypeError: ``index`` is a single integer; a batch keeps its task axis, so
                write ``batch[i : i + 1]``.
            ValueError: no task is chosen.
        """
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim != 1):
            raise TypeError(
                f"index must be a slice or a list or 1-d tensor of tasks, got {index!r}"
                "; for one task write batch[i : i + 1]"
            )
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        return TaskBatch(*(getattr(self, name)[index] for name in _FIELDS))

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TaskBatch:
        """Returns the batch on another device or in another floating dtype.

        Args:
            device: where to; ``None`` keeps the device.
            dtype: floating dtype for the floating tensors; classes stay int64.

        Raises:
            TypeError: ``dtype`` is not a floating dtype.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")
        moved = (
            field.to(device=device, dtype=dtype if field.is_floating_point() else None)
            for field in (getattr(self, name) for name in _FIELDS)
        )
        return TaskBatch(*moved)


def batch_of(
    support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
) -> TaskBatch:
    """A batch of tensors made to measure, without the checks: for samplers alone."""
    batch = object.__new__(TaskBatch)
    _SET_SUPPORT_X(batch, support_x)
    _SET_SUPPORT_Y(batch, support_y)
    _SET_QUERY_X(batch, query_x)
    _SET_QUERY_Y(batch, query_y)
    return batch


# a frozen class refuses assignment; its slots don't
_SET_SUPPORT_X, _SET_SUPPORT_Y, _SET_QUERY_X, _SET_QUERY_Y = (
    TaskBatch.__dict__[name].__set__ for name in _FIELDS
)


def _check_pair(x: Tensor, y: Tensor, name: str) -> None:
    """Inputs and targets of one half belong together."""
    x_floats, y_floats = x.is_floating_point(), y.is_floating_point()
    if not (x_floats or x.dtype == torch.int64):
        raise TypeError(
            f"{name}_x must be floating (or int64 indices), got {x.dtype}; convert "
            "images with .float() / 255"
        )
    if not (y_floats or y.dtype == torch.int64):
        raise TypeError(
            f"{name}_y must hold int64 classes [tasks, samples] or floating targets "
            f"[tasks, samples, outputs], got {y.dtype}"
        )
    if x_floats and y_floats and x.dtype != y.dtype:
        raise TypeError(
            f"{name}_y is {y.dtype} but {name}_x is {x.dtype}; use one floating dtype"
        )
    x_shape, y_shape = x.shape, y.shape
    if len(x_shape) < 2:
        raise ValueError(
            f"{name}_x must be [tasks, samples, ...], got shape {tuple(x_shape)}"
        )
    if len(y_shape) != (3 if y_floats else 2):
        raise ValueError(
            f"{name}_y must be [tasks, samples] int64 classes or [tasks, samples, "
            f"outputs] floating targets, got {y.dtype} of shape {tuple(y_shape)}"
            + ("; y.unsqueeze(-1) for one output" if len(y_shape) == 2 else "")
        )
    if x_shape[:2] != y_shape[:2]:
        raise ValueError(
            f"{name}_x and {name}_y disagree on [tasks, samples]: {tuple(x_shape[:2])} "
            f"against {tuple(y_shape[:2])}"
        )
    if x_shape[0] == 0 or x_shape[1] == 0:
        raise ValueError(
            f"{name}_x needs at least one task and one sample, got shape "
            f"{tuple(x_shape)}"
        )


def _check_halves(support: Tensor, query: Tensor, name: str) -> None:
    """Support and query differ in nothing but the number of samples."""
    if support.dtype != query.dtype:
        raise TypeError(
            f"query_{name} is {query.dtype}, support_{name} is {support.dtype}; they "
            "must agree"
        )
    if support.device != query.device:
        raise ValueError(
            f"query_{name} is on {query.device}, support_{name} on {support.device}: "
            "move all four to one device"
        )
    support_shape, query_shape = support.shape, query.shape
    if support_shape[0] != query_shape[0]:
        raise ValueError(
            f"support_{name} has {support_shape[0]} tasks, query_{name} "
            f"{query_shape[0]}; they must agree"
        )
    if support_shape[2:] != query_shape[2:]:
        raise ValueError(
            f"one sample of support_{name} has shape {tuple(support_shape[2:])}, of "
            f"query_{name} {tuple(query_shape[2:])}; they must agree"
        )
