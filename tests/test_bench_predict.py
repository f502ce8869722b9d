"""The prediction for a GPU follows from what is recorded, and from nothing else."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import cost, launches, predict, prediction_table, report  # noqa: E402
from bench.launches import Launch  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402
from fastmaml.engines.placement import missing  # noqa: E402

records = pytest.mark.skipif(
    missing(launches.BACKEND) is not None, reason=str(missing(launches.BACKEND))
)

ROUND = predict.Machine(
    bandwidth=1e12,
    fp32=1e13,
    tf32=4e13,
    mma_share=0.75,
    multiprocessors=10,
    overhead=2e-6,
    early=5e-7,
    latency=1e-6,
    in_flight=16,
)
FULL = Launch("k", "", "a b", 80, 256, 0, bytes=2_000_000, flops=0)


# -- the model ----------------------------------------------------------------------


def test_a_launch_by_hand():
    """80 blocks of 256 threads are all resident: 16 bytes each are 328 kB in 1 µs."""
    assert predict.resident_blocks(FULL, 32) == 8
    memory = 2e6 / (80 * 256 * 16 / 1e-6)
    assert predict.seconds(FULL, 32, ROUND) == pytest.approx(2e-6 + memory)
    wide = replace(ROUND, in_flight=64)  # 1.3 MB in 1 µs: memory itself is the bound
    assert predict.seconds(FULL, 32, wide) == pytest.approx(2e-6 + 2e-6)
    both = replace(FULL, loads=2)
    assert predict.parts(both, 32, ROUND)["memory"] == pytest.approx(memory / 2)
    busy = replace(FULL, flops=100_000_000)  # 10 µs at 10 TFLOP/s
    assert predict.seconds(busy, 32, ROUND) == pytest.approx(2e-6 + 1e-5)
    split = replace(busy, unit="3xtf32")  # 40 * 0.75 / 3 = 10 TFLOP/s
    assert predict.seconds(split, 32, ROUND) == pytest.approx(2e-6 + 1e-5)


def test_only_launches_behind_ours_begin_early():
    late = predict.seconds(FULL, 32, ROUND)
    early = predict.seconds(replace(FULL, early=True), 32, ROUND)
    assert late - early == pytest.approx(2e-6 - 5e-7)
    whole = cost.cost(WORKLOADS["sinusoid-1"])
    mean = (-1, "resident_mean_kernel<S>(P)", (13, 6, 1), 128, 0)
    found = launches.counted([], [mean] * 3, whole)
    assert [x.early for x in found] == [False, True, True]
    groups = predict.grouped(found)
    assert [g["count"] for g in groups] == [1, 2]
    row = predict.workload_row(groups, [], ROUND)
    assert row["overhead_ms"] == pytest.approx(1e3 * (2e-6 + 2 * 5e-7))
    (kernel,) = predict.kernel_rows(groups, [], ROUND)
    assert kernel["overhead_ms"] == pytest.approx(row["overhead_ms"])


def test_barriers_of_a_whole_task():
    """Of one step through three layers, of two steps through two, and one layer."""
    assert predict.resident_phases(3, 1) == 1 + 3 * 5
    assert predict.resident_phases(2, 2) == 1 + 5 * 3
    assert predict.resident_phases(1, 1) == 1 + 3 * 2


def test_a_grid_that_leaves_multiprocessors_idle():
    """Of 11 blocks on 10 multiprocessors one has two; 1 block leaves nine idle."""
    busy = replace(FULL, flops=100_000_000, bytes=0)
    times = {
        n: predict.parts(replace(busy, blocks=n), 32, ROUND)["arithmetic"]
        for n in (1, 10, 11, 20)
    }
    assert times[10] == pytest.approx(1e-5) == times[20]
    assert times[11] == pytest.approx(1e-5 * 20 / 11)
    assert times[1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [
        (16, 0, 8),
        (32, 0, 8),
        (33, 0, 6),
        (64, 0, 4),
        (255, 0, 1),
        (32, 56 << 10, 4),
        (32, 1024, 8),
    ],
)
def test_what_a_multiprocessor_holds(registers, shared, blocks):
    assert predict.resident_blocks(replace(FULL, shared=shared), registers) == blocks


@pytest.mark.parametrize("more", ["bytes", "flops"])
def test_more_work_takes_no_less_time(more):
    times = [
        predict.seconds(replace(FULL, **{more: n}), 64, ROUND)
        for n in (0, 10**6, 10**8, 10**10)
    ]
    assert times == sorted(times) and times[-1] > times[0]


@pytest.mark.parametrize("better", ["bandwidth", "in_flight", "fp32"])
def test_a_better_machine_is_no_slower(better):
    work = replace(FULL, flops=10**8, bytes=10**8)
    faster = replace(ROUND, **{better: 2 * getattr(ROUND, better)})
    assert predict.seconds(work, 64, faster) <= predict.seconds(work, 64, ROUND)


def test_registers_are_those_of_the_greediest_instance():
    compiled = [
        {"name": "k<float, 1>", "registers": 40, "arch": "sm_90", "file": "a.cu"},
        {"name": "k<float, 2>", "registers": 50, "arch": "sm_90", "file": "a.cu"},
        {"name": "k<double, 2>", "registers": 90, "arch": "sm_90", "file": "a.cu"},
        {"name": "k<float, 3>", "registers": 80, "arch": "sm_80", "file": "a.cu"},
        {
            "name": "k<float, 4>",
            "registers": 60,
            "arch": "sm_90",
            "file": "bilinear_inputs.cu",
        },
    ]
    assert predict.registers_of(FULL, compiled[:4]) == 50
    inputs = replace(FULL, form="inputs")
    assert predict.registers_of(inputs, compiled) == 60
    assert predict.registers_of(replace(FULL, kernel="other"), compiled) == 255


def test_registers_of_a_norm_are_those_of_its_pass():
    compiled = [
        {
            "name": f"norm_kernel<float, 4, {i}, {last}>",
            "registers": 40 + 10 * i + (last == "2"),
            "arch": "sm_90",
            "file": "norm.cu",
        }
        for i in range(4)
        for last in "02"
    ]
    for name, registers in (
        ("forward", 41),
        ("backward", 51),
        ("tangent_backward", 71),
    ):
        launch = replace(FULL, kernel=f"norm {name}")
        assert predict.registers_of(launch, compiled) == registers


# -- counting -----------------------------------------------------------------------


def facts(**changes):
    zero = dict.fromkeys(
        ("relu", "relu_input", "own_w", "tw", "tx", "dx", "dw", "tdx", "tdw", "base"), 0
    )
    sizes = {"tasks": 2, "samples": 3, "in": 5, "out": 7, "parameters": 48, "saved": 0}
    channels = {"channels_in": 5, "channels_out": 7, "multiply_adds": 35, "parts": 1}
    channels |= {"pooled": 0}
    return {**zero, **sizes, **channels, **changes}


def test_a_linear_layer_by_hand():
    """T = 2, N = 3, 5 -> 7 features; x 30, y 42 elements, 2 * 2 * 3 * 35 = 420."""
    (forward,) = launches.shares(("bilinear", "forward", facts()))
    assert (forward.elements, forward.flops) == (30 + 48 + 42, 420)
    own = facts(own_w=1, dx=1, dw=1)
    inputs, weights = launches.shares(("bilinear", "backward", own))
    assert (inputs.elements, inputs.flops) == (42 + 96 + 30, 420)
    assert (weights.elements, weights.flops) == (30 + 42 + 96, 420)
    both = facts(tw=1, tx=1, tdx=1, tdw=1, parts=4)
    found = launches.shares(("bilinear", "tangent_backward", both))
    assert [s.flops for s in found] == [840, 840, 0]
    assert found[0].elements == 42 + 48 + 42 + 96 + 30
    assert found[1].elements == 2 * (30 + 42) + 4 * 96
    assert found[2].elements == 4 * 96 + 96


def test_signs_of_a_relu_by_hand():
    """A word for up to 32 outputs of a sample: 2 * 3 above the layer and below it."""
    below = facts(relu=1, saved=3, tw=1)
    (forward,) = launches.shares(("bilinear", "forward", below))
    assert forward.elements == 30 + 48 + 42 + 6
    (tangent,) = launches.shares(("bilinear", "tangent_forward", below))
    assert tangent.elements == 30 + 96 + 42 + 6
    (inputs,) = launches.shares(("bilinear", "backward", facts(relu_input=1, dx=1)))
    assert inputs.elements == 42 + 48 + 30 + 6


def test_a_norm_whose_adjoint_is_mapped_below_by_hand():
    """Two windows of four pixels: y 2 * 3 * 8, winners and adjoints 2 * 3 * 2."""
    sizes = {"in": 5, "out": 8, "multiply_adds": 40}
    (weights,) = launches.shares(
        ("bilinear", "backward", facts(**sizes, dw=1, pooled=2))
    )
    assert weights.elements == 30 + 48 + 2 * 12 + 96
    norm = facts(**sizes | {"in": 8, "out": 2, "parameters": 2}, dw=1)
    (sums,) = launches.shares(("batch_norm_pool", "backward", norm))
    assert sums.elements == 2 * 12 + 2 * 2


def test_a_norm_that_does_the_mean_above_it_by_hand():
    """Means of 2 channels of 4 pixels: x 2 * 3 * 8, outputs and adjoints 2 * 3 * 2."""
    norm = facts(**{"in": 8, "out": 8, "parameters": 2, "pooled": 2}, dx=1)
    (forward,) = launches.shares(("batch_norm", "forward", norm))
    (backward,) = launches.shares(("batch_norm", "backward", norm))
    assert forward.elements == 48 + 12 + 4
    assert backward.elements == 2 * 48 + 12 + 4


@pytest.mark.parametrize(
    ("operation", "packs"),
    [
        ("batch_norm forward", 1),
        ("batch_norm tangent_backward", 4),
        ("batch_norm_pool tangent_forward", 2),
        ("relu backward", 1),
    ],
)
def test_passes_of_norms_load_from_several_tensors_at_once(operation, packs):
    assert launches.loads((*operation.split(), {})) == packs


@records
def test_a_norm_of_few_rows_is_one_launch_and_does_the_mean_above_it():
    """980 rows of five samples are few enough; the means are nobody else's."""
    found = launches.record(WORKLOADS["omniglot-conv-1"])
    norms = [x for x in found if x.operation.startswith("batch_norm")]
    assert {x.loads for x in norms} == {1, 2, 4}
    assert len(norms) == 4 * (2 + 2 + 1 + 1)
    assert not any("pool" in x.operation for x in found)


