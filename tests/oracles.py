"""Reference answers: plain autograd, one task at a time, in the dtype of the model.

The meta-gradient differentiates the *unrolled* inner loop with ``create_graph``, so it
shares nothing with the chain of Hessian-vector products it judges: no vmap, no chain,
its own reading of the rate layouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from fastmaml.engines.base import Rates
from fastmaml.tasks.batch import TaskBatch

LossFn = Callable[[Tensor, Tensor], Tensor]
Named = dict[str, Tensor]


@dataclass
class Answer:
    """Means over tasks: loss [], gradients by name, rate gradient as the rates."""

    loss: Tensor
    gradients: Named
    rate_gradient: Tensor


def parameters(model: nn.Module) -> Named:
    """The trainable parameters, detached."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


class PlainNorm(nn.Module):
    """Batch or layer norm written out, under the parameter names of the original.

    torch's fused kernels can't be differentiated twice with a shift and no scale, and
    share their formulas with the engine under test; these don't.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.layer = isinstance(norm, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        across = range(1, x.ndim) if self.layer else (0, *range(2, x.ndim))
        centred = x - x.mean(tuple(across), keepdim=True)
        spread = centred.square().mean(tuple(across), keepdim=True)
        y = centred / (spread + self.eps).sqrt()
        shape = x.shape[1:] if self.layer else (-1, *[1] * (x.ndim - 2))
        if self.weight is not None:
            y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def reference(model: nn.Module) -> nn.Module:
    """A copy of the model with its norms on batch statistics written out."""
    copied = copy.deepcopy(model)
    for path, module in list(copied.named_modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            copied.set_submodule(path, PlainNorm(module))
    return copied


def loss_of(
    model: nn.Module, loss_fn: LossFn, params: Named, x: Tensor, y: Tensor
) -> Tensor:
    """Loss of one task."""
    return loss_fn(functional_call(model, params, (x,)), y)


def rate_of(rates: Rates, values: Tensor, params: Named, name: str, k: int) -> Tensor:
    """The rate of one parameter at step k, read straight off the layout."""
    row = values[min(k, values.shape[0] - 1)] if rates.per_step else values
    if rates.adapted is not None and name not in rates.adapted:
        return row.new_zeros(())
    if rates.layout == "scalar":
        return row
    if rates.layout == "per_tensor":
        return row[list(params).index(name)]
    blocks = torch.split(row, [p.numel() for p in params.values()])
    return blocks[list(params).index(name)].view_as(params[name])


def unrolled(
    model: nn.Module,
    loss_fn: LossFn,
    params: Named,
    rates: Rates,
    values: Tensor,
    x: Tensor,
    y: Tensor,
    steps: int,
    first_order: bool = False,
) -> list[Named]:
    """Parameters of one task after 0..steps inner steps, with their graph."""
    thetas = [params]
    for k in range(steps):
        theta = thetas[-1]
        loss = loss_of(model, loss_fn, theta, x, y)
        gradients = torch.autograd.grad(
            loss, list(theta.values()), create_graph=True, allow_unused=True
        )
        after = {}
        for (name, p), g in zip(theta.items(), gradients, strict=True):
            g = torch.zeros_like(p) if g is None else g
            g = g.detach() if first_order else g
            after[name] = p - rate_of(rates, values, params, name, k) * g
        thetas.append(after)
    return thetas


def meta_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    params: Named,
    rates: Rates,
    tasks: TaskBatch,
    steps: int,
    *,
    first_order: bool = False,
    loss_weights: Sequence[float] | None = None,
) -> Answer:
    """Differentiates the mean over tasks of sum_k w_k L_query(theta_k)."""
    model = reference(model)
    weights = loss_weights or [0.0] * steps + [1.0]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    values = rates.values.detach().clone().requires_grad_()
    total = values.new_zeros(())
    for t in range(len(tasks)):
        sx, sy = tasks.support_x[t], tasks.support_y[t]
        thetas = unrolled(
            model, loss_fn, leaves, rates, values, sx, sy, steps, first_order
        )
        for w, theta in zip(weights, thetas, strict=True):
            if w:
                qx, qy = tasks.query_x[t], tasks.query_y[t]
                total = total + w * loss_of(model, loss_fn, theta, qx, qy)
    total = total / len(tasks)
    *gradients, slopes = torch.autograd.grad(
        total, [*leaves.values(), values], allow_unused=True, materialize_grads=True
    )
    return Answer(
        total.detach(), dict(zip(params, gradients, strict=True)), slopes.detach()
    )


def adapt(
    model: nn.Module,
    loss_fn: LossFn,
    params: Named,
    rates: Rates,
    x: Tensor,
    y: Tensor,
    steps: int,
) -> Named:
    """Parameters after the inner loop, name -> [T, ...]."""
    model = reference(model)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    finals = [
        unrolled(model, loss_fn, leaves, rates, rates.values, x[t], y[t], steps)[-1]
        for t in range(len(x))
    ]
    return {n: torch.stack([f[n].detach() for f in finals]) for n in params}


def value_and_grad(
    model: nn.Module, loss_fn: LossFn, params: Named, x: Tensor, y: Tensor
) -> tuple[Tensor, Named]:
    """Loss [T] and gradients, name -> [T, ...]; params are per task, [T, ...]."""
    model = reference(model)
    losses, rows = [], []
    for t in range(len(x)):
        leaves = {n: p[t].detach().clone().requires_grad_() for n, p in params.items()}
        loss = loss_of(model, loss_fn, leaves, x[t], y[t])
        g = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        losses.append(loss.detach())
        rows.append(dict(zip(params, g, strict=True)))
    return torch.stack(losses), {n: torch.stack([r[n] for r in rows]) for n in params}


def hvp(
    model: nn.Module, loss_fn: LossFn, params: Named, x: Tensor, y: Tensor, v: Named
) -> Named:
    """Hessian of each task's loss times v, by differentiating <gradient, v>."""
    model = reference(model)
    rows = []
    for t in range(len(x)):
        leaves = {n: p[t].detach().clone().requires_grad_() for n, p in params.items()}
        loss = loss_of(model, loss_fn, leaves, x[t], y[t])
        g = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        slope = sum((a * v[n][t]).sum() for n, a in zip(params, g, strict=True))
        if not slope.requires_grad:  # a loss linear in the parameters
            rows.append({n: torch.zeros_like(p) for n, p in leaves.items()})
            continue
        h = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
        rows.append(dict(zip(params, h, strict=True)))
    return {n: torch.stack([r[n] for r in rows]) for n in params}


