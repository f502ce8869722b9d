"""The figure of recorded agents, and the README's section that shows it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import agents, record_run, results_table, stamps  # noqa: E402


def evaluation(method: str, *returns: float, **more: Any) -> dict[str, Any]:
    """What a run was evaluated to, as it stands in a recorded file."""
    return {
        "experiment": "navigation",
        "preset": "paper",
        "method": method,
        "horizon": 100,
        "tasks": 40,
        "episodes": 20,
        "returns": list(returns),
        "returns_interval": [1.0] * len(returns),
        **more,
    }


def run(method: str, *returns: float, **more: Any) -> dict[str, Any]:
    return {
        "experiment": "2D navigation",
        "command": "fastmaml train navigation",
        "published": "-40.41 / -11.68",
        "measure": "returns",
        "steps": [0],
        "evaluation": evaluation(method, *returns, **more),
        "curve": [
            {"iteration": 20 * (i + 1), "returns": list(returns)} for i in range(3)
        ],
        "seconds": 3.0,
        "machine": "two cores",
        "commit": "abc",
        "date": "2020-01-01",
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A README and two recorded runs."""
    begin, end = results_table.BEGIN, results_table.END
    (tmp_path / "README.md").write_text(f"above\n{begin}\n{end}\nbelow\n")
    write(tmp_path, "navigation", run("maml", -40.0, -10.0, -4.0))
    write(tmp_path, "cheetah", run("maml", 1.0, 2.0, experiment="cheetah-dir"))
    return tmp_path


def write(root: Path, name: str, content: dict[str, Any]) -> None:
    folder = root / "bench" / "results" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def check(root: Path, capsys: Any) -> tuple[int, str]:
    capsys.readouterr()
    code = results_table.main(["--check"], root)
    return code, capsys.readouterr().err


def test_the_readme_shows_the_figure_of_its_runs(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(checkout, capsys)
    assert code == 1 and "README.md: stale" in said and "agents.png: missing" in said
    assert results_table.main(["--figures"], checkout) == 0
    assert check(checkout, capsys) == (0, "")
    text = (checkout / "README.md").read_text()
    assert "](bench/results/figures/agents.png)\n" in text
    assert text.startswith("above\n") and text.endswith("\nbelow\n")
    figure = checkout / "bench" / "results" / "figures" / "agents.png"
    folder = checkout / "bench" / "results" / "training"
    assert stamps.read(figure) == stamps.stamp(results_table.recorded(folder))
    # the figures of the benchmark are checked without it
    assert stamps.stale(figure.parent, {}) == []


def test_a_figure_of_other_runs_fails_the_check(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results_table.main(["--figures"], checkout)
    write(checkout, "waves", run("maml", -1.0) | {"measure": "loss"})
    path = checkout / "bench" / "results" / "training" / "waves.json"
    content = json.loads(path.read_text())
    content["evaluation"] |= {
        "loss": [1.0],
        "loss_interval": [0.1],
        "queries": 10,
        "transductive": True,
    }
    path.write_text(json.dumps(content))
    results_table.main([], checkout)
    assert check(checkout, capsys) == (0, ""), "not a run of an agent"
    changed = run("maml", -40.0, -10.0, -4.0)
    changed["curve"][1]["returns"][1] = -11.0
    write(checkout, "navigation", changed)
    code, said = check(checkout, capsys)
    assert code == 1 and said.startswith("agents.png: drawn from other runs")
    for file in path.parent.glob("*.json"):
        file.unlink()
    results_table.main([], checkout)
    code, said = check(checkout, capsys)
    assert code == 1 and "agents.png: drawn from no run there is" in said
    assert results_table.main(["--fast"], checkout) == 2


def test_a_row_of_panels_for_each_experiment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = []
    monkeypatch.setattr(agents.plt, "close", drawn.append)
    runs = {
        "oracle": run("oracle", -0.5) | {"curve": []},
        "maml": run("maml", -40.0, -10.0, -4.0),
        "vel": run("maml", 1.0, 2.0, experiment="cheetah-vel", horizon=200),
        "dir": run("maml", 1.0, 2.0, experiment="cheetah-dir", horizon=200),
    }
    agents.draw(runs, tmp_path / "agents.png")
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        "2D navigation",
        "validation as maml trains",
        "half-cheetah, forward/backward",
        "validation as dir trains",
        "half-cheetah, velocity",
        "validation as vel trains",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for line in shown[0].get_lines()}
    assert lines == {
        "MAML": [-40.0, -10.0, -4.0],
        "oracle": [-0.5, -0.5],
        "paper, MAML": [-40.41, -11.68, -3.33],
    }
    lines = {line.get_label(): list(line.get_ydata()) for line in shown[1].get_lines()}
    assert lines["held-out tasks, after 2 steps"] == [-4.0] * 3
    assert [t.get_text() for t in shown[1].get_legend().get_texts()] == [
        "before adapting",
        "after 1 step",
        "after 2 steps",
    ]
    assert "paper, MAML" not in {line.get_label() for line in shown[4].get_lines()}


def test_the_preset_fast_has_the_papers_tasks() -> None:
    more = {"experiment": "cheetah-dir", "horizon": 200}
    runs = {
        "paper": run("maml", 1.0, 2.0, **more),
        "fast": run("maml", 1.0, 2.0, preset="fast", **more),
        "gym": run("maml", 1.0, 2.0, preset="gym", **more),
    }
    found = [{*group} for group in agents.groups(runs).values()]
    assert {"paper", "fast"} in found and {"gym"} in found


def test_published_returns_stand_beside_those_in_their_units() -> None:
    assert agents._known("navigation", "paper", 100)[0] == -40.41
    assert agents._known("navigation", "paper", 20) == ()
    assert agents._known("cheetah-dir", "gym", 100) == ()


def test_a_method_is_shown_once() -> None:
    beside = [
        evaluation("pretrained", -41.0, -20.0, run="pre"),
        evaluation("random", -70.0, -69.0, run="rand"),
    ]
    group = {
        "maml": run("maml", -40.0, -10.0, compared=beside),
        "longer": run("pretrained", -40.5, -19.0),
    }
    found = agents.records(group)
    assert [(r["method"], r["run"]) for r in found] == [
        ("maml", "maml"),
        ("pretrained", "longer"),
        ("random", "rand"),
    ]
    assert [list(g) for g in agents.groups(group).values()] == [["maml", "longer"]]


def test_recording_keeps_comparisons_and_intervals(tmp_path: Path) -> None:
    known = {"returns": [1.0], "interval": [0.5], "method": "oracle"}
    beside = known | {"run": "/somewhere/else/oracle"}
    written = known | {"compared": [beside]}
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    rows = [
        {"kind": "train", "iteration": 1, "returns": [0.0], "seconds": 1.0},
        {"kind": "validation", "iteration": 1, "returns": [2.0], "interval": [0.25]},
        {"kind": "validation", "iteration": 2, "returns": [3.0], "seconds": 2.0},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    options = argparse.Namespace(experiment="e", published="p", command="c", steps=[0])
    found = record_run.record(tmp_path, options)
    assert found["evaluation"]["compared"] == [
        {"returns": [1.0], "returns_interval": [0.5], "method": "oracle"}
        | {"run": "oracle"}
    ]
    assert found["curve"] == [
        {"iteration": 1, "returns": [2.0], "interval": [0.25]},
        {"iteration": 2, "returns": [3.0]},
    ]
    assert found["seconds"] == 2.0
