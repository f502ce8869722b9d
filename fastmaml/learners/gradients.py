"""The meta-gradient of a learner: to autograd, or straight into ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaml.engines.gradient_targets import GradientTargets, Targets, fresh
from fastmaml.engines.native_call import Outcome, tasks_key
from fastmaml.learners.checks import check_batch
from fastmaml.learners.details import MetaLossDetails
from fastmaml.tasks.batch import TaskBatch

if TYPE_CHECKING:
    from fastmaml.learners.base import Learner


class Gradients:
    """Computes meta-gradients for a learner as it was built last.

    Where the engine prepares calls (`NativeEngine.prepare`), tasks like some before
    take one call that writes where the gradient belongs; everywhere else, and for the
    first tasks of a kind, the learner admits the tasks.

    Args:
        learner: whose model, settings and engine are used.
        inputs: its trained parameters, then learned rates.
    """

    def __init__(self, learner: Learner, inputs: Sequence[Tensor]) -> None:
        self._learner = learner
        self._inputs = inputs
        self._targets = GradientTargets(inputs)
        self._calls: dict[Any, Any] = {}
        self._key: Any = None
        self._call: Any = None
        self._settings = learner.settings

    def of(self, tasks: TaskBatch) -> tuple[Tensor, list[Tensor]]:
        """The meta-loss and new tensors with the gradients of the inputs."""
        call = self._prepared(tasks)
        if call is None:
            return self._plainly(tasks)
        gradients = [fresh(p) for p in self._inputs]
        return self._run(call, tasks, Targets(gradients)), gradients

    def write(self, tasks: TaskBatch, accumulate: bool) -> Tensor:
        """Puts the gradients into ``.grad`` and returns the meta-loss."""
        targets = self._targets
        known = targets.settled(accumulate) or targets.unset()
        if known is not None:
            loss = self._again(tasks, known)
            if loss is None and (call := self._prepared(tasks)) is not None:
                loss = self._run(call, tasks, known)
            if loss is not None:
                if known.once:
                    targets.put(known)
                return loss
        if targets.hooked():
            return self._by_autograd(tasks, accumulate)
        call = self._prepared(tasks)
        if call is None:
            loss, gradients = self._plainly(tasks)
            targets.deliver(gradients, [p.grad for p in self._inputs], accumulate)
            return loss
        chosen, before = targets.choose(accumulate)
        loss = self._run(call, tasks, chosen)
        targets.deliver(chosen.written, before, accumulate)
        targets.settle()
        return loss

    def _again(self, tasks: TaskBatch, targets: Targets) -> Tensor | None:
        """The last call once more; ``None`` unless the tasks are of its kind."""
        learner, call = self._learner, self._call
        if (
            call is None
            or call.engine is not learner._engine
            or learner.settings is not self._settings
        ):
            return None
        try:
            found = call.again(tasks, targets)
        except AttributeError:
            check_batch(tasks)
            raise
        except ValueError:
            learner._admit_tasks(tasks)
            raise
        return None if found is None else self._noted(found)

    def _prepared(self, tasks: TaskBatch) -> Any:
        """The call for tasks of this kind; ``None`` if the engine prepares none."""
        learner = self._learner
        try:
            key = tasks_key(tasks)
        except AttributeError:
            check_batch(tasks)
            raise
        if learner.settings is not self._settings:
            self._settings, self._key, self._calls = learner.settings, None, {}
        if key == self._key and self._call.engine is learner._engine:
            return self._call
        call = self._calls.get(key)
        if call is not None and call.engine is learner._engine:
            self._key, self._call = key, call
            return call
        learner._admit_tasks(tasks)
        if learner._gradients is not self:  # another engine had to be built
            return learner._gradients._prepared(tasks)
        prepare = getattr(learner._engine, "prepare", None)
        if prepare is None:
            return None
        s = learner.settings
        call = prepare(
            learner._params,
            learner._rates,
            tasks,
            steps=s.inner_steps,
            first_order=s.first_order,
            loss_weights=s.loss_weights,
            rate_gradient=s.learn_rates,
        )
        self._calls[key] = self._call = call
        self._key = key
        return call

    def _run(self, call: Any, tasks: TaskBatch, targets: Targets) -> Tensor:
        learner = self._learner
        try:
            found = call.run(tasks, targets)
        except ValueError:
            learner._admit_tasks(tasks)  # which says it in the learner's words
            raise
        return self._noted(found)

    def _noted(self, found: Outcome) -> Tensor:
        learner = self._learner
        metrics = found.metrics
        there = None if isinstance(metrics, bytearray) else found.loss
        learner.last = MetaLossDetails.lazily(
            found.value, learner._dtype, found.accuracy, found.tasks, metrics, there
        )
        return found.loss

    def _plainly(self, tasks: TaskBatch) -> tuple[Tensor, list[Tensor]]:
        """By the engine's protocol alone."""
        learner = self._learner
        s = learner.settings
        found = learner._engine.meta_gradient(
            learner._params,
            learner._rates,
            tasks,
            steps=s.inner_steps,
            first_order=s.first_order,
            loss_weights=s.loss_weights,
            rate_gradient=s.learn_rates,
        )
        learner.last = MetaLossDetails(
            found.loss, found.query_loss, found.query_accuracy
        )
        gradients = [found.gradients[n] for n in learner._params]
        if found.rate_gradient is not None:
            gradients.append(found.rate_gradient)
        # a tensor of its own: autograd attaches the graph to what forward returns
        return found.loss.clone(), gradients

    def _by_autograd(self, tasks: TaskBatch, accumulate: bool) -> Tensor:
        if not accumulate:
            for p in self._inputs:
                p.grad = None
        with torch.enable_grad():
            loss = self._learner.meta_loss(tasks)
            loss.backward()
        return loss.detach()
