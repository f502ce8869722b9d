"""The benchmark of reinforcement learning takes the same step as its peer."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gymnasium")
from bench import rl  # noqa: E402


def test_the_peer_takes_the_same_step(tmp_path):
    out = tmp_path / "rl.json"
    rl.main(
        [
            *("--experiment", "navigation", "--tasks", "3", "--episodes", "4"),
            *("--horizon", "25", "--rounds", "2", "--out", str(out)),
        ]
    )
    result = json.loads(out.read_text())
    # float32 products, ten iterations of an ill-conditioned system
    assert result["updates"]["difference"] < 0.1
    assert result["updates"]["ratio"] > 0
    row = result["iterations"]["fastmaml"]
    assert row["steps"] == 2 * 3 * 4 * 25 or row["steps"] < 600
    parts = row["sampling"] + row["processing"] + row["update"]
    assert parts == pytest.approx(row["seconds"], rel=0.5)
