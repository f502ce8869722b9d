"""Rates by parameter name, their gradients back into the layout, loss weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmaml.engines.base import Rates


class RateMap:
    """Reads and writes ``Rates.values`` by name.

    Args:
        shapes: of the trainable parameters, in the model's order.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = dict(shapes)
        self._tensors: dict[str, int | slice] = {n: i for i, n in enumerate(shapes)}
        self._slices: dict[str, int | slice] = {}
        start = 0
        for name, shape in shapes.items():
            self._slices[name] = slice(start, start + shape.numel())
            start += shape.numel()

    def adapted(self, rates: Rates) -> list[str]:
        """Names the inner loop changes, in the model's order."""
        return [n for n in self._shapes if rates.adapted is None or n in rates.adapted]

    def by_name(self, rates: Rates, step: int) -> dict[str, Tensor]:
        """Rates of one step for the adapted names, broadcastable to [T, ...]."""
        values = rates.at(step)
        names = self.adapted(rates)
        if rates.layout == "scalar":
            return dict.fromkeys(names, values)
        if rates.layout == "per_tensor":
            return {n: values[self._tensors[n]] for n in names}
        return {n: values[self._slices[n]].view(self._shapes[n]) for n in names}

    def add(
        self, total: Tensor, slopes: Mapping[str, Tensor], rates: Rates, step: int
    ) -> None:
        """Adds slopes, name -> [...] as the parameter, to ``total`` in the layout."""
        row = total[min(step, len(total) - 1)] if rates.per_step else total
        if rates.layout == "scalar":
            row += torch.stack([s.sum() for s in slopes.values()]).sum()
        elif rates.layout == "per_tensor":
            for name, slope in slopes.items():
                row[self._tensors[name]] += slope.sum()
        else:
            for name, slope in slopes.items():
                row[self._slices[name]] += slope.flatten()


def check_steps(steps: int) -> None:
    """Refuses a negative number of inner steps."""
    if steps < 0:
        raise ValueError(f"steps={steps}: expected 0 or more")


def step_weights(loss_weights: Sequence[float] | None, steps: int) -> list[float]:
    """The w_k, [K+1]; the last step alone unless told."""
    check_steps(steps)
    if loss_weights is None:
        return [0.0] * steps + [1.0]
    weights = [float(w) for w in loss_weights]
    if len(weights) != steps + 1:
        raise ValueError(
            f"loss_weights: got {len(weights)} weights, expected one before the first "
            f"step and one after each of the {steps} steps, {steps + 1} in all"
        )
    return weights


def weighted(loss: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over tasks of sum over k of w_k times the loss [T, K+1]; NaN weighs 0."""
    w = torch.tensor(weights, dtype=loss.dtype, device=loss.device)
    return torch.where(w != 0, loss * w, 0).sum()


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape; one alone is not copied."""
    return torch.stack(list(tensors)).sum(0) if len(tensors) > 1 else tensors[0]


def present(tensor: Tensor | None) -> Tensor:
    """The tensor, known to be there."""
    assert tensor is not None
    return tensor
