"""What is installed is what is tested, and a broken extension is explained."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import fastmaml
from fastmaml import _native

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

# Trains for one meta-gradient on each engine that is there.
USE = """
import fastmaml, torch
from fastmaml.tasks import Sinusoid
from torch.nn import Linear, ReLU, Sequential
model = Sequential(Linear(1, 8), ReLU(), Linear(8, 1))
learner = fastmaml.MAML(model, loss="mse")
learner.meta_loss(Sinusoid().sample(2)).backward()
assert model[0].weight.grad.abs().sum() > 0
print(learner.report)
try:
    fastmaml.MAML(model, loss="mse", engine="native").meta_loss(Sinusoid().sample(2))
except Exception as error:
    print("refused:", error)
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def core_file() -> Path:
    return Path(_native.core().__file__)


# ------------------------------------------------------------------- what is installed
def test_one_version_everywhere():
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE).group(1)
    assert importlib.metadata.version("fastmaml") == version
    assert fastmaml.__version__ == version
    assert _native.core().build_info()["version"] == version


def test_the_command_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert {s.value for s in scripts if s.name == "fastmaml"} == {"fastmaml.cli:main"}


def test_the_package_under_test_is_the_installed_one():
    distribution = importlib.metadata.distribution("fastmaml")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    home = ROOT if editable else Path(str(distribution.locate_file("")))
    assert Path(fastmaml.__file__).parent == home.resolve() / "fastmaml"
    if "FASTMAML_CORE_PATH" not in os.environ:
        assert core_file().parent == Path(fastmaml.__file__).parent


def test_plain_pytest_in_a_checkout_imports_the_installed_package(tmp_path):
    decoy = tmp_path / "fastmaml"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise RuntimeError('the source folder')")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "tests").mkdir()
    where = "import fastmaml\ndef test_where(): assert fastmaml.__file__ == {!r}\n"
    (tmp_path / "tests" / "test_a.py").write_text(where.format(fastmaml.__file__))
    command = Path(sysconfig.get_path("scripts")) / "pytest"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("cwd", ["checkout", "elsewhere"])
def test_python_m_fastmaml_finds_the_extension(tmp_path, cwd):
    out = python("-m", "fastmaml", "info", cwd=ROOT if cwd == "checkout" else tmp_path)
    assert re.search(r"^native engine +available$", out, re.MULTILINE), out


def test_the_extension_links_neither_torch_nor_cuda():
    content = core_file().read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so", b"libgomp"):
        assert library not in content


def test_building_needs_no_torch():
    requires = re.search(r"^requires = \[(.+)\]$", PYPROJECT, re.MULTILINE).group(1)
    assert "pybind11" in requires
    assert "torch" not in requires


def test_every_dependency_has_a_tested_version():
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    for line in importlib.metadata.requires("fastmaml") or []:
        name = re.match(r"[\w-]+", line).group().lower()
        assert name in pinned, f"{name} is not in constraints.txt"


def test_the_source_distribution_is_complete(tmp_path):
    listed = ["csrc", "fastmaml", "tests", "bench", ".ci", *map(str, ROOT.glob("*.*"))]
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".git", "build")
    for name in [*listed, "LICENSE", ".clang-format", ".pre-commit-config.yaml"]:
        source, copy = ROOT / name, tmp_path / Path(name).name
        if source.is_dir() and not source.name.endswith(".egg-info"):
            shutil.copytree(source, copy, ignore=ignored, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, copy)
    (tmp_path / "fastmaml" / "_core.planted.so").write_text("built, so not for sdists")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    python("-c", build, cwd=tmp_path)
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = [
        p.relative_to(ROOT) for d in ("csrc", "tests") for p in (ROOT / d).rglob("*")
    ]
    needed += [Path("CMakeLists.txt"), Path("constraints.txt"), Path(".ci/run")]
    files = {p for p in needed if (ROOT / p).is_file() and p.suffix != ".pyc"}
    missing = set(map(str, files)) - names
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
@pytest.mark.parametrize(
    ("knob", "answer"),
    [
        ("FASTMAML_CUDA=maybe", "expected AUTO, ON, OFF or EMULATED"),
        ("FASTMAML_ISA=mmx", "expected all, native"),
    ],
)
def test_build_knobs_answer_clearly(tmp_path, knob, answer):
    assert answer in refusal(tmp_path, knob)


