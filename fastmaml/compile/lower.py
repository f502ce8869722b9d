"""Steps of a forward pass as layers that the native engine knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fastmaml.compile.program import Attribute, LayerSpec
from fastmaml.compile.trace import Step
from fastmaml.models import AppendParameter

Lowered = list[LayerSpec]


class Unsupported(Exception):
    """A step has no native layer; the message says why."""


def is_known(module: nn.Module) -> bool:
    """Whether the module is an operation of its own (or a subclass of one)."""
    return _known_type(module) is not None


def lower(step: Step) -> Lowered:
    """Layers of one step: none for what changes nothing, two for a fused call.

    Raises:
        Unsupported: with the reason, naming the module path or the call.
    """
    if step.operation == "append":
        return [_append(step.name, str(step.options["parameter"]), step.options)]
    if step.module is None:
        _refuse_computed(step)
        return _FUNCTIONS[step.operation](step.name, **step.options)
    kind = _known_type(step.module)
    if kind is None:
        raise Unsupported(_where(step.name, step.module) + "has no native layer")
    return _MODULES[kind](step.name, step.module)


def _refuse_computed(step: Step) -> None:
    """Options must be constants; a flattening may read the batch size."""
    for name, value in step.options.items():
        if isinstance(value, fx.Node) and step.operation != "reshape":
            where = f"{step.name} ({step.operation}) "
            raise Unsupported(f"{where}has a computed {name}: expected a constant")


def _known_type(module: nn.Module) -> type[nn.Module] | None:
    """The known base whose computation the module keeps unchanged."""
    for base in type(module).__mro__:
        if base in _MODULES:
            same = getattr(type(module), "forward", None) is base.forward
            return base if same and _same_inner(module, base) else None
    return None


def _same_inner(module: nn.Module, base: type) -> bool:
    inner = "_conv_forward"
    return getattr(type(module), inner, None) is getattr(base, inner, None)


def _where(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__}) "


def _owned(name: str, module: nn.Module, *tensors: str) -> tuple[str | None, ...]:
    prefix = f"{name}." if name else ""
    return tuple(None if getattr(module, t) is None else prefix + t for t in tensors)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    first, second = value
    return (int(first), int(second))


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise Unsupported(f"{where}{what}")


# -- modules with parameters -----------------------------------------------------------


def _linear(name: str, m: nn.Linear) -> Lowered:
    sizes: dict[str, Attribute] = {
        "in_features": m.in_features,
        "out_features": m.out_features,
        "bias": m.bias is not None,
    }
    return [LayerSpec("linear", name, sizes, _owned(name, m, "weight", "bias"))]


def _conv2d(name: str, m: nn.Conv2d) -> Lowered:
    where = _where(name, m)
    _require(m.groups == 1, where, f"has groups={m.groups}: expected 1")
    _require(
        _pair(m.dilation) == (1, 1), where, f"has dilation={m.dilation}: expected 1"
    )
    mode = m.padding_mode
    _require(mode == "zeros", where, f"has padding_mode={mode!r}: expected 'zeros'")
    sizes: dict[str, Attribute] = {
        "in_channels": m.in_channels,
        "out_channels": m.out_channels,
        "kernel": _pair(m.kernel_size),
        "stride": _pair(m.stride),
        "padding": _conv_padding(where, m),
        "bias": m.bias is not None,
    }
    return [LayerSpec("conv2d", name, sizes, _owned(name, m, "weight", "bias"))]


def _conv_padding(where: str, m: nn.Conv2d) -> tuple[int, int]:
    if m.padding == "valid":
        return (0, 0)
    kernel = _pair(m.kernel_size)
    if m.padding == "same":
        even = any(k % 2 == 0 for k in kernel)
        _require(not even, where, "pads 'same' with an even kernel: not symmetric")
        return (kernel[0] // 2, kernel[1] // 2)
    return _pair(m.padding)


def _batch_norm(name: str, m: nn.BatchNorm1d | nn.BatchNorm2d) -> Lowered:
    _require(
        m.running_mean is None,
        _where(name, m),
        "uses running statistics; the native layer uses those of the batch: pass "
        "batch_norm='batch' or build it with track_running_stats=False",
    )
    sizes: dict[str, Attribute] = {
        "features": m.num_features,
        "eps": float(m.eps),
        "scale": m.weight is not None,
        "shift": m.bias is not None,
    }
    return [LayerSpec("batch_norm", name, sizes, _owned(name, m, "weight", "bias"))]


def _layer_norm(name: str, m: nn.LayerNorm) -> Lowered:
    sizes: dict[str, Attribute] = {
        "shape": tuple(m.normalized_shape),
        "eps": float(m.eps),
        "scale": m.weight is not None,
        "shift": m.bias is not None,
    }
    return [LayerSpec("layer_norm", name, sizes, _owned(name, m, "weight", "bias"))]


def _append(name: str, parameter: str, options: dict[str, Any]) -> LayerSpec:
    size = {"size": int(options["size"])}
    return LayerSpec("append_parameter", name, {**size}, (parameter,))


def _append_module(name: str, m: AppendParameter) -> Lowered:
    (parameter,) = _owned(name, m, "value")
    return [_append(name, str(parameter), {"size": m.value.numel()})]


# -- activations, pooling, shapes ------------------------------------------------------


def _plain(kind: str) -> Callable[..., Lowered]:
    def build(name: str, **ignored: Any) -> Lowered:
        return [LayerSpec(kind, name)]

    return build


def _gelu(name: str, approximate: str = "none") -> Lowered:
    return [LayerSpec("gelu_tanh" if approximate == "tanh" else "gelu", name)]


def _leaky_relu(
    name: str, negative_slope: float = 0.01, inplace: bool = False
) -> Lowered:
    return [LayerSpec("leaky_relu", name, {"slope": float(negative_slope)})]


def _elu(name: str, alpha: float = 1.0, inplace: bool = False) -> Lowered:
    return [LayerSpec("elu", name, {"alpha": float(alpha)})]


def _softplus(name: str, beta: float = 1.0, threshold: float = 20.0) -> Lowered:
    got = f"has beta={beta:g}, threshold={threshold:g}: expected 1 and 20"
    _require(beta == 1 and threshold == 20, f"{name} (softplus) ", got)
    return [LayerSpec("softplus", name)]


def _max_pool2d(
    name: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Lowered:
    where = f"{name} (max_pool2d) "
    _require(_pair(dilation) == (1, 1), where, f"has dilation={dilation}: expected 1")
    _require(not return_indices, where, "returns indices as well")
    return [_pool("max_pool2d", name, kernel_size, stride, padding, ceil_mode)]


def _avg_pool2d(
    name: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Lowered:
    where = f"{name} (avg_pool2d) "
    counted = count_include_pad or _pair(padding) == (0, 0)
    _require(counted, where, "has count_include_pad=False: expected True")
    _require(divisor_override is None, where, "has a divisor_override: expected none")
    return [_pool("avg_pool2d", name, kernel_size, stride, padding, ceil_mode)]


def _pool(
    kind: str, name: str, kernel: Any, stride: Any, padding: Any, ceil_mode: bool
) -> LayerSpec:
    _require(not ceil_mode, f"{name} ({kind}) ", "has ceil_mode=True: expected False")
    window: dict[str, Attribute] = {
        "kernel": _pair(kernel),
        "stride": _pair(kernel if stride in (None, []) else stride),
        "padding": _pair(padding),
    }
    return LayerSpec(kind, name, window)


def _adaptive_avg_pool2d(name: str, output_size: Any) -> Lowered:
    where = f"{name} (adaptive_avg_pool2d) "
    one = output_size in (1, (1, 1), [1, 1])
    _require(one, where, f"has output_size={output_size}: expected 1")
    return [LayerSpec("global_avg_pool", name)]


def _mean(
    name: str, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Lowered:
    where = f"{name} (mean) "
    axes = set(dim) if isinstance(dim, list | tuple) else {dim}
    space = axes in ({2, 3}, {-1, -2}) and dtype is None
    _require(space, where, f"has dim={dim}: expected the mean over space, (2, 3)")
    pooled = LayerSpec("global_avg_pool", name)
    return [pooled] if keepdim else [pooled, LayerSpec("flatten", f"{name}.flatten")]


def _flatten(name: str, start_dim: int = 0, end_dim: int = -1) -> Lowered:
    got = f"flattens dimensions {start_dim} to {end_dim}: expected 1 to -1"
    _require((start_dim, end_dim) == (1, -1), f"{name} (flatten) ", got)
    return [LayerSpec("flatten", name)]


def _reshape(name: str, shape: Any, input: Any = None) -> Lowered:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    samples = len(sizes) == 2 and _is_batch_size(sizes[0])
    _require(
        samples and sizes[1] == -1,
        f"{name} (reshape) ",
        "is no flattening: expected x.flatten(1) or x.view(x.size(0), -1)",
    )
    return [LayerSpec("flatten", name)]


def _is_batch_size(node: Any) -> bool:
    """Whether a graph node reads the first entry of a shape."""
    if not isinstance(node, fx.Node):
        return False
    return len(node.args) > 1 and bool(node.args[1] == 0)


def _dropout(name: str, p: float = 0.5, training: bool = True, **_: Any) -> Lowered:
    off = p == 0 or not training
    _require(off, f"{name} (dropout) ", f"draws masks with p={p:g} in training mode")
    return []


def _nothing(name: str, **ignored: Any) -> Lowered:
    return []


_FUNCTIONS: dict[str, Callable[..., Lowered]] = {
    "relu": _plain("relu"),
    "tanh": _plain("tanh"),
    "sigmoid": _plain("sigmoid"),
    "silu": _plain("silu"),
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean,
    "flatten": _flatten,
    "reshape": _reshape,
    "dropout": _dropout,
    "identity": _nothing,
}


def _same_as(function: str, *options: str) -> Callable[[str, nn.Module], Lowered]:
    """Lowers a module through the function of the same name."""

    def build(name: str, module: nn.Module) -> Lowered:
        values = {o: getattr(module, o) for o in options}
        return _FUNCTIONS[function](name, **values)

    return build


def _dropout_module(name: str, m: _DropoutNd) -> Lowered:
    return _dropout(name, p=m.p, training=m.training)


_MODULES: dict[type[nn.Module], Callable[..., Lowered]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    AppendParameter: _append_module,
    nn.ReLU: _same_as("relu"),
    nn.Tanh: _same_as("tanh"),
    nn.Sigmoid: _same_as("sigmoid"),
    nn.SiLU: _same_as("silu"),
    nn.GELU: _same_as("gelu", "approximate"),
    nn.LeakyReLU: _same_as("leaky_relu", "negative_slope"),
    nn.ELU: _same_as("elu", "alpha"),
    nn.Softplus: _same_as("softplus", "beta", "threshold"),
    nn.MaxPool2d: _same_as(
        "max_pool2d",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "ceil_mode",
        "return_indices",
    ),
    nn.AvgPool2d: _same_as(
        "avg_pool2d",
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
    nn.AdaptiveAvgPool2d: _same_as("adaptive_avg_pool2d", "output_size"),
    nn.Flatten: _same_as("flatten", "start_dim", "end_dim"),
    nn.Identity: _same_as("identity"),
    nn.Dropout: _dropout_module,
    nn.Dropout1d: _dropout_module,
    nn.Dropout2d: _dropout_module,
}
