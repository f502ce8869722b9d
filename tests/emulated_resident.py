"""Task-resident meta-gradients of the emulated CUDA backend, called from C.

A driver (tests/emulation/resident.cpp) is compiled with the kernels as plain C++. Every
array lies in NaN, misaligned, so that what is read or written outside of it shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated_build import ROOT, compile_driver
from emulated_layers import Memory, pointers
from native_cases import Case, Named
from torch import Tensor

from fastmaml.compile import compile_module
from fastmaml.engines import Rates
from fastmaml.tasks import TaskBatch

_COUNTS = ("double_precision", "layers", "features", "tasks", "steps", "support")
_COUNTS += ("query", "first_order", "rate_rows", "rate_per_tensor", "seed")
_LISTS = ("kinds", "in", "out", "bias", "alpha")
_POINTERS = ("loss_weights", "params", "gradients", "rates", "adapted", "support_x")
_POINTERS += ("support_y", "query_x", "query_y", "query_loss", "query_accuracy", "rows")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in _LISTS),
        *((name, ctypes.c_char_p) for name in ("loss", "reduction")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


@dataclass(frozen=True)
class Answer:
    """A meta-gradient.

    Attributes:
        gradients: mean over tasks, name -> [...].
        loss, accuracy: of the query samples, float64 [T, K + 1]; NaN without a weight.
    """

    gradients: Named
    loss: Tensor
    accuracy: Tensor

    @property
    def all(self) -> Named:
        """Everything under one set of names."""
        return {**self.gradients, "loss": self.loss, "accuracy": self.accuracy}


def build(folder: Path, *flags: str, source: Path = ROOT / "csrc") -> ctypes.CDLL:
    """The driver, with the kernels in ``source``."""
    kernels = [source / "cuda" / "task_resident.cu"]
    library = compile_driver("resident", kernels, folder, *flags, source=source)
    library.last_error.restype = ctypes.c_char_p
    return library


class Network:
    """A case's network on a driver."""

    def __init__(self, driver: ctypes.CDLL, c: Case) -> None:
        report = compile_module(c.model, c.problem.loss, c.problem.reduction)
        assert report.program is not None, str(report)
        self.program = report.program
        self.driver, self.case = driver, c

    def takes(self, dtype: torch.dtype = torch.float64, **options) -> bool:
        """Whether the backend would do tasks of the case in one piece."""
        return self._run(dtype, plan_alone=True, **options) is not None

    def meta_gradient(self, dtype: torch.dtype, **options) -> Answer:
        """See `_run` for options.

        Raises:
            RuntimeError: if the driver throws.
        """
        answer = self._run(dtype, **options)
        assert answer is not None, "the backend doesn't take this call"
        return answer

    def _call(self, name: str, *arguments) -> None:
        if getattr(self.driver, name)(*arguments):
            raise RuntimeError(self.driver.last_error().decode())

    def _run(
        self,
        dtype: torch.dtype,
        *,
        steps: int = 2,
        tasks: TaskBatch | None = None,
        rates: Rates | None = None,
        loss_weights: Sequence[float] | None = None,
        first_order: bool = False,
        seed: int = 0,
        plan_alone: bool = False,
    ) -> Answer | None:
        c, layers = self.case, self.program.layers
        batch, rates = tasks or c.tasks, rates or c.rates
        names = self.program.parameters
        adapted = rates.adapted
        flags = [adapted is None or n in adapted for n in names]
        weights = loss_weights or [0.0] * steps + [1.0]
        kept = [
            (ctypes.c_char_p * len(layers))(*(s.kind.encode() for s in layers)),
            *(
                (ctypes.c_int64 * len(layers))(
                    *(int(s.attributes.get(key, 0)) for s in layers)
                )
                for key in ("in_features", "out_features", "bias")
            ),
            (ctypes.c_double * len(layers))(
                *(
                    float(s.attributes.get("alpha", s.attributes.get("slope", 0)))
                    for s in layers
                )
            ),
        ]
        memory, metrics = Memory(dtype, 1), Memory(torch.float64)

        def put(values: Tensor) -> Tensor:
            plain = not values.is_floating_point()
            return values.contiguous() if plain else memory.put(values.to(dtype))

        given = [put(c.params[n]) for n in names]
        results = [memory.empty(c.params[n].numel()) for n in names]
        samples = [batch.support_x, batch.support_y, batch.query_x, batch.query_y]
        samples = [put(v) for v in samples]
        T = batch.tasks
        loss, accuracy = (metrics.empty(T * (steps + 1)) for _ in range(2))
        loss.fill_(torch.nan), accuracy.fill_(torch.nan)
        numbers = {
            "loss_weights": torch.tensor(weights, dtype=torch.float64),
            "rates": put(rates.values.flatten()),
            "adapted": torch.tensor(flags, dtype=torch.uint8),
            **dict(zip(_POINTERS[5:9], samples, strict=True)),
            "query_loss": loss,
            "query_accuracy": accuracy,
        }
        lists = pointers(given), pointers(results)  # type: ignore[arg-type]
        call = _Call(
            double_precision=dtype == torch.float64,
            layers=len(layers),
            features=batch.support_x.shape[-1],
            tasks=T,
            steps=steps,
            support=batch.support_x.shape[1],
            query=batch.query_x.shape[1],
            first_order=first_order,
            rate_rows=rates.values.shape[0] if rates.per_step else 1,
            rate_per_tensor=rates.layout == "per_tensor",
            seed=seed,
            **{n: ctypes.addressof(v) for n, v in zip(_LISTS, kept, strict=True)},
            loss=self.program.loss.kind.encode(),
            reduction=self.program.loss.reduction.encode(),
            params=ctypes.addressof(lists[0]),
            gradients=ctypes.addressof(lists[1]),
            **{n: v.data_ptr() for n, v in numbers.items()},
        )
        taken, row = ctypes.c_int64(), ctypes.c_int64()
        self._call("plan", ctypes.byref(call), ctypes.byref(taken), ctypes.byref(row))
        if not taken.value:
            return None
        if plan_alone:
            return Answer({}, loss, accuracy)
        rows = memory.empty(T * row.value)
        call.rows = rows.data_ptr()
        self._call("meta_gradient", ctypes.byref(call))
        memory.check()
        metrics.check()
        return Answer(
            {n: g.view(c.params[n].shape) for n, g in zip(names, results, strict=True)},
            loss.view(T, steps + 1),
            accuracy.view(T, steps + 1),
        )
