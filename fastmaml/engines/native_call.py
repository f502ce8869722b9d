"""A meta-gradient prepared once: what a learner's next call shares with its last.

Programs, settings, rates and addresses depend on shapes, dtypes and the identity of
tensors alone, so they are worked out for the first tasks of a kind. Each further call
checks that nothing has moved, hands over the addresses of the samples, and leaves the
gradients where they belong. This is the inside of `NativeEngine`, in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.engines.base import Params, Rates
from fastmaml.engines.layout import check_steps, step_weights
from fastmaml.tasks.batch import TaskBatch

Key = tuple[Any, ...]

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

# of three ways to make a tensor the quickest
_EMPTY_LIKE = torch.empty_like


class Outcome(NamedTuple):
    """What a prepared call leaves besides gradients.

    Attributes:
        loss: [] the meta-loss.
        value: the same as a number; NaN if that would mean to wait for a GPU.
        accuracy: query accuracy after the last step, mean over tasks, or ``None``
            without classes; NaN likewise.
        tasks: T.
        metrics: [2, T, K+1] float64: query losses and accuracies after each step; NaN
            where w_k is zero. Its bytes, or a tensor on the GPU.
    """

    loss: Tensor
    value: float
    accuracy: float | None
    tasks: int
    metrics: bytearray | Tensor


def tasks_key(tasks: TaskBatch) -> Key:
    """What two batches must agree on to share a prepared call.

    All else follows from the checks that a batch has passed.
    """
    support_x, support_y, query_x = tasks.support_x, tasks.support_y, tasks.query_x
    return (
        support_x.shape,
        support_y.shape,
        query_x.shape,
        support_x.dtype,
        support_y.dtype,
        support_x.device,
    )


class PreparedCall:
    """The meta-gradient of a learner on tasks of one kind.

    Args:
        engine: the native engine, whose workspace and lock are used.
        params: shared by all tasks, name -> tensor; read where they are at each call.
        rates: likewise.
        tasks: of the kind, already admitted by the learner.
        steps: K.
        first_order: leave the Hessians out.
        loss_weights: [K+1] the w_k; ``None`` weighs the last step alone.
        rate_gradient: whether a gradient of the rates is wanted, as the last one.
    """

    def __init__(
        self,
        engine: Any,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        first_order: bool,
        loss_weights: Sequence[float] | None,
        rate_gradient: bool,
    ) -> None:
        check_steps(steps)
        own = engine._parameters
        self.engine = engine
        self._own = own
        self._params = dict(params)
        self._tensors = [params[n] for n in own.names]
        self._dtype = own.dtype(params)
        self._rates = rates
        self._rate_gradient = rate_gradient
        # where parameter i of the program is among the learner's
        position = {n: i for i, n in enumerate(params)}
        self._order = [position[n] for n in own.names]
        self._classes = engine._classes
        self._tasks = tasks.tasks
        self._images = tasks.support_x.dim() == 5
        self._weights = step_weights(loss_weights, steps)
        self._on_host = engine._place.on_host
        self._shape = (2, tasks.tasks, steps + 1)
        keep: list[Tensor] = []
        _, layout, rows, adapted = own.rates(rates, self._dtype, keep)
        program = engine._program_for(tasks.support_x)
        kind = {torch.float32: "PreparedFloat32", torch.float64: "PreparedFloat64"}
        self._call = getattr(engine._core, kind[self._dtype])(
            engine._place.of(program, adapted),
            program,
            tasks.tasks,
            steps,
            first_order,
            engine._memory,
            self._weights,
            tasks.support_size,
            tasks.query_size,
            layout,
            rows,
            adapted,
        )
        self._watch: Any = None
        self._gradients: Sequence[Tensor] = ()
        self._gradient_places: list[int] = []
        self._scalar = torch.empty((), dtype=self._dtype)
        # read in place: same dtype, same order, no gaps
        self._rates_in_place = own.reads_rates_in_place(rates, self._dtype)
        self._tensors.append(rates.values)
        self._slopes: Tensor | None = None

    def run(self, tasks: TaskBatch, gradients: Sequence[Tensor]) -> Outcome:
        """Writes the meta-gradient.

        Args:
            tasks: of the kind; any strides.
            gradients: as the learner's parameters, then the rates if those are
                learned: contiguous, of the parameters' shape and dtype. The sequence
                of the last call again means that its tensors have not moved.

        Raises:
            ValueError: if labels are out of range; nothing is written then. On a GPU
                the loss is NaN instead.
        """
        keep: list[Tensor] = []
        support_x, support_y = tasks.support_x, tasks.support_y
        query_x, query_y = tasks.query_x, tasks.query_y
        support_last = query_last = False
        if not _native.contiguous((support_x, support_y, query_x, query_y)):
            support_x, support_last = self._in_order(support_x, keep)
            query_x, query_last = self._in_order(query_x, keep)
            support_y, query_y = support_y.contiguous(), query_y.contiguous()
        if not self._on_host:
            samples = (support_x, support_y, query_x, query_y)
            return self._launch(samples, support_last, query_last, gradients, keep)
        loss = _EMPTY_LIKE(self._scalar)
        places = _native.addresses((support_x, support_y, query_x, query_y, loss))
        engine = self.engine
        with engine._lock:
            self._place(gradients, keep)
            value, score, metrics = engine._run_prepared(
                self._call, places, support_last, query_last
            )
            self._finish(gradients)
        scores = score if self._classes else None
        return Outcome(loss, value, scores, self._tasks, metrics)

    def _launch(
        self,
        samples: tuple[Tensor, ...],
        support_last: bool,
        query_last: bool,
        gradients: Sequence[Tensor],
        keep: list[Tensor],
    ) -> Outcome:
        """As `run`, without waiting for the results."""
        engine = self.engine
        metrics = torch.full(
            self._shape, torch.nan, dtype=torch.float64, device=engine._device
        )
        with engine._lock:
            self._place(gradients, keep)
            engine._launch_prepared(
                self._call,
                _native.addresses(samples),
                support_last,
                query_last,
                metrics,
            )
            self._finish(gradients)
        loss = weighted_loss(metrics[0], self._weights).to(self._dtype)
        scores = math.nan if self._classes else None
        return Outcome(loss, math.nan, scores, self._tasks, metrics)

    def _finish(self, gradients: Sequence[Tensor]) -> None:
        """The gradient of the rates in the model's order, where that is another."""
        if self._slopes is not None:
            slopes = self._own.rates_to_model(self._slopes, self._rates)
            gradients[-1].copy_(slopes)

    def _in_order(self, x: Tensor, keep: list[Tensor]) -> tuple[Tensor, bool]:
        """Inputs without gaps, and whether their channels are last."""
        if x.is_contiguous():
            return x, False
        if self._images and x.movedim(2, -1).is_contiguous():
            return x, True
        x = x.contiguous()
        keep.append(x)
        return x, False

    def _place(self, gradients: Sequence[Tensor], keep: list[Tensor]) -> None:
        """Hands over the addresses that differ from those of the last call."""
        own, rates, dtype = self._own, self._rates, self._dtype
        if self._watch is None or self._watch.changed():
            copies: list[Tensor] = []
            self._call.set_parameters(own.addresses(self._params, dtype, 1, copies)[0])
            self._call.set_rates(own.rates(rates, dtype, keep)[0])
            self._rates_in_place = own.reads_rates_in_place(rates, dtype)
            # copies are made anew at every call
            self._watch = None if copies else _native.watch(self._tensors)
            keep += copies
        elif not self._rates_in_place:
            self._call.set_rates(own.rates(rates, dtype, keep)[0])
        if gradients is not self._gradients:
            places = _native.addresses(gradients)
            self._gradients = gradients
            if places != self._gradient_places:
                self._place_gradients(places)

    def _place_gradients(self, places: list[int]) -> None:
        slopes = 0
        self._slopes = None
        if self._rate_gradient:
            slopes = places[-1]
            if not self._rates_in_place:
                count = self._rates.values.numel()
                self._slopes = self.engine._empty((count,), self._dtype)
                slopes = _native.own_address(self._slopes)
        self._call.set_gradients([places[i] for i in self._order], slopes)
        self._gradient_places = places


