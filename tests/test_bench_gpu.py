"""What only a GPU can tell is asked by one command; here that runs without one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import contenders, cost, gpu, gpu_stages, peers_jax, report, timing  # noqa: E402
from bench import run as run_module  # noqa: E402
from bench.gpu import Stage  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402
from fastmaml.engines.placement import missing  # noqa: E402

needs_emulation = pytest.mark.skipif(
    missing("cuda_emulated") is not None, reason=str(missing("cuda_emulated"))
)


def python(code, name="a", limit=30.0, **options):
    return Stage(name, (sys.executable, "-c", code), limit, **options)


def run(tmp_path, *stages, **options):
    out = tmp_path / "gpu.json"
    result = gpu.run(stages, out, dry=True, **options)
    assert json.loads(out.read_text()) == result
    return result


# -- stages -------------------------------------------------------------------------


def test_a_stage_that_fails_is_told_and_the_others_run(tmp_path):
    out = tmp_path / "second.json"
    write = f"open({str(out)!r}, 'w').write('[1, 2]')"
    result = run(
        tmp_path,
        python("import sys; print('the reason'); sys.exit(7)", "first"),
        python(write, "second", out=out),
        Stage("third", ("no-such-program",), 5.0),
        commit="abc",
    )
    first, second, third = result["stages"].values()
    assert (first["status"], first["exit"]) == ("failed", 7)
    assert "the reason" in first["tail"]
    assert second["status"] == "ok" and result["second"] == [1, 2]
    assert third["status"] == "failed" and "No such file" in third["tail"]
    assert (result["kind"], result["quick"], result["commit"]) == ("gpu", True, "abc")
    assert result["versions"]["torch"] == torch.__version__


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    place = tmp_path / "child"
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
    child += f"'import time; time.sleep(60)']); open({str(place)!r}, 'w')"
    child += ".write(str(p.pid)); print('began', flush=True); time.sleep(60)"
    began = time.perf_counter()
    result = run(tmp_path, python(child, limit=3.0))
    assert time.perf_counter() - began < 30
    told = result["stages"]["a"]
    assert told["status"] == "timed out" and "began" in told["tail"]
    deadline = time.perf_counter() + 10
    state = Path(f"/proc/{place.read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.perf_counter() < deadline, "a child has survived its stage"
        time.sleep(0.1)


def test_no_stage_begins_when_the_time_is_used_up(tmp_path):
    result = run(tmp_path, python("1"), budget=gpu.LEAST - 1)
    assert result["stages"]["a"]["status"] == "left out"


def test_stages_of_one_batch_run_at_the_same_time(tmp_path):
    """Each waits for the file that the other makes."""
    code = "import pathlib, time\nopen({!r}, 'w')\n"
    code += "while not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    one, other = str(tmp_path / "1"), str(tmp_path / "2")
    result = run(
        tmp_path,
        python(code.format(one, other), "x", together="b"),
        python(code.format(other, one), "y", together="b"),
    )
    assert [s["status"] for s in result["stages"].values()] == ["ok", "ok"]


def test_the_stages_on_a_gpu(tmp_path):
    found = {s.name: s for s in gpu.stages(tmp_path, False, sorted(WORKLOADS))}
    assert found["build"].environment["FASTMAML_CUDA"] == "ON"
    assert found["tests"].environment["FASTMAML_TEST_BACKENDS"] == "cuda"
    assert {f"workload {n}" for n in WORKLOADS} <= set(found)
    assert {f"sanitizer {t}" for t in gpu.TOOLS} <= set(found)
    alone = ("work", "ceil", "kern", "launching")
    timed = [s for n, s in found.items() if n.startswith(alone)]
    assert list(found)[0] == "build" and list(found)[-1].startswith("workload")
    assert timed and not any(s.together for s in timed)
    early, late = found["launching early"], found["launching in turn"]
    allowed = [s.environment["FASTMAML_EARLY_LAUNCH"] for s in (early, late)]
    assert allowed == ["1", "0"] and early.out != late.out
    files = gpu.tests_of_backends()
    assert {"tests/test_cuda_learner.py", "tests/test_captured_step.py"} <= set(files)
    assert "tests/test_native_passes.py" in files
    assert all((ROOT / f).exists() for f in files)


# -- the script ---------------------------------------------------------------------


def script(tmp_path, *programs, **environment):
    """Runs bench/gpu.sh where only some programs are there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    for name in ("bash", "dirname", "grep", "env"):
        for place in ("/bin", "/usr/bin"):
            if Path(place, name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(Path(place, name))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    return subprocess.run(
        [str(ROOT / "bench" / "gpu.sh")],
        env={**kept, "PATH": str(folder), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_without_nvcc_it_refuses(tmp_path):
    done = script(tmp_path, CUDA_HOME=str(tmp_path))
    assert done.returncode == 2 and "no nvcc on PATH" in done.stderr


def test_without_a_gpu_it_refuses(tmp_path):
    done = script(tmp_path, ("nvcc", "exit 0"), ("nvidia-smi", "exit 9"))
    assert done.returncode == 2 and "finds no GPU here" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_with_a_torch_that_sees_no_gpu_it_refuses(tmp_path):
    seen = ("nvidia-smi", "echo 'GPU 0: a card'")
    done = script(tmp_path, ("nvcc", "exit 0"), seen)
    assert done.returncode == 2 and "no torch that sees the GPU" in done.stderr


@needs_emulation
def test_dry_all_stages_run_and_agree(tmp_path):
    out = tmp_path / "gpu.json"
    only = ["tests", "small", "ceilings", "kernels", "workload", "launching"]
    status = gpu.main(["--dry", "--out", str(out), "--only", *only])
    result = json.loads(out.read_text())
    told = {n: s["status"] for n, s in result["stages"].items()}
    assert status == 0, result["stages"]
    assert set(told.values()) == {"ok"} and len(told) == len(only) + 1
    both = [result[f"launching {how}"]["sinusoid-1"] for how in gpu.LAUNCHES]
    assert both[0]["bits"] == both[1]["bits"]
    assert min(x[step] for x in both for step in ("meta_step", "captured_step")) > 0
    assert result["stages"]["tests"]["tests"]["passed"] >= 1
    assert result["small"]["sinusoid-1"] < 1e-5
    field = result["workloads"]["sinusoid-1"]["contenders"]
    mine = field["fastmaml (cuda_emulated engine)"]
    assert mine["error"] < 1e-5 and mine["captured_step"]["median"] > 0
    assert field["vmap of grad"]["meta_gradient"]["ratio"]["samples"] > 0
    assert mine["percent_of_peak"] > 0
    assert result["kernels"]["workloads"]["sinusoid-1"][0]["ms"] > 0
    assert report.newest(tmp_path, "cuda", "gpu") is None  # dry ones are not shown


# -- kernels ------------------------------------------------------------------------

PRODUCT = (
    "void fm::cuda::(anonymous namespace)::bilinear_kernel<float, fm::cuda::TensorLoop"
    "<32, 32, 16, 16, 4, (fm::cuda::Arithmetic)1>, (fm::cuda::Form){}>"
    "(fm::cuda::Product<float>)"
)


def test_kernels_as_the_profiler_names_them():
    assert gpu_stages.key_of(PRODUCT.format(0)) == ("bilinear_kernel", "outputs")
    assert gpu_stages.key_of(PRODUCT.format(2)) == ("bilinear_kernel", "weights")
    plain = "void fm::cuda::map_kernel<float, (fm::cuda::Map)1>(fm::cuda::P<float>)"
    assert gpu_stages.key_of(plain) == ("map_kernel", "")


def test_kernels_are_related_to_the_ceilings():
    known = {("bilinear_kernel", "inputs"): {"bytes": 4e6, "flops": 2e9, "ms": 0.5}}
    peak = {"copy_bytes": 4e12, "fp32_flops": 4e13, "tf32_flops": 4e14}
    events = [(PRODUCT.format(1), 1e-4)] * 4 + [("other(int)", 1e-3)] * 2
    other, row = gpu_stages.kernel_rows(events, 2, known, peak)
    assert (other["kernel"], other["launches"], other["ms"]) == ("other", 1, 1.0)
    assert "percent_of_copy" not in other
    assert (row["launches"], row["ms"]) == (2, pytest.approx(0.2))
    assert row["percent_of_copy"] == pytest.approx(0.5)  # 20 GB/s of 4 TB/s
    assert row["percent_of_fp32"] == pytest.approx(25.0)  # 10 of 40 TFLOP/s
    assert row["percent_of_tf32"] == pytest.approx(2.5)
    assert row["predicted_ms"] == 0.5


def test_recorded_kernels_carry_the_names_of_the_profiler():
    found = gpu_stages.recorded_kernels("omniglot-conv-1")
    assert {("bilinear_kernel", "weights"), ("batch_norm_kernel", "")} <= set(found)
    flops = sum(row["flops"] for row in found.values())
    assert flops == cost.cost(WORKLOADS["omniglot-conv-1"]).flops
    assert gpu_stages.recorded_kernels("no such workload") == {}


# -- asynchronous calls -------------------------------------------------------------


def test_the_clock_stops_when_the_last_call_is_done():
    log = []

    def call(value):
        log.append(value)
        return value

    timed = timing.cycle(call, "ab", lambda last: log.append(f"waited for {last}"))
    assert timing.time_call(timed, 3) > 0
    assert log == ["b", "a", "b", "waited for b"]
    log.clear()
    timing.time_call(timing.cycle(call, "ab"), 2)
    assert log == ["b", "a"]


def test_jax_without_a_gpu_says_so():
    jax = pytest.importorskip("jax")
    if jax.default_backend() == "gpu":
        pytest.skip("JAX has a GPU here")
    assert "it computes on cpu" in peers_jax.missing("cuda")
    reason = contenders.reason_to_skip(
        WORKLOADS["sinusoid-1"], "JAX jit vmap", False, "cuda"
    )
    assert "sees no GPU" in reason


# -- the report ---------------------------------------------------------------------


def measured(milliseconds, ratio, **more):
    times = {"median": milliseconds, "ratio": {"median": ratio}}
    row = {"error": 2e-7, "meta_gradient": times, "meta_step": times}
    return {**row, "percent_of_peak": 12.34, **more}


def synthetic(**changes):
    graph = {"captured_step": {"median": 0.0456}}
    field = {"fastmaml": measured(0.0789, 1.0, **graph), "peer": measured(1.2, 15.2)}
    return {
        "kind": "gpu",
        "device": "cuda",
        "quick": False,
        "date": "2001-02-03T00:00:00+00:00",
        "command": "bench/gpu.sh",
        "commit": "0123456789ab",
        "gpu": {"name": "Some Card", "driver": "1.2.3", "cuda": "13.0"},
        "versions": {"torch": "9.9", "jax": None},
        "peak": {"copy_bytes": 3.01e12, "matrix_flops": 5.12e13},
        "stages": {
            "tests": {"status": "ok", "tests": {"passed": 321}},
            "sanitizer racecheck": {"status": "timed out", "tail": "..."},
        },
        "workloads": {
            "w": {
                "title": "a network",
                "work": "2 × (3, 4), 1 step",
                "contenders": field,
                "skipped": {"absent peer": "not installed"},
            }
        },
        **changes,
    }


@pytest.fixture
def checkout(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{report.BEGIN}\n{report.END}\nbottom\n")
    places = ["--results", str(tmp_path), "--readme", str(readme)]
    return tmp_path, lambda *extra: report.main([*places, *extra])


def test_the_report_shows_a_result_of_a_gpu(checkout):
    folder, write = checkout
    assert write() == 0
    without = (folder / "README.md").read_text()
    (folder / "card.json").write_text(json.dumps(synthetic()))
    assert write("--check") == 1
    assert write() == 0 and write("--check") == 0
    text = (folder / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a network"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    work = ["a network", "2 × (3, 4), 1 step"]
    assert cells == [*work, "**0.0789**", "1.20", "15.2×", "0.0456", "12"]
    told = ("Some Card", "driver 1.2.3", "3.01 TB/s", "51.2 TFLOP/s", "321 passed")
    for fact in (*told, "sanitizer racecheck (timed out)", "card.json", "2001-02-03"):
        assert fact in text
    (folder / "card.json").unlink()
    assert write() == 0 and (folder / "README.md").read_text() == without


def test_the_report_survives_a_run_of_which_nothing_was_left(checkout):
    folder, write = checkout
    empty = synthetic(workloads={}, peak={}, stages={"build": {"status": "failed"}})
    del empty["gpu"], empty["versions"]
    (folder / "card.json").write_text(json.dumps(empty))
    assert write() == 0
    assert "Not ok: build (failed)" in (folder / "README.md").read_text()


def test_what_compilers_have_shown_before_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def probe(workload, name, limit, device):
        asked.append((name, limit, device))
        return {"alone_ms": 1.0}

    monkeypatch.setattr(run_module, "probe", probe)
    workload, file = WORKLOADS["sinusoid-1"], tmp_path / "compile.json"
    compiler = "vmap + torch.compile"

    def found(name, *more):
        options = run_module.parse(["--first-call-limit", "7", *more])
        return run_module._found_alone(workload, name, options)

    before = ("--probed", str(file))
    assert found(compiler, *before) == {"alone_ms": 1.0}  # there is no such file
    assert found("vmap of grad", *before) == {}
    assert asked == [(compiler, 7.0, "cpu")]
    file.write_text(json.dumps({"sinusoid-1": {compiler: {"skipped": "too long"}}}))
    assert found(compiler, *before) == {"skipped": "too long"}
    assert found("vmap of grad", *before) == {} and len(asked) == 1
    assert found("vmap of grad", "--quick") == {} and len(asked) == 1
    assert found("vmap of grad") == {"alone_ms": 1.0}
