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
from fastmaml.engines.gradient_targets import Targets
from fastmaml.engines.layout import check_steps, step_weights
from fastmaml.tasks.batch import TaskBatch

Key = tuple[Any, ...]

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
        self._targets: Targets | None = None
        self._target_places: tuple[list[int], list[int]] = ([], [])
        self._sums_here = False
        self._scalar = torch.empty((), dtype=self._dtype)
        self._space: Tensor | None = None
        self._room = (0, 0)
        if self._on_host and (reader := _native.reader()) is not None:
            self._call.expect(reader, _samples(tasks))
        # of the gradients, which are the learner's
        self._counts = [p.numel() for p in params.values()]
        if rate_gradient:
            self._counts.append(rates.values.numel())
        # read in place: same dtype, same order, no gaps
        self._rates_in_place = own.reads_rates_in_place(rates, self._dtype)
        self._tensors.append(rates.values)
        self._slopes: Tensor | None = None

    def again(self, tasks: TaskBatch, targets: Targets) -> Outcome | None:
        """As `run`, if all but the values is as at the last call; else ``None``.

        Args:
            tasks: checked here; any kind.
            targets: as for `run`.

        Raises:
            ValueError: as `run` does.
        """
        engine = self.engine
        loss = _EMPTY_LIKE(self._scalar)
        with engine._lock:
            if not self._rates_in_place:
                return None
            self._place_targets(targets)
            space = engine._workspace
            if space is not self._space:
                self._room = _native.own_address(space), space.numel()
                self._space = space
            found = self._call.again(tasks, loss, *self._room)
            if found is None:
                return None
            engine._plan = self._call
        value, score, metrics = found
        scores = score if self._classes else None
        return Outcome(loss, value, scores, self._tasks, metrics)

    def run(self, tasks: TaskBatch, targets: Targets) -> Outcome:
        """Writes the meta-gradient.

        Args:
            tasks: of the kind; any strides.
            targets: as the learner's parameters, then the rates if those are learned.
                The object of the last call again means that its tensors have not moved.

        Raises:
            ValueError: if labels are out of range; nothing is written then. On a GPU
                the loss is NaN instead.
        """
        keep: list[Tensor] = []
        support_x, support_y, query_x, query_y = _samples(tasks)
        support_last = query_last = False
        if not _native.contiguous((support_x, support_y, query_x, query_y)):
            support_x, support_last = self._in_order(support_x, keep)
            query_x, query_last = self._in_order(query_x, keep)
            support_y, query_y = support_y.contiguous(), query_y.contiguous()
        if not self._on_host:
            samples = (support_x, support_y, query_x, query_y)
            return self._launch(samples, support_last, query_last, targets, keep)
        loss = _EMPTY_LIKE(self._scalar)
        places = _native.addresses((support_x, support_y, query_x, query_y, loss))
        engine = self.engine
        with engine._lock:
            self._place(targets, keep)
            value, score, metrics = engine._run_prepared(
                self._call, places, support_last, query_last
            )
            self._finish(targets)
        scores = score if self._classes else None
        return Outcome(loss, value, scores, self._tasks, metrics)

    def _launch(
        self,
        samples: tuple[Tensor, ...],
        support_last: bool,
        query_last: bool,
        targets: Targets,
        keep: list[Tensor],
    ) -> Outcome:
        """As `run`, without waiting for the results."""
        engine = self.engine
        # by ours: each kernel of torch between them would have to be launched, too
        metrics = engine._empty(self._shape, torch.float64)
        loss = engine._empty((), self._dtype)
        with engine._lock:
            self._place(targets, keep)
            engine._launch_prepared(
                self._call,
                _native.addresses((*samples, loss)),
                support_last,
                query_last,
                metrics,
            )
            self._finish(targets)
        scores = math.nan if self._classes else None
        return Outcome(loss, math.nan, scores, self._tasks, metrics)

    def _finish(self, targets: Targets) -> None:
        """What the extension leaves to do.

        The gradient of the rates in the model's order, where that is another, and sums.
        """
        if self._slopes is not None:
            slopes = self._own.rates_to_model(self._slopes, self._rates)
            targets.written[-1].copy_(slopes)
        if targets.sums and not self._sums_here:
            with torch.no_grad():
                torch._foreach_add_(list(targets.sums), list(targets.written))

    def _in_order(self, x: Tensor, keep: list[Tensor]) -> tuple[Tensor, bool]:
        """Inputs without gaps, and whether their channels are last."""
        if x.is_contiguous():
            return x, False
        if self._images and x.movedim(2, -1).is_contiguous():
            return x, True
        x = x.contiguous()
        keep.append(x)
        return x, False

    def _place(self, targets: Targets, keep: list[Tensor]) -> None:
        """Hands over the addresses that differ from those of the last call."""
        own, rates, dtype = self._own, self._rates, self._dtype
        if self._watch is None or self._watch.changed():
            copies: list[Tensor] = []
            places = own.addresses(self._params, dtype, 1, copies)[0]
            # copies are made anew at every call
            self._watch = None if copies else _native.watch(self._tensors)
            self._call.set_parameters(places, self._watch)
            self._call.set_rates(own.rates(rates, dtype, keep)[0])
            in_place = own.reads_rates_in_place(rates, dtype)
            if in_place != self._rates_in_place:
                self._rates_in_place = in_place
                self._targets, self._target_places = None, ([], [])
            keep += copies
        elif not self._rates_in_place:
            self._call.set_rates(own.rates(rates, dtype, keep)[0])
        self._place_targets(targets)

    def _place_targets(self, targets: Targets) -> None:
        if targets is self._targets:
            return
        places = _native.addresses(targets.written)
        sums = _native.addresses(targets.sums)
        self._targets = None if targets.once else targets
        if (places, sums) != self._target_places:
            self._set_gradients(places, sums)

    def _set_gradients(self, places: list[int], sums: list[int]) -> None:
        slopes = 0
        self._slopes = None
        if self._rate_gradient:
            slopes = places[-1]
            if not self._rates_in_place:
                count = self._rates.values.numel()
                self._slopes = self.engine._empty((count,), self._dtype)
                slopes = _native.own_address(self._slopes)
        self._sums_here = self._on_host and self._slopes is None
        added = zip(places, sums, self._counts, strict=True) if sums else ()
        self._call.set_gradients(
            [places[i] for i in self._order],
            slopes,
            [*added] if self._sums_here else [],
        )
        self._target_places = places, sums


def _samples(tasks: TaskBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y


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
