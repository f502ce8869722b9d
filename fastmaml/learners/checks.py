"""Samples at the learner's door: do they fit the model and the loss?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml.losses import POLICY_TARGETS, Loss
from fastmaml.tasks.batch import TaskBatch


def check_batch(tasks: object) -> None:
    """Raises TypeError unless tasks come as one batch."""
    if not isinstance(tasks, TaskBatch):
        raise TypeError(
            f"tasks: expected a TaskBatch, got {type(tasks).__name__}: make one of the "
            "four tensors, TaskBatch(support_x, support_y, query_x, query_y)"
        )


def check_placement(
    what: str, x: Tensor, y: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError unless samples have the model's floating dtype and device."""
    for name, tensor in ((f"{what}_x", x), (f"{what}_y", y)):
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, the model on {device}: move one of "
                "them, tasks.to(device=...) or model.to(device=...)"
            )
        if tensor.is_floating_point() and tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, the model {dtype}: convert one of them, "
                "tasks.to(dtype=...) or model.to(dtype=...)"
            )


@torch.no_grad()
def output_shape(what: str, model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of the model's output for one task's samples.

    Args:
        what: ``support`` or ``query``.
        model: with batch statistics where those are asked for.
        x: [N, ...].

    Raises:
        ValueError: if the model fails on them, or returns no tensor.
    """
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    try:
        output = functional_call(model, buffers, (x,))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{what}_x: the model can't take the samples {list(x.shape)} of a task "
            f"({x.dtype}): {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model: returned {type(output).__name__}, expected one tensor [N, ...]"
        )
    return tuple(output.shape)


def check_targets(what: str, loss: Loss, output: tuple[int, ...], y: Tensor) -> None:
    """Checks the targets of one task against the output of the same task.

    Args:
        what: ``support`` or ``query``.
        loss: callables accept anything.
        output: [N, ...].
        y: [N, ...].

    Raises:
        ValueError: naming shapes as got and as expected.
    """
    if not loss.native:
        return
    got = f"{what}_y: got targets {list(y.shape)} of {y.dtype} for a task"
    if loss.name == "cross_entropy":
        if len(output) != 2:
            raise ValueError(
                f"model: returned {list(output)} for the {what} samples of a task, "
                "cross_entropy expects scores [N, ways]"
            )
        if y.is_floating_point() or y.ndim != 1:
            raise ValueError(f"{got}, cross_entropy expects int64 classes [N]")
        return
    if not y.is_floating_point():
        raise ValueError(f"{got}, {loss.name} expects floating targets")
    if loss.name == "mse" and tuple(y.shape) != output:
        hint = ": y.unsqueeze(-1)" if (*y.shape, 1) == output else ""
        raise ValueError(
            f"{got}, mse expects the shape of the output {list(output)}{hint}"
        )
    if loss.native and loss.name in POLICY_TARGETS:
        _check_policy(loss.name, got, output, y)


def _check_policy(name: str, got: str, output: tuple[int, ...], y: Tensor) -> None:
    gaussian = not name.startswith("categorical")
    if len(output) != 2 or (gaussian and output[1] % 2):
        expected = "[N, 2A]: means and logs of the standard deviations"
        raise ValueError(
            f"model: returned {list(output)} for a task, {name} expects "
            f"{expected if gaussian else '[N, O]: scores'}"
        )
    size, meaning = POLICY_TARGETS[name]
    wanted = [output[0], size(output[1])]
    if list(y.shape) != wanted:
        shape, _, parts = meaning.partition(":")
        raise ValueError(f"{got}, {name} expects {shape} = {wanted}:{parts}")


def check_classes(what: str, y: Tensor, ways: int) -> None:
    """Raises ValueError unless all classes [T, N] are in 0..ways-1."""
    low, high = torch.aminmax(y)
    if low.item() < 0 or high.item() >= ways:
        raise ValueError(
            f"{what}_y: classes run from {low.item()} to {high.item()}, but the model "
            f"has {ways} outputs, so expected 0 to {ways - 1}"
        )
