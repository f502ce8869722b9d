"""What each CUDA kernel takes of a GPU, as the compiler tells: no GPU is needed.

    python -m bench.cuda_kernels            # into results/cuda-kernels.{json,md}
    python -m bench.cuda_kernels --check    # writes nothing, fails on spills, warnings

Every `csrc/cuda/*.cu` is compiled to machine code for each architecture, with warnings
as errors, and ptxas prints registers, stack, spills and static shared memory of every
kernel. Dynamic shared memory is chosen at launch and is not seen here. Registers bound
the threads that a multiprocessor holds at once: it has 65536, handed out to warps in
units of 8 a thread.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ROOT, facts

ARCHS = ("sm_80", "sm_90")
RESULTS = ROOT / "bench" / "results"
FLAGS = (
    "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -cubin -Werror all-warnings "
    "-Xptxas=-v"
).split()
REGISTERS = 65536  # of a multiprocessor, compute capability 8.0 and 9.0
MOST_THREADS = 2048


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    Attributes:
        file: where it is written.
        arch: what it was compiled for, `sm_90`.
        name: with template arguments, without namespaces and parameters.
        registers: of a thread.
        stack: bytes of a thread's local memory, spills included.
        spill_stores: bytes that a thread writes because registers ran out.
        spill_loads: bytes that it reads back.
        shared: static shared memory of a block, bytes.
    """

    file: str
    arch: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def family(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def spills(self) -> int:
        """Bytes that a thread writes or reads because registers ran out."""
        return self.spill_stores + self.spill_loads

    @property
    def threads(self) -> int:
        """Threads that a multiprocessor's registers suffice for."""
        granted = -(-self.registers // 8) * 8
        return min(MOST_THREADS, REGISTERS // (32 * granted) * 32)


def short(demangled: str) -> str:
    """`void fm::cuda::(anonymous namespace)::f<float>(P)` as `f<float>`."""
    name = re.sub(r"\(anonymous namespace\)::", "", demangled.removeprefix("void "))
    name = re.sub(r"\bfm::(\w+::)*", "", name)
    name = re.sub(r"\([\w:]+\)(?=-?\d)", "", name)  # casts of template arguments
    depth = 0
    for i, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            return name[:i]
    return name


def parse(text: str, file: str) -> list[Kernel]:
    """Kernels in what ptxas prints with `-v`, names still mangled.

    Raises:
        ValueError: if a kernel's figures are missing.
    """
    kernels = []
    blocks = re.split(r"^ptxas info\s*: Compiling entry function ", text, flags=re.M)
    for block in blocks[1:]:
        head = re.match(r"'([^']+)' for '(\w+)'", block)
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            block,
        )
        used = re.search(r"Used (\d+) registers(.*)", block)
        if not (head and memory and used):
            raise ValueError(f"{file}: ptxas says of a kernel only: {block.strip()}")
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        kernels.append(
            Kernel(
                file,
                head.group(2),
                head.group(1),
                int(used.group(1)),
                *map(int, memory.groups()),
                int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same kernels with readable names."""
    names = "\n".join(k.name for k in kernels)
    done = subprocess.run(
        ["c++filt"], input=names, capture_output=True, text=True, check=True
    )
    pairs = zip(kernels, done.stdout.splitlines(), strict=True)
    return [Kernel(**{**asdict(k), "name": short(name)}) for k, name in pairs]


def compile_file(source: Path, arch: str, nvcc: str, include: Path) -> list[Kernel]:
    """Compiles one file for one architecture.

    Raises:
        RuntimeError: with the compiler's messages, if it warns or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "out.cubin")
        command = [nvcc, *FLAGS, f"-arch={arch}", f"-I{include}", str(source)]
        done = subprocess.run(
            [*command, "-o", target], capture_output=True, text=True, check=False
        )
    said = done.stdout + done.stderr
    if done.returncode or re.search(r"\bwarning\b", said):
        lines = [x for x in said.splitlines() if not x.startswith("ptxas info")]
        told = facts.without_paths("\n".join(lines[:40]))
        raise RuntimeError(f"{source.name} for {arch}:\n{told}")
    return demangled(parse(said, source.name))


def collect(
    folder: Path, archs: Iterable[str], nvcc: str, jobs: int = 2
) -> tuple[list[Kernel], list[str]]:
    """Compiles every .cu of a source tree's cuda/ folder.

    Args:
        folder: the tree that includes are relative to, `csrc`.
        archs: architectures, for example `sm_90`.
        nvcc: the compiler.
        jobs: compilations at a time.

    Returns:
        The kernels, and what went wrong.
    """
    sources = sorted((folder / "cuda").glob("*.cu"))
    work = [(source, arch) for arch in archs for source in sources]
    kernels: list[Kernel] = []
    wrong: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(compile_file, s, a, nvcc, folder) for s, a in work]
        for future in futures:
            try:
                kernels += future.result()
            except RuntimeError as error:
                wrong.append(str(error))
    return kernels, wrong


def spilling(kernels: Iterable[Kernel]) -> list[str]:
    """A line for every kernel whose registers run out."""
    return [
        f"{k.file} for {k.arch}: {k.name} spills {k.spill_stores} bytes, reads "
        f"{k.spill_loads} ({k.registers} registers)"
        for k in kernels
        if k.spills
    ]


def table(kernels: Sequence[Kernel], told: str) -> str:
    """The kernels in markdown, all instances of a template in one row."""
    lines = [
        "# CUDA kernels, as compiled",
        "",
        told,
        "",
        "Instances of a template (scalars, activations, tiles) share a row: their "
        "number, the range of their registers, the fewest threads that a "
        "multiprocessor has registers for (of 2048), the most bytes spilled and the "
        "most stack of a thread. Not measured: no kernel has run.",
    ]
    for arch in sorted({k.arch for k in kernels}):
        lines += ["", f"## {arch}", ""]
        lines += [
            "| kernel | file | instances | registers | threads | spills | stack |"
        ]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
        groups: dict[tuple[str, str], list[Kernel]] = {}
        for k in kernels:
            if k.arch == arch:
                groups.setdefault((k.file, k.family), []).append(k)
        for (file, family), same in sorted(groups.items()):
            least = min(k.registers for k in same)
            most = max(k.registers for k in same)
            span = str(most) if least == most else f"{least} to {most}"
            lines.append(
                f"| `{family}` | `{file}` | {len(same)} | {span} "
                f"| {min(k.threads for k in same)} | {max(k.spills for k in same)} "
                f"| {max(k.stack for k in same)} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, writes the results, and says what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on PATH: install the CUDA toolkit 12 or 13", file=sys.stderr)
        return 2
    kernels, wrong = collect(options.csrc, options.archs, nvcc, options.jobs)
    wrong += spilling(kernels)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(kernels)} kernels for {', '.join(options.archs)}, {len(wrong)} faults")
    if options.check:
        return int(bool(wrong))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    where = facts.collect()
    result = {
        "kind": "cuda-kernels",
        "device": "cuda",
        "date": where["date"],
        "commit": where["commit"],
        "nvcc": release.group(1) if release else "unknown",
        "kernels": [asdict(k) | {"threads": k.threads} for k in kernels],
        "faults": wrong,
    }
    told = f"nvcc {result['nvcc']}, commit {result['commit']}, {result['date'][:10]}."
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda-kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "cuda-kernels.md").write_text(table(kernels, told))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
