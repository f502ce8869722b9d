"""Layer problems: small nets built around one layer, one option or one size.

The layer in question has parameters before and after it, so that all four of its passes
matter; where it stands first, that is said in the name. Sizes lie around vector widths.
"""

from __future__ import annotations

from collections.abc import Callable

from conv_problems import CONVOLUTION
from fused_problems import FUSED
from linear_problems import LINEAR, mlp
from problem import Builder, Problem
from torch import nn

from fastmaml import models

# -- normalisation ---------------------------------------------------------------------


def _norm(layer: nn.Module, scale: bool, shift: bool) -> nn.Module:
    if not scale:
        layer.register_parameter("weight", None)
    if not shift:
        layer.register_parameter("bias", None)
    return layer


def _bn(features: int, space: bool, scale: bool, shift: bool, eps: float) -> nn.Module:
    kind = nn.BatchNorm2d if space else nn.BatchNorm1d
    return _norm(kind(features, eps=eps, track_running_stats=False), scale, shift)


def _bn_flat(
    features: int, scale: bool = True, shift: bool = True, eps: float = 1e-5
) -> Builder:
    return lambda: nn.Sequential(
        nn.Linear(3, features),
        _bn(features, False, scale, shift, eps),
        nn.Tanh(),
        nn.Linear(features, 2),
    )


def _bn_space(
    features: int, scale: bool = True, shift: bool = True, eps: float = 1e-5
) -> Builder:
    return lambda: nn.Sequential(
        nn.Conv2d(2, features, 2),
        _bn(features, True, scale, shift, eps),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(features * 6, 2),
    )


def _layer_norm(scale: bool, shift: bool) -> Builder:
    return lambda: nn.Sequential(
        nn.Linear(3, 9),
        _norm(nn.LayerNorm(9), scale, shift),
        nn.Tanh(),
        nn.Linear(9, 2),
    )


def _layer_norm_space() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 2),
        nn.LayerNorm((5, 2, 3)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(30, 2),
    )


def _norm_parameters(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        for name, _ in module.named_parameters(recurse=False)
    }


_AFFINE = {
    "": (True, True),
    "-no-scale": (False, True),
    "-no-shift": (True, False),
    "-plain": (False, False),
}
NORMALISATION = [
    *(
        Problem(f"batch-norm-flat{k}", _bn_flat(9, *v), (3,), 2, samples=7)
        for k, v in _AFFINE.items()
    ),
    *(
        Problem(f"batch-norm-space{k}", _bn_space(5, *v), (2, 3, 4), 2, samples=3)
        for k, v in _AFFINE.items()
    ),
    Problem("batch-norm-flat-17", _bn_flat(17, eps=1e-3), (3,), 2, samples=4),
    Problem("batch-norm-space-16", _bn_space(16, eps=1e-3), (2, 3, 4), 2, samples=3),
    Problem("batch-norm-space-33", _bn_space(33), (2, 3, 4), 2, samples=1),
    Problem(
        "batch-norm-not-adapted",
        _bn_flat(8, scale=False),
        (3,),
        2,
        not_adapted=_norm_parameters,
    ),
    *(Problem(f"layer-norm{k}", _layer_norm(*v), (3,), 2) for k, v in _AFFINE.items()),
    Problem("layer-norm-space", _layer_norm_space, (2, 3, 4), 2, samples=3),
]

# -- activations -----------------------------------------------------------------------


def _activation(make: Callable[[], nn.Module]) -> Builder:
    return lambda: nn.Sequential(
        nn.Linear(3, 17), make(), nn.Linear(17, 5), make(), nn.Linear(5, 2)
    )


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "leaky-relu": nn.LeakyReLU,
    "leaky-relu-0.3": lambda: nn.LeakyReLU(0.3),
    "elu": nn.ELU,
    "elu-1.7": lambda: nn.ELU(1.7),
    "softplus": nn.Softplus,
}


def _activation_space(make: Callable[[], nn.Module]) -> Builder:
    return lambda: nn.Sequential(
        nn.Conv2d(1, 5, 2), make(), nn.Flatten(), nn.Linear(30, 2)
    )


ACTIVATION = [
    *(
        Problem(f"activation-{name}", _activation(make), (3,), 2, samples=7)
        for name, make in _ACTIVATIONS.items()
    ),
    *(
        Problem(f"activation-space-{name}", _activation_space(make), (1, 3, 4), 2)
        for name, make in list(_ACTIVATIONS.items())[:5]
    ),
    Problem(
        "activation-first",
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2)),
        (3,),
        2,
    ),
    Problem(
        "activation-last",
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Softplus()),
        (3,),
        2,
    ),
]

