"""The benchmark counts, compares and reports correctly; nothing here takes times."""

import copy
import json
import sys
from pathlib import Path

import oracles
import pytest
import torch
from torch import nn

from fastmaml import Rates, quick_bench

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import contenders, cost, facts, memory, peers, report, targets  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402

NAMES = sorted(WORKLOADS)


def small(name, **sizes):
    workload = WORKLOADS[name]
    samples = {"support": min(workload.support, 10), "query": min(workload.query, 10)}
    return workload.resized(**{"tasks": 2, **samples, **sizes})


# -- cost ---------------------------------------------------------------------------


def test_forward_cost_of_a_hand_counted_network():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),  # 4 x 4 outputs: 16 * 3 * 9 * 2
        nn.ReLU(),
        nn.Conv2d(3, 6, 2, groups=3),  # 3 x 3 outputs: 9 * 6 * 4 * 3 / 3
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    forward = cost.forward_cost(model, torch.rand(7, 2, 8, 8))
    assert forward == cost.Forward(total=864 + 216 + 270, first=864)


def test_meta_gradient_of_a_hand_counted_network():
    """F = 10 + 20, F1 = 10: a gradient 80, a product 140."""
    forward = cost.Forward(total=30, first=10)
    macs = cost.meta_gradient_macs(forward, tasks=2, support=3, query=4, steps=5)
    assert macs == 2 * (5 * 3 * (80 + 140) + 4 * 80)


@pytest.mark.parametrize(
    "name, gflop",
    [
        ("sinusoid-1", 0.010),
        ("sinusoid-5", 0.040),
        ("omniglot-conv-1", 10.0),
        ("omniglot-conv-5", 39.9),
        ("omniglot-fc", 0.56),
        ("mini-imagenet", 88.7),
        ("policy", 44.5),
    ],
)
def test_workloads_cost_what_they_are_known_to(name, gflop):
    assert cost.cost(WORKLOADS[name]).flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_bytes_of_the_sinusoid():
    spent = cost.cost(WORKLOADS["sinusoid-5"])
    parameters = 4 * (40 + 40 + 1600 + 40 + 40 + 1)
    assert spent.parameter_bytes == parameters
    assert spent.data_bytes == 25 * 20 * 2 * 4
    assert spent.copies_bytes == 25 * 5 * parameters
    assert spent.bytes == spent.data_bytes + 2 * parameters


def test_percent_of_peak():
    assert cost.percent_of_peak(50, seconds=2.0, peak=100.0) == 25.0


# -- workloads and peers ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batches_repeat_and_differ(name):
    workload = small(name)
    one, same, other = workload.batch(1), workload.batch(1), workload.batch(2)
    assert torch.equal(one.support_x, same.support_x)
    assert torch.equal(one.query_y, same.query_y)
    assert not torch.equal(one.query_x, other.query_x)
    sizes = (len(one), one.support_size, one.query_size)
    assert sizes == (workload.tasks, workload.support, workload.query)


def oracle(workload, model, tasks):
    """The test suite's float64 answer, independent of everything in bench/."""
    problem = peers.make_problem(workload, model)
    rate = torch.tensor(workload.inner_lr, dtype=torch.float64)
    rates = Rates(rate, adapted=frozenset(problem.adapted))
    params = oracles.parameters(model)
    answer = oracles.meta_gradient(
        model, problem.loss, params, rates, tasks, workload.steps
    )
    return problem, params, answer


@pytest.mark.parametrize("name", NAMES)
def test_peers_agree_with_the_oracle(name):
    workload = small(name, query=5)
    if name == "mini-imagenet":
        workload = workload.resized(tasks=1, support=5, steps=2)
    model = copy.deepcopy(workload.model()).double()
    tasks = workload.batch().to(dtype=torch.float64)
    problem, params, answer = oracle(workload, model, tasks)
    for peer in ("autograd loop", "vmap of grad", "vmap, HVP chain"):
        loss, gradients = peers.PEERS[peer](problem)(params, tasks)
        torch.testing.assert_close(loss, answer.loss, rtol=1e-9, atol=1e-12)
        assert peers.error(gradients, answer.gradients) < 1e-8, peer
    _, gradients = peers.reference(problem, params, tasks)
    assert peers.error(gradients, answer.gradients) < 1e-8


@pytest.mark.parametrize("name", ["sinusoid-1", "omniglot-fc", "policy"])
def test_jax_peers_agree_with_the_reference(name):
    pytest.importorskip("jax")
    workload, batch = small(name), small(name).batch()
    model = workload.model()
    problem = peers.make_problem(workload, model)
    _, want = peers.reference(problem, dict(model.named_parameters()), batch)
    for peer in ("JAX jit vmap", "JAX, HVP chain"):
        contender = contenders.make(workload, peer)
        _, got = contender.meta_gradient(contender.prepare(batch))
        assert peers.error(contender.gradients(got), want) < 1e-4, peer


