"""What the tests of the native engine share: cases, answers, odd memory, settings.

Values of a case can be represented in float32, so that one float64 answer of the oracle
judges the engine in both dtypes.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import backends
import oracles
import torch
from engines import loss_of
from problems import BY_NAME, Problem, direction, per_task
from torch import Tensor, nn

from fastmaml import _native
from fastmaml.compile import compile_module
from fastmaml.engines import Rates
from fastmaml.engines.native import NativeEngine
from fastmaml.tasks import TaskBatch

Named = dict[str, Tensor]

DTYPES = [torch.float64, torch.float32]
WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


# -- cases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A problem with its samples, in float64.

    Attributes:
        problem: where it is from.
        model: with the shared parameters.
        params: shared by all tasks, name -> [...].
        own: of every task, name -> [T, ...].
        vector: of every task, to multiply Hessians with.
        tasks: the meta-batch.
        rates: the problem's inner rate, for all tensors it adapts.
    """

    problem: Problem
    model: nn.Module
    params: Named
    own: Named
    vector: Named
    tasks: TaskBatch
    rates: Rates

    @property
    def loss(self):
        return loss_of(self.problem).function


def single(tensor: Tensor) -> Tensor:
    """Rounded to values that float32 can hold."""
    return tensor.detach().float().double() if tensor.is_floating_point() else tensor


@functools.cache
def case(problem: Problem | str, tasks: int = 2, samples: int = 0) -> Case:
    """A case of a problem of the table; the same object each time, so don't modify."""
    if isinstance(problem, str):
        problem = BY_NAME[problem]
    model = problem.build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(single(p))
    batch = problem.tasks(tasks, samples, samples and samples + 1)
    return Case(
        problem,
        model,
        {n: p.detach() for n, p in model.named_parameters()},
        {n: single(p) for n, p in per_task(model, tasks).items()},
        {n: single(v) for n, v in direction(model, tasks).items()},
        TaskBatch(
            single(batch.support_x),
            single(batch.support_y),
            single(batch.query_x),
            single(batch.query_y),
        ),
        Rates(single(torch.tensor(problem.inner_lr)), adapted=problem.adapted(model)),
    )


def native(
    c: Case, kind: type[NativeEngine] = NativeEngine, **options: Any
) -> NativeEngine:
    """The engine of a case, for both dtypes, on the backend whose turn it is."""
    report = compile_module(c.model, c.problem.loss, c.problem.reduction)
    assert report.program is not None, str(report)
    name = options.setdefault("backend", backends.current())
    engine = kind(report.program, backends.placed(c.model, name), **options)
    device = backends.device_of(name)
    return engine if device == "cpu" else backends.Elsewhere(engine, device)  # type: ignore[return-value]


def cast(named: Mapping[str, Tensor], dtype: torch.dtype) -> Named:
    return {n: t.to(dtype) for n, t in named.items()}


def row(dtype: torch.dtype, what: str) -> str:
    """The row of the tolerance ledger."""
    return f"{str(dtype).removeprefix('torch.')} {what}"


# -- the oracle's answers --------------------------------------------------------------


@functools.cache
def passes_wanted(problem: Problem | str) -> dict[str, Any]:
    """What the passes over one batch give, for the tasks' own parameters."""
    c = case(problem)
    x, y = c.tasks.support_x, c.tasks.support_y
    model = oracles.reference(c.model)
    rows = [
        torch.func.functional_call(model, {n: p[t] for n, p in c.own.items()}, (x[t],))
        for t in range(len(x))
    ]
    value, gradient = oracles.value_and_grad(c.model, c.loss, c.own, x, y)
    arguments = c.model, c.loss, c.own, x, y, c.vector
    return {
        "forward": torch.stack(rows).detach(),
        "value": value,
        "gradient": gradient,
        "hvp": oracles.hvp(*arguments),
        "gauss_newton_product": oracles.gauss_newton_product(*arguments),
    }


@functools.cache
def chain_wanted(problem: Problem | str) -> Named:
    """The meta-gradient of two steps."""
    c = case(problem)
    arguments = c.model, c.loss, c.params, c.rates, c.tasks, 2
    return oracles.meta_gradient(*arguments).gradients


def adapt_wanted(c: Case, rates: Rates, steps: int, own: bool) -> Named:
    """Adapted parameters from the shared ones, or from each task's own."""
    x, y = c.tasks.support_x, c.tasks.support_y
    if not own:
        return oracles.adapt(c.model, c.loss, c.params, rates, x, y, steps)
    rows = [
        oracles.adapt(
            c.model,
            c.loss,
            {n: p[t] for n, p in c.own.items()},
            rates,
            x[t : t + 1],
            y[t : t + 1],
            steps,
        )
        for t in range(len(x))
    ]
    return {n: torch.cat([r[n] for r in rows]) for n in c.own}


# -- everything an engine can do -------------------------------------------------------


