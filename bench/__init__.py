"""Benchmarks: fastmaml and its peers on the same work, in the same run.

Imported from the root of a checkout, which is also where the sources of ``fastmaml``
lie. The root therefore moves to the end of the import path: an installed package,
the one with the compiled engine, goes first.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _prefer_installed_package() -> None:
    places = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    sys.path[:] = [*places, str(ROOT)]


_prefer_installed_package()
