"""The emulation of CUDA on the CPU: sound kernels work in it, faulty ones are caught.

`tests/emulation/*.cu` are compiled as C++ against `csrc/`, plain and under sanitizers.
`sound.cu` compares kernels with plain loops; `planted.cu` holds a fault for each thing
that the emulation promises to notice.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", *SANITIZERS],
    "ucontext": ["-O1", "-DFM_FIBER_UCONTEXT"],
}

pytestmark = pytest.mark.skipif(
    COMPILER is None or not CSRC.is_dir(), reason="no C++ compiler, or no sources"
)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compiles a program of tests/emulation, once per kind; skips without sanitizer."""
    folder = tmp_path_factory.mktemp("emulation")
    built: dict[tuple[str, str], Path] = {}

    def compile_once(name: str, kind: str) -> Path:
        target = folder / f"{name}-{kind}"
        if (name, kind) not in built:
            sources = [
                HERE / "emulation" / f"{name}.cu",
                *(CSRC / "cuda").glob("*.cpp"),
            ]
            sources = [str(s) for s in sources if not s.name.startswith("backend_")]
            command = [COMPILER, "-std=c++17", "-g", "-pthread", f"-I{CSRC}"]
            command += ["-Wall", "-Wextra", "-Werror", *FLAGS[kind], "-x", "c++"]
            done = subprocess.run(
                [*command, *sources, "-o", str(target)],
                capture_output=True,
                text=True,
                env=environment(),
                check=False,
            )
            if done.returncode and re.search(
                r"lib[au][sb]san|-l[au][sb]san", done.stderr
            ):
                pytest.skip("no AddressSanitizer here")
            assert done.returncode == 0, done.stderr
            built[name, kind] = target
        return target

    return compile_once


def environment(**changes: str) -> dict[str, str]:
    """The environment without what this process may have been told for itself."""
    own = ("LD_PRELOAD", "FASTMAML_EMULATION_SHUFFLE")
    clean = {k: v for k, v in os.environ.items() if k not in own}
    return {**clean, "ASAN_OPTIONS": "detect_leaks=0", **changes}


def run(program: Path, *words: str, **changes: str):
    return subprocess.run(
        [program, *words],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("kind", FLAGS)
def test_sound_kernels(build, kind):
    done = run(build("sound", kind))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SOUND = ["reverse", "previous", "pairs", "reuse", "copy", "no fault", "shared at most"]
SOUND += ["await"]
WRONG = [
    "reverse without",
    "pairs without",
    "reuse without",
    "copy without wait",
    "copy half a wait",
    "copy without barrier",
    "copy too early",
]
# What each of the others says.
SAYS = {
    "await by some": r"await_kernel<Fault>\(Params\): block \(0, 0, 0\), thread 8: "
    r"came to its end without having awaited the kernels before; every kernel begins",
    "await behind a barrier": r"thread 0: came to __syncthreads without having awaited",
    "return": r"diverge_kernel<0>\(Params\): block \(0, 0, 0\): thread 0 waits at "
    r"__syncthreads \(planted.cu:\d+\), but thread 40 has finished; all threads of a "
    r"block must wait at the same place",
    "two barriers": r"thread 0 waits at __syncthreads \(planted.cu:(\d+)\), but thread "
    r"64 waits at __syncthreads \(planted.cu:(?!\1)\d+\)",
    "half a warp": r"thread 0 waits at warp_shuffle_xor \(reduce.cuh:\d+\), but thread "
    r"16 waits at __syncthreads .* of a warp must",
    "mma": r"thread 32 waits at mma_tf32 .* but thread 37 waits at __syncthreads",
    "two kinds": r"thread 5 waits at __syncwarp .* but thread 0 waits at __syncthreads",
    "trips": r"thread 16 waits at warp_shuffle .* but thread 0 waits at __syncthreads",
    "copy source": r"block \(0, 0, 0\), thread 7: copy_async .*16.*: the source is mis",
    "copy target": r"block \(0, 0, 0\), thread 7: copy_async .*16.*: the target is mis",
    "copy behind": r"thread 127: .*the target is not within the block's shared memory",
    "shared": r"chain_kernel\(Params\): .* 232449 bytes: a block has at most 232448",
    "block 1056": r"block of 1056 threads: expected a multiple of 32 up to 1024",
    "block 48": r"block of 48 threads",
    "block 0": r"block of 0 threads",
    "grid": r"grid \(1, 0, 1\): expected 1 to",
    "nested": r"chain_kernel\(Params\): launched from inside of nested_kernel\(Par",
}


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
def test_twins_without_a_fault(build, kind):
    program = build("planted", kind)
    for case in SOUND:
        for seed in range(6):
            assert run(program, case, str(seed)).stdout == "right\n", (case, seed)


@pytest.mark.parametrize("case", WRONG)
def test_a_race_gives_wrong_results(build, case):
    program = build("planted", "plain")
    for seed in range(6):
        assert run(program, case, str(seed)).stdout == "wrong\n", seed


@pytest.mark.parametrize("case", ["previous without", "previous warp only", "chain"])
def test_a_race_that_order_hides_shows_when_shuffled(build, case):
    program = build("planted", "plain")
    assert run(program, case).stdout == "right\n"
    said = [run(program, case, str(seed)).stdout for seed in range(1, 7)]
    assert said.count("wrong\n") >= 4, said  # four warps may come in order by chance
    asked = run(program, case, FASTMAML_EMULATION_SHUFFLE="3")
    assert asked.stdout == "wrong\n"


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
@pytest.mark.parametrize("case", SAYS)
def test_a_fault_is_explained(build, case, kind):
    done = run(build("planted", kind), case)
    assert re.search(SAYS[case], done.stdout), done.stdout + done.stderr
    assert "nothing runs afterwards" not in done.stdout


def test_a_kernel_that_touches_memory_before_it_awaits_ends_the_process(build):
    done = run(build("planted", "plain"), "await too late")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stdout


def test_a_write_behind_shared_memory_is_noticed(build):
    said = run(build("planted", "plain"), "write behind").stdout
    assert re.search(r"block \(0, 0, 0\) wrote byte 0 behind .* of 512 bytes", said)


@pytest.mark.parametrize(
    ("case", "what"), [("write behind", "WRITE"), ("read behind", "READ")]
)
def test_out_of_bounds_under_the_sanitizer(build, case, what):
    done = run(build("planted", "sanitized"), case)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert f"{what} of size 4" in done.stderr
    assert re.search(r"in .*\(Params\): block \(0, 0, 0\), thread 7\n", done.stderr)


def test_a_misaligned_vector_under_the_sanitizer(build):
    done = run(build("planted", "sanitized"), "vector")
    assert done.returncode != 0
    assert "misaligned address" in done.stderr
