"""Engines for a problem, and the fixture values that learner tests run over."""

from __future__ import annotations

import backends
import torch
from problem import Problem
from torch import Tensor, nn

from fastmaml import MAML
from fastmaml.compile import compile_module
from fastmaml.engines import Engine, FunctionalEngine, Rates
from fastmaml.learners.settings import TEST_ENGINES
from fastmaml.losses import Loss, resolve_loss


def native_unavailable() -> str | None:
    """Why the native engine can't be used, or None."""
    try:
        from fastmaml.engines import native
    except ImportError as error:
        return str(error)
    return native.unavailable()


# values of a learner's `engine`; on a model on the CPU all of them run there
NAMES = ["functional"] + (["native"] if native_unavailable() is None else [])
NAMES += [n for n in TEST_ENGINES if backends.why_not(n) is None]


def reported(engine: str) -> str:
    """What the report of a learner calls its engine."""
    return "native" if engine in TEST_ENGINES else engine


def loss_of(problem: Problem) -> Loss:
    return resolve_loss(problem.loss, problem.reduction)


def functional(problem: Problem, model: nn.Module, **options) -> FunctionalEngine:
    loss = loss_of(problem)
    return FunctionalEngine(model, loss.function, loss.accuracy, **options)


def engine_for(name: str, problem: Problem, model: nn.Module) -> Engine:
    if name == "functional":
        return functional(problem, model)
    from fastmaml.engines.native import NativeEngine

    report = compile_module(model, problem.loss, problem.reduction)
    assert report.program is not None, str(report)
    backend = name if name in TEST_ENGINES else None
    return NativeEngine(report.program, model, backend=backend)


def scalar_rates(problem: Problem, model: nn.Module) -> Rates:
    rate = torch.tensor(problem.inner_lr, dtype=torch.float64)
    return Rates(rate, adapted=problem.adapted(model))


def rates_of(
    problem: Problem, model: nn.Module, layout: str, per_step: bool, steps: int
) -> Rates:
    """Random rates around the problem's, in any layout."""
    count = {
        "scalar": (),
        "per_tensor": (len(list(model.parameters())),),
        "per_parameter": (sum(p.numel() for p in model.parameters()),),
    }[layout]
    shape = ((steps,) if per_step else ()) + count
    generator = torch.Generator().manual_seed(5)
    spread = torch.rand(shape, generator=generator, dtype=torch.float64)
    values = problem.inner_lr * (0.5 + spread)
    return Rates(values, layout, per_step, problem.adapted(model))  # type: ignore[arg-type]


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def learner_for(problem, engine, model=None, kind=MAML, **options):
    """A learner with the problem's loss, rate and adapted names, and two steps."""
    model = problem.build() if model is None else model
    defaults = {
        "loss": problem.loss,
        "reduction": problem.reduction,
        "inner_lr": problem.inner_lr,
        "inner_steps": 2,
        "adapted": problem.adapted(model),
        "engine": engine,
    }
    return kind(model, **{**defaults, **options})
