"""The laws hold on this checkout, and each of them finds a planted violation."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest

import fastmaml

ROOT = Path(__file__).resolve().parents[1]
URL = "https" + "://"
LATER = "TO" + "DO"
KERNEL = "FM_KERNEL void __launch_bounds__(kThreads, 1)\n    k(const P<S> p)"
AWAIT = "await_previous_kernels()"

# law, file to plant, what it says
PLANTED = [
    ("includes_go_one_way", "csrc/math/a.h", '#include "program/layer.h"'),
    ("includes_go_one_way", "csrc/meta/a.cpp", '#include "cpu/simd.h"'),
    ("includes_go_one_way", "csrc/cpu/a.cpp", '  #  include "../meta/options.h"'),
    ("includes_go_one_way", "csrc/tasks/a.cpp", '#include "program/layer.h"'),
    ("includes_go_one_way", "csrc/cpu/a.cpp", '#include "tasks/philox.h"'),
    ("includes_go_one_way", "tests/emulation/a.cpp", '#include "meta/options.h"'),
    ("only_bind_sees_python", "csrc/cpu/a.cpp", "#include <pybind11/pybind11.h>"),
    ("only_bind_sees_python", "csrc/common/a.h", "#include <Python.h>"),
    ("engine_knows_no_torch", "csrc/bind/a.cpp", "#include <torch/extension.h>"),
    ("engine_knows_no_torch", "csrc/cpu/a.h", "void f(const at::Tensor& x);"),
    ("engine_is_silent", "csrc/cpu/a.cpp", 'std::printf("here");'),
    ("engine_is_silent", "csrc/cpu/a.inl.h", "std::cerr << 1;"),
    ("engine_is_silent", "csrc/meta/a.cpp", "if (bad) exit(1);"),
    ("engine_is_silent", "csrc/cuda/a.cu", "cudaMalloc(&p, n);"),
    ("pointers_in_one_place", "fastmaml/engines/a.py", "p = x.data_ptr()"),
    ("one_door_to_the_extension", "fastmaml/a.py", "from fastmaml import _core"),
    ("one_door_to_the_extension", "fastmaml/a.py", "from . import _core"),
    ("one_door_to_the_extension", "tests/a.py", "import fastmaml._core as c"),
    ("one_door_to_the_extension", "bench/a.py", "from fastmaml._core import f"),
    ("files_are_short", "csrc/cpu/a.inl.h", "\n" * 401),
    ("files_are_short", "fastmaml/a.py", "x = 1\n" * 401),
    ("nothing_left_for_later", "csrc/cpu/a.cpp", f"// {LATER}: faster"),
    ("nothing_left_for_later", "README.md", f"{LATER} write this"),
    ("speaks_of_the_project_alone", "README.md", "see /" + "home/someone/notes"),
    ("speaks_of_the_project_alone", ".ci/run", "cd /" + "opt/thing"),
    ("speaks_of_the_project_alone", "setup.py", f"# {URL}registry.example.net/x"),
    ("speaks_of_the_project_alone", "constraints.txt", "--extra-index" + "-url x"),
    ("tests_use_the_installed_package", "tests/__init__.py", ""),
    ("tests_use_the_installed_package", "conftest.py", ""),
    ("kernels_await_previous", "csrc/cuda/a.cu", "FM_KERNEL void k(P p) { f(p); }"),
    ("kernels_await_previous", "csrc/cuda/a.cu", f"{KERNEL} {{\n  if (x) {AWAIT};"),
    ("kernels_await_previous", "csrc/cuda/a.cuh", f"{KERNEL} {{\n  // {AWAIT};\n}}"),
    ("kernels_await_previous", "csrc/cuda/a.cu", "k<<<1, 32>>>(p);"),
    ("kernels_await_previous", "csrc/cuda/a.cu", "const S* __restrict__ x = p.x;"),
]

# What looks like a violation and is none.
INNOCENT = {
    "csrc/meta/a.cpp": '#include "program/layer.h"\n#include "meta/options.h"\n',
    "csrc/bind/a.cpp": '#include <pybind11/pybind11.h>\n#include "cpu/simd.h"\n',
    "csrc/cuda/a.cu": f"{KERNEL};\n{KERNEL} {{  // a note\n  {AWAIT};\n}}\n",
    "csrc/cpu/a.cpp": "// printf( is for others\nstd::snprintf(b, n, f);\n",
    "fastmaml/_native.py": "import fastmaml._core\nx.data_ptr()\n",
    "fastmaml/a.py": "path = root / 'data'  # see arxiv.org/work/1\n",
    "README.md": f"{URL}github.com/a/b, runs/home/x, ./opt/a\n",
}


def plant(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("law", house.LAWS, ids=lambda law: law.__name__)
def test_law_holds_here(law):
    assert list(law(ROOT)) == []


@pytest.mark.parametrize(("name", "path", "content"), PLANTED)
def test_law_finds_a_planted_violation(tmp_path, name, path, content):
    plant(tmp_path, path, content)
    found = list(getattr(house, name)(tmp_path))
    assert len(found) == 1
    assert found[0].startswith(path)


def test_every_law_has_a_planted_violation():
    assert {law.__name__ for law in house.LAWS} == {name for name, _, _ in PLANTED}


@pytest.mark.parametrize("law", house.LAWS, ids=lambda law: law.__name__)
def test_law_accuses_nobody_innocent(tmp_path, law):
    for name, content in INNOCENT.items():
        plant(tmp_path, name, content)
    assert list(law(tmp_path)) == []


def test_laws_see_the_whole_checkout():
    seen = {path.relative_to(ROOT).as_posix() for path in house.files(ROOT)}
    assert {"setup.py", "README.md", ".ci/run", "pyproject.toml"} <= seen
    assert {"fastmaml/_native.py", "csrc/bind/module.cpp", "tests/house.py"} <= seen


def modules() -> list[str]:
    found = pkgutil.walk_packages(fastmaml.__path__, "fastmaml.")
    return ["fastmaml"] + [m.name for m in found if "._core" not in m.name]


@pytest.mark.parametrize("name", [m for m in modules() if "__main__" not in m])
def test_public_symbols_are_documented(name):
    if name.startswith("fastmaml.rl.envs"):
        for needed in ("gymnasium", "mujoco"):
            pytest.importorskip(needed, reason="needs the extra fastmaml[rl]")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert list(house.undocumented(module)) == []


UNDOCUMENTED = """
from dataclasses import dataclass
def bare(): pass
def told():
    'Says.'
