"""Which engine runs a model, and the reason that the report gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmaml.compile import CompileReport, EngineReport, compile_module
from fastmaml.engines.base import Engine
from fastmaml.engines.functional import FunctionalEngine
from fastmaml.engines.modes import check_modes
from fastmaml.engines.placement import backend_for, missing
from fastmaml.learners.settings import TEST_ENGINES
from fastmaml.losses import Loss

# Emulation has proven the CUDA kernels, no GPU has: nobody gets them unasked.
UNPROVEN = (
    "its CUDA kernels have been run by an emulation only, on no GPU yet: "
    "engine='native' takes them"
)


@dataclass(frozen=True)
class EngineChoice:
    """What the user asked for.

    Attributes:
        engine: ``auto``, ``native``, ``functional``, or a backend for tests.
        memory: plan of the native engine.
        chunk_size: tasks in flight on the functional engine.
        vectorize: whether the functional engine batches tasks with vmap.
        precision: of matrix products on a GPU.
    """

    engine: str = "auto"
    memory: str = "auto"
    chunk_size: int | None = None
    vectorize: bool = True
    precision: str = "float32"

    def backend(self, device: torch.device) -> str:
        """Of the native engine, for tensors of a device."""
        if self.engine in TEST_ENGINES:
            return self.engine
        return backend_for(device)


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
            precision that it doesn't have there; if a module's training mode has no
            meaning in an inner loop.
    """
    check_modes(model)
    if choice.engine == "functional":
        why = "engine='functional' was asked for"
        return _functional(model, loss, choice, why, None)
    compiled = compile_module(model, _loss_argument(loss), loss.reduction)
    obstacle = against or _obstacle(model, choice, compiled)
    if obstacle is None:
        return _native(model, choice, compiled)
    if choice.engine != "auto":
        raise ValueError(
            f"engine={choice.engine!r} can't run this model: {obstacle}\n{compiled}"
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
    backend = choice.backend(device)
    if choice.engine in TEST_ENGINES and device.type != "cpu":
        return f"it takes a model on the CPU, got one on {device}"
    if (reason := _missing()) is not None:
        return reason
    if (reason := missing(backend)) is not None:
        return f"the native engine has no backend for {device}: {reason}"
    return UNPROVEN if choice.engine == "auto" and device.type == "cuda" else None


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
    backend = choice.backend(next(model.parameters()).device)
    engine = NativeEngine(
        compiled.program,
        model,
        memory=choice.memory,
        backend=backend,
        precision=choice.precision,
    )
    why = "every layer has a native implementation"
    if choice.engine in TEST_ENGINES:
        why += f"; the {backend} backend was asked for"
    if choice.precision != "float32":
        why += f"; products in {choice.precision}"
    return engine, _report("native", model, why, compiled)


def _functional(
    model: nn.Module,
    loss: Loss,
    choice: EngineChoice,
    why: str,
    compiled: CompileReport | None,
) -> tuple[Engine, EngineReport]:
    if choice.precision != "float32":
        raise ValueError(
            f"precision={choice.precision!r} is one of the native engine on a GPU, but "
            f"the functional engine runs this model: {why}; leave precision='float32'"
        )
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