@pytest.mark.parametrize("name", ["sinusoid-1", "omniglot-fc"])
@pytest.mark.parametrize("entrant", ["fastmaml (functional engine)", "vmap of grad"])
def test_contenders_compute_the_gradient_and_move_by_adam(name, entrant, monkeypatch):
    monkeypatch.setattr(contenders, "OUTER_RATE", 1e-3)
    workload, batch = small(name), small(name).batch()
    model = workload.model()
    problem = peers.make_problem(workload, model)
    _, want = peers.reference(problem, dict(model.named_parameters()), batch)
    contender = contenders.make(workload, entrant)
    _, got = contender.meta_gradient(contender.prepare(batch))
    assert peers.error(contender.gradients(got), want) < 1e-4
    before, _ = contender.meta_gradient(batch)
    for _ in range(20):
        contender.meta_step(batch)
    after, _ = contender.meta_gradient(batch)
    assert after < before


def test_error_is_relative_to_the_whole_gradient():
    want = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 0.0])}
    got = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 0.5])}
    assert peers.error(got, want) == pytest.approx(0.1)


def test_long_compiles_are_opt_in():
    workload, name = WORKLOADS["mini-imagenet"], "vmap + torch.compile"
    assert "--compile-all" in contenders.reason_to_skip(workload, name, False)
    assert contenders.reason_to_skip(workload, name, True) is None


# -- memory and facts ---------------------------------------------------------------


def test_memory_is_that_of_the_fresh_process_alone():
    """``ru_maxrss`` would start from this process's own peak."""
    block = torch.ones(192 * 2**20)  # 768 MiB
    run = memory.measure("sinusoid-1", "vmap of grad", 1, limit=120)
    assert 2**25 < run["before"] <= run["peak"] < memory.peak_bytes()
    assert run["peak"] < block.nbytes


def test_memory_states_why_a_case_is_missing():
    run = memory.measure("sinusoid-1", "nobody", 1, limit=120)
    assert "nobody" in run["skipped"]


def test_parameter_copies_of_the_memory_row():
    copies = memory.copies("sinusoid-1", (1, 5, 20))
    assert copies["parameters"] == 4 * 1761
    assert copies["growth"] == 19 * 25 * 4 * 1761


def test_results_name_no_folders():
    text = facts.without_paths("No such file: '/somewhere/deep/file.so' (a/b)")
    assert text == "No such file: 'file.so' (a/b)"
    assert str(ROOT) not in json.dumps(facts.collect())


# -- report -------------------------------------------------------------------------


def entry(milliseconds, ratio):
    spread = {"lower": milliseconds, "upper": milliseconds, "samples": 5}
    times = {"median": milliseconds, **spread, "ratio": {"median": ratio}}
    return {
        "error": 2e-7,
        "meta_gradient": times,
        "meta_step": times,
        "percent_of_peak": 12.34,
    }


def synthetic(date="2001-02-03T00:00:00+00:00", milliseconds=0.1234, quick=False):
    runs = {"1": {"peak": 100 * 2**20}, "20": {"peak": 130 * 2**20}}
    return {
        "quick": quick,
        "date": date,
        "device": "cpu",
        "commit": "0123456789ab",
        "modified": False,
        "command": "python -m bench.run",
        "machine": {"cpu": "Some CPU", "threads": 2, "torch_capability": "AVX2"},
        "versions": {"torch": "9.9", "jax": None},
        "peak": {"matrix_flops": 3.4e11},
        "workloads": {
            "w": {
                "title": "a network",
                "work": "2 × (3, 4), 1 step",
                "contenders": {
                    "slow peer": entry(1234.5, 9999.0),
                    "fastmaml": entry(milliseconds, 1.0),
                    "good peer": entry(1.2, 9.87),
                },
                "skipped": {"absent peer": "not installed"},
            }
        },
        "memory": {
            "workload": "w",
            "steps": [1, 20],
            "copies": {"growth": 40 * 2**20, "growth_per_worker": 2**20},
            "contenders": {"fastmaml": {"runs": runs, "growth": 30 * 2**20}},
        },
    }


@pytest.fixture
def checkout(tmp_path):
    """A README with markers and one result; returns what runs the report on them."""
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{report.BEGIN}\nold\n{report.END}\nbottom\n")
    (tmp_path / "first.json").write_text(json.dumps(synthetic()))
    places = ["--results", str(tmp_path), "--readme", str(readme)]
    return tmp_path, lambda *extra: report.main([*places, *extra])


