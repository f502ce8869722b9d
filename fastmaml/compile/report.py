"""Reports: what became of a model, which engine runs it, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastmaml.compile.program import LoweredProgram


@dataclass(frozen=True)
class CompileReport:
    """Outcome of `fastmaml.compile.compile_module`.

    Attributes:
        program: the model as layers, or ``None`` where a part is unsupported.
        reasons: one sentence for every part that keeps the model off the native
            engine; empty exactly when ``program`` is not.
    """

    program: LoweredProgram | None
    reasons: list[str] = field(default_factory=list)

    @property
    def native(self) -> bool:
        """Whether the model became a program."""
        return self.program is not None

    def __str__(self) -> str:
        """The layers, or every reason against them."""
        if self.program is None:
            return "\n".join(
                ["not a native program; runs on the functional engine:"]
                + [f"  - {reason}" for reason in self.reasons]
            )
        loss = self.program.loss
        rows = [f"  {layer}" for layer in self.program.layers]
        tail = f"  loss: {loss.kind} ({loss.reduction})"
        return "\n".join([f"native program, {len(rows)} layers:", *rows, tail])


@dataclass(frozen=True)
class EngineReport:
    """Which engine runs a learner, where, and why.

    Attributes:
        engine: ``native`` or ``functional``.
        device: such as ``cpu``.
        dtype: such as ``float32``.
        why: the reason for the engine, in one sentence.
        compiled: the compile report; ``None`` if compiling was not asked for.
    """

    engine: str
    device: str
    dtype: str
    why: str
    compiled: CompileReport | None = None

    def __str__(self) -> str:
        """The engine and why, then the compile report."""
        head = f"{self.engine} engine on {self.device}, {self.dtype}: {self.why}"
        return head if self.compiled is None else f"{head}\n{self.compiled}"