# -- pooling and shapes ----------------------------------------------------------------


def _pooled(pool: Callable[[], nn.Module], channels: int, size: int) -> Builder:
    return lambda: nn.Sequential(
        nn.Conv2d(2, channels, 1),
        nn.Tanh(),
        pool(),
        nn.Flatten(),
        nn.Linear(size, 2),
    )


# name, kernel, stride, padding, channels, height, width, pooled positions
_WINDOWS: list[tuple] = [
    ("2-s2", 2, 2, 0, 5, 4, 6, 6),
    ("2-s2-remainder", 2, 2, 0, 16, 5, 5, 4),
    ("3-s2-p1-overlap", 3, 2, 1, 3, 6, 5, 9),
    ("3x2-s1x2", (3, 2), (1, 2), 0, 17, 4, 5, 4),
    ("3-s1-p1", 3, 1, 1, 1, 3, 3, 9),
    ("2x3-s2-p0x1", (2, 3), 2, (0, 1), 8, 4, 4, 4),
]
POOLING = [
    *(
        Problem(
            f"{kind}-pool-{name}",
            _pooled(lambda p=pool, a=(k, s, p): p(*a), c, c * positions),  # type: ignore[misc]
            (2, h, w),
            2,
            samples=3,
        )
        for kind, pool in (("max", nn.MaxPool2d), ("avg", nn.AvgPool2d))
        for name, k, s, p, c, h, w, positions in _WINDOWS
    ),
    *(
        Problem(
            f"global-pool-{c}",
            _pooled(lambda: nn.AdaptiveAvgPool2d(1), c, c),
            (2, h, 3),
            2,
            samples=3,
        )
        for c, h in ((1, 3), (9, 2), (16, 1))
    ),
    Problem(
        "flatten-input",
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 2)
        ),
        (2, 3, 4),
        2,
    ),
    Problem(
        "flatten-twice",
        lambda: nn.Sequential(
            nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
        ),
        (3, 2, 3),
        2,
    ),
    Problem(
        "nested-sequential",
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(3, 7), nn.Tanh()),
            nn.Identity(),
            nn.Sequential(nn.Sequential(nn.Linear(7, 2))),
        ),
        (3,),
        2,
    ),
    Problem(
        "append-parameter",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), models.AppendParameter(3)),
        (3,),
        8,
    ),
    Problem(
        "append-parameter-inside",
        lambda: nn.Sequential(
            nn.Linear(3, 7), models.AppendParameter(2), nn.Tanh(), nn.Linear(9, 2)
        ),
        (3,),
        2,
        samples=4,
    ),
]

# -- losses ----------------------------------------------------------------------------


def _policy(actions: int) -> Builder:
    return lambda: nn.Sequential(
        nn.Linear(3, 7),
        nn.Tanh(),
        nn.Linear(7, actions),
        models.AppendParameter(actions),
    )


LOSS = [
    Problem("mse-9-outputs", mlp(3, 7, 9), (3,), 9),
    *(
        Problem(
            f"cross-entropy-{ways}-n{samples}-{reduction}",
            mlp(3, 7, ways),
            (3,),
            ways,
            loss="cross_entropy",
            reduction=reduction,
            samples=samples,
        )
        for ways, samples in ((2, 3), (5, 5), (17, 7), (5, 1))
        for reduction in ("mean", "sum_over_ways")
        if (ways, samples) != (5, 1) or reduction == "mean"
    ),
    *(
        Problem(f"{loss.replace('_', '-')}-{a}", _policy(a), (3,), 2 * a, loss=loss)
        for loss in ("policy_gradient", "likelihood_ratio", "gaussian_kl")
        for a in ((1, 3, 9) if loss == "policy_gradient" else (1, 3))
    ),
    # more samples than the engine takes at once
    Problem(
        "policy-gradient-3-n150",
        _policy(3),
        (3,),
        6,
        loss="policy_gradient",
        samples=150,
    ),
    *(
        Problem(f"{loss.replace('_', '-')}-{o}", mlp(3, 7, o), (3,), o, loss=loss)
        for loss in (
            "categorical_policy_gradient",
            "categorical_likelihood_ratio",
            "categorical_kl",
        )
        for o in (2, 5)
    ),
]

LAYER = [
    *LINEAR,
    *CONVOLUTION,
    *NORMALISATION,
    *ACTIVATION,
    *POOLING,
    *FUSED,
    *LOSS,
]
