"""What every learner shares: engine, parameters, meta-loss, evaluation, state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.compile import EngineReport, infer_shapes
from fastmaml.engines.base import Params, Rates
from fastmaml.engines.modes import with_batch_statistics, with_unit_scales
from fastmaml.learners.checks import (
    check_batch,
    check_classes,
    check_placement,
    check_targets,
    output_shape,
)
from fastmaml.learners.clone import TaskModel
from fastmaml.learners.details import MetaLossDetails
from fastmaml.learners.evaluation import Evaluation
from fastmaml.learners.gradients import Gradients
from fastmaml.learners.meta_loss import MetaLoss
from fastmaml.learners.selection import EngineChoice, select_engine
from fastmaml.learners.settings import Settings, steps_or
from fastmaml.learners.watch import ModelWatch
from fastmaml.losses import Loss
from fastmaml.tasks.batch import TaskBatch

__all__ = ["Evaluation", "Learner", "MetaLossDetails"]


class Learner:
    """A model, its inner loop and the engine that runs both.

    The parameters are the model's own: any torch optimizer trains them, and the model
    is never patched. Replacing parameters, `.to(...)`, `.train()` and `.eval()` are
    noticed at the next call, which then builds the engine anew.

    Attributes:
        model: the user's.
        settings: what the meta-gradient depends on.
        last: details of the latest meta-loss, ``None`` before the first.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, settings: Settings, choice: EngineChoice
    ) -> None:
        self.model = model
        self.settings = settings
        self.last: MetaLossDetails | None = None
        self._loss = loss
        self._choice = choice
        self._rate_values: Tensor | None = None
        self._build()

    # -- what it is ---------------------------------------------------------------

    @property
    def report(self) -> EngineReport:
        """Which engine and device run it, and why."""
        self._refresh()
        return self._report

    @property
    def rates(self) -> Tensor:
        """The inner rates in the layout of the settings; trained if learned."""
        assert self._rate_values is not None
        return self._rate_values

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters by name, then learned rates as ``inner_lr``."""
        yield from self.model.named_parameters()
        if isinstance(self._rate_values, nn.Parameter):
            yield "inner_lr", self._rate_values

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer trains: the model's own parameters, then learned rates."""
        return (p for _, p in self.named_parameters())

    # -- what it does -------------------------------------------------------------

    def meta_loss(self, tasks: TaskBatch) -> Tensor:
        """Query loss after the inner loop, averaged over tasks; ``backward()`` works.

        The meta-gradient is computed here and kept; ``backward`` only scales it.
        Under ``torch.no_grad()`` no gradient is computed.

        Args:
            tasks: of the model's dtype and device.

        Returns:
            [] the mean over tasks of sum_k w_k L_query(theta_k).

        Raises:
            ValueError: if the tasks don't fit the model or the loss.
        """
        self._refresh()
        if not torch.is_grad_enabled():
            self._admit_tasks(tasks)
            return self._loss_alone(tasks)
        return MetaLoss.apply(lambda: self._gradients.of(tasks), *self._inputs)

    def backward(self, tasks: TaskBatch, *, accumulate: bool = True) -> Tensor:
        """As ``meta_loss(tasks).backward()``, without autograd: the faster way.

        Args:
            tasks: of the model's dtype and device.
            accumulate: add to the ``.grad`` there is, as autograd does; ``False``
                overwrites it, which saves ``zero_grad``.

        Returns:
            [] the meta-loss, without a graph.

        Raises:
            ValueError: if the tasks don't fit the model or the loss.
        """
        self._refresh()
        return self._gradients.write(tasks, accumulate)

    def adapt(
        self, support_x: Tensor, support_y: Tensor, steps: int | None = None
    ) -> dict[str, Tensor]:
        """Runs the inner loop.

        Args:
            support_x: [T, S, ...].
            support_y: [T, S] classes or [T, S, O] targets.
            steps: K unless told.

        Returns:
            Parameters of every task, name -> [T, ...]; copies, without a graph.
        """
        self._refresh()
        self._admit("support", support_x, support_y)
        count = steps_or(steps, self.settings.inner_steps)
        return self._engine.adapt(
            self._params, self._rates, support_x, support_y, steps=count
        )

    def predict(self, adapted: Params, x: Tensor) -> Tensor:
        """Outputs of adapted parameters.

        Args:
            adapted: as `adapt` returns them.
            x: [T, N, ...].

        Returns:
            [T, N, ...], without a graph.
        """
        self._refresh()
        if missing := [n for n in self._params if n not in adapted]:
            raise ValueError(f"adapted: lacks {missing}; pass what adapt() returned")
        tasks = len(next(iter(adapted.values())))
        if tasks != len(x):
            raise ValueError(f"x: got {len(x)} tasks, adapted has {tasks}")
        check_placement("predicted", x, x, self._dtype, self._device)
        self._check_native_shape(tuple(x.shape[2:]))
        return self._engine.forward(adapted, x)

    def evaluate(
        self, tasks: TaskBatch, steps: int | None = None, inductive: bool = False
    ) -> Evaluation:
        """Query loss and accuracy after 0..K inner steps.

        Args:
            tasks: T tasks.
            steps: K unless told.
            inductive: pass one query at a time, beside the support samples, so that
                batch statistics never mix queries.
        """
        self._refresh()
        self._admit_tasks(tasks)
        metrics = self._engine.evaluate(
            self._params,
            self._rates,
            tasks,
            steps=steps_or(steps, self.settings.inner_steps),
            inductive=inductive,
        )
        return Evaluation.of(metrics, tasks.query_size, not inductive)

    def clone(self) -> TaskModel:
        """One task's copy, for loops that adapt one task at a time.

        ``task = learner.clone(); task.adapt(loss(task(xs), ys));
        loss(task(xq), yq).backward()`` accumulates gradients in the model's own
        parameters.
        """
        self._refresh()
        return TaskModel(
            self._autograd_model, self._params, self._rates, self.settings.first_order
        )

    # -- state --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The model's state, the rates, and the settings they belong to."""
        return {
            "model": self.model.state_dict(),
            "rates": self.rates.detach().clone(),
            "settings": self.settings.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: of a learner with the same settings.
            strict: ``False`` accepts other settings, such as first order.

        Raises:
            ValueError: if settings or shapes differ, or an entry is missing.
        """
        if missing := {"model", "rates", "settings"} - set(state):
            raise ValueError(f"state: lacks {sorted(missing)}; pass a state_dict()")
        if strict:
            _check_same(state["settings"], self.settings.to_dict())
        if state["rates"].shape != self.rates.shape:
            raise ValueError(
                f"state: rates have shape {list(state['rates'].shape)}, this learner's "
                f"{list(self.rates.shape)}"
            )
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.rates.copy_(state["rates"])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; its engine is built anew."""
        kept = ("model", "settings", "_loss", "_choice", "_rate_values")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.last = None
        self._build()

    # -- engine -------------------------------------------------------------------

    def _build(self, against: str | None = None) -> None:
        """Engine, names and tensors for the model as it is now."""
        batch = self.settings.batch_norm == "batch"
        self._skeleton = with_batch_statistics(self.model) if batch else self.model
        self._autograd_model = with_unit_scales(self._skeleton)
        self._engine, self._report = select_engine(
            self._skeleton, self._loss, self._choice, against
        )
        self._params: dict[str, Tensor] = {
            n: p for n, p in self.model.named_parameters() if p.requires_grad
        }
        first = next(iter(self._params.values()))
        self._dtype, self._device = first.dtype, first.device
        self._rates = self._make_rates()
        learned = [self.rates] if self.settings.learn_rates else []
        self._inputs = [*self._params.values(), *learned]
        self._outputs: dict[Any, tuple[int, ...]] = {}
        self._gradients = Gradients(self, self._inputs)
        self._watch = ModelWatch(self.model)

    def _refresh(self) -> None:
        if self._watch.changed():
            self._build()

    def _make_rates(self) -> Rates:
        s = self.settings
        if self._rate_values is None:
            values = torch.full(self._rate_shape(), s.inner_lr, dtype=torch.float64)
            self._rate_values = nn.Parameter(values) if s.learn_rates else values
        # in place, so that an optimizer keeps its parameter
        self._rate_values.data = self._rate_values.data.to(self._device, self._dtype)
        adapted = None if s.adapted is None else frozenset(s.adapted)
        return Rates(self._rate_values, s.rates, s.per_step_rates, adapted)

    def _rate_shape(self) -> tuple[int, ...]:
        sizes = {
            "scalar": (),
            "per_tensor": (len(self._params),),
            "per_parameter": (sum(p.numel() for p in self._params.values()),),
        }
        steps = (self.settings.inner_steps,) if self.settings.per_step_rates else ()
        return (*steps, *sizes[self.settings.rates])

    def _loss_alone(self, tasks: TaskBatch) -> Tensor:
        """The meta-loss without its gradient: an evaluation."""
        s = self.settings
        found = self._engine.evaluate(
            self._params, self._rates, tasks, steps=s.inner_steps
        )
        weights = s.loss_weights or (*[0.0] * s.inner_steps, 1.0)
        w = torch.tensor(weights, dtype=found.loss.dtype, device=found.loss.device)
        loss = torch.where(w != 0, found.loss * w, 0).sum(1).mean()
        kept = torch.where(w != 0, found.loss, torch.nan)
        scores = found.accuracy
        if scores is not None:
            scores = torch.where(w != 0, scores, torch.nan)
        self.last = MetaLossDetails(loss, kept, scores)
        return loss

    # -- the door -----------------------------------------------------------------

    def _admit_tasks(self, tasks: TaskBatch) -> None:
        check_batch(tasks)
        self._admit("support", tasks.support_x, tasks.support_y)
        self._admit("query", tasks.query_x, tasks.query_y)

    def _admit(self, what: str, x: Tensor, y: Tensor) -> None:
        """Checks samples; what depends on their shapes alone, once per shape."""
        key = (x.shape[2:], x.dtype, x.device, y.shape[2:], y.dtype, y.device, what)
        output = self._outputs.get(key)
        if output is None:
            output = self._first_sight(what, x, y)
            self._outputs[key] = output
        if self._loss.name == "cross_entropy" and self._loss.native and not y.is_cuda:
            check_classes(what, y, output[-1])

    def _first_sight(self, what: str, x: Tensor, y: Tensor) -> tuple[int, ...]:
        check_placement(what, x, y, self._dtype, self._device)
        output = output_shape(what, self._skeleton, x[0])
        check_targets(what, self._loss, output, y[0])
        self._check_native_shape(tuple(x.shape[2:]))
        return output

    def _check_native_shape(self, sample: tuple[int, ...]) -> None:
        """Leaves the native engine if samples of this shape don't fit its layers."""
        compiled = self._report.compiled
        if self._report.engine != "native" or compiled is None:
            return
        assert compiled.program is not None
        try:
            infer_shapes(compiled.program, sample)
        except ValueError as error:
            self._build(against=f"for samples of shape {list(sample)}: {error}")


def _check_same(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if name not in saved or saved[name] != value:
            raise ValueError(
                f"state: was saved with {name}={saved.get(name)!r}, this learner has "
                f"{name}={value!r}; build it alike, or pass strict=False"
            )
