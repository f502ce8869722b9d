"""Every run has a folder of its own, also beside runs of the same second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import TINY, environment

from fastmaml import cli
from fastmaml.recipes.folder import new_folder

SECOND = """
import sys, time
time.strftime = lambda *_: "20260102-030405"
from fastmaml.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line in a second that does not pass."""
TINIEST = ("--iterations", "1", "--test-tasks", "0", "--no-plots", "--no-progress")


def test_two_runs_started_at_once_share_no_folder(tmp_path: Path) -> None:
    words = ["train", "sinusoid", *TINY["sinusoid"], *TINIEST]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SECOND, *words, "--seed", str(seed)],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert folders == ["sinusoid-20260102-030405", "sinusoid-20260102-030405-2"]
    for seed, out in enumerate(told):
        folder = tmp_path / out.split("run: ")[1].split("\n")[0]
        assert f'"seed": {seed}' in (folder / "settings.json").read_text()
        assert (folder / "last.pt").is_file()


def test_a_taken_name_gets_the_next_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    names = [new_folder(tmp_path / "runs", "x").name for _ in range(3)]
    assert names == ["x-now", "x-now-2", "x-now-3"]


def test_a_refused_run_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "sinusoid", "--meta-batch", "0"]) != 0
    assert not list(tmp_path.iterdir())
