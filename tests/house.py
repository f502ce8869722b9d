"""The laws of the house, as functions from a checkout to its violations.

`tests/test_house.py` runs every law on this checkout, and on a planted violation that
it must find. A violation reads ``path:line: what is wrong``.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path

Law = Callable[[Path], Iterator[str]]

FOLDERS = ("csrc", "fastmaml", "tests", "bench", ".ci")
ROOT_FILES = ("*.md", "*.py", "*.toml", "*.txt", "*.in", ".*.yaml", "CMakeLists.txt")
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
MAY_INCLUDE = {
    "common": {"common"},
    "math": {"common", "math"},
    "program": {"common", "math", "program"},
    "cpu": {"common", "math", "program", "cpu"},
    "cuda": {"common", "math", "program", "tasks", "cuda"},
    "meta": {"common", "math", "program", "meta"},
    "tasks": {"common", "math", "tasks"},
    "bind": {"common", "math", "program", "cpu", "cuda", "meta", "tasks", "bind"},
    # kernels of tests/emulation/
    "emulation": {"common", "math", "program", "cuda", "emulation"},
    "portable": {"common", "math", "program", "meta", "cpu"},  # tests/portable/
}
HOSTS = {"github.com", "raw.githubusercontent.com", "arxiv.org", "pytorch.org"}
LOOPBACK = {"127.0.0.1", "localhost"}
LONGEST = 400


def files(root: Path, *suffixes: str) -> Iterator[Path]:
    """The text files of a checkout, with one of the suffixes if any are named."""
    listed = [path for pattern in ROOT_FILES for path in root.glob(pattern)]
    for folder in FOLDERS:
        listed += (root / folder).rglob("*")
    for path in sorted(set(listed)):
        built = "__pycache__" in path.parts or path.suffix in (".so", ".pyc", ".dylib")
        if path.is_file() and not built and (not suffixes or path.suffix in suffixes):
            yield path


def text(path: Path) -> str:
    """What a file says; binary files say nothing."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def find(root: Path, path: Path, pattern: str, wrong: str) -> Iterator[str]:
    """A violation for every line of a file that matches; C++ comments don't count."""
    for number, line in enumerate(text(path).splitlines(), 1):
        code = line.split("//")[0] if path.suffix in CODE[1:] else line
        if match := re.search(pattern, code):
            yield f"{path.relative_to(root)}:{number}: {wrong}: {match.group()}"


def includes_go_one_way(root: Path) -> Iterator[str]:
    """Includes follow common <- math <- program <- {cpu, cuda, meta} <- bind.

    Beside program and what follows it, tasks stands between math and {cuda, bind}.
    """
    for path in files(root, ".cpp", ".h", ".cu", ".cuh"):
        own = path.relative_to(root).parts[1]
        for number, line in enumerate(text(path).splitlines(), 1):
            match = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not match:
                continue
            target = match.group(1).split("/")[0] if "/" in match.group(1) else own
            if target not in MAY_INCLUDE.get(own, set()):
                where = f"{path.relative_to(root)}:{number}"
                yield f"{where}: {own}/ may not include {match.group(1)}"


def only_bind_sees_python(root: Path) -> Iterator[str]:
    """pybind11 and Python headers are included in csrc/bind/ alone."""
    for path in files(root, ".cpp", ".h", ".cu", ".cuh"):
        if path.relative_to(root).parts[:2] != ("csrc", "bind"):
            yield from find(root, path, r"#\s*include\s*<(pybind11/|Python)", "Python")


def engine_knows_no_torch(root: Path) -> Iterator[str]:
    """Nothing in csrc includes torch's headers or names its namespaces."""
    pattern = r"#\s*include\s*[<\"](torch|ATen|c10)/|\b(torch|at|c10)::"
    for path in files(root, ".cpp", ".h", ".cu", ".cuh"):
        yield from find(root, path, pattern, "torch in the engine")


def engine_is_silent(root: Path) -> Iterator[str]:
    """Nothing in csrc prints, exits, or takes device memory of its own."""
    pattern = (
        r"\b(printf|fprintf|puts|exit|_Exit|abort|cudaMalloc\w*)\s*\(|\b(cout|cerr)\b"
    )
    for path in files(root, ".cpp", ".h", ".cu", ".cuh"):
        yield from find(root, path, pattern, "throw or return instead")


