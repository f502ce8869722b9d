"""Second-order meta-gradients in JAX: jit of vmap, as its users write them.

Import this module only where ``jax`` is installed (``missing`` tells). The networks
are those of ``fastmaml.models``, read from the compiled program's layer list, so that
parameters carry the same names and shapes. Images run channels last, XLA's preferred
layout on CPUs; weights are transposed inside the jitted function.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from bench.workloads import Workload
from fastmaml.compile import compile_module
from fastmaml.models import batch_norm_parameters
from fastmaml.tasks.batch import TaskBatch

Array = Any
Tree = dict[str, Any]
Forward = Callable[[Tree, Array], Array]
JaxPeer = Callable[..., tuple[Array, Tree]]


def missing(device: str = "cpu") -> str | None:
    """Returns why JAX peers can't run on a device, or ``None`` if they can.

    JAX computes on its first device, which must be of the kind that is asked for.
    """
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed (pip install jax)"
    if device == "cpu":
        return None
    import jax

    try:
        found = jax.default_backend()
    except RuntimeError as error:
        return f"jax finds no device: {str(error).splitlines()[0]}"
    return None if found == "gpu" else f"jax sees no GPU here, it computes on {found}"


# -- the network ------------------------------------------------------------------


def _linear(spec: Any, p: list[Array], x: Array) -> Array:
    y = x @ p[0].T
    return y if p[1] is None else y + p[1]


def _conv2d(spec: Any, p: list[Array], x: Array) -> Array:
    from jax import lax

    a = spec.attributes
    y = lax.conv_general_dilated(
        x,
        p[0].transpose(2, 3, 1, 0),
        window_strides=a["stride"],
        padding=[(n, n) for n in a["padding"]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y if p[1] is None else y + p[1]


def _batch_norm(spec: Any, p: list[Array], x: Array) -> Array:
    from jax import lax

    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes)
    y = centred * lax.rsqrt((centred**2).mean(axes) + spec.attributes["eps"])
    y = y if p[0] is None else y * p[0]
    return y if p[1] is None else y + p[1]


def _max_pool2d(spec: Any, p: list[Array], x: Array) -> Array:
    import jax.numpy as jnp

    kh, kw = spec.attributes["kernel"]
    if spec.attributes["stride"] != (kh, kw) or any(spec.attributes["padding"]):
        raise ValueError(f"{spec.name}: only pooling without overlap is benchmarked")
    n, h, w, c = x.shape
    x = x[:, : h // kh * kh, : w // kw * kw]
    return jnp.max(x.reshape(n, h // kh, kh, w // kw, kw, c), (2, 4))


def _flatten(spec: Any, p: list[Array], x: Array) -> Array:
    if x.ndim == 4:  # torch flattens channels first
        x = x.transpose(0, 3, 1, 2)
    return x.reshape(x.shape[0], -1)


def _append_parameter(spec: Any, p: list[Array], x: Array) -> Array:
    import jax.numpy as jnp

    return jnp.concatenate([x, jnp.broadcast_to(p[0], (x.shape[0], p[0].size))], -1)


def _activation(name: str) -> Callable[..., Array]:
    def apply(spec: Any, p: list[Array], x: Array) -> Array:
        import jax.numpy as jnp

        return jnp.maximum(x, 0) if name == "relu" else jnp.tanh(x)

    return apply


_LAYERS: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "relu": _activation("relu"),
    "tanh": _activation("tanh"),
    "max_pool2d": _max_pool2d,
    "global_avg_pool": lambda spec, p, x: x.mean((1, 2), keepdims=True),
    "flatten": _flatten,
    "append_parameter": _append_parameter,
}


def make_forward(workload: Workload, model: nn.Module) -> Forward:
    """Makes (parameters, x [N, ...]) -> outputs in JAX from a torch network.

    Raises:
        ValueError: if the network has a layer that no workload has.
    """
    report = compile_module(model, workload.loss, "mean")
    if report.program is None:
        raise ValueError(f"{workload.name}: not compiled: {'; '.join(report.reasons)}")
    layers = report.program.layers
    if unknown := {spec.kind for spec in layers} - _LAYERS.keys():
        raise ValueError(f"{workload.name}: no JAX version of {sorted(unknown)}")

    def forward(params: Tree, x: Array) -> Array:
        for spec in layers:
            own = [None if n is None else params[n] for n in spec.parameters]
            own += [None] * (2 - len(own))
            x = _LAYERS[spec.kind](spec, own, x)
        return x

    return forward


# -- the losses -------------------------------------------------------------------


def _cross_entropy(output: Array, target: Array) -> Array:
    import jax
    import jax.numpy as jnp

    log_p = jax.nn.log_softmax(output)
    return -jnp.take_along_axis(log_p, target[:, None], -1).mean()


def _policy_gradient(output: Array, target: Array) -> Array:
    import jax.numpy as jnp

    mean, log_std = jnp.split(output, 2, -1)
    actions, advantage = target[:, :-1], target[:, -1]
    z = (actions - mean) * jnp.exp(-log_std)
    log_density = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
    return -(log_density.sum(-1) * advantage).mean()


_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "mse": lambda output, target: ((output - target) ** 2).mean(),
    "cross_entropy": _cross_entropy,
    "policy_gradient": _policy_gradient,
}


# -- the meta-gradients -----------------------------------------------------------


def _task_loss(workload: Workload, model: nn.Module) -> Callable[..., Array]:
    forward, loss = make_forward(workload, model), _LOSSES[workload.loss]
    return lambda params, x, y: loss(forward(params, x), y)


def _adapted(params: Tree, kept: set[str]) -> Tree:
    return {n: p for n, p in params.items() if n not in kept}


def vmap_grad(workload: Workload, model: nn.Module) -> JaxPeer:
    """Makes value_and_grad of the mean over vmapped, unrolled tasks."""
    import jax

    task_loss, kept = _task_loss(workload, model), batch_norm_parameters(model)
    rate = workload.inner_lr

    def mean_loss(params: Tree, tasks: tuple[Array, ...]) -> Array:
        def task(sx: Array, sy: Array, qx: Array, qy: Array) -> Array:
            theta = _adapted(params, kept)
            inner = jax.grad(lambda t: task_loss({**params, **t}, sx, sy))
            for _ in range(workload.steps):
                theta = jax.tree.map(lambda p, g: p - rate * g, theta, inner(theta))
            return task_loss({**params, **theta}, qx, qy)

        return jax.vmap(task)(*tasks).mean()

    return jax.value_and_grad(mean_loss)


def hvp_chain(workload: Workload, model: nn.Module) -> JaxPeer:
    """Makes the chain of Hessian-vector products, forward over reverse, vmapped."""
    import jax

    task_loss, kept = _task_loss(workload, model), batch_norm_parameters(model)
    rate = workload.inner_lr

    def chain(params: Tree, sx: Array, sy: Array, qx: Array, qy: Array) -> tuple:
        def gradient(theta: Tree) -> Tree:
            return jax.grad(task_loss)({**params, **theta}, sx, sy)

        path = [_adapted(params, kept)]
        for _ in range(workload.steps):
            g = _adapted(gradient(path[-1]), kept)
            path.append(jax.tree.map(lambda p, d: p - rate * d, path[-1], g))
        full = {**params, **path.pop()}
        loss, adjoint = jax.value_and_grad(task_loss)(full, qx, qy)
        for theta in reversed(path):
            direction = _adapted(adjoint, kept)
            _, product = jax.jvp(gradient, (theta,), (direction,))
            adjoint = jax.tree.map(lambda v, h: v - rate * h, adjoint, product)
        return loss, adjoint

    def mean(params: Tree, tasks: tuple[Array, ...]) -> tuple[Array, Tree]:
        loss, adjoint = jax.vmap(chain, (None, 0, 0, 0, 0))(params, *tasks)
        return loss.mean(), jax.tree.map(lambda g: g.mean(0), adjoint)

    return mean


PEERS: dict[str, Callable[[Workload, nn.Module], JaxPeer]] = {
    "JAX jit vmap": vmap_grad,
    "JAX, HVP chain": hvp_chain,
}


# -- at the boundary --------------------------------------------------------------


def to_params(model: nn.Module) -> Tree:
    """Copies a network's parameters to JAX."""
    import jax.numpy as jnp

    return {
        n: jnp.asarray(p.detach().cpu().numpy()) for n, p in model.named_parameters()
    }