def weighted_loss(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """[] the mean over tasks of sum_k w_k times losses [T, K+1], where w_k != 0."""
    used = [k for k, w in enumerate(weights) if w != 0]
    if len(used) == 1:
        (k,) = used
        mean = losses[:, k].mean()
        return mean if weights[k] == 1 else mean * weights[k]
    # one kernel after the other instead of a tensor of weights: that would be a copy
    total = losses.new_zeros(())
    for k in used:
        total = total + losses[:, k].mean() * weights[k]
    return total


class GradientTargets:
    """Where a meta-gradient goes: the ``.grad`` of a learner's parameters.

    Args:
        inputs: the parameters, learned rates included.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)
        self._settled: list[Tensor] = []
        self._watches: tuple[Any, ...] = ()
        self._scratch: list[Tensor] | None = None

    def hooked(self) -> bool:
        """Whether somebody waits for autograd to arrive at a parameter."""
        for p in self._inputs:
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return True
        return False

    def settled(self) -> list[Tensor] | None:
        """Every ``.grad`` as it was at the last `settle`, if that is how it is now."""
        for watch in self._watches:
            if watch.changed():
                self._watches = ()
                return None
        return self._settled if self._watches else None

    def settle(self) -> None:
        """Notes the ``.grad`` of all inputs if the engine can write there."""
        kept = [p.grad for p in self._inputs]
        if all(
            g is not None and _plain(g, p) and _quiet(p)
            for g, p in zip(kept, self._inputs, strict=True)
        ):
            self._settled = kept  # type: ignore[assignment]
            self._watches = (
                _native.watch(self._settled),
                _native.watch(self._inputs, ("grad", *_HOOKS), layout=False),
            )

    def choose(self, accumulate: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        """Tensors to write the gradient into, and each ``.grad`` as it is now."""
        now = [p.grad for p in self._inputs]
        targets = []
        for i, (p, gradient) in enumerate(zip(self._inputs, now, strict=True)):
            if gradient is None:
                targets.append(fresh(p))
            elif accumulate or not _plain(gradient, p):
                targets.append(self._scratch_for(i))
            else:
                targets.append(gradient)
        return targets, now

    def deliver(
        self, targets: list[Tensor], before: list[Tensor | None], accumulate: bool
    ) -> None:
        """Puts what was written where it belongs."""
        inputs = self._inputs
        with torch.no_grad():
            for p, target, gradient in zip(inputs, targets, before, strict=True):
                if gradient is None:
                    p.grad = target
                elif gradient is not target and accumulate:
                    gradient.add_(target)
                elif gradient is not target:
                    gradient.copy_(target)

    def _scratch_for(self, i: int) -> Tensor:
        if self._scratch is None:
            self._scratch = [fresh(p) for p in self._inputs]
        return self._scratch[i]


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
