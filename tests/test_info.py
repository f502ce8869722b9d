"""The diagnosis says what is there, and why the rest isn't."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types

import pytest
import torch
from command import environment

from fastmaml import _native, info


@pytest.fixture
def built(monkeypatch):
    """Pretends that an extension with this description of itself is loaded."""

    def pretend(**description):
        module = types.SimpleNamespace(build_info=lambda: description)
        monkeypatch.setattr(_native, "core", lambda: module)

    return pretend


@pytest.fixture
def broken(monkeypatch):
    def fail():
        raise _native.NativeUnavailable(
            "the planted reason\n  to fix: plant no reasons"
        )

    monkeypatch.setattr(_native, "core", fail)


def test_describes_this_installation():
    facts = info.collect()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["native"]["available"] == (_native.unavailable() is None)
    assert json.loads(json.dumps(facts)) == facts


def test_the_real_extension_describes_itself():
    native = info.collect()["native"]
    assert native["available"], native.get("reason")
    assert native["isa"] in native["isas"]
    assert "baseline" in native["isas"]
    assert native["threads"] >= 1


@pytest.mark.parametrize("wish", ["", "1", "0"])
def test_says_whether_kernels_may_begin_early(wish):
    if _native.unavailable() or _native.core().build_info()["cuda_backend"] == "none":
        pytest.skip("no CUDA backend in this build")
    code = "from fastmaml import info; print(info.render())"
    variable = {"FASTMAML_EARLY_LAUNCH": wish} if wish else {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), **variable},
        capture_output=True,
        text=True,
        check=True,
    )
    told = r"off \(FASTMAML_EARLY_LAUNCH=0\)" if wish == "0" else "on"
    assert re.search(rf"  early_launches +{told}\n", done.stdout)


def test_renders_what_was_built(built):
    built(isas=["baseline", "avx2", "avx512"], isa="avx2", compiler="planted 1.2")
    text = info.render()
    for row in (
        r"native engine  +available",
        r"  isas  +baseline avx2 avx512",
        r"  isa  +avx2",
        r"  compiler  +planted 1.2",
        r"device cpu  +native and functional engine",
    ):
        assert re.search(f"^{row}$", text, re.MULTILINE), row


@pytest.mark.parametrize(
    ("processor", "reason"),
    [("AVX512", "FASTMAML_ISA=all"), ("AVX2", "this processor does not have it")],
)
def test_tells_why_an_instruction_set_is_missing(built, monkeypatch, processor, reason):
    monkeypatch.setattr(info.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    built(isas=["baseline", "avx2"], isa="avx2")
    missing = info.collect()["missing"]
    assert reason in missing["avx512"]
    assert "avx2" not in missing


def test_no_avx_is_missed_on_other_processors(built, monkeypatch):
    monkeypatch.setattr(info.platform, "machine", lambda: "aarch64")
    built(isas=["baseline"], isa="baseline")
    assert not {"avx2", "avx512"} & set(info.collect()["missing"])


def test_a_broken_extension_is_explained(broken):
    facts = info.collect()
    assert facts["native"]["available"] is False
    assert facts["devices"]["cpu"] == "functional engine"
    text = info.render()
    assert "missing: native engine\n  the planted reason" in text
    assert "to fix: plant no reasons" in text


NATIVE_CUDA = "native engine on cuda"


def test_the_real_extension_tells_of_its_cuda_backend():
    native = info.collect()["native"]
    if native["cuda_backend"] == "none":
        assert native["cuda"].startswith("none: ")
    else:
        expected = {"cuda": r"CUDA 1[2-9]\.\S+ for [0-9]", "cuda_emulated": "emulated"}
        assert re.match(expected[native["cuda_backend"]], native["cuda"])


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"cuda": "none: planted reason", "cuda_backend": "none"}, "^planted reason; "),
        (
            {"cuda": "emulated", "cuda_backend": "cuda_emulated"},
            "on the CPU, for tests",
        ),
        ({}, "an older build"),
    ],
)
def test_says_why_there_is_no_cuda_backend(built, description, reason):
    built(isas=["baseline"], isa="baseline", **description)
    said = info.collect()["missing"][NATIVE_CUDA]
    assert re.search(reason, said), said
    assert "rebuild with FASTMAML_CUDA=ON" in said


def test_a_broken_extension_has_no_cuda_backend(broken):
    assert "needs the native engine" in info.collect()["missing"][NATIVE_CUDA]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("kind", ["cuda", "none"])
def test_cuda_device_as_torch_sees_it(built, monkeypatch, seen, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    built(isas=["baseline"], isa="baseline", cuda="CUDA 13.0 for 90", cuda_backend=kind)
    facts = info.collect()
    engines = {"cuda": "native and functional engine", "none": "functional engine"}
    expected = engines[kind] if seen else "not visible to torch"
    assert facts["devices"]["cuda"] == expected
    assert (NATIVE_CUDA in facts["missing"]) == (kind == "none" or not seen)
    if kind == "cuda" and not seen:
        assert "torch sees no GPU" in facts["missing"][NATIVE_CUDA]


def test_missing_jax_is_explained(monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    assert "[bench]" in info.collect()["missing"]["jax"]
