"""What a learner asks of an engine.

An engine owns the arithmetic: inner loops of a batch of tasks and the meta-gradient
through them. Learners know this protocol alone, so every learner runs on every
engine. Tensors are tasks-first; letters are those of the naming card: T tasks,
S support samples, Q query samples, K inner steps, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from fastmaml.tasks.batch import TaskBatch

Params = Mapping[str, Tensor]
RateLayout = Literal["scalar", "per_tensor", "per_parameter"]


@dataclass(frozen=True)
class Rates:
    """Inner learning rates a_k in one of three layouts, each optionally per step.

    Attributes:
        values: ``scalar``: []; ``per_tensor``: [tensors], in the order of the
            model's parameters; ``per_parameter``: [P], the parameters flattened and
            concatenated in that order. With ``per_step`` a leading axis [K, ...].
        layout: which of the three.
        per_step: whether ``values`` has the leading step axis.
        adapted: names of the parameters the inner loop changes; the rate of all
            others is zero. ``None`` means all.
    """

    values: Tensor
    layout: RateLayout = "scalar"
    per_step: bool = False
    adapted: frozenset[str] | None = None

    def at(self, step: int) -> Tensor:
        """Returns the rates of one step; steps beyond the last reuse the last."""
        if not self.per_step:
            return self.values
        return self.values[min(step, self.values.shape[0] - 1)]


@dataclass(frozen=True)
class MetaGradient:
    """Loss and gradients of one meta-batch, averaged over its tasks.

    Attributes:
        loss: [] sum over k of w_k times the query loss after step k.
        gradients: name -> tensor shaped as the parameter.
        rate_gradient: shaped as ``Rates.values``; ``None`` unless asked for.
        query_loss: [T, K+1] query loss after each step; NaN where w_k is zero.
        query_accuracy: [T, K+1] likewise, classification only, else ``None``.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    rate_gradient: Tensor | None = None
    query_loss: Tensor | None = None
    query_accuracy: Tensor | None = None


@dataclass(frozen=True)
class StepMetrics:
    """Query metrics after 0..K inner steps.

    Attributes:
        loss: [T, K+1].
        accuracy: [T, K+1] in [0, 1], or ``None`` for losses without classes.
    """

    loss: Tensor
    accuracy: Tensor | None = field(default=None)


class Curvature(Protocol):
    """Products with many vectors at one point."""

    def hvp(self, vector: Params) -> dict[str, Tensor]:
        """See :meth:`Engine.hvp`."""
        ...

    def gauss_newton_product(self, vector: Params) -> dict[str, Tensor]:
        """See :meth:`Engine.gauss_newton_product`."""
        ...


@dataclass(frozen=True)
class PlainCurvature:
    """The `Curvature` of an engine that keeps nothing between products.

    Attributes:
        engine: whose products these are.
        params: where.
        x: inputs.
        y: targets.
    """

    engine: Engine
    params: Params
    x: Tensor
    y: Tensor

    def hvp(self, vector: Params) -> dict[str, Tensor]:
        """See :meth:`Engine.hvp`."""
        return self.engine.hvp(self.params, self.x, self.y, vector)

    def gauss_newton_product(self, vector: Params) -> dict[str, Tensor]:
        """See :meth:`Engine.gauss_newton_product`."""
        return self.engine.gauss_newton_product(self.params, self.x, self.y, vector)


class Engine(Protocol):
    """The arithmetic behind a learner.

    ``params`` maps names to tensors, either shared by all tasks ([...], shaped as in
    the model) or per task ([T, ...]); one call does not mix the two. Gradients and
    products come back per task.
    """

    name: str

    def meta_gradient(
        self,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        first_order: bool = False,
        loss_weights: Sequence[float] | None = None,
        rate_gradient: bool = False,
    ) -> MetaGradient:
        """Meta-gradient of the query loss through ``steps`` inner steps.

        ``loss_weights`` [K+1] are the w_k; ``None`` weighs the last step alone.
        """
        ...

    def adapt(
        self,
        params: Params,
        rates: Rates,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
    ) -> dict[str, Tensor]:
        """Parameters after ``steps`` inner steps, name -> [T, ...]."""
        ...

    def evaluate(
        self,
        params: Params,
        rates: Rates,
        tasks: TaskBatch,
        *,
        steps: int,
        inductive: bool = False,
    ) -> StepMetrics:
        """Query loss and accuracy after 0..``steps`` inner steps.

        Transductive (default): the query samples of a task pass together. Inductive:
        one query sample at a time, beside the support samples, so that batch
        statistics never mix queries.
        """
        ...

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Outputs [T, N, ...] of inputs x [T, N, ...]."""
        ...

    def value_and_grad(
        self, params: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [T] and its gradients, name -> [T, ...]."""
        ...

    def hvp(
        self, params: Params, x: Tensor, y: Tensor, vector: Params
    ) -> dict[str, Tensor]:
        """Hessian of the loss times ``vector`` (name -> [T, ...] or shared)."""
        ...

    def gauss_newton_product(
        self, params: Params, x: Tensor, y: Tensor, vector: Params
    ) -> dict[str, Tensor]:
        """J' H_loss J times ``vector``, J the Jacobian of the outputs."""
        ...

    def curvature(
        self, params: Params, x: Tensor, y: Tensor, *, many: bool = False
    ) -> Curvature:
        """The products above with many vectors, none of the three changing between.

        What they share may stay in memory from the second product on, or, where
        ``many`` says that there will be more than one, from the first.
        """
        ...
