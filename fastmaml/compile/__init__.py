"""The compile step: a ``torch.nn.Module`` becomes a program, or a list of reasons."""

from __future__ import annotations

import threading

from torch import nn

from fastmaml.compile.lower import Unsupported, is_known, lower
from fastmaml.compile.params import refusals, usage_refusals
from fastmaml.compile.program import LayerSpec, LossSpec, LoweredProgram
from fastmaml.compile.report import CompileReport, EngineReport
from fastmaml.compile.shapes import infer_shapes
from fastmaml.compile.trace import Step, Untraceable, trace
from fastmaml.losses import Loss, LossCallable, resolve_loss

__all__ = [
    "CompileReport",
    "EngineReport",
    "LayerSpec",
    "LossSpec",
    "LoweredProgram",
    "compile_module",
    "infer_shapes",
]


# torch.fx patches nn.Module for the whole process while it traces, so that one thread
# must not even look at a module while another traces
_COMPILING = threading.Lock()


def compile_module(
    model: nn.Module, loss: str | LossCallable = "mse", reduction: str = "mean"
) -> CompileReport:
    """Turns a model and its loss into a program for the native engine.

    ``nn.Sequential``, nested ones and modules whose forward pass ``torch.fx`` sees as
    a straight line compile, in their present mode (``model.training``).

    Args:
        model: not modified.
        loss: name of a built-in loss; a callable is a reason against.
        reduction: of the loss.

    Returns:
        The program, or every reason why there is none. Unsupported parts never raise.

    Raises:
        ValueError: for a loss or reduction that doesn't exist.
    """
    resolved = resolve_loss(loss, reduction)
    with _COMPILING:
        return _compile(model, resolved)


def _compile(model: nn.Module, loss: Loss) -> CompileReport:
    reasons = [*_loss_refusals(loss), *refusals(model)]
    layers: list[LayerSpec] = []
    try:
        steps = trace(model, is_known)
    except Untraceable as error:
        return CompileReport(None, [*reasons, str(error)])
    for step in steps:
        try:
            layers += lower(step)
        except Unsupported as error:
            reasons.append(str(error))
    spec = LossSpec(loss.name, loss.reduction)
    program = LoweredProgram(tuple(layers), spec)
    reasons += _repeated(steps)
    if not reasons:
        reasons += usage_refusals(model, program)
    return CompileReport(None if reasons else program, reasons)


def _loss_refusals(loss: Loss) -> list[str]:
    if loss.native:
        return []
    reason = f"the loss is a Python callable ({loss.name}), not a built-in"
    if same := _SAME_LOSSES.get(loss.name):
        reason += f"; if it takes no options, loss={same!r} is the same"
    return [reason]


_SAME_LOSSES = {
    "mse_loss": "mse",
    "MSELoss": "mse",
    "cross_entropy": "cross_entropy",
    "CrossEntropyLoss": "cross_entropy",
}
"""What PyTorch calls losses that are built in."""


def _repeated(steps: list[Step]) -> list[str]:
    called = [
        s.name
        for s in steps
        if s.module is not None and any(True for _ in s.module.parameters())
    ]
    return [
        f"module {name} is called {called.count(name)} times"
        for name in sorted(set(called))
        if called.count(name) > 1
    ]
