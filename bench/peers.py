"""Second-order meta-gradients as people write them with torch today.

Every peer has one interface: made from a ``Problem``, it maps (parameters, tasks) to
(loss, gradients), both averaged over tasks. All adapt the same parameters at the same
rate, so they compute the same numbers; ``reference`` is the float64 value they are
held against. Formulas of the losses are the peers' own, not fastmaml's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp, vmap

from bench.workloads import Workload
from fastmaml.models import batch_norm_parameters
from fastmaml.tasks.batch import TaskBatch

Params = Mapping[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[Params, TaskBatch], tuple[Tensor, dict[str, Tensor]]]


def _policy_gradient(output: Tensor, target: Tensor) -> Tensor:
    mean, log_std = output.chunk(2, dim=-1)
    actions, advantage = target[..., :-1], target[..., -1]
    z = (actions - mean) * torch.exp(-log_std)
    log_density = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
    return -(log_density.sum(-1) * advantage).mean()


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return -F.log_softmax(output, -1).gather(-1, target.unsqueeze(-1)).mean()


LOSSES: dict[str, LossFunction] = {
    "mse": lambda output, target: (output - target).square().mean(),
    "cross_entropy": _cross_entropy,
    "policy_gradient": _policy_gradient,
}


@dataclass(frozen=True)
class Problem:
    """What a peer needs to know of a workload.

    Attributes:
        model: the network.
        loss: (output [N, ...], target [N, ...]) -> [].
        adapted: names of the parameters of the inner loop.
        inner_lr: its rate.
        steps: K.
    """

    model: nn.Module
    loss: LossFunction
    adapted: tuple[str, ...]
    inner_lr: float
    steps: int

    def task_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Loss [] of one task's samples x [N, ...], y [N, ...]."""
        return self.loss(functional_call(self.model, dict(params), (x,)), y)


def make_problem(workload: Workload, model: nn.Module) -> Problem:
    """States a workload for the peers.

    Batch norm's parameters are trained but not adapted, as in the paper's code.
    """
    kept = batch_norm_parameters(model)
    return Problem(
        model=model,
        loss=LOSSES[workload.loss],
        adapted=tuple(n for n, _ in model.named_parameters() if n not in kept),
        inner_lr=workload.inner_lr,
        steps=workload.steps,
    )