def test_report_writes_once_and_then_agrees(checkout):
    folder, run = checkout
    assert run("--check") == 1
    assert run() == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("top\n") and text.endswith("\nbottom\n")
    assert "old" not in text
    assert run("--check") == 0 and run() == 0
    assert (folder / "README.md").read_text() == text


def test_report_states_times_ratio_share_memory_and_source(checkout):
    folder, run = checkout
    run()
    text = (folder / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a network"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    work = ["a network", "2 × (3, 4), 1 step"]
    assert cells == [*work, "**0.123**", "1,234", "1.20", "9.87×", "9.87×", "12"]
    assert "| fastmaml | 100 | 130 | 30 |" in text
    assert "of all tasks* |  |  | 40 |" in text
    assert "one task a thread* |  |  | 1 |" in text
    assert "absent peer (not installed)" in text
    for fact in ("340 GFLOP/s", "Some CPU", "0123456789ab", "first.json", "2001-02-03"):
        assert fact in text


def test_report_takes_the_newest_full_cpu_result(checkout):
    folder, _ = checkout
    later = "2002-01-01T00:00:00+00:00"
    (folder / "a.json").write_text(json.dumps(synthetic(later, quick=True)))
    gpu = {**synthetic(later), "device": "cuda"}
    (folder / "b.json").write_text(json.dumps(gpu))
    assert report.newest(folder) == folder / "first.json"
    (folder / "c.json").write_text(json.dumps(synthetic(later)))
    assert report.newest(folder) == folder / "c.json"


def test_report_shows_the_newest_result_of_each_other_processor_in_short(checkout):
    folder, run = checkout
    dates = {"old": "1999-01-01", "new": "2000-01-01"}
    for name, date in dates.items():
        result = synthetic(f"{date}T00:00:00+00:00", milliseconds=7.77)
        result["machine"] = {**result["machine"], "cpu": "Other CPU"}
        (folder / f"{name}.json").write_text(json.dumps(result))
    assert run() == 0
    text = (folder / "README.md").read_text()
    assert text.index("**0.123**") < text.index("On Other CPU, 2 threads (2000-01-01")
    assert "| w | 7.77 | good peer | 1.20 | 9.87× | – | – |" in text
    assert "new.json" in text and "1999-01-01" not in text
    assert "On Some CPU" not in text


def test_a_new_result_makes_the_readme_stale(checkout):
    folder, run = checkout
    run()
    newer = synthetic("2003-01-01T00:00:00+00:00", milliseconds=0.2)
    (folder / "second.json").write_text(json.dumps(newer))
    assert run("--check") == 1
    assert run() == 0 and run("--check") == 0


def test_a_readme_without_markers_is_refused(checkout, capsys):
    folder, run = checkout
    (folder / "README.md").write_text("nothing here")
    assert run() == 1
    assert report.BEGIN in capsys.readouterr().err


def test_figures_are_drawn(checkout):
    folder, run = checkout
    assert run("--figures", str(folder / "figures")) == 0
    for name in ("speed.png", "memory.png"):
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "value, shown",
    [(0.01234, "0.0123"), (9.996, "10.0"), (1234.5, "1,234"), (0.5, "0.500"), (0, "0")],
)
def test_digits(value, shown):
    assert targets.digits(value) == shown


# -- fastmaml bench -----------------------------------------------------------------


def test_quick_bench_contenders_compute_the_same():
    for case in quick_bench.CASES:
        model = case.build()
        tasks = quick_bench._batch(case)[:2]
        got = quick_bench._torch_func_call(case, model, tasks)()
        kept = quick_bench.models.batch_norm_parameters(model)
        learner = quick_bench.MAML(
            model,
            loss=case.loss,
            inner_lr=case.inner_lr,
            inner_steps=case.steps,
            adapted=lambda name, kept=kept: name not in kept,
            engine="functional",
        )
        learner.meta_loss(tasks).backward()
        want = {n: p.grad.double() for n, p in model.named_parameters()}
        assert peers.error(got, want) < 1e-4


def test_quick_bench_prints_a_row_a_case():
    rows = [
        quick_bench.Row("one", 0.5, 2.0),
        quick_bench.Row("two", None, 3.0),
    ]
    head, first, second = quick_bench.table(rows).splitlines()
    assert "native" in head
    assert first.split() == ["one", "0.500", "ms", "2.000", "ms", "4.0x"]
    assert second.split() == ["two", "-", "3.000", "ms", "-"]
