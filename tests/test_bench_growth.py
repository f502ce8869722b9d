"""Growth, figures, targets, training steps and the workshop; nothing takes times."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmaml import _native

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import (  # noqa: E402
    contenders,
    figures,
    growth,
    report,
    run,
    stamps,
    targets,
    timing,
)
from bench.workloads import WORKLOADS  # noqa: E402

needs_native = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the native engine is not built"
)


def small(name, **sizes):
    workload = WORKLOADS[name]
    samples = {"support": min(workload.support, 10), "query": min(workload.query, 10)}
    return workload.resized(**{"tasks": 2, **samples, **sizes})


# -- training steps -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinusoid-1", "omniglot-conv-1", "mini-imagenet"])
def test_training_draws_tasks_of_the_workloads_sizes(name):
    workload = small(name)
    sampler = workload.source(workload.support, workload.query)
    one, two = sampler.sample(workload.tasks), sampler.sample(workload.tasks)
    like = workload.batch()
    for tensor in ("support_x", "support_y", "query_x", "query_y"):
        assert getattr(one, tensor).shape == getattr(like, tensor).shape, tensor
    assert not torch.equal(one.support_x, two.support_x)


def test_a_training_step_moves_the_parameters(monkeypatch):
    monkeypatch.setattr(contenders, "OUTER_RATE", 1e-2)
    workload = small("sinusoid-1")
    contender = contenders.ours(workload, "functional")
    before, _ = contender.meta_gradient(workload.batch())
    for _ in range(30):
        contender.training_step()
    after, _ = contender.meta_gradient(workload.batch())
    assert after < before


def test_only_fastmaml_takes_training_steps():
    assert contenders.make(small("sinusoid-1"), "vmap of grad").training_step is None
    assert contenders.ours(small("policy"), "functional").training_step is None


def test_overhead_is_taken_within_rounds():
    step, bare = {0: 3e-3, 1: 9e-3, 2: 4e-3}, {0: 2e-3, 2: 2e-3}
    extra = run.overhead(step, bare)
    assert extra["microseconds"]["median"] == pytest.approx(1500)
    assert extra["percent"]["median"] == pytest.approx(75)


def test_a_run_states_training_steps_beside_meta_steps(monkeypatch):
    names = ["fastmaml (functional engine)", "vmap of grad"]
    monkeypatch.setattr(contenders, "names", lambda engines, chosen: names)
    options = run.parse(["--quick"])
    plan = timing.Plan(rounds=2, min_rounds=1, budget=0.1, min_sample=1e-4, pause=0)
    found = run.run_workload(small("sinusoid-1"), options, plan, lambda text: None)
    ours, peer = (found["contenders"][n] for n in names)
    assert ours["training_step"]["samples"] >= 1
    assert {"microseconds", "percent"} == set(ours["overhead"])
    assert "ratio" in peer["meta_step"] and "training_step" not in peer


# -- targets ------------------------------------------------------------------------


def speed(ratio=7.0, date="2001-02-03", **more):
    def row(median, ratio):
        return {
            "error": 1e-7,
            "meta_gradient": {"median": median, "ratio": {"median": ratio}},
            "meta_step": {"median": median, "ratio": {"median": ratio}},
            "percent_of_peak": 42.0,
        }

    mine = {
        **row(0.5, 1.0),
        "training_step": {"median": 0.6},
        "overhead": {"microseconds": {"median": 100.0}, "percent": {"median": 20.0}},
    }
    field = {"fastmaml": mine, "slow": row(9.0, 18.0), "good": row(3.5, ratio)}
    return {
        "quick": False,
        "date": date,
        "device": "cpu",
        "commit": "0123456789ab",
        "modified": False,
        "command": "python -m bench.run",
        "machine": {"cpu": "Some CPU", "threads": 2, "torch_capability": "AVX2"},
        "versions": {"torch": "9.9"},
        "peak": {"matrix_flops": 1e11},
        "workloads": {
            "sinusoid-1": {
                "title": "a network",
                "work": "2 x (3, 4), 1 step",
                "contenders": field,
                "skipped": {},
            }
        },
        **more,
    }


@pytest.mark.parametrize("ratio, met", [(7.0, "yes"), (6.0, "yes"), (5.9, "no")])
def test_targets_are_met_from_their_ratio_on(ratio, met):
    (standing,) = targets.of_result(speed(ratio))
    assert targets.cells(standing) == [
        "sinusoid-1",
        "0.500",
        "good",
        "3.50",
        f"{ratio:.2f}×",
        "6×",
        met,
        "42",
        targets.NONE,
        "60% of peak",
        "no",
        "0.600",
        "100 µs, 20%",
    ]


def test_every_workload_has_a_target():
    assert set(targets.TARGETS) == set(WORKLOADS)


def test_targets_without_peers_or_training_say_nothing():
    medians = {"policy": {"meta_gradient": {"fastmaml": 0.1}}, "other": {}}
    (standing,) = targets.of_medians(medians, {})
    assert standing.met is None and standing.peer is None
    assert targets.cells(standing)[2:5] == [targets.NONE] * 3


def test_the_readme_carries_the_targets():
    table = report.targets_table(speed())
    assert table.splitlines()[0].startswith("| workload | fastmaml, ms | best peer |")
    assert "| sinusoid-1 | 0.500 | good | 3.50 | 7.00× | 6× | yes |" in table
    assert table in report.section(speed(), "x.json")


@needs_native
def test_pytest_bench_ends_with_the_targets():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["bench/test_workloads.py", "-k", "sinusoid-1 and (fastmaml or HVP)"]
    command += ["--benchmark-warmup=off", "-o", "addopts="]
    # pytest-benchmark times nothing where pytest-xdist has left its mark
    foreign = ("PYTEST_XDIST", "PYTEST_ADDOPTS")
    env = {n: v for n, v in os.environ.items() if not n.startswith(foreign)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    head = next(i for i, x in enumerate(lines) if x.startswith("workload  "))
    row = re.split(r"  +", lines[head + 1])
    assert row[0] == "sinusoid-1" and row[2] in ("vmap, HVP chain", "JAX, HVP chain")
    assert row[5] == "6×" and "µs" in row[-1]


# -- growth -------------------------------------------------------------------------


def test_each_axis_changes_one_size():
    base = WORKLOADS["omniglot-conv-1"]
    assert growth.scaled(base, "tasks", 3).tasks == 3
    assert growth.scaled(base, "steps", 4).steps == 4
    sampled = growth.scaled(base, "samples", 10)
    assert (sampled.support, sampled.query, sampled.tasks) == (10, 10, base.tasks)
    assert growth.scaled(base, "width", 16).model()[0].out_channels == 16
    assert growth.scaled(base, "threads", 1) == base
    for name, axes in growth.VALUES.items():
        for axis, sizes in axes.items():
            for size in sizes[:1]:
                growth.scaled(WORKLOADS[name], axis, size).resized(tasks=1).batch()
        assert growth.BASE_WIDTH[name] in axes["width"]


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with growth.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_point_that_cannot_be_says_why():
    options = growth.parse(["--quick"])
    reason = growth.reason_against("sinusoid-1", "threads", 1, "JAX jit vmap", options)
    assert reason in (growth.ONE_POOL, "jax is not installed (pip install jax)")
    assert "nobody" in growth.attempt("sinusoid-1", "tasks", 1, "nobody", 120)


def test_growth_is_written_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setitem(growth.PEERS, "sinusoid-1", ("vmap of grad", "nobody"))
    out = tmp_path / "growth.json"
    arguments = ["--workloads", "sinusoid-1", "--axes", "tasks", "--quick"]
    options = growth.parse([*arguments, "--out", str(out), "--resume"])
    growth.run(options, lambda text: None)
    result = json.loads(out.read_text())
    entry = result["series"]["sinusoid-1"]["axes"]["tasks"]
    assert entry["values"] == [1, 4]
    assert entry["contenders"]["vmap of grad"]["4"]["median"] > 0
    assert "nobody" in entry["contenders"]["nobody"]["1"]["skipped"]
    monkeypatch.setattr(growth, "point", None)  # nothing is left to measure
    growth.run(options, lambda text: None)
    assert json.loads(out.read_text())["series"] == result["series"]


# -- figures ------------------------------------------------------------------------


def grown(date="2001-02-03"):
    def row(scale):
        return {
            str(v): {
                "median": scale * v,
                "lower": 0.9 * scale * v,
                "upper": 2 * scale * v,
            }
            for v in (1, 4)
        }

    field = {"fastmaml": row(1), "vmap of grad": {**row(5), "4": {"skipped": "why"}}}
    axes = {a: {"values": [1, 4], "contenders": field} for a in growth.AXES}
    series = {"title": "a network", "base": {"tasks": 4}, "axes": axes}
    runs = {"1": {"peak": 100 * 2**20}, "20": {"peak": 130 * 2**20}}
    memory = {
        "workload": "w",
        "steps": [1, 20],
        "contenders": {"fastmaml": {"runs": runs}},
    }
    return {
        "kind": "growth",
        "device": "cpu",
        "quick": False,
        "date": date,
        "series": {"sinusoid-1": series},
        "memory": memory,
    }


@pytest.fixture
def results(tmp_path):
    """A folder with a speed and a growth result; returns it and what reports on it."""
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    (tmp_path / "speed.json").write_text(json.dumps(speed()))
    (tmp_path / "growth.json").write_text(json.dumps(grown()))
    places = ["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    return tmp_path, lambda *extra: report.main([*places, *extra])


def test_figures_carry_their_source_and_stand_in_the_readme(results):
    folder, main = results
    assert main("--figures", str(folder / "figures")) == 0
    names = {"speed.png", "growth-sinusoid-1.png", "memory.png"}
    assert {p.name for p in (folder / "figures").iterdir()} == names
    assert stamps.read(folder / "figures" / "speed.png") == stamps.stamp(speed())
    assert stamps.read(folder / "figures" / "memory.png") == stamps.stamp(grown())
    text = (folder / "README.md").read_text()
    assert all(f"(figures/{name})" in text for name in names)
    assert main("--check") == 0


def test_a_figure_of_another_result_fails_the_check(results, capsys):
    folder, main = results
    main("--figures", str(folder / "figures"))
    (folder / "newer.json").write_text(json.dumps(grown("2001-02-04")))
    assert main("--check") == 1
    assert "growth-sinusoid-1.png: drawn from another result" in capsys.readouterr().err
    assert main("--figures", str(folder / "figures")) == 0 and main("--check") == 0


def test_missing_and_unknown_figures_fail_the_check(results, capsys):
    folder, main = results
    main("--figures", str(folder / "figures"))
    (folder / "figures" / "speed.png").rename(folder / "figures" / "old.png")
    main()
    assert main("--check") == 1
    errors = capsys.readouterr().err
    assert "speed.png: missing" in errors and "old.png: drawn from no result" in errors


def test_a_plain_file_has_no_stamp(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert stamps.read(tmp_path / "a.png") is None
    assert stamps.read(tmp_path / "b.png") is None


def test_labels_are_spread_in_order():
    assert figures._spread([0.5, 0.1], 0.2) == [0.5, 0.1]
    one, two, three = figures._spread([0.5, 0.51, 0.49], 0.1)
    assert three < one < two
    assert two - one == pytest.approx(0.1, abs=1e-3)
    assert one - three == pytest.approx(0.1, abs=1e-3)


def test_growth_and_layers_are_no_speed_results(results):
    folder, _ = results
    late = {**speed(date="2009-01-01"), "kind": "layers"}
    (folder / "layers.json").write_text(json.dumps(late))
    assert report.newest(folder) == folder / "speed.json"
    assert report.newest(folder, kind="growth") == folder / "growth.json"


# -- workshop -----------------------------------------------------------------------


def test_experiments_state_question_prediction_outcome_and_decision():
    folder = ROOT / "bench" / "workshop"
    index = (folder / "README.md").read_text()
    experiments = sorted(folder.glob("[0-9]*.py"))
    assert [int(p.name[:3]) for p in experiments] == list(
        range(1, len(experiments) + 1)
    )
    for path in experiments:
        words = ast.get_docstring(ast.parse(path.read_text()))
        parts = re.findall(r"^(\w+):$", words, re.MULTILINE)
        assert parts == ["Question", "Prediction", "Outcome", "Decision"], path.name
        assert f"]({path.name})" in index


def test_figures_name_who_has_no_point(tmp_path, monkeypatch):
    from bench import figures

    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, *_: drawn.append(figure))
    there = {"1": {"lower": 1.0, "median": 1.0, "upper": 1.0}}
    field = {"fastmaml": there, "JAX jit vmap": {"1": {"skipped": "one pool"}}}
    axes = {
        "threads": {"values": [1], "contenders": field},
        "tasks": {"values": [1], "contenders": {"fastmaml": there}},
    }
    series = {"title": "a network", "base": {"tasks": 1}, "axes": axes}
    figures._growth(series, tmp_path / "x.png", {})
    left = [panel.get_title(loc="left") for panel in drawn[0].axes]
    assert left == ["left out: JAX jit vmap", ""]
