"""Gains of trust-region steps are differences of surrogates, of any trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest
from rl_problem import problem, restated

from fastmaml.train.checkpoint import CheckpointError

pytest.importorskip("gymnasium")
from bench import trust_region  # noqa: E402


@pytest.mark.parametrize("preconditioned", [False, True])
def test_gains_are_of_the_trajectories_that_are_asked(preconditioned: bool) -> None:
    p = problem()
    own = p.objective()
    here, (again, thin) = trust_region.gains(
        own,
        [p.objective(), p.objective(2)],
        3,
        preconditioned=preconditioned,
        max_kl=0.01,
        damping=1e-3,
    )
    assert here == again == thin > 0  # the surrogate always sees all samples
    assert own.loss == pytest.approx(float(restated(p, own.theta)[0].detach()))


def test_all_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--experiment navigation --tasks 3 --episodes 4 --horizon 20".split()
    trust_region.main([*words, "--held-out", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(trust_region.ROWS)
    assert lines[-1].startswith("preconditioned, 3 products: gain 0.")


def test_a_checkpoint_is_the_policy(tmp_path: Path) -> None:
    words = ["--experiment", "navigation", "--tasks", "2", "--episodes", "2"]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trust_region.main([*words, "--checkpoint", f"{tmp_path}/none.pt"])