def to_tasks(tasks: TaskBatch) -> tuple[Array, ...]:
    """Copies a meta-batch to JAX, images channels last."""
    import jax.numpy as jnp

    tasks = tasks.to(device="cpu")

    def last(x: np.ndarray) -> Array:
        return jnp.asarray(np.moveaxis(x, 2, -1) if x.ndim == 5 else x)

    return (
        last(tasks.support_x.numpy()),
        jnp.asarray(tasks.support_y.numpy()),
        last(tasks.query_x.numpy()),
        jnp.asarray(tasks.query_y.numpy()),
    )


def adam_step(meta_gradient: JaxPeer, rate: float) -> Callable[..., tuple]:
    """Makes a whole meta-step for one jit: (params, state, tasks) -> the same, loss.

    ``state`` is (step count, first moments, second moments), as ``adam_state`` makes.
    """
    import jax
    import jax.numpy as jnp

    def step(params: Tree, state: tuple, tasks: tuple[Array, ...]) -> tuple:
        loss, g = meta_gradient(params, tasks)
        count, first, second = state
        count = count + 1
        first = jax.tree.map(lambda m, d: 0.9 * m + 0.1 * d, first, g)
        second = jax.tree.map(lambda v, d: 0.999 * v + 0.001 * d * d, second, g)
        scale = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        params = jax.tree.map(
            lambda p, m, v: p - scale * m / (jnp.sqrt(v) + 1e-8), params, first, second
        )
        return params, (count, first, second), loss

    return step


def adam_state(params: Tree) -> tuple:
    """Makes Adam's state before the first step."""
    import jax
    import jax.numpy as jnp

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jnp.zeros(()), zeros, jax.tree.map(jnp.zeros_like, params)
