"""The native engine: fused C++ kernels, no autograd graph.

A `LoweredProgram` and the shape of one input make a compiled program; calls hand it
pointers and a workspace, which is a torch tensor kept between calls. One meta-gradient
is one call. Samples and parameters share a dtype, float32 or float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml import _native
from fastmaml.compile import LoweredProgram
from fastmaml.engines.base import MetaGradient, Params, Rates, StepMetrics
from fastmaml.engines.layout import present, step_weights
from fastmaml.tasks.batch import TaskBatch

unavailable = _native.unavailable

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_LAYOUTS = {"scalar": 0, "per_tensor": 1, "per_parameter": 2}
_MEMORY = {"auto": 0, "keep": 1, "recompute": 2}
_FORWARD, _GRADIENT, _HESSIAN, _GAUSS_NEWTON = range(4)
_NO_SAMPLES = (0, 0, 0, False)

Named = dict[str, Tensor]


class Plan(NamedTuple):
    """Memory of the latest call, in bytes.

    Attributes:
        total: the whole workspace.
        slots: tasks in work at once, one per thread.
        slot: per task in work: K copies of the parameters and its activations.
        shared: parameters, rates and per-task results.
        tape: activations and adjoints of one support step.
        kept: activations of all steps are kept for the chain; else recomputed.
    """

    total: int
    slots: int
    slot: int
    shared: int
    tape: int
    kept: bool


class NativeEngine:
    """Runs a lowered program; see `fastmaml.engines.base.Engine`.

    Args:
        program: from `fastmaml.compile.compile_module`.
        model: gives the parameters' shapes and order; never called or modified.
        memory: ``keep`` the activations of every inner step for the chain, or
            ``recompute`` them there; ``auto`` keeps up to 512 MiB.

    Raises:
        ValueError: for an unknown ``memory``.
        NativeUnavailable: if the extension can't be loaded.
    """

    name = "native"

    def __init__(
        self, program: LoweredProgram, model: nn.Module, *, memory: str = "auto"
    ) -> None:
        if memory not in _MEMORY:
            raise ValueError(
                f"memory={memory!r}: expected one of {', '.join(map(repr, _MEMORY))}"
            )
        self.plan: Plan | None = None
        self._core = _native.core()
        self._program = program
        self._memory = _MEMORY[memory]
        own = dict(model.named_parameters())
        self._names = program.parameters
        self._shapes = {n: tuple(own[n].shape) for n in self._names}
        self._numels = {n: own[n].numel() for n in self._names}
        # the rates' layouts follow the model's order, the program its layers'
        self._model_names = [n for n in own if n in self._shapes]
        self._reorder = tuple(self._model_names) != tuple(self._names)
        self._classes = program.loss.kind == "cross_entropy"
        self._programs: dict[tuple[int, ...], Any] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    # -- the protocol -------------------------------------------------------------

    def meta_gradient(
        self,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        first_order: bool = False,
        loss_weights: Sequence[float] | None = None,
        rate_gradient: bool = False,
    ) -> MetaGradient:
        """See `fastmaml.engines.base.Engine.meta_gradient`."""
        dtype = self._dtype(params)
        weights = step_weights(loss_weights, steps)
        program = self._program_for(tasks.support_x)
        keep: list[Tensor] = []
        gradients = {
            n: torch.empty(self._shapes[n], dtype=dtype) for n in self._names
        }
        rows = torch.empty(2, tasks.tasks, steps + 1, dtype=torch.float64)
        rate_rows = None
        if rate_gradient:
            rate_rows = torch.empty(rates.values.numel(), dtype=dtype)
        query_loss, query_accuracy = rows[0], rows[1]
        self._run(
            f"meta_gradient_{_DTYPES[dtype]}",
            program,
            tasks.tasks,
            steps,
            first_order,
            self._memory,
            weights,
            *self._parameters(params, dtype, tasks.tasks),
            self._rates(rates, dtype, keep),
            self._samples(program, "support", tasks.support_x, tasks.support_y, dtype, keep),
            self._samples(program, "query", tasks.query_x, tasks.query_y, dtype, keep),
            self._addresses("gradient", gradients, dtype),
            0 if rate_rows is None else self._address("rates", rate_rows),
            self._address("query_loss", query_loss),
            self._address("query_accuracy", query_accuracy),
        )
        used = [k for k, w in enumerate(weights) if w != 0]
        w = torch.tensor([weights[k] for k in used], dtype=torch.float64)
        loss = (query_loss[:, used] @ w).mean() if used else query_loss.new_zeros(())
        return MetaGradient(
            loss=loss.to(dtype),
            gradients=gradients,
            rate_gradient=None
            if rate_rows is None
            else self._rates_to_model(rate_rows, rates),
            query_loss=query_loss.to(dtype),
            query_accuracy=query_accuracy.to(dtype) if self._classes else None,
        )

    def adapt(
        self,
        params: Params,
        rates: Rates,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
    ) -> Named:
        """See `fastmaml.engines.base.Engine.adapt`."""
        dtype = self._dtype(params)
        count = support_x.shape[0]
        adapted = self._per_task(count, dtype)
        self._adapt(params, rates, (support_x, support_y), None, steps, adapted, None)
        return adapted

    def evaluate(
        self,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        inductive: bool = False,
    ) -> StepMetrics:
        """See `fastmaml.engines.base.Engine.evaluate`."""
        if inductive:
            return self._evaluate_inductive(params, rates, tasks, steps)
        rows = torch.empty(2, tasks.tasks, steps + 1, dtype=torch.float64)
        self._adapt(
            params,
            rates,
            (tasks.support_x, tasks.support_y),
            (tasks.query_x, tasks.query_y),
            steps,
            {},
            rows,
        )
        dtype = self._dtype(params)
        return StepMetrics(rows[0].to(dtype), rows[1].to(dtype) if self._classes else None)

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """See `fastmaml.engines.base.Engine.forward`."""
        program = self._program_for(x)
        output = torch.empty(
            x.shape[0], x.shape[1], program.outputs, dtype=self._dtype(params)
        )
        self._product(_FORWARD, params, x, None, output=output)
        return output

    def value_and_grad(
        self, params: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Named]:
        """See `fastmaml.engines.base.Engine.value_and_grad`."""
        dtype = self._dtype(params)
        loss = torch.empty(x.shape[0], dtype=torch.float64)
        result = self._per_task(x.shape[0], dtype)
        self._product(_GRADIENT, params, x, y, loss=loss, result=result)
        return loss.to(dtype), result

    def hvp(self, params: Params, x: Tensor, y: Tensor, vector: Params) -> Named:
        """See `fastmaml.engines.base.Engine.hvp`."""
        result = self._per_task(x.shape[0], self._dtype(params))
        self._product(_HESSIAN, params, x, y, vector=vector, result=result)
        return result

    def gauss_newton_product(
        self, params: Params, x: Tensor, y: Tensor, vector: Params
    ) -> Named:
        """See `fastmaml.engines.base.Engine.gauss_newton_product`."""
        result = self._per_task(x.shape[0], self._dtype(params))
        self._product(_GAUSS_NEWTON, params, x, y, vector=vector, result=result)
        return result

    # -- calls --------------------------------------------------------------------

    def _run(self, name: str, *arguments: Any) -> None:
        """Calls the extension, with a larger workspace if it asks for one."""
        call: Callable[..., Any] = getattr(self._core, name)
        with self._lock:
            space = self._workspace
            plan = call(*arguments, (self._address("workspace", space), space.numel()))
            if plan.bytes > space.numel():
                self._workspace = space = torch.empty(plan.bytes, dtype=torch.uint8)
                call(*arguments, (self._address("workspace", space), space.numel()))
            self.plan = Plan(
                plan.bytes,
                plan.slots,
                plan.slot_bytes,
                plan.shared_bytes,
                plan.tape_bytes,
                plan.kept,
            )

    def _adapt(
        self,
        params: Params,
        rates: Rates,
        support: tuple[Tensor, Tensor],
        query: tuple[Tensor, Tensor] | None,
        steps: int,
        adapted: Named,
        rows: Tensor | None,
    ) -> None:
        dtype = self._dtype(params)
        program = self._program_for(support[0])
        keep: list[Tensor] = []
        self._run(
            f"adapt_{_DTYPES[dtype]}",
            program,
            support[0].shape[0],
            steps,
            *self._parameters(params, dtype, support[0].shape[0]),
            self._rates(rates, dtype, keep),
            self._samples(program, "support", *support, dtype, keep),
            self._samples(program, "query", *query, dtype, keep)
            if query
            else _NO_SAMPLES,
            self._addresses("adapted", adapted, dtype) if adapted else [],
            0 if rows is None else self._address("query_loss", rows[0]),
            0 if rows is None else self._address("query_accuracy", rows[1]),
        )

    def _product(
        self,
        product: int,
        params: Params,
        x: Tensor,
        y: Tensor | None,
        *,
        vector: Params | None = None,
        output: Tensor | None = None,
        loss: Tensor | None = None,
        result: Named | None = None,
    ) -> None:
        dtype = self._dtype(params)
        program = self._program_for(x)
        keep: list[Tensor] = []
        no_vector: tuple[list[int], bool] = ([], False)
        self._run(
            f"product_{_DTYPES[dtype]}",
            program,
            product,
            x.shape[0],
            *self._parameters(params, dtype, x.shape[0]),
            *(self._parameters(vector, dtype, x.shape[0]) if vector else no_vector),
            self._samples(program, "", x, y, dtype, keep),
            0 if output is None else self._address("output", output),
            0 if loss is None else self._address("loss", loss),
            self._addresses("result", result, dtype) if result else [],
        )

    def _evaluate_inductive(
        self, params: Params, rates: Rates, tasks: TaskBatch, steps: int
    ) -> StepMetrics:
        """One query at a time beside the support samples, after each step."""
        losses, scores = [], []
        theta: Params = params
        for k in range(steps + 1):
            if k > 0:
                step = Rates(rates.at(k - 1), rates.layout, False, rates.adapted)
                theta = self.adapt(
                    theta, step, tasks.support_x, tasks.support_y, steps=1
                )
            outputs = torch.cat(
                [
                    self.forward(
                        theta, torch.cat([tasks.support_x, tasks.query_x[:, q : q + 1]], 1)
                    )[:, -1:]
                    for q in range(tasks.query_size)
                ],
                1,
            )
            loss, score = self._score(outputs, tasks.query_y)
            losses.append(loss)
            scores.append(score)
        accuracy = torch.stack(scores, 1) if self._classes else None
        return StepMetrics(torch.stack(losses, 1), accuracy)

    def _score(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        from fastmaml.losses import resolve_loss

        loss = resolve_loss(self._program.loss.kind, self._program.loss.reduction)
        per_task = zip(outputs, y, strict=True)
        values = [
            (loss.function(out, t), present(loss.accuracy)(out, t))
            if self._classes
            else (loss.function(out, t), out.new_zeros(()))
            for out, t in per_task
        ]
        return torch.stack([v for v, _ in values]), torch.stack([a for _, a in values])

    # -- arguments ----------------------------------------------------------------

    def _program_for(self, x: Tensor) -> Any:
        shape = tuple(x.shape[2:])
        program = self._programs.get(shape)
        if program is None:
            layers = [(s.kind, s.name, dict(s.attributes)) for s in self._program.layers]
            loss = self._program.loss
            program = self._core.Program(list(shape), layers, loss.kind, loss.reduction)
            self._programs[shape] = program
        return program

    def _dtype(self, params: Params) -> torch.dtype:
        dtype = params[self._names[0]].dtype
        if dtype not in _DTYPES:
            raise TypeError(
                f"params: the native engine computes in float32 or float64, got {dtype}"
            )
        return dtype

    @staticmethod
    def _address(name: str, tensor: Tensor) -> int:
        return _native.address(name, tensor, tensor.dtype, tensor.shape)

    def _addresses(self, what: str, named: Params, dtype: torch.dtype) -> list[int]:
        return [
            _native.address(n, named[n], dtype, named[n].shape) for n in self._names
        ]

    def _parameters(
        self, params: Params, dtype: torch.dtype, tasks: int
    ) -> tuple[list[int], bool]:
        """Addresses in the program's order, and whether there is one set per task."""
        first = self._names[0]
        per_task = params[first].dim() > len(self._shapes[first])
        axis = (tasks,) if per_task else ()
        addresses = [
            _native.address(n, params[n].detach(), dtype, axis + self._shapes[n])
            for n in self._names
        ]
        return addresses, per_task

    def _samples(
        self,
        program: Any,
        which: str,
        x: Tensor,
        y: Tensor | None,
        dtype: torch.dtype,
        keep: list[Tensor],
    ) -> tuple[int, int, int, bool]:
        prefix = f"{which}_" if which else ""
        channels_last = False
        if not x.is_contiguous():
            channels_last = x.dim() == 5 and x.movedim(2, -1).is_contiguous()
            if not channels_last:
                x = x.contiguous()
                keep.append(x)
        if channels_last:
            x_address = _native.images_address(f"{prefix}x", x, dtype)
        else:
            x_address = _native.address(f"{prefix}x", x, dtype, x.shape)
        if y is None:
            return x_address, 0, x.shape[1], channels_last
        y = y.contiguous()
        keep.append(y)
        shape = x.shape[:2] if self._classes else (*x.shape[:2], program.target_size)
        y_dtype = torch.int64 if self._classes else dtype
        return (
            x_address,
            _native.address(f"{prefix}y", y, y_dtype, shape),
            x.shape[1],
            channels_last,
        )

    def _per_task(self, tasks: int, dtype: torch.dtype) -> Named:
        return {
            n: torch.empty((tasks, *self._shapes[n]), dtype=dtype) for n in self._names
        }

    # -- rates --------------------------------------------------------------------

    def _rates(
        self, rates: Rates, dtype: torch.dtype, keep: list[Tensor]
    ) -> tuple[int, int, int, list[bool]]:
        values = rates.values.detach()
        rows = values.shape[0] if rates.per_step else 1
        width = {
            "scalar": 1,
            "per_tensor": len(self._names),
            "per_parameter": sum(self._numels.values()),
        }[rates.layout]
        if values.numel() != rows * width:
            raise ValueError(
                f"rates: expected {rows * width} values for layout {rates.layout!r}, "
                f"got {values.numel()}"
            )
        values = values.reshape(rows, width).to(dtype)
        if self._reorder:
            values = self._permuted(values, rates, self._model_names, self._names)
        values = values.contiguous()
        keep.append(values)
        adapted = [rates.adapted is None or n in rates.adapted for n in self._names]
        address = _native.address("rates", values, dtype, values.shape)
        return address, _LAYOUTS[rates.layout], rows, adapted

    def _rates_to_model(self, rows: Tensor, rates: Rates) -> Tensor:
        if self._reorder:
            width = -1 if rates.per_step else rows.numel()
            count = rates.values.shape[0] if rates.per_step else 1
            rows = rows.reshape(count, width)
            rows = self._permuted(rows, rates, self._names, self._model_names)
        return rows.reshape(rates.values.shape)

    def _permuted(
        self, values: Tensor, rates: Rates, before: Iterable[str], after: Iterable[str]
    ) -> Tensor:
        """Columns of per-tensor or per-parameter rates from one order to another."""
        if rates.layout == "scalar":
            return values
        before = list(before)
        each = rates.layout == "per_parameter"
        sizes = [self._numels[n] if each else 1 for n in before]
        parts = dict(zip(before, values.split(sizes, dim=1), strict=True))
        return torch.cat([parts[n] for n in after], dim=1)
