"""Which engine runs a model, and the reason that the report gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmaml.compile import CompileReport, EngineReport, compile_module
from fastmaml.engines.base import Engine
from fastmaml.engines.functional import FunctionalEngine
from fastmaml.engines.modes import check_modes
from fastmaml.losses import Loss


@dataclass(frozen=True)
class EngineChoice:
    """What the user asked for.

    Attributes:
        engine: ``auto``, ``native`` or ``functional``.
        memory: plan of the native engine.
        chunk_size: tasks in flight on the functional engine.
        vectorize: whether the functional engine batches tasks with vmap.
    """

    engine: str = "auto"
    memory: str = "auto"
    chunk_size: int | None = None
    vectorize: bool = True


def select_engine(
    model: nn.Module, loss: Loss, choice: EngineChoice, against: str | None = None
) -> tuple[Engine, EngineReport]:
    """Builds the engine and says why it is that one.

    Args:
        model: already with batch statistics where those are asked for.
        loss: resolved.
        choice: what the user asked for.
        against: a reason against the native engine that was found at run time.

    Raises:
        ValueError: if the native engine is asked for and can't run the model, or a
            module's training mode has no meaning in an inner loop.
    """
    check_modes(model)
    if choice.engine == "functional":
        why = "engine='functional' was asked for"
        return _functional(model, loss, choice, why, None)
    compiled = compile_module(model, _loss_argument(loss), loss.reduction)
    obstacle = against or _obstacle(model, choice, compiled)
    if obstacle is None:
        return _native(model, choice, compiled)
    if choice.engine == "native":
        raise ValueError(
            f"engine='native' can't run this model: {obstacle}\n{compiled}"
        )
    return _functional(model, loss, choice, obstacle, compiled)


def _loss_argument(loss: Loss) -> Any:
    return loss.name if loss.native else loss.function


def _obstacle(
    model: nn.Module, choice: EngineChoice, compiled: CompileReport
) -> str | None:
    """Why the native engine can't run the model, or ``None``."""
    if not compiled.native:
        return "the model is not a native program, see below"
    if not choice.vectorize:
        return "vectorize=False was asked for"
    device = next(model.parameters()).device
    if device.type != "cpu":
        return f"the native engine has no backend for {device}"
    return _missing()


def _missing() -> str | None:
    try:
        from fastmaml.engines import native
    except ImportError as error:
        return f"the native engine can't be imported: {error}"
    return native.unavailable()


def _native(
    model: nn.Module, choice: EngineChoice, compiled: CompileReport
) -> tuple[Engine, EngineReport]:
    from fastmaml.engines.native import NativeEngine

    assert compiled.program is not None
    engine = NativeEngine(compiled.program, model, memory=choice.memory)
    why = "every layer has a native implementation"
    return engine, _report("native", model, why, compiled)


def _functional(
    model: nn.Module,
    loss: Loss,
    choice: EngineChoice,
    why: str,
    compiled: CompileReport | None,
) -> tuple[Engine, EngineReport]:
    engine = FunctionalEngine(
        model,
        loss.function,
        loss.accuracy,
        chunk_size=choice.chunk_size,
        vectorize=choice.vectorize,
    )
    return engine, _report("functional", model, why, compiled)


def _report(
    name: str, model: nn.Module, why: str, compiled: CompileReport | None
) -> EngineReport:
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    return EngineReport(name, str(first.device), dtype, why, compiled)
