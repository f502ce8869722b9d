"""The native engine: fused C++ kernels, no autograd graph.

A `LoweredProgram` and the shape of one input make a compiled program; calls hand it
addresses and a workspace, which is a torch tensor kept between calls. One meta-gradient
is one call. Samples and parameters share a dtype, float32 or float64.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml import _native
from fastmaml.compile import LoweredProgram
from fastmaml.engines.base import MetaGradient, Params, Rates, StepMetrics
from fastmaml.engines.layout import check_steps, step_weights
from fastmaml.engines.native_arguments import (
    DTYPES,
    NO_SAMPLES,
    Named,
    ParameterArguments,
    Samples,
    sample_arguments,
)
from fastmaml.engines.native_call import PreparedCall, weighted_loss
from fastmaml.engines.native_curvature import (
    FORWARD,
    GAUSS_NEWTON,
    GRADIENT,
    HESSIAN,
    NativeCurvature,
)
from fastmaml.engines.native_inductive import evaluate_inductive
from fastmaml.engines.native_workspace import Calls
from fastmaml.engines.placement import Placement, backend_for
from fastmaml.tasks.batch import TaskBatch

unavailable = _native.unavailable

_MEMORY = {"auto": 0, "keep": 1, "recompute": 2}


class Plan(NamedTuple):
    """Memory of the latest call, in bytes.

    Attributes:
        total: the whole workspace.
        slots: tasks in work at once, one per thread; 1 for all of them on a GPU.
        slot: per slot: K copies of the parameters, and activations, of its tasks.
        shared: parameters, rates and per-task results.
        tape: activations and adjoints of one support step.
        kept: activations of all steps are kept for the chain; else recomputed.
        resident: each task was done in one piece, in the nearest caches.
        factored: layers whose adapted weights were never formed, their updates being
            products of few rows.
    """

    total: int
    slots: int
    slot: int
    shared: int
    tape: int
    kept: bool
    resident: bool
    factored: int


class NativeEngine(Calls):
    """Runs a lowered program; see `fastmaml.engines.base.Engine`.

    Args:
        program: from `fastmaml.compile.compile_module`.
        model: gives the parameters' shapes and order; never called or modified.
        memory: ``keep`` every inner step's activations for the chain, or ``recompute``
            them; ``auto`` keeps 512 MiB, and does tasks of small networks in one piece.
        backend: of the extension; ``None`` takes that of the model's device.
        precision: how a GPU multiplies float32, see `Placement`.

    Raises:
        ValueError: for an unknown ``memory``, a backend that was not built, or a
            precision that it doesn't know.
        NativeUnavailable: if the extension can't be loaded.
    """

    name = "native"

    def __init__(
        self,
        program: LoweredProgram,
        model: nn.Module,
        *,
        memory: str = "auto",
        backend: str | None = None,
        precision: str = "float32",
    ) -> None:
        if memory not in _MEMORY:
            raise ValueError(
                f"memory={memory!r}: expected one of {', '.join(map(repr, _MEMORY))}"
            )
        self._core = _native.core()
        self._program = program
        self._memory = _MEMORY[memory]
        self._device = device = next(model.parameters()).device
        self._place = Placement(backend or backend_for(device), device, precision)
        self._parameters = ParameterArguments(program.parameters, model, device)
        self._classes = program.loss.kind == "cross_entropy"
        self._programs: dict[tuple[int, ...], Any] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)
        self._tapes: list[Tensor] = []  # of products that are done
        self._stream = 0  # whose order the workspace is used in
        self._lock = threading.Lock()
        self._plan: Any = None

    @property
    def plan(self) -> Plan | None:
        """Memory of the latest call; ``None`` before the first."""
        if (p := getattr(self._plan, "plan", self._plan)) is None:
            return None
        sizes = p.bytes, p.slots, p.slot_bytes, p.shared_bytes, p.tape_bytes
        return Plan(*sizes, p.kept, p.resident, p.factored)

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
        own = self._parameters
        dtype = own.dtype(params)
        program = self._program_for(tasks.support_x)
        keep: list[Tensor] = []
        gradients, gradient_addresses = own.make(dtype)
        query = self._empty((2, tasks.tasks, steps + 1), torch.float64)
        if not self._place.on_host:
            query.fill_(torch.nan)
        slopes = self._empty((rates.values.numel() if rate_gradient else 0,), dtype)
        weights = step_weights(loss_weights, steps)
        plan = self._run(
            f"meta_gradient_{DTYPES[dtype]}",
            program,
            tasks.tasks,
            steps,
            first_order,
            self._memory,
            weights,
            *own.addresses(params, dtype, tasks.tasks, keep),
            own.rates(rates, dtype, keep),
            self._samples("support_", tasks.support_x, tasks.support_y, dtype, keep),
            self._samples("query_", tasks.query_x, tasks.query_y, dtype, keep),
            gradient_addresses,
            _native.own_address(slopes) if rate_gradient else 0,
            _native.own_address(query[0]),
            _native.own_address(query[1]),
            adapted=own.adapted(rates),
        )
        if self._place.on_host:
            loss = torch.tensor(plan.loss, dtype=dtype)
        else:
            loss = weighted_loss(query[0], weights).to(dtype)
        query = query.to(dtype)
        return MetaGradient(
            loss=loss,
            gradients=gradients,
            rate_gradient=own.rates_to_model(slopes, rates) if rate_gradient else None,
            query_loss=query[0],
            query_accuracy=query[1] if self._classes else None,
        )

    def prepare(
        self,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        first_order: bool,
        loss_weights: Sequence[float] | None,
        rate_gradient: bool,
    ) -> PreparedCall:
        """The meta-gradient of these very parameters, on further tasks like these."""
        return PreparedCall(
            self,
            params,
            rates,
            tasks,
            steps=steps,
            first_order=first_order,
            loss_weights=loss_weights,
            rate_gradient=rate_gradient,
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
        dtype = self._parameters.dtype(params)
        adapted, addresses = self._parameters.make(dtype, (len(support_x),))
        support = (support_x, support_y)
        self._adapt(params, rates, support, None, steps, addresses, (0, 0))
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
            return evaluate_inductive(self, params, rates, tasks, steps)
        check_steps(steps)
        query = self._empty((2, tasks.tasks, steps + 1), torch.float64)
        self._adapt(
            params,
            rates,
            (tasks.support_x, tasks.support_y),
            (tasks.query_x, tasks.query_y),
            steps,
            [],
            (_native.own_address(query[0]), _native.own_address(query[1])),
        )
        query = query.to(self._parameters.dtype(params))
        return StepMetrics(query[0], query[1] if self._classes else None)

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """See `fastmaml.engines.base.Engine.forward`."""
        outputs = self._program_for(x).outputs
        dtype = self._parameters.dtype(params)
        output = self._empty((x.shape[0], x.shape[1], outputs), dtype)
        self._product(FORWARD, params, x, None, output=_native.own_address(output))
        return output

    def value_and_grad(
        self, params: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Named]:
        """See `fastmaml.engines.base.Engine.value_and_grad`."""
        dtype = self._parameters.dtype(params)
        metrics = self._empty((2, x.shape[0]), torch.float64)
        result, addresses = self._parameters.make(dtype, (x.shape[0],))
        where = _native.own_address(metrics[0]), _native.own_address(metrics[1])
        self._product(GRADIENT, params, x, y, metrics=where, result=addresses)
        return metrics[0].to(dtype), result

    def hvp(self, params: Params, x: Tensor, y: Tensor, vector: Params) -> Named:
        """See `fastmaml.engines.base.Engine.hvp`."""
        return self._curvature(HESSIAN, params, x, y, vector)

    def gauss_newton_product(
        self, params: Params, x: Tensor, y: Tensor, vector: Params
    ) -> Named:
        """See `fastmaml.engines.base.Engine.gauss_newton_product`."""
        return self._curvature(GAUSS_NEWTON, params, x, y, vector)

    def curvature(
        self, params: Params, x: Tensor, y: Tensor, *, many: bool = False
    ) -> NativeCurvature:
        """See `fastmaml.engines.base.Engine.curvature`."""
        return NativeCurvature(self, params, x, y, many=many)

    # -- calls --------------------------------------------------------------------

    def _adapt(
        self,
        params: Params,
        rates: Rates,
        support: tuple[Tensor, Tensor],
        query: tuple[Tensor, Tensor] | None,
        steps: int,
        adapted: list[int],
        metrics: tuple[int, int],
    ) -> None:
        check_steps(steps)
        own = self._parameters
        dtype = own.dtype(params)
        tasks = support[0].shape[0]
        keep: list[Tensor] = []
        self._run(
            f"adapt_{DTYPES[dtype]}",
            self._program_for(support[0]),
            tasks,
            steps,
            *own.addresses(params, dtype, tasks, keep),
            own.rates(rates, dtype, keep),
            self._samples("support_", *support, dtype, keep),
            self._samples("query_", *query, dtype, keep) if query else NO_SAMPLES,
            adapted,
            *metrics,
            adapted=own.adapted(rates),
        )

    def _curvature(
        self,
        product: int,
        params: Params,
        x: Tensor,
        y: Tensor,
        vector: Params,
        kept: tuple[int, bool] = (0, False),
    ) -> Named:
        dtype = self._parameters.dtype(params)
        result, to = self._parameters.make(dtype, (x.shape[0],))
        self._product(product, params, x, y, vector=vector, result=to, kept=kept)
        return result

    def _may_keep(self, size: int) -> bool:
        """Whether so many bytes may wait for a later pass."""
        if self._memory == _MEMORY["auto"]:
            return bool(size <= self._core.KEEP_BYTES)
        return self._memory == _MEMORY["keep"]

    def _product(
        self,
        product: int,
        params: Params,
        x: Tensor,
        y: Tensor | None,
        *,
        vector: Params | None = None,
        output: int = 0,
        metrics: tuple[int, int] = (0, 0),
        result: Sequence[int] = (),
        kept: tuple[int, bool] = (0, False),
    ) -> None:
        own = self._parameters
        dtype = own.dtype(params)
        tasks = x.shape[0]
        keep: list[Tensor] = []
        no_vector: tuple[list[int], bool] = ([], False)
        self._run(
            f"product_{DTYPES[dtype]}",
            self._program_for(x),
            product,
            tasks,
            *own.addresses(params, dtype, tasks, keep),
            *(
                own.addresses(vector, dtype, tasks, keep)
                if vector is not None
                else no_vector
            ),
            self._samples("", x, y, dtype, keep),
            output,
            *metrics,
            result,
            *kept,
        )

    def _program_for(self, x: Tensor) -> Any:
        """The compiled program for samples of x's shape."""
        shape = tuple(x.shape[2:])
        program = self._programs.get(shape)
        if program is None:
            layers = [
                (s.kind, s.name, dict(s.attributes)) for s in self._program.layers
            ]
            loss = self._program.loss
            program = self._core.Program(list(shape), layers, loss.kind, loss.reduction)
            self._programs[shape] = program
        return program

    def _samples(
        self,
        which: str,
        x: Tensor,
        y: Tensor | None,
        dtype: torch.dtype,
        keep: list[Tensor],
    ) -> Samples:
        size = self._program_for(x).target_size
        target = None if self._classes else (size,)
        return sample_arguments(which, x, y, dtype, target, keep, self._device)
