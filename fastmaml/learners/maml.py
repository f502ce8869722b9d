"""MAML and its first-order form: coefficients for the one driver.

Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of
Deep Networks", 2017: the algorithm of section 2.2; the first-order form of section 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from fastmaml.engines.base import RateLayout
from fastmaml.learners.base import Learner
from fastmaml.learners.selection import EngineChoice
from fastmaml.learners.settings import Adapted, Settings, adapted_names, check_choice
from fastmaml.losses import LossCallable, resolve_loss


class MAML(Learner):
    """Model-agnostic meta-learning with the exact second-order meta-gradient.

    Args:
        model: any differentiable module; stays the user's own, never patched.
        loss: ``mse``, ``cross_entropy``, ``policy_gradient``, or a callable
            (output [N, ...], target [N, ...]) -> scalar of one task.
        reduction: ``mean``, or for cross-entropy ``sum_over_ways`` (ways times it).
        inner_lr: first value of every inner rate.
        inner_steps: K.
        first_order: leave the Hessians out.
        loss_weights: [K+1], weight of the query loss after each step; ``None`` weighs
            the last alone.
        rates: one inner rate for all (``scalar``), ``per_tensor`` or
            ``per_parameter``.
        per_step_rates: give every inner step rates of its own; steps beyond K reuse
            the last.
        learn_rates: train the rates; ``parameters()`` then ends with them.
        adapted: names the inner loop changes, or a predicate; ``None`` means all.
        batch_norm: ``batch`` uses batch statistics in every mode and leaves running
            buffers alone.
        engine: ``auto`` takes the native engine where it can run the model, but on
            GPUs the functional one, as long as no GPU has run its kernels;
            ``native`` makes the reasons against it an error; ``functional``. For
            tests, ``cpu_lockstep`` and ``cuda_emulated`` run CPU tensors as a GPU
            would.
        precision: how a GPU multiplies float32: ``float32`` as accurately as a CPU,
            ``tf32`` or ``bfloat16`` with rounded factors, faster. The CPU has no
            other than ``float32``.
        memory: activations of the native engine: ``keep``, ``recompute`` or ``auto``.
        chunk_size: tasks in flight on the functional engine; ``None`` means all.
        vectorize: ``False`` runs tasks one by one on the functional engine, for
            forward passes that branch on values.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what expected.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | LossCallable = "mse",
        reduction: Literal["mean", "sum_over_ways"] = "mean",
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        loss_weights: Sequence[float] | None = None,
        rates: RateLayout = "scalar",
        per_step_rates: bool = False,
        learn_rates: bool = False,
        adapted: Adapted = None,
        batch_norm: Literal["batch"] | None = None,
        engine: Literal[
            "auto", "native", "functional", "cpu_lockstep", "cuda_emulated"
        ] = "auto",
        precision: Literal["float32", "tf32", "bfloat16"] = "float32",
        memory: Literal["auto", "keep", "recompute"] = "auto",
        chunk_size: int | None = None,
        vectorize: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module, got {type(model).__name__}"
            )
        check_choice("engine", engine)
        check_choice("precision", precision)
        check_choice("memory", memory)
        resolved = resolve_loss(loss, reduction)
        settings = Settings(
            loss=resolved.name,
            reduction=resolved.reduction,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            first_order=first_order,
            loss_weights=_tuple(loss_weights),
            rates=rates,
            per_step_rates=per_step_rates,
            learn_rates=learn_rates,
            adapted=adapted_names(adapted, model),
            batch_norm=batch_norm,
        )
        choice = EngineChoice(engine, memory, chunk_size, vectorize, precision)
        super().__init__(model, resolved, settings, choice)


class FOMAML(MAML):
    """First-order MAML: `MAML` with ``first_order=True``."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        if not options.setdefault("first_order", True):
            raise ValueError("first_order=False: that is MAML, use it instead")
        super().__init__(model, **options)


def _tuple(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if weights is None else tuple(float(w) for w in weights)
