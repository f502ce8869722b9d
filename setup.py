"""Builds fastmaml._core with CMake and Ninja; all metadata is in pyproject.toml.

The knobs are environment variables: FASTMAML_ISA, FASTMAML_CUDA, FASTMAML_CUDA_ARCHS,
FASTMAML_SANITIZE, FASTMAML_STRICT and FASTMAML_BUILD_JOBS. README.md says what each
does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KNOBS = {
    "FASTMAML_ISA": "all",
    "FASTMAML_CUDA": "AUTO",
    "FASTMAML_CUDA_ARCHS": "",
    "FASTMAML_SANITIZE": "",
    "FASTMAML_STRICT": "OFF",
}


class Build(build):
    """The usual build, from an empty staging folder.

    setuptools never removes anything from build/lib, so that a module deleted from
    the source would live on in the next wheel.
    """

    def run(self) -> None:
        """Empties the staging folder, then builds."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Compiles the extension in build/cmake-*, which is kept and so incremental."""

    def run(self) -> None:
        """Builds, and leaves a copy of the extension in the source package too.

        In a checkout, ``python -m fastmaml`` imports the source package whatever is
        installed, because Python puts the working directory first. An instrumented
        extension loads only under its sanitizer's runtime, and one that emulates CUDA
        is for tests, so those are not left there.
        """
        super().run()
        if not self.inplace and _kind() == "release":
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        """Runs CMake and Ninja, and puts the module where setuptools wants it."""
        knobs = {name: os.environ.get(name, value) for name, value in KNOBS.items()}
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder = ROOT / "build" / f"cmake-{tag}-{_kind()}"
        jobs = os.environ.get("FASTMAML_BUILD_JOBS") or str(os.cpu_count() or 1)
        _run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *self._options(knobs))
        _run("cmake", "--build", folder, "--target", "_core", "--parallel", jobs)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)

    def _options(self, knobs: dict[str, str]) -> list[str]:
        import pybind11

        options = knobs | {
            "FASTMAML_VERSION": self.distribution.get_version(),
            "CMAKE_BUILD_TYPE": "Release",
            # Under pip's build isolation these move with every build, so the values
            # that CMake remembers from the last one are never right.
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        return [f"-D{name}={value}" for name, value in options.items()]


def _kind() -> str:
    """What sets a build apart from the one that users have."""
    sanitize = os.environ.get("FASTMAML_SANITIZE", "")
    emulated = os.environ.get("FASTMAML_CUDA", "").upper() == "EMULATED"
    kinds = [*sanitize.split(","), "emulated" if emulated else ""]
    return "-".join(filter(None, kinds)) or "release"


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(
            f"building fastmaml needs {name}, which is not on PATH: install it with "
            f"`pip install {name}`, or build without --no-build-isolation"
        )
    return found


def _run(name: str, *arguments: str | Path) -> None:
    """Runs a build tool; its own output is the explanation when it fails."""
    command = [_tool(name), *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"fastmaml: {name} failed, see its messages above")


setup(
    ext_modules=[Extension("fastmaml._core", sources=[])],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
)
