"""Fixtures shared by all tests: real data, a cache of its own, and seeds."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import backend  # noqa: F401  a fixture

_FALLBACK = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real ``omniglot`` and ``mini_imagenet``."""
    chosen = os.environ.get("FASTMAML_DATA")
    folder = Path(chosen) if chosen else _FALLBACK
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; set FASTMAML_DATA")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Keeps packed data sets of the tests, also of their subprocesses, to the tests."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTMAML_CACHE", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is compiled once for all tests, also those of other workers."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Starts every test from the same random numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
