"""Where a prepared call leaves a meta-gradient: in the ``.grad`` of parameters.

Whether the engine can write there is worked out once and then watched, so that a
further call only asks whether anything has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Targets:
    """Tensors for one gradient each. The same object stands for the same memory.

    Args:
        written: take the gradient: contiguous, of the parameters' shape and dtype.
        sums: what the written ones are added to; empty if they are all that is wanted.
        once: not for another call, which need not keep the tensors alive until then.
    """

    __slots__ = ("once", "sums", "written")

    def __init__(
        self,
        written: Sequence[Tensor],
        sums: Sequence[Tensor] = (),
        *,
        once: bool = False,
    ) -> None:
        self.written, self.sums, self.once = written, sums, once


class GradientTargets:
    """Where a meta-gradient goes: the ``.grad`` of a learner's parameters.

    Args:
        inputs: the parameters, learned rates included.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)
        # overwriting and adding
        self._settled: tuple[Targets, Targets] | None = None
        self._changed: Any = None
        self._set_or_hooked: Any = None
        self._left: list[int] = []
        self._scratch: list[Tensor] | None = None

    def hooked(self) -> bool:
        """Whether somebody waits for autograd to arrive at a parameter."""
        for p in self._inputs:
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return True
        return False

    def settled(self, accumulate: bool) -> Targets | None:
        """Every ``.grad`` as it was at the last `settle`, if that is how it is now."""
        settled = self._settled
        if settled is None:
            return None
        if self._changed():
            self._settled = None
            return None
        return settled[accumulate]

    def settle(self) -> None:
        """Notes the ``.grad`` of all inputs if they stay and can be written to.

        Loops that set them to ``None`` have others at each call; see `unset`.
        """
        kept = [p.grad for p in self._inputs]
        before, self._left = self._left, [*map(id, kept)]
        if before != self._left:
            return
        gradients = [
            g
            for g, p in zip(kept, self._inputs, strict=True)
            if g is not None and _plain(g, p) and _quiet(p)
        ]
        if len(gradients) == len(kept):
            scratch = [self._scratch_for(i) for i in range(len(kept))]
            self._settled = Targets(gradients), Targets(scratch, gradients)
            self._changed = _native.watch(gradients, self._looks()).changed

    def unset(self) -> Targets | None:
        """New tensors, if no input has a ``.grad`` and none ever had a hook.

        Only after `choose` has seen it so; `put` makes them the gradients.
        """
        if self._set_or_hooked is None or self._set_or_hooked():
            return None
        return Targets([*map(torch.empty_like, self._all_scratch())], once=True)

    def put(self, targets: Targets) -> None:
        """Makes the tensors of `unset` the gradients."""
        for p, gradient in zip(self._inputs, targets.written, strict=True):
            p.grad = gradient

    def choose(self, accumulate: bool) -> tuple[Targets, list[Tensor | None]]:
        """Tensors to write the gradient into, and each ``.grad`` as it is now."""
        now = [p.grad for p in self._inputs]
        if self._set_or_hooked is None and not any(g is not None for g in now):
            self._note_unset()
        targets = []
        for i, (p, gradient) in enumerate(zip(self._inputs, now, strict=True)):
            if gradient is None:
                targets.append(fresh(p))
            elif accumulate or not _plain(gradient, p):
                targets.append(self._scratch_for(i))
            else:
                targets.append(gradient)
        return Targets(targets), now

    def deliver(
        self, written: Sequence[Tensor], before: list[Tensor | None], accumulate: bool
    ) -> None:
        """Puts what was written where it belongs."""
        inputs = self._inputs
        with torch.no_grad():
            for p, target, gradient in zip(inputs, written, before, strict=True):
                if gradient is None:
                    p.grad = target
                elif gradient is not target and accumulate:
                    gradient.add_(target)
                elif gradient is not target:
                    gradient.copy_(target)

    def _note_unset(self) -> None:
        if all(_quiet(p) for p in self._inputs):
            watch = _native.core().ObjectWatch(self._looks(), [], [])
            self._set_or_hooked = watch.changed

    def _looks(self) -> list[tuple[Tensor, str]]:
        return [(p, name) for name in ("grad", *_HOOKS) for p in self._inputs]

    def _all_scratch(self) -> list[Tensor]:
        if self._scratch is None:
            self._scratch = [fresh(p) for p in self._inputs]
        return self._scratch

    def _scratch_for(self, i: int) -> Tensor:
        return self._all_scratch()[i]


def fresh(p: Tensor) -> Tensor:
    """A new tensor, contiguous, as the parameter."""
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _quiet(p: Tensor) -> bool:
    """Whether no hook was ever on a parameter: lists of hooks would change unseen."""
    return all(getattr(p, name) is None for name in _HOOKS)


def _plain(gradient: Tensor, p: Tensor) -> bool:
    """Whether the engine can write here."""
    return (
        gradient.layout == torch.strided
        and gradient.device == p.device
        and gradient.dtype == p.dtype
        and gradient.shape == p.shape
        and gradient.is_contiguous()
    )