def everything(
    engine: NativeEngine,
    c: Case,
    dtype: torch.dtype = torch.float64,
    *,
    rates: Rates | None = None,
    steps: int = 2,
) -> Named:
    """All results of all calls under one flat set of names.

    Names that start with ``mean`` are means over tasks; the others are per task.
    """
    own, vector, shared = (cast(v, dtype) for v in (c.own, c.vector, c.params))
    tasks = c.tasks.to(dtype=dtype)
    support = tasks.support_x, tasks.support_y
    rates = rates or c.rates
    value, gradient = engine.value_and_grad(own, *support)
    meta = engine.meta_gradient(shared, rates, tasks, steps=steps, rate_gradient=True)
    metrics = engine.evaluate(own, rates, tasks, steps=steps)
    results = {
        "forward": engine.forward(own, support[0]),
        "value": value,
        "meta.query_loss": meta.query_loss,
        "evaluate.loss": metrics.loss,
        "mean.loss": meta.loss,
        "mean.rates": meta.rate_gradient,
        **_prefixed("gradient", gradient),
        **_prefixed("hvp", engine.hvp(own, *support, vector)),
        **_prefixed("gauss", engine.gauss_newton_product(own, *support, vector)),
        **_prefixed("adapt", engine.adapt(shared, rates, *support, steps=steps)),
        **_prefixed("mean", meta.gradients),
    }
    if meta.query_accuracy is not None:
        results["meta.query_accuracy"] = meta.query_accuracy
        results["evaluate.accuracy"] = metrics.accuracy
    return results


def _prefixed(prefix: str, named: Mapping[str, Tensor]) -> Named:
    return {f"{prefix}.{n}": t for n, t in named.items()}


def assert_same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Equal to the last bit, signs of zeros and places of NaN included."""
    assert set(got) == set(want)
    for name, w in want.items():
        g = got[name]
        assert g.dtype == w.dtype and g.shape == w.shape, name
        whole = WHOLE[w.dtype]
        differing = g.contiguous().view(whole) != w.contiguous().view(whole)
        assert not differing.any(), (
            f"{name}: {int(differing.sum())} of {w.numel()} values differ, at most by "
            f"{(g - w).abs().nan_to_num().max().item():.3e}"
        )


def says(*parts: str) -> str:
    """A pattern that finds the parts in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


# -- settings of the extension, put back afterwards ------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    core = _native.core()
    before = core.num_threads()
    core.set_num_threads(count)
    try:
        yield
    finally:
        core.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    core = _native.core()
    before = core.build_info()["isa"]
    core.use_isa(name)
    try:
        yield
    finally:
        core.use_isa(before)


# -- memory ----------------------------------------------------------------------------

_ROOM = 13  # elements around a tensor; odd, so that it starts off every boundary


def embedded(tensor: Tensor) -> Tensor:
    """A misaligned copy with NaN (or -1) right before and behind it in memory."""
    count = tensor.numel()
    size = tensor.element_size()
    room = torch.full(((count + 2 * _ROOM) * size,), 255, dtype=torch.uint8)
    inside = room.view(tensor.dtype)[_ROOM : _ROOM + count]
    inside.copy_(tensor.flatten())
    return inside.view(tensor.shape)


def embedded_case(c: Case) -> Case:
    """A case whose tensors all lie misaligned among NaN."""
    model = copy.deepcopy(c.model)
    return Case(
        c.problem,
        model,
        *({n: embedded(t) for n, t in v.items()} for v in (c.params, c.own, c.vector)),
        TaskBatch(
            embedded(c.tasks.support_x),
            embedded(c.tasks.support_y),
            embedded(c.tasks.query_x),
            embedded(c.tasks.query_y),
        ),
        c.rates,
    )


class Watched:
    """The extension, with the arguments of every call passing through ``change``."""

    def __init__(self, change: Callable[[tuple], tuple]) -> None:
        self._core = _native.core()
        self._change = change
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._core, name)
        if "_float" not in name:
            return found

        def call(*arguments: Any) -> Any:
            self.answers.append(found(*self._change(arguments)))
            return self.answers[-1]

        return call


class Forgetful(NativeEngine):
    """Keeps no workspace, so that each call gets one of exactly the planned size."""

    _workspace = property(
        lambda self: torch.empty(0, dtype=torch.uint8), lambda self, space: None
    )


class Guards:
    """Stands in for ``torch.empty``: every tensor lies in NaN, between guard bytes."""

    SIZE, BYTE = 4096, 0xA5

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        shape = tuple(shape[0]) if isinstance(shape[0], tuple | torch.Size) else shape
        count = math.prod(shape)
        size = count * torch.zeros(0, dtype=dtype).element_size()
        buffer = torch.full((size + 2 * self.SIZE,), self.BYTE, dtype=torch.uint8)
        self.buffers.append(buffer)
        inside = buffer[self.SIZE : self.SIZE + size]
        inside.fill_(255)
        return inside.view(dtype).view(shape)

    def check(self) -> None:
        """Raises if a byte around one of the tensors was written."""
        assert self.buffers, "nothing was guarded"
        for buffer in self.buffers:
            for guard in (buffer[: self.SIZE], buffer[-self.SIZE :]):
                assert (guard == self.BYTE).all(), "written outside of a tensor"

    def sizes(self) -> set[int]:
        """Bytes of the tensors that were handed out."""
        return {buffer.numel() - 2 * self.SIZE for buffer in self.buffers}
