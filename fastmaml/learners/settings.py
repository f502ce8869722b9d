"""Options of a learner, checked when it is built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastmaml.engines.base import RateLayout

Adapted = Collection[str] | Callable[[str], bool] | None
# the native engine on backends that serve tests
TEST_ENGINES = ("cpu_lockstep", "cuda_emulated")
_CHOICES = {
    "rates": ("scalar", "per_tensor", "per_parameter"),
    "batch_norm": (None, "batch"),
    "engine": ("auto", "native", "functional", *TEST_ENGINES),
    "precision": ("float32", "tf32", "bfloat16"),
    "memory": ("auto", "keep", "recompute"),
}


@dataclass(frozen=True)
class Settings:
    """What the meta-gradient depends on; saved with a learner's state.

    Attributes:
        loss: name of the loss.
        reduction: of the loss.
        inner_lr: first value of every rate.
        inner_steps: K.
        first_order: whether Hessians are left out.
        loss_weights: w_k, [K+1], or ``None`` for the last step alone.
        rates: layout of the rates.
        per_step_rates: whether every step has rates of its own.
        learn_rates: whether the rates are trained.
        adapted: names the inner loop changes, sorted, or ``None`` for all.
        batch_norm: ``batch`` for batch statistics in every mode.
    """

    loss: str
    reduction: str
    inner_lr: float
    inner_steps: int
    first_order: bool
    loss_weights: tuple[float, ...] | None
    rates: RateLayout
    per_step_rates: bool
    learn_rates: bool
    adapted: tuple[str, ...] | None
    batch_norm: str | None

    def __post_init__(self) -> None:
        """Checks values that don't depend on the model."""
        check_choice("rates", self.rates)
        check_choice("batch_norm", self.batch_norm)
        _check_rate(self.inner_lr)
        _check_steps("inner_steps", self.inner_steps)
        _check_weights(self.loss_weights, self.inner_steps)
        if self.per_step_rates and self.inner_steps == 0:
            raise ValueError("per_step_rates=True needs inner_steps of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        plain = asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}


def check_choice(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is one of the option's choices."""
    if value not in _CHOICES[name]:
        expected = ", ".join(repr(c) for c in _CHOICES[name])
        raise ValueError(f"{name}={value!r}: expected one of {expected}")


def steps_or(steps: int | None, default: int) -> int:
    """The number of inner steps asked for, or the learner's own."""
    if steps is None:
        return default
    _check_steps("steps", steps)
    return steps


def adapted_names(adapted: Adapted, model: nn.Module) -> tuple[str, ...] | None:
    """Names the inner loop changes, sorted; ``None`` if that is all of them.

    Raises:
        TypeError: if ``adapted`` is neither a collection of names nor a predicate.
        ValueError: for unknown or frozen names, and if nothing is left to adapt.
    """
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: has no trainable parameters (requires_grad=True)")
    if adapted is None:
        return None
    if callable(adapted):
        chosen = {n for n in trainable if adapted(n)}
    elif isinstance(adapted, str) or not isinstance(adapted, Collection):
        raise TypeError(
            "adapted: expected a collection of parameter names or a predicate "
            f"(name) -> bool, got {adapted!r}"
        )
    else:
        chosen = set(adapted)
        _check_known(chosen, trainable, model)
    if not chosen:
        raise ValueError(
            "adapted: names no parameter, so the inner loop would change nothing; "
            f"expected some of {_listed(trainable)}"
        )
    return None if chosen == set(trainable) else tuple(sorted(chosen))


def _check_known(chosen: set[str], trainable: list[str], model: nn.Module) -> None:
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    if stuck := sorted(chosen & frozen):
        raise ValueError(
            f"adapted: {_listed(stuck)} frozen; set requires_grad=True or leave it out"
        )
    for name in sorted(chosen - set(trainable)):
        near = difflib.get_close_matches(name, trainable, n=3, cutoff=0.4)
        hint = f"did you mean {_listed(near)}?" if near else "expected some of "
        raise ValueError(
            f"adapted: the model has no parameter {name!r}; "
            + (hint if near else hint + _listed(trainable))
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_rate(rate: Any) -> None:
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not number:
        raise TypeError(f"inner_lr: expected a number, got {type(rate).__name__}")
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"inner_lr={rate}: expected a positive, finite number")


def _check_steps(name: str, steps: Any) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"{name}: expected an integer, got {steps!r}")
    if steps < 0:
        raise ValueError(f"{name}={steps}: expected 0 or more")


def _check_weights(weights: tuple[float, ...] | None, steps: int) -> None:
    if weights is None:
        return
    if len(weights) != steps + 1:
        raise ValueError(
            f"loss_weights: got {len(weights)} weights, expected {steps + 1}: one "
            f"before the first step and one after each of the {steps} steps"
        )
    if not all(math.isfinite(w) for w in weights) or not any(weights):
        raise ValueError(
            f"loss_weights={list(weights)}: expected finite numbers, not all zero"
        )
