"""What crosses into the native engine: addresses of parameters, samples and rates.

Everything is checked here, once per call; the extension trusts what it gets. Tensors
made on the way are put into ``keep``, which outlives the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmaml import _native
from fastmaml.engines.base import Params, Rates

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
LAYOUTS = {"scalar": 0, "per_tensor": 1, "per_parameter": 2}

Named = dict[str, Tensor]
Samples = tuple[int, int, int, bool]
RateArguments = tuple[int, int, int, list[bool]]

NO_SAMPLES: Samples = (0, 0, 0, False)


class ParameterArguments:
    """Parameters, and whatever is shaped like them, in the program's order.

    Args:
        names: of the program's parameters, in the order of its layers.
        model: gives their shapes, and the order that rates follow.
        device: of everything that crosses.
    """

    def __init__(
        self, names: Sequence[str], model: nn.Module, device: torch.device
    ) -> None:
        self._device = device
        own = dict(model.named_parameters())
        self.names = tuple(names)
        self.shapes = {n: tuple(own[n].shape) for n in names}
        self._model_names = [n for n in own if n in self.shapes]
        self._numels = {n: own[n].numel() for n in names}
        self._reorder = tuple(self._model_names) != self.names

    def dtype(self, params: Params) -> torch.dtype:
        """The dtype of a call, that of its parameters."""
        if self.names[0] not in params:
            raise ValueError(
                f"params: expected {', '.join(self.names)}, got {[*params]}"
            )
        dtype = params[self.names[0]].dtype
        if dtype not in DTYPES:
            raise TypeError(
                "params: the native engine computes in float32 or float64, got "
                f"{dtype}; convert the model with .float() or .double()"
            )
        return dtype

    def addresses(
        self, params: Params, dtype: torch.dtype, tasks: int, keep: list[Tensor]
    ) -> tuple[list[int], bool]:
        """Where the parameters are, and whether there is one set per task."""
        missing = [n for n in self.names if n not in params]
        if missing:
            raise ValueError(
                f"expected a tensor for each of the {len(self.names)} parameters, "
                f"got none for {', '.join(missing)}"
            )
        first = self.names[0]
        per_task = params[first].dim() > len(self.shapes[first])
        axis = (tasks,) if per_task else ()
        result = []
        for name in self.names:
            tensor = params[name]
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                keep.append(tensor)
            shape = axis + self.shapes[name]
            result.append(_native.address(name, tensor, dtype, shape, self._device))
        return result, per_task

    def make(
        self, dtype: torch.dtype, axis: tuple[int, ...] = ()
    ) -> tuple[Named, list[int]]:
        """New tensors [*axis, ...] for results, and where they are."""
        made = {
            n: torch.empty(axis + s, dtype=dtype, device=self._device)
            for n, s in self.shapes.items()
        }
        return made, [_native.own_address(t) for t in made.values()]

    def rates(
        self, rates: Rates, dtype: torch.dtype, keep: list[Tensor]
    ) -> RateArguments:
        """Address, layout, rows and adapted flags of inner learning rates."""
        values = rates.values.detach()
        rows = values.shape[0] if rates.per_step else 1
        if rows < 1:
            raise ValueError(
                "rates: expected at least one row, one per inner step, got none"
            )
        width = self._width(rates)
        if values.numel() != rows * width:
            raise ValueError(
                f"rates: expected {rows * width} values for layout {rates.layout!r}, "
                f"got {values.numel()}"
            )
        if values.dtype != dtype:
            values = values.to(dtype)
        if self._reorder and rates.layout != "scalar":
            values = self._permuted(values.reshape(rows, width), rates, to_model=False)
        values = values.contiguous()
        keep.append(values)
        address = _native.address("rates", values, dtype, values.shape, self._device)
        return address, LAYOUTS[rates.layout], rows, self.adapted(rates)

    def adapted(self, rates: Rates) -> list[bool]:
        """Whether the inner loop changes a parameter."""
        return [rates.adapted is None or n in rates.adapted for n in self.names]

    def reads_rates_in_place(self, rates: Rates, dtype: torch.dtype) -> bool:
        """Whether `rates` hands over the values themselves, not a copy."""
        values = rates.values
        ordered = not self._reorder or rates.layout == "scalar"
        alike = values.dtype == dtype and values.device == self._device
        return ordered and alike and values.is_contiguous()

    def rates_to_model(self, rows: Tensor, rates: Rates) -> Tensor:
        """A gradient for the rates, shaped and ordered like ``rates.values``."""
        if self._reorder and rates.layout != "scalar":
            rows = rows.reshape(-1, self._width(rates))
            rows = self._permuted(rows, rates, to_model=True)
        return rows.reshape(rates.values.shape)

    def _width(self, rates: Rates) -> int:
        return {
            "scalar": 1,
            "per_tensor": len(self.names),
            "per_parameter": sum(self._numels.values()),
        }[rates.layout]

    def _permuted(self, values: Tensor, rates: Rates, *, to_model: bool) -> Tensor:
        """Columns from the model's order to the program's, or back."""
        orders = [list(self._model_names), list(self.names)]
        before, after = reversed(orders) if to_model else orders
        each = rates.layout == "per_parameter"
        sizes = [self._numels[n] if each else 1 for n in before]
        parts = dict(zip(before, values.split(sizes, dim=1), strict=True))
        return torch.cat([parts[n] for n in after], dim=1)


def sample_arguments(
    which: str,
    x: Tensor,
    y: Tensor | None,
    dtype: torch.dtype,
    target: tuple[int, ...] | None,
    keep: list[Tensor],
    device: torch.device,
) -> Samples:
    """Addresses of inputs and targets, samples per task, whether channels are last.

    Args:
        which: prefix of the names in errors, such as ``support_``.
        x: [T, N, ...]; images may lie channels last in memory.
        y: [T, N, *target], or ``None`` when only outputs are wanted.
        dtype: of x, and of y unless it holds labels.
        target: shape of one sample's target; ``None`` for int64 labels.
        keep: takes what must outlive the call.
        device: of x and y.
    """
    if x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(
            f"{which}x: expected at least one task of one sample, [T, N, ...], got "
            f"shape {list(x.shape)}"
        )
    channels_last = False
    if not x.is_contiguous():
        channels_last = x.dim() == 5 and x.movedim(2, -1).is_contiguous()
        if not channels_last:
            x = x.contiguous()
            keep.append(x)
    if channels_last:
        address = _native.images_address(f"{which}x", x, dtype, device)
    else:
        address = _native.address(f"{which}x", x, dtype, x.shape, device)
    if y is None:
        return address, 0, x.shape[1], channels_last
    if not y.is_contiguous():
        y = y.contiguous()
        keep.append(y)
    shape = x.shape[:2] if target is None else (*x.shape[:2], *target)
    y_dtype = torch.int64 if target is None else dtype
    y_address = _native.address(f"{which}y", y, y_dtype, shape, device)
    return address, y_address, x.shape[1], channels_last