@records
def test_first_norms_are_mapped_in_the_convolution_below():
    """In five steps and on the query samples; the norm is left with its sums."""
    found = launches.record(WORKLOADS["mini-imagenet"])
    (kernel,) = {x.kernel for x in found if "pooled" in x.kernel}
    assert [x.kernel for x in found].count(kernel) == 6
    places = [i for i, x in enumerate(found) if x.kernel == kernel]
    assert all(found[i - 1].operation == "batch_norm_pool backward" for i in places)
    assert all(found[i - 1].blocks < 16 for i in places)


def test_adjoints_of_one_launch_are_what_two_would_do():
    operation = ("bilinear", "backward", facts(own_w=1, dx=1, dw=1))
    kernel = (0, "bilinear_adjoints_kernel<S, Loop>(P)", (9, 1, 1), 128, 0)
    whole = cost.cost(WORKLOADS["sinusoid-1"])
    (one,) = launches.counted([operation], [kernel], whole)
    inputs, weights = launches.shares(operation)
    assert (one.form, one.blocks) == ("adjoints", 9)
    assert one.flops == inputs.flops + weights.flops
    assert one.bytes == 4 * (inputs.elements + weights.elements)


@records
def test_adjoints_share_a_launch():
    """But for the first layer's, which hands down none."""
    found = launches.record(WORKLOADS["omniglot-conv-1"])
    forms = [x.form for x in found if x.operation == "bilinear backward"]
    assert forms == 2 * (4 * ["adjoints"] + ["weights"])
    forms = [x.form for x in found if x.operation == "bilinear tangent_backward"]
    assert forms == 4 * ["adjoints"] + ["weights"]


