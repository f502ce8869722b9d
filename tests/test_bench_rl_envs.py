"""The bench of locomotion runs, counts rows, and leaves nothing behind."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

pytest.importorskip("mujoco.batch", reason="needs the extra fastmaml[rl]")

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, as in test_bench

from bench import rl_envs  # noqa: E402


@pytest.mark.parametrize("case", ["cheetah-finn2017", "ant-gym"])
def test_contenders_step_and_are_compared(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings where it runs
    out = tmp_path / "rl.json"
    quick = ["--rows", "6", "--rounds", "3", "--min-sample", "0.001", "--threads", "1"]
    rl_envs.main(["--out", str(out), "--cases", case, *quick])
    result = json.loads(out.read_text())
    found = result["cases"][case]
    assert result["kind"] == "rl-envs"
    rows = {name: entry["rows"] for name, entry in found.items()}
    expected = {"fastmaml": 6, "mujoco.batch": 6, "gymnasium loop": 16}
    expected |= {"SyncVectorEnv": 16, "AsyncVectorEnv": 4}
    if case == "ant-gym":
        expected["mujoco.batch, fields read"] = 6
    assert rows == expected
    assert found["fastmaml"]["of mujoco.batch"]["median"] > 0
    assert "env-steps/s" in capsys.readouterr().out
    rl_envs.main(["--out", str(out), "--cases", case, "--resume", *quick])
    assert list(json.loads(out.read_text())["cases"]) == [case]
    assert not multiprocessing.active_children()
