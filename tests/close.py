"""The tolerance ledger: every bound on an error, its name and its reason.

Two bounds are checked together. Elementwise, |got - want| may reach ``relative`` times
|want| plus ``floor`` times the largest |want| of the whole vector: that catches one
wrong entry. The whole vector's relative L2 error may reach ``l2``: that catches small
errors everywhere. The floor is of the whole vector, not of one tensor, because some
gradients (a convolution bias before batch norm) are zero but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on errors, and why they are what they are."""

    relative: float
    floor: float
    l2: float
    reason: str


LEDGER = {
    "exact": Tolerance(0, 0, 0, "the same operations in the same order"),
    "float64 pass": Tolerance(
        1e-9, 1e-12, 1e-12, "one pass: sums of up to 1e4 terms of eps 2.2e-16"
    ),
    "float64 product": Tolerance(
        1e-8, 1e-11, 1e-11, "a Hessian product: two passes, and divisions by the spread"
    ),
    "float64 chain": Tolerance(
        1e-7, 1e-10, 1e-10, "up to five products in a row, each amplifying the last"
    ),
    "float32 pass": Tolerance(
        1e-3, 1e-5, 1e-5, "one pass: sums of up to 1e4 terms of eps 1.2e-7"
    ),
    "float32 product": Tolerance(
        1e-2, 1e-4, 5e-5, "a Hessian product: two passes, and divisions by the spread"
    ),
    "float32 chain": Tolerance(
        1e-2, 3e-4, 1e-4, "up to five products in a row, each amplifying the last"
    ),
    "split tf32 product": Tolerance(
        1e-4, 2e-6, 4e-7, "3xTF32: factors of 21 bits, sums in float32 by 32 terms"
    ),
    "tf32 product": Tolerance(
        0, 6e-3, 1e-3, "two factors of 10 bits of fraction: at most 2^-11 each"
    ),
    "bfloat16 product": Tolerance(
        0, 5e-2, 8e-3, "two factors of 7 bits of fraction: at most 2^-8 each"
    ),
    "differences": Tolerance(
        1e-6, 1e-7, 1e-7, "float64 differences: rounding over the step, 1e-16 / 1e-4"
    ),
}

Values = Tensor | Mapping[str, Tensor]


def assert_close(got: Values, want: Values, tolerance: str, problem: str) -> None:
    """Compares elementwise and by the relative L2 error of the whole vector.

    Args:
        got: a tensor, or tensors by name; names and shapes must match ``want``.
        want: the reference, of any floating dtype; compared in float64.
        tolerance: a row of the ledger.
        problem: what to blame in the message.
    """
    bounds = LEDGER[tolerance]
    got, want = _named(got), _named(want)
    assert list(got) == list(want) or set(got) == set(want), (
        f"{problem}: got tensors {sorted(got)}, expected {sorted(want)}"
    )
    for name, w in want.items():
        assert got[name].shape == w.shape, (
            f"{problem}: {name} has shape {list(got[name].shape)}, "
            f"expected {list(w.shape)}"
        )
        assert torch.isfinite(got[name]).equal(torch.isfinite(w)), (
            f"{problem}: {name} is not finite where it should be, or the reverse"
        )
    flat_want = torch.cat([_flat(w) for w in want.values()])
    flat_got = torch.cat([_flat(got[n]) for n in want])
    largest = flat_want.abs().max().item() if flat_want.numel() else 0.0
    for name, w in want.items():
        _check_elements(_flat(got[name]), _flat(w), largest, bounds, problem, name)
    error = (flat_got - flat_want).norm().item()
    allowed = bounds.l2 * flat_want.norm().item()
    assert error <= allowed or error < 1e-300, (
        f"{problem}: L2 error {error:.3e} of a vector of norm "
        f"{flat_want.norm().item():.3e}, allowed {allowed:.3e} ({tolerance}: "
        f"{bounds.reason})"
    )


def _check_elements(
    got: Tensor,
    want: Tensor,
    largest: float,
    bounds: Tolerance,
    problem: str,
    name: str,
) -> None:
    allowed = bounds.relative * want.abs() + bounds.floor * largest
    excess = (got - want).abs() - allowed
    if not excess.numel() or excess.max() <= 0:
        return
    i = int(excess.argmax())
    count = f"{int((excess > 0).sum())} of {excess.numel()}"
    raise AssertionError(
        f"{problem}: {name}[{i}] is {got[i].item():.12g}, expected "
        f"{want[i].item():.12g}; off by {abs(got[i] - want[i]).item():.3e}, allowed "
        f"{allowed[i].item():.3e}; {count} entries are "
        f"off ({bounds.reason})"
    )


def _named(values: Values) -> dict[str, Tensor]:
    return {"value": values} if isinstance(values, Tensor) else dict(values)


def _flat(tensor: Tensor) -> Tensor:
    """Finite entries in float64; where others are is compared beforehand."""
    flat = tensor.detach().double().cpu().flatten()
    return torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