@dataclass
class Bare:
    x: int = 0
class Told:
    'Says.'
    def method(self): pass
    @property
    def size(self): pass
    def _own(self): pass
size = 3
__all__ = ['bare', 'told', 'Bare', 'Told', 'size']
"""


def test_missing_docstrings_are_found(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(UNDOCUMENTED)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(house.undocumented(importlib.import_module("planted"))) == [
        "planted.bare",
        "planted.Bare",
        "planted.Told.method",
        "planted.Told.size",
    ]


def check(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / script), "--check"]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_readme_figures_are_generated():
    for script in ("bench/report.py", "bench/results_table.py"):
        done = check(script, ROOT)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"


@pytest.fixture
def reported(tmp_path) -> Path:
    """A copy of what the README's tables are made of, with one run reported."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=ignored)
    shutil.copy(ROOT / "README.md", tmp_path)
    run = {
        "experiment": "planted experiment",
        "command": "fastmaml train planted",
        "published": "0.67 / 0.38",
        "measure": "loss",
        "steps": [1, 2],
        "evaluation": {
            "loss": [3.0, 0.5, 0.25],
            "loss_interval": [0.3, 0.05, 0.025],
            "tasks": 600,
            "queries": 10,
            "transductive": True,
        },
        "seconds": 61.0,
        "machine": "planted machine",
        "commit": "abc",
        "date": "2000-01-01",
    }
    folder = tmp_path / "bench" / "results" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planted.json").write_text(json.dumps(run))
    return tmp_path


def test_results_in_the_readme_come_from_the_files(reported):
    script = str(reported / "bench" / "results_table.py")
    assert check(script, reported).returncode != 0
    subprocess.run([sys.executable, script], check=True, cwd=reported)
    assert check(script, reported).returncode == 0
    readme = reported / "README.md"
    row = next(r for r in readme.read_text().splitlines() if "planted exp" in r)
    assert "0.500 ± 0.050 / 0.250 ± 0.025" in row
    readme.write_text(readme.read_text().replace("0.500 ± 0.050", "0.400 ± 0.050"))
    assert check(script, reported).returncode != 0