def _tensors(tasks: TaskBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y


def autograd_loop(problem: Problem) -> Peer:
    """Makes the plain loop: one task after the other, ``create_graph=True``."""

    def unrolled(params: Params, task: tuple[Tensor, ...]) -> Tensor:
        theta = dict(params)
        support_x, support_y, query_x, query_y = task
        for _ in range(problem.steps):
            loss = problem.task_loss(theta, support_x, support_y)
            inputs = [theta[n] for n in problem.adapted]
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
            for name, g in zip(problem.adapted, gradients, strict=True):
                theta[name] = theta[name] - problem.inner_lr * g
        return problem.task_loss(theta, query_x, query_y)

    def meta_gradient(params: Params, tasks: TaskBatch) -> tuple[Tensor, dict]:
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        x = tasks.support_x
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for task in zip(*_tensors(tasks), strict=True):
            loss = unrolled(leaves, task) / len(tasks)
            loss.backward()
            total += loss.detach()
        return total, {n: leaf.grad for n, leaf in leaves.items()}

    return meta_gradient


def _mean_query_loss(problem: Problem) -> Callable[..., Tensor]:
    """(params, support_x, support_y, query_x, query_y) -> [], tasks under vmap."""

    def support_loss(theta: dict, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return problem.task_loss({**params, **theta}, x, y)

    def mean_loss(params: Params, *tensors: Tensor) -> Tensor:
        def task(
            support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
        ) -> Tensor:
            theta = {n: params[n] for n in problem.adapted}
            for _ in range(problem.steps):
                g = grad(support_loss)(theta, params, support_x, support_y)
                theta = {n: p - problem.inner_lr * g[n] for n, p in theta.items()}
            return problem.task_loss({**params, **theta}, query_x, query_y)

        return vmap(task)(*tensors).mean()

    return mean_loss


def vmap_grad(problem: Problem) -> Peer:
    """Makes torch.func's way: grad of the mean over vmapped, unrolled tasks."""
    function = grad_and_value(_mean_query_loss(problem))

    def meta_gradient(params: Params, tasks: TaskBatch) -> tuple[Tensor, dict]:
        gradients, loss = function(dict(params), *_tensors(tasks))
        return loss, gradients

    return meta_gradient


def vmap_compiled(problem: Problem) -> Peer:
    """Makes ``vmap_grad`` under torch.compile, on a GPU as CUDA graphs."""
    mean_loss = _mean_query_loss(problem)
    on_gpu = next(problem.model.parameters()).is_cuda

    @torch.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)
    def function(params: dict, *tensors: Tensor) -> tuple[dict, Tensor]:
        return grad_and_value(mean_loss)(params, *tensors)

    def meta_gradient(params: Params, tasks: TaskBatch) -> tuple[Tensor, dict]:
        gradients, loss = function(dict(params), *_tensors(tasks))
        return loss, gradients

    return meta_gradient


def vmap_hvp_chain(problem: Problem) -> Peer:
    """Makes the chain of Hessian-vector products, vmapped.

    Keeps K copies of the parameters instead of K graphs. Products are taken reverse
    over reverse, which measures faster here than forward over reverse.
    """

    def support_gradient(full: dict, x: Tensor, y: Tensor) -> dict:
        def loss(theta: dict) -> Tensor:
            return problem.task_loss({**full, **theta}, x, y)

        return grad(loss)({n: full[n] for n in problem.adapted})

    def step(full: dict, x: Tensor, y: Tensor) -> dict:
        g = support_gradient(full, x, y)
        return {
            n: p - problem.inner_lr * g[n] if n in g else p for n, p in full.items()
        }

    def chain(params: Params, *task: Tensor) -> tuple[Tensor, dict]:
        support_x, support_y, query_x, query_y = task
        path = [dict(params)]
        for _ in range(problem.steps):
            path.append(step(path[-1], support_x, support_y))
        last = grad_and_value(problem.task_loss)
        adjoint, loss = last(path.pop(), query_x, query_y)
        for full in reversed(path):
            pull = vjp(lambda p: support_gradient(p, support_x, support_y), full)[1]
            (product,) = pull({n: adjoint[n] for n in problem.adapted})
            adjoint = {n: v - problem.inner_lr * product[n] for n, v in adjoint.items()}
        return loss, adjoint

    def meta_gradient(params: Params, tasks: TaskBatch) -> tuple[Tensor, dict]:
        in_dims = (None, 0, 0, 0, 0)
        loss, gradients = vmap(chain, in_dims)(dict(params), *_tensors(tasks))
        return loss.mean(), {n: g.mean(0) for n, g in gradients.items()}

    return meta_gradient


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "autograd loop": autograd_loop,
    "vmap of grad": vmap_grad,
    "vmap, HVP chain": vmap_hvp_chain,
    "vmap + torch.compile": vmap_compiled,
}


def reference(
    problem: Problem, params: Params, tasks: TaskBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, by autograd through the unrolled loop."""
    doubles = {n: p.detach().double() for n, p in params.items()}
    return autograd_loop(problem)(doubles, tasks.to(dtype=torch.float64))


def error(got: Params, want: Params) -> float:
    """Relative error of a gradient, norm over norm of all tensors together."""
    off = sum(((got[n].to(want[n]).double() - want[n]) ** 2).sum().item() for n in want)
    norm = sum((want[n] ** 2).sum().item() for n in want)
    return math.sqrt(off / norm)


def unavailable() -> dict[str, str]:
    """Peers left out on every workload, name -> reason."""
    if importlib.util.find_spec("learn2learn") is None:
        reason = "not installed: 0.2.0 does not build on Python 3.11 or later"
    else:
        reason = "installed, but no adapter: its MAML is the autograd loop"
    return {"learn2learn": reason}