def gauss_newton_product(
    model: nn.Module, loss_fn: LossFn, params: Named, x: Tensor, y: Tensor, v: Named
) -> Named:
    """J' H_loss J v of each task: jvp, an explicit Hessian of the loss, vjp."""
    model = reference(model)
    rows = []
    for t in range(len(x)):
        theta = {n: p[t] for n, p in params.items()}

        def output_of(p: Named, inputs: Tensor = x[t]) -> Tensor:
            return functional_call(model, p, (inputs,))

        output, tangent = jvp(output_of, (theta,), ({n: v[n][t] for n in theta},))
        curved = _loss_hessian(loss_fn, output.detach(), y[t]) @ tangent.flatten()
        rows.append(vjp(output_of, theta)[1](curved.view_as(tangent))[0])
    return {n: torch.stack([r[n] for r in rows]) for n in params}


def _loss_hessian(loss_fn: LossFn, output: Tensor, y: Tensor) -> Tensor:
    """Hessian of the loss for the flattened outputs of one task."""
    return torch.autograd.functional.hessian(
        lambda flat: loss_fn(flat.view_as(output), y), output.flatten()
    )


def inductive_losses(
    model: nn.Module, loss_fn: LossFn, theta: Named, tasks: TaskBatch, t: int
) -> Tensor:
    """Loss of each query of task t when it passes alone beside the support, [Q]."""
    model = reference(model)
    rows = []
    for q in range(tasks.query_size):
        x = torch.cat([tasks.support_x[t], tasks.query_x[t, q : q + 1]])
        output = functional_call(model, theta, (x,))[-1:]
        rows.append(loss_fn(output, tasks.query_y[t, q : q + 1]))
    return torch.stack(rows)
