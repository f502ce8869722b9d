"""Threads of the native engine: set, read, restored, refused."""

import os
import subprocess
import sys

import pytest

import fastmaml
from fastmaml import _native

pytestmark = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the native engine is not built"
)


@pytest.fixture(autouse=True)
def restored():
    before = fastmaml.get_num_threads()
    yield
    fastmaml.set_num_threads(before)


def test_threads_are_what_was_set():
    fastmaml.set_num_threads(3)
    assert fastmaml.get_num_threads() == 3


def test_none_restores_the_default():
    default = _in_a_process(os.environ.get("FASTMAML_NUM_THREADS", ""))
    fastmaml.set_num_threads(default + 2)
    fastmaml.set_num_threads(None)
    assert fastmaml.get_num_threads() == default


def test_the_default_is_within_the_cpus():
    assert 1 <= _in_a_process("") <= (os.cpu_count() or 1)


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads={threads}: expected at least 1"):
        fastmaml.set_num_threads(threads)


def test_the_environment_sets_the_default():
    assert _in_a_process("5") == 5


def _in_a_process(wish: str) -> int:
    environment = {**os.environ, "FASTMAML_NUM_THREADS": wish}
    code = "import fastmaml; print(fastmaml.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("threads", ["2", 2.0, True])
def test_threads_are_an_integer(threads):
    with pytest.raises(TypeError, match=f"threads={threads!r}: expected an integer"):
        fastmaml.set_num_threads(threads)