def test_launches_that_are_not_understood_are_refused():
    operation = ("bilinear", "backward", facts(dx=1, dw=1))
    kernel = (0, "bilinear_kernel<S>(P)", (1, 1, 1), 128, 0)
    whole = cost.cost(WORKLOADS["sinusoid-1"])
    with pytest.raises(ValueError, match="expected 2, got 4"):
        launches.counted([operation], [kernel] * 4, whole)


def test_a_kernel_that_does_whole_tasks_does_it_all():
    whole = cost.cost(WORKLOADS["sinusoid-1"])
    task = (-1, "resident_task_kernel<S, Loss>(P)", (25, 1, 1), 256, 1024)
    mean = (-1, "resident_mean_kernel<S>(P)", (13, 6, 1), 128, 0)
    one, other = launches.counted([], [task, mean], whole)
    assert (one.flops, one.bytes) == (whole.flops, whole.bytes // 4 * 4)
    assert (one.kernel, one.blocks) == ("resident_task_kernel", 25)
    assert (other.flops, other.bytes, other.blocks) == (0, 0, 78)


@records
def test_small_networks_are_done_by_it():
    names = [x.kernel for x in launches.record(WORKLOADS["sinusoid-1"])]
    assert names == ["resident_task_kernel", "resident_mean_kernel", "adam_kernel"]


@records
@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_recorded_launches_do_the_arithmetic_that_there_is(name):
    """At full size, and exactly: two ways to count that know nothing of each other."""
    found = launches.record(WORKLOADS[name], memory="keep")
    whole = cost.cost(WORKLOADS[name])
    assert sum(x.flops for x in found) == whole.flops
    assert sum(x.bytes for x in found) > whole.bytes
    assert all(x.blocks > 0 and x.block % 32 == 0 for x in found)
    assert found[-1].operation == "optimizer adam"


@records
def test_recording_ends_even_where_the_call_fails(monkeypatch):
    from fastmaml import _native

    workload = WORKLOADS["sinusoid-1"]

    def broken(self):
        raise KeyError("planted")

    monkeypatch.setattr(launches.Adam, "step", broken)
    with pytest.raises(KeyError, match="planted"):
        launches.record(workload)
    model = workload.model()
    learner = launches.contenders.make_learner(workload, launches.BACKEND, model)
    learner.backward(workload.batch(), accumulate=False)  # runs its kernels again
    _, recorded = _native.core().end_recording()
    assert len(recorded) < 40
    got = {n: p.grad for n, p in model.named_parameters()}
    want = launches.contenders.peers.reference(
        launches.contenders.peers.make_problem(workload, model),
        dict(model.named_parameters()),
        workload.batch(),
    )[1]
    assert launches.contenders.peers.error(got, want) < 1e-5


# -- the files ----------------------------------------------------------------------


def copied(tmp_path):
    for name in ("cuda-kernels.json", "cuda-prediction.json", "cuda-prediction.md"):
        (tmp_path / name).write_text((predict.RESULTS / name).read_text())
    return ["--out", str(tmp_path)]


def test_the_committed_page_is_what_its_data_says(tmp_path, capsys):
    assert predict.main(["--check"]) == 0
    place = copied(tmp_path)
    text = tmp_path / "cuda-prediction.md"
    text.write_text(text.read_text().replace("A prediction", "A measurement"))
    assert predict.main(["--check", *place]) == 1
    assert "stale" in capsys.readouterr().out
    assert predict.main(["--again", *place]) == 0
    assert predict.main(["--check", *place]) == 0
    assert report.newest(tmp_path) is None


def test_new_registers_make_the_prediction_stale(tmp_path):
    place = copied(tmp_path)
    kernels = tmp_path / "cuda-kernels.json"
    compiled = json.loads(kernels.read_text())
    for kernel in compiled["kernels"]:
        kernel["registers"] = 255
    kernels.write_text(json.dumps(compiled))
    assert predict.main(["--check", *place]) == 1


def test_the_page_calls_itself_a_prediction():
    result = json.loads((predict.RESULTS / "cuda-prediction.json").read_text())
    page = prediction_table.page(result)
    assert "No kernel has run on a GPU" in page
    assert set(result["rows"]) == set(WORKLOADS)
    assert "| sinusoid-1, a block a task |" in page and "0.015 with Adam |" in page
