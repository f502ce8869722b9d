"""Reports on CUDA kernels and strict builds find spills and warnings, planted ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import cuda_kernels, report  # noqa: E402

needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("c++filt")), reason="nvcc is not on PATH"
)

SOUND = """
namespace fm::cuda { namespace {
struct Params { float* out; };
template <class S, int N> __global__ void sound_kernel(const Params p) {
  __shared__ S tile[N];
  tile[threadIdx.x] = S(threadIdx.x);
  __syncthreads();
  p.out[threadIdx.x] = float(tile[N - 1 - threadIdx.x]);
}
template __global__ void sound_kernel<float, 64>(const Params);
template __global__ void sound_kernel<double, 64>(const Params);
}}
"""
SPILLS = """
__global__ void __launch_bounds__(1024, 2)
spilling_kernel(const double* in, double* out) {
  double v[64];
  for (int i = 0; i < 64; ++i) v[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = v[i] * v[63 - i];
}
"""
WARNS = "__global__ void warning_kernel() { int unused = 3; }"


@pytest.fixture
def report_on(tmp_path, capsys):
    """Runs the report on one planted file; returns the status and what it said."""

    def run(source, *arguments):
        folder = tmp_path / "csrc" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "planted.cu").write_text(source)
        places = ["--csrc", str(tmp_path / "csrc"), "--out", str(tmp_path / "out")]
        status = cuda_kernels.main([*places, "--archs", "sm_90", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@needs_nvcc
def test_kernels_are_listed_with_what_they_take(report_on, tmp_path):
    status, said = report_on(SOUND)
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "cuda-kernels.json").read_text())
    kernels = {k["name"]: k for k in result["kernels"]}
    assert set(kernels) == {"sound_kernel<float, 64>", "sound_kernel<double, 64>"}
    assert kernels["sound_kernel<double, 64>"]["shared"] == 64 * 8
    assert kernels["sound_kernel<float, 64>"]["shared"] == 64 * 4
    for kernel in kernels.values():
        assert (kernel["file"], kernel["arch"]) == ("planted.cu", "sm_90")
        assert 4 <= kernel["registers"] <= 32 and kernel["threads"] == 2048
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    text = (tmp_path / "out" / "cuda-kernels.md").read_text()
    assert "| `sound_kernel` | `planted.cu` | 2 |" in text
    # it lies among results of other kinds
    assert report.newest(tmp_path / "out") is None


@needs_nvcc
def test_a_spill_fails_the_check(report_on, tmp_path):
    status, said = report_on(SPILLS, "--check")
    assert status == 1
    assert "planted.cu for sm_90: spilling_kernel spills" in said
    assert not (tmp_path / "out").exists()


@needs_nvcc
def test_a_warning_fails_the_check(report_on):
    status, said = report_on(WARNS, "--check")
    assert status == 1
    assert 'variable "unused" was declared but never referenced' in said


LOCAL = """
__global__ void indexing_kernel(const int* in, int* out) {
  int v[16];
  for (int i = 0; i < 16; ++i) v[i] = in[i];
  for (int i = 0; i < in[0]; ++i) ++v[in[i]];
  out[0] = v[in[1]];
}
"""


@needs_nvcc
@pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not on PATH")
def test_a_strict_build_stops_at_warnings_and_spills(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    for name in ("CMakeLists.txt", "csrc/cuda/build.cmake", "csrc/cuda/compiler.cmake"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    planted = {
        **{"sound": SOUND, "spills": SPILLS, "warns": WARNS},
        **{"local": LOCAL, "bilinear_local": LOCAL},
    }
    empty = ("common/engine.cpp", "cpu/kernels_isa.cpp", "bind/module.cpp")
    texts = {f"cuda/{name}.cu": text for name, text in planted.items()}
    for name, text in {**dict.fromkeys(empty, ""), **texts}.items():
        (tmp_path / "csrc" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    knobs = {"FASTMAML_CUDA": "ON", "FASTMAML_CUDA_ARCHS": "90-real"}
    knobs |= {"FASTMAML_STRICT": "ON", "pybind11_DIR": pybind11.get_cmake_dir()}
    options = [f"-D{name}={value}" for name, value in knobs.items()]
    cmake, build = ["cmake", "-G", "Ninja", *options, str(tmp_path)], tmp_path / "build"
    build.mkdir()
    subprocess.run(cmake, cwd=build, capture_output=True, check=True)
    ninja = ["ninja", "-k0", *(f"CMakeFiles/fm_cuda.dir/csrc/{n}.o" for n in texts)]
    said = subprocess.run(ninja, cwd=build, capture_output=True, text=True).stdout
    for told in (
        "Registers are spilled to local memory in function '_Z15spilling_kernel",
        'variable "unused" was declared but never referenced',
        "Local memory used for function '_Z15indexing_kernel",
    ):
        assert told in said, said
    objects = {path.name.partition(".")[0] for path in build.rglob("*.cu.o")}
    assert objects == {"sound", "local"}


def test_without_nvcc_it_says_so(report_on, monkeypatch):
    monkeypatch.setattr(cuda_kernels.shutil, "which", lambda name: None)
    status, said = report_on(SOUND)
    assert status == 2 and "nvcc is not on PATH" in said


def kernel(**changes):
    plain = {"registers": 32, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    return cuda_kernels.Kernel(
        **{"file": "f.cu", "arch": "sm_90", "name": "k", **plain, "shared": 0} | changes
    )


@pytest.mark.parametrize(
    ("registers", "threads"),
    [(16, 2048), (32, 2048), (33, 1632), (128, 512), (255, 256)],
)
def test_registers_bound_the_threads(registers, threads):
    assert kernel(registers=registers).threads == threads


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (
            "void fm::cuda::(anonymous namespace)::f<float>(fm::cuda::P<float>)",
            "f<float>",
        ),
        ("void fm::cuda::g<double, fm::math::Relu, (int)3>(int)", "g<double, Relu, 3>"),
        ("plain_kernel(float*, int)", "plain_kernel"),
    ],
)
def test_names_are_short(mangled, name):
    assert cuda_kernels.short(mangled) == name


def test_a_kernel_without_figures_is_an_error():
    text = "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n"
    with pytest.raises(ValueError, match="f.cu: ptxas says of a kernel only"):
        cuda_kernels.parse(text, "f.cu")
