"""The paper's networks, as plain ``nn.Sequential`` models.

Batch normalisation here is the paper's code's: on the statistics of the batch at hand
in training and test alike (so evaluation is transductive), with a learned centre and no
scale, epsilon 1e-3. Its parameters are meta-learned but not adapted in the inner loop;
``batch_norm_parameters`` names them for ``MAML(adapted=...)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPSILON = 1e-3  # of the code's batch normalisation
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class _CentreOnly:
    """Drops the scale and the running statistics of a batch normalisation."""

    def __init__(self, features: int, eps: float = _EPSILON) -> None:
        super().__init__(features, eps=eps, track_running_stats=False)  # type: ignore[call-arg]
        self.register_parameter("weight", None)  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Sets the centre back to zero."""
        nn.init.zeros_(self.bias)  # type: ignore[attr-defined]


class CentreBatchNorm1d(_CentreOnly, nn.BatchNorm1d):
    """Batch normalisation of [N, features] with a centre and no scale.

    Args:
        features: number of features.
        eps: added to the variance.
    """


class CentreBatchNorm2d(_CentreOnly, nn.BatchNorm2d):
    """Batch normalisation of [N, features, H, W] with a centre and no scale.

    Args:
        features: number of channels.
        eps: added to the variance.
    """


class AppendParameter(nn.Module):
    """Appends a free parameter to every sample: [N, F] becomes [N, F + size].

    The state-independent log standard deviation of a Gaussian policy.

    Args:
        size: length of the parameter ``value``.
        initial: its first value; 0 is a standard deviation of 1.
    """

    def __init__(self, size: int, initial: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.value = nn.Parameter(torch.full((size,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns every sample of ``x`` [N, F] with ``value`` behind it."""
        return torch.cat([x, self.value.expand(x.shape[0], self.size)], dim=1)

    def extra_repr(self) -> str:
        """Returns what ``print`` shows between the brackets."""
        return f"size={self.size}"


def sinusoid_mlp(
    inputs: int = 1, outputs: int = 1, hidden: Sequence[int] = (40, 40)
) -> nn.Sequential:
    """The network of sine regression: 1-40-40-1 with ReLU.

    Weights start from a normal of standard deviation 0.01 cut at two deviations,
    biases from zero, as in the paper's code.

    Args:
        inputs: numbers of a sample.
        outputs: numbers of a target.
        hidden: widths of the hidden layers.

    Source:
        Section 5.1.
    """
    model = _mlp((inputs, *hidden, outputs), nn.ReLU)
    for layer in model:
        if isinstance(layer, nn.Linear):
            _truncated_normal_(layer.weight, 0.01)
            nn.init.zeros_(layer.bias)
    return model


def omniglot_conv(
    ways: int, channels: int = 64, in_channels: int = 1, head_std: float = 1.0
) -> nn.Sequential:
    """The convolutional network of Omniglot.

    Four times 3 x 3 convolution of stride 2, batch normalisation, ReLU; then the mean
    over space and a linear head. Images of 28 x 28 shrink to 14, 7, 4, 2.

    Convolutions start from Glorot's uniform, the head's weights from a normal of
    standard deviation ``head_std``, biases from zero. The paper's code has 1; smaller
    heads start with a smaller loss.

    Args:
        ways: classes of a task.
        channels: channels of every convolution.
        in_channels: channels of an image.
        head_std: of the head's weights at the start.

    Source:
        Section 5.2. The code pads as TensorFlow's "same", which for stride 2 and even
        sizes pads one pixel on the right and bottom alone; here it is one pixel on all
        sides.
    """
    layers: list[nn.Module] = []
    for before in (in_channels, channels, channels, channels):
        layers += _conv_block(before, channels, stride=2)
    head = nn.Linear(channels, ways)
    nn.init.normal_(head.weight, std=head_std)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def omniglot_fc(
    ways: int, inputs: int = 784, hidden: Sequence[int] = (256, 128, 64, 64)
) -> nn.Sequential:
    """The network of Omniglot without convolutions: 784-256-128-64-64-ways.

    Every hidden layer is linear, batch normalisation, ReLU. Weights start from a
    normal of standard deviation 0.01 cut at two deviations, biases from zero.

    Args:
        ways: classes of a task.
        inputs: pixels of an image.
        hidden: widths of the hidden layers.

    Source:
        Section 5.2.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), CentreBatchNorm1d(after), nn.ReLU()]
    layers.append(nn.Linear(hidden[-1], ways))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            _truncated_normal_(layer.weight, 0.01)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def mini_imagenet_conv(
    ways: int, channels: int = 32, in_channels: int = 3, size: int = 84
) -> nn.Sequential:
    """The network of MiniImagenet.

    Four times 3 x 3 convolution, batch normalisation, ReLU, 2 x 2 max pooling; then a
    linear head on all of it, 800 numbers for images of 84 x 84 and 32 channels.

    Weights start from Glorot's uniform, biases from zero.

    Args:
        ways: classes of a task.
        channels: channels of every convolution.
        in_channels: channels of an image.
        size: height and width of an image, at least 16.

    Raises:
        ValueError: ``size`` is below 16, where four poolings leave nothing.

    Source:
        Section 5.2, after Ravi and Larochelle 2017.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 for four poolings, got {size}")
    layers: list[nn.Module] = []
    for before in (in_channels, channels, channels, channels):
        layers += [*_conv_block(before, channels, stride=1), nn.MaxPool2d(2)]
    head = nn.Linear(channels * (size // 16) ** 2, ways)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.Flatten(), head)


def gaussian_policy_mlp(
    obs: int,
    actions: int,
    hidden: Sequence[int] = (100, 100),
    *,
    activation: str = "relu",
    log_std: float = 0.0,
) -> nn.Sequential:
    """A Gaussian policy: observations [N, obs] to [N, 2 * actions] (mean, log-std).

    The log standard deviations are parameters of their own, the same in every state.
    Weights start from Glorot's uniform, biases from zero.

    Args:
        obs: numbers of an observation.
        actions: numbers of an action.
        hidden: widths of the hidden layers.
        activation: ``"relu"`` or ``"tanh"``.
        log_std: first value of the log standard deviations.

    Raises:
        ValueError: ``activation`` is neither.

    Source:
        Section 5.3: 100-100, ReLU.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}"
        )
    layers = _mlp((obs, *hidden, actions), _ACTIVATIONS[activation])
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers.append(AppendParameter(actions, log_std))


def batch_norm_parameters(model: nn.Module) -> set[str]:
    """Returns the names of all parameters of batch normalisations in ``model``.

    For the paper's choice of what the inner loop adapts:
    ``MAML(model, adapted=lambda name: name not in batch_norm_parameters(model))``.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
    }


def _mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def _conv_block(before: int, after: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return [conv, CentreBatchNorm2d(after), nn.ReLU()]


def _truncated_normal_(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
