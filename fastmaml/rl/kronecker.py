"""A preconditioner of trust-region steps: Kronecker factors of the Fisher matrix.

With `a` the input of a layer, 1 behind it for the bias, and `g` a derivative of the
policy's outputs along a root of their Fisher matrix, with respect to what the layer
puts out, the layer's block is taken for E[g g'] (x) E[a a'], blocks of two layers for
zero, and the adaptation for the identity:

    M^-1 V = (G + s I)^-1 V (A + r I)^-1       V: a layer's weights [out, in + 1]

Conjugate gradients remain exact products with J' F J: the factors only say along which
directions they begin. Some hundred samples of all tasks are enough for that.

Source:
    Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored
    approximate curvature", with the factored damping of its section 6.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml.models import AppendParameter
from fastmaml.rl.policies import Policy

SAMPLES = 512  # of all tasks together, that factors are made of
RELATIVE_DAMPING = 0.1  # of a factor's mean eigenvalue, added to all of them


def factored_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have factors, by name.

    Raises:
        ValueError: other layers have parameters, too.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, AppendParameter)):
            layers[name] = module
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                "preconditioner='kronecker' needs a policy whose parameters are those "
                f"of Linear and AppendParameter layers; {name or 'the model'} is a "
                f"{type(module).__name__}. Take preconditioner='none'"
            )
    return layers


class KroneckerPreconditioner:
    """v [P] -> M^-1 v [P] float64, at fixed parameters.

    Args:
        policy: whose Fisher matrix it is.
        params: where, name -> [...].
        x: observations [T, N, O].
        weights: of the samples [T, N].
        most: samples that are taken of all; they are spread over the tasks.
    """

    def __init__(
        self,
        policy: Policy,
        params: Mapping[str, Tensor],
        x: Tensor,
        weights: Tensor,
        most: int = SAMPLES,
    ) -> None:
        self._shapes = {n: p.shape for n, p in params.items()}
        stride = -(-weights.numel() // most)
        rows = x.flatten(0, 1)[::stride]
        share = weights.flatten()[::stride]
        scale = torch.sqrt(share / share.sum()).unsqueeze(-1)
        layers = factored_layers(policy.model)
        factors = _factors(policy, params, layers, rows, scale)
        self._inverses = {n: tuple(map(_inverse, pair)) for n, pair in factors.items()}

    def __call__(self, v: Tensor) -> Tensor:
        """M^-1 v."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = dict(zip(self._shapes, v.split(sizes), strict=True))
        out: dict[str, Tensor] = {}
        for layer, (left, right) in self._inverses.items():
            own = [n for n in self._shapes if n.rpartition(".")[0] == layer]
            columns = [parts[n].view(len(left), -1) for n in own]
            solved = left @ torch.cat(columns, 1) @ right
            widths = [c.shape[1] for c in columns]
            out.update(zip(own, solved.split(widths, 1), strict=True))
        return torch.cat([out[n].reshape(-1) for n in self._shapes])


def _factors(
    policy: Policy,
    params: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    x: Tensor,
    scale: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """G [out, out] and A [in + 1, in + 1] of each layer, samples scaled by [N, 1]."""
    inputs: dict[str, Tensor] = {}
    puts: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name in inputs:
                raise ValueError(f"preconditioner='kronecker': {name} is called twice")
            one = args[0].new_ones(len(out), 1)
            linear = isinstance(module, nn.Linear)
            columns = [args[0]] if linear else []
            columns += [one] if not linear or module.bias is not None else []
            inputs[name] = torch.cat(columns, 1).detach() * scale
            puts[name] = out

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    try:
        with torch.enable_grad():
            outputs = functional_call(policy.model, leaves, (x,))
    finally:
        for handle in handles:
            handle.remove()
    # what a layer appends to stands in front
    sizes = {n: len(next(m.parameters())) for n, m in layers.items()}
    left = {n: x.new_zeros(size, size) for n, size in sizes.items()}
    for root in policy.distribution.fisher_roots(outputs.detach()):
        found = torch.autograd.grad(
            outputs,
            [*puts.values()],
            root * scale,
            retain_graph=True,
            materialize_grads=True,
        )
        for name, slope in zip(puts, found, strict=True):
            if slope.any():  # log-stds do not move what means depend on
                own = slope[:, -sizes[name] :]
                left[name].addmm_(own.T, own)
    return {n: (left[n], inputs[n].T @ inputs[n]) for n in layers}


def _inverse(factor: Tensor) -> Tensor:
    """Of the damped factor, one of zeros being left alone.

    It is not finite if the factor is not, which ends a search.
    """
    factor = factor.double()
    damping = RELATIVE_DAMPING * factor.diagonal().mean() if factor.any() else 1.0
    damped = factor + damping * torch.eye(len(factor), dtype=factor.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)
