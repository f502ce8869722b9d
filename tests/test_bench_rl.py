"""The benchmark of reinforcement learning computes the same as its peer."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gymnasium")
from bench import report, rl, rl_envs, rl_report  # noqa: E402


def test_the_peer_computes_the_same(tmp_path):
    out = tmp_path / "rl.json"
    rl.main(
        [
            *("--experiment", "navigation", "--tasks", "3", "--episodes", "4"),
            *("--horizon", "25", "--rounds", "2", "--out", str(out)),
        ]
    )
    result = json.loads(out.read_text())
    assert 0 < result["updates"]["difference"] < 1e-4  # float32
    assert result["updates"]["ratio"] > 0
    row = result["iterations"]["fastmaml"]
    assert row["steps"] == 2 * 3 * 4 * 25 or row["steps"] < 600
    parts = row["sampling"] + row["processing"] + row["update"]
    assert parts == pytest.approx(row["seconds"], rel=0.5)
    assert rl_report.FAST in result["updates"]
    assert rl_report.FAST in result["iterations"]
    for row in result["iterations"].values():
        assert row["update_share"] == pytest.approx(row["update"] / row["seconds"])
    assert result["simulation"] == {} and result["kind"] == "rl"
    assert report.newest(tmp_path, kind="rl") == out
    assert report.newest(tmp_path) is None
    assert "env-steps" not in rl_report.rl_section(result, out.name)


def test_locomotion_is_simulated_as_in_the_bench_of_environments(monkeypatch):
    from fastmaml.recipes import recipe

    measured = []

    def measure(case, rows, threads, plan):
        measured.append((case, rows, plan.rounds))
        return {"fastmaml": None}

    monkeypatch.setattr(rl_envs, "measure", measure)
    for name in ("cheetah-vel", "ant-goal"):
        assert rl.simulation(recipe(name).from_preset("paper"), 60, 3)
    assert rl.simulation(recipe("navigation").from_preset("paper"), 60, 3) == {}
    assert measured == [("cheetah-finn2017", 60, 3), ("ant-finn2017", 60, 3)]


def _result() -> dict:
    def row(update: float) -> dict:
        parts = {"sampling": 0.8, "processing": 0.2, "update": update}
        seconds = sum(parts.values())
        return {**parts, "seconds": seconds, "sampled_steps_per_second": 450.0}

    speeds = {"fastmaml": 480.0, "mujoco.batch": 500.0, "gymnasium loop": 50.0}
    return {
        "kind": "rl",
        "device": "cpu",
        "quick": False,
        "date": "2001-02-03T00:00:00+00:00",
        "commit": "0123456789ab",
        "command": "python -m bench.rl",
        "machine": {"cpu": "Some CPU", "cores": 2},
        "experiment": "cheetah-dir",
        "tasks": 40,
        "episodes": 20,
        "horizon": 200,
        "updates": {"torch.func": [19.0, 9.0, 10.0]},
        "iterations": {"fastmaml": row(1.0), "fastmaml, a tenth": row(0.25)},
        "simulation": {
            name: {"steps_per_second": {"median": speed}}
            for name, speed in speeds.items()
        },
    }


def test_shares_are_of_the_iteration_and_of_mujoco():
    result = _result()
    rl.shares(result["iterations"], result["simulation"])
    ours = result["iterations"]["fastmaml"]
    assert ours["update_share"] == pytest.approx(0.5)
    assert ours["sampling_of_mujoco"] == pytest.approx(0.9)


def test_the_report_tells_seconds_shares_and_rates():
    lines = rl_report.rl_section(_result(), "bench/results/rl.json").splitlines()
    assert "| fastmaml | 0.80 | 0.20 | 1.00 | 2.00 | 50% |" in lines
    assert "| fastmaml, a tenth | 0.80 | 0.20 | 0.25 | 1.25 | 20% |" in lines
    assert "| torch.func | 0.80 | 0.20 | 10.00 | 11.00 | 91% |" in lines
    assert "| fastmaml, policy included | 450 | 90% |" in lines
    assert "| fastmaml, steps alone | 480 | 96% |" in lines
    assert "| gymnasium loop | 50 | 10% |" in lines
    assert "[bench/results/rl.json](bench/results/rl.json)" in lines[-1]


def test_the_report_says_what_fast_means_where_it_was_measured():
    result = _result()
    assert "fast`" not in rl_report.rl_section(result, "rl.json")
    row = result["iterations"]["fastmaml, a tenth"]
    result["iterations"]["fastmaml, fast"] = {**row, "update": 0.5}
    text = rl_report.rl_section(result, "rl.json")
    assert "| fastmaml, fast | 0.80 | 0.20 | 0.50 | 1.50 | 33% |" in text
    assert "`fast`: as of `--preset fast`, three products of every twentieth" in text


def test_the_peer_may_be_left_out(tmp_path):
    out = tmp_path / "rl.json"
    words = "--experiment navigation --tasks 2 --episodes 2 --horizon 9 --rounds 2"
    rl.main([*words.split(), "--no-peer", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [*result["updates"]] == [*result["iterations"]]
    text = rl_report.rl_section(result, out.name)
    assert "torch.func" not in text and "peer" not in text.replace("--no-peer", "")