def refusal(folder: Path, *knobs: str) -> str:
    """Why CMake does not configure with these knobs, in one line."""
    options = [f"-D{knob}" for knob in knobs]
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
def test_cuda_that_is_not_there_is_explained(tmp_path):
    said = refusal(tmp_path, "FASTMAML_CUDA=ON", f"FASTMAML_NVCC={tmp_path}/none")
    assert "found no nvcc on PATH or below CUDA_HOME" in said
    assert "FASTMAML_CUDA=OFF" in said
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    said = refusal(tmp_path, "FASTMAML_CUDA=ON", f"FASTMAML_NVCC={old}")
    assert f"{old} is not of CUDA 12 or later (it says 'release 11.8')" in said


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
def test_a_gpu_that_is_too_old_is_explained(tmp_path):
    new, smi = tmp_path / "nvcc", tmp_path / "nvidia-smi"
    new.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    smi.write_text("#!/bin/sh\necho 7.5\n")
    for tool in (new, smi):
        tool.chmod(0o755)
    tools = [f"FASTMAML_NVCC={new}", f"NVIDIA_SMI={smi}"]
    said = refusal(tmp_path, "FASTMAML_CUDA=ON", *tools)
    assert "compute capability 7.5, and fastmaml needs 8.0 or later" in said


EMULATED = "emulated on the CPU"
if not list((ROOT / "csrc" / "cuda").glob("backend_*.cpp")):
    EMULATED = "none: this version has no CUDA backend"


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
@pytest.mark.parametrize(
    ("knobs", "built"),
    [
        (["FASTMAML_CUDA=OFF"], "none: built with FASTMAML_CUDA=OFF"),
        (["FASTMAML_CUDA=AUTO", "FASTMAML_NVCC=none"], "none: found no nvcc on PATH"),
        (["FASTMAML_CUDA=EMULATED", "FASTMAML_SANITIZE=address,undefined"], EMULATED),
    ],
)
def test_the_build_says_which_cuda_backend_it_has(tmp_path, knobs, built):
    pybind11 = pytest.importorskip("pybind11")
    found = [f"pybind11_DIR={pybind11.get_cmake_dir()}", "FASTMAML_ISA=baseline"]
    options = [f"-D{knob}" for knob in [*knobs, *found]]
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"CUDA: {built}" in done.stdout


# ------------------------------------------------------------- when the extension fails
def test_a_broken_extension_is_explained_at_use(tmp_path):
    stub = tmp_path / "_core.so"
    stub.write_bytes(b"not a library")
    out = python("-c", USE, cwd=tmp_path, FASTMAML_CORE_PATH=str(stub))
    assert f"tried:  {stub}, named by FASTMAML_CORE_PATH" in out
    assert "error:  ImportError:" in out
    assert "unset FASTMAML_CORE_PATH" in out
    assert "functional" in out
    assert "refused:" in out


def test_a_missing_extension_is_explained_at_use(tmp_path):
    hide = "import sys; sys.modules['fastmaml._core'] = None\n"
    out = python("-c", hide + USE, cwd=tmp_path, FASTMAML_CORE_PATH="")
    assert f"tried:  fastmaml._core in {Path(fastmaml.__file__).parent}" in out
    assert "pip install --force-reinstall --no-deps ." in out
    assert "functional" in out
    assert "refused:" in out


def test_info_explains_a_broken_extension(tmp_path):
    out = python(
        "-m", "fastmaml", "info", cwd=tmp_path, FASTMAML_CORE_PATH=str(tmp_path / "no")
    )
    assert "not available" in out
    assert "not named like an extension module" in out


def test_the_loader_takes_another_file(tmp_path):
    other = shutil.copy(core_file(), tmp_path)
    show = "from fastmaml import _native; print(_native.core().__file__)"
    out = python("-c", show, cwd=tmp_path, FASTMAML_CORE_PATH=str(other))
    assert out.strip() == str(other)


def test_a_failed_load_is_tried_again(monkeypatch, tmp_path):
    _native.core.cache_clear()
    monkeypatch.setenv("FASTMAML_CORE_PATH", str(tmp_path / "_core.so"))
    assert "_core.so" in _native.unavailable()
    monkeypatch.undo()
    assert _native.unavailable() is None