def pointers_in_one_place(root: Path) -> Iterator[str]:
    """Only fastmaml/_native.py asks tensors for their addresses."""
    for path in files(root, ".py"):
        here = path.relative_to(root).as_posix()
        if here.startswith("fastmaml/") and here != "fastmaml/_native.py":
            yield from find(root, path, r"\bdata_ptr\(", "belongs in _native.py")


def one_door_to_the_extension(root: Path) -> Iterator[str]:
    """Only fastmaml/_native.py imports the extension module."""
    for path in files(root, ".py"):
        here = path.relative_to(root).as_posix()
        if here == "fastmaml/_native.py":
            continue
        for node in ast.walk(ast.parse(text(path))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(re.search(r"\bfastmaml\._core\b|^None\._core$", n) for n in names):
                line = node.lineno  # type: ignore[attr-defined]
                yield f"{here}:{line}: ask fastmaml._native.core() instead"


def files_are_short(root: Path) -> Iterator[str]:
    """No source file is longer than 400 lines."""
    for path in files(root, *CODE):
        lines = len(text(path).splitlines())
        if lines > LONGEST:
            yield f"{path.relative_to(root)}:{lines}: longer than {LONGEST} lines"


def nothing_left_for_later(root: Path) -> Iterator[str]:
    """No notes to self; what is unfinished is not there."""
    pattern = (
        r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
    )
    for path in files(root):
        for number, line in enumerate(text(path).splitlines(), 1):
            if match := re.search(pattern, line):
                yield f"{path.relative_to(root)}:{number}: {match.group()}"


def speaks_of_the_project_alone(root: Path) -> Iterator[str]:
    """No paths of one machine, no package indexes, no hosts the project doesn't use."""
    machine = r"(?<![\w.~}$-])/(" + "home|root|work|workspace|opt|mnt|Users" + r")/\w+"
    index = r"--(extra-)?index-url|--find-" + "links"
    for path in files(root):
        here = path.relative_to(root)
        yield from find(root, path, machine, "a path of one machine")
        yield from find(root, path, index, "a package index")
        for number, line in enumerate(text(path).splitlines(), 1):
            for host in re.findall(r"https?://(\w[\w.-]*)", line):
                if host not in HOSTS | LOOPBACK:
                    yield f"{here}:{number}: not one of the project's hosts: {host}"


def tests_use_the_installed_package(root: Path) -> Iterator[str]:
    """Neither file that would make pytest put the checkout on sys.path exists."""
    for name in ("conftest.py", "tests/__init__.py"):
        if (root / name).exists():
            yield f"{name}:1: makes pytest test the checkout, not what is installed"


def kernels_await_previous(root: Path) -> Iterator[str]:
    """A kernel's first statement awaits the kernels before it; only launch() starts it.

    See csrc/cuda/early_launch.h: one that didn't would race with two others.
    """
    for path in files(root, ".cu", ".cuh"):
        here = path.relative_to(root)
        if here.parts[0] != "csrc":
            continue
        yield from find(root, path, r"__global__|<<<", "FM_KERNEL and launch()")
        read_only = r"__restrict__|__ldg"
        yield from find(root, path, read_only, "may be read before the kernel awaits")
        code = re.sub(r"//[^\n]*", "", text(path))
        for match in re.finditer(r"\bFM_KERNEL\b[^{;]*\{\s*([^;}]*)", code):
            if match.group(1) != "await_previous_kernels()":
                line = code.count("\n", 0, match.start()) + 1
                yield f"{here}:{line}: a kernel that does not await_previous_kernels()"


LAWS: tuple[Law, ...] = (
    includes_go_one_way,
    only_bind_sees_python,
    engine_knows_no_torch,
    engine_is_silent,
    pointers_in_one_place,
    one_door_to_the_extension,
    files_are_short,
    nothing_left_for_later,
    speaks_of_the_project_alone,
    tests_use_the_installed_package,
    kernels_await_previous,
)


def undocumented(module: types.ModuleType) -> Iterator[str]:
    """Public classes, their public methods, and functions without a docstring."""
    for name in getattr(module, "__all__", ()):
        value = inspect.unwrap(getattr(module, name))
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        generated = f"{name}("  # what dataclass writes where there is nothing
        if not value.__doc__ or value.__doc__.startswith(generated):
            yield f"{module.__name__}.{name}"
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            plain = getattr(function, "fget", getattr(function, "__func__", function))
            if method.startswith("_") or not inspect.isfunction(plain):
                continue
            if not inspect.getdoc(getattr(value, method)):
                yield f"{module.__name__}.{name}.{method}"
