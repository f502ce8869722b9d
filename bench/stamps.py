"""Which result a figure was drawn from: a hash of the result inside the PNG.

Drawing and checking agree on names and stamps here; checking needs no matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "Source"
AGENTS = "agents.png"
"""The figure of recorded training runs, which ``bench/results_table.py`` checks."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def stamp(result: Mapping[str, Any]) -> str:
    """Returns a short hash of everything a result says."""
    text = json.dumps(result, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> str | None:
    """Returns the stamp inside a PNG, ``None`` without one."""
    data = path.read_bytes()
    if not data.startswith(_SIGNATURE):
        return None
    at = len(_SIGNATURE)
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        key, _, value = body.partition(b"\0")
        if kind == b"tEXt" and key == KEY.encode():
            return value.decode("latin-1")
        at += 12 + length
    return None


def names(results: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """The figures that results make, file name -> what it shows.

    Args:
        results: kind (``speed``, ``growth``) -> its newest result, if there is one.
    """
    speed, growth = results.get("speed"), results.get("growth")
    found = {}
    if speed:
        found["speed.png"] = "Time of a meta-gradient against fastmaml's"
    for name, series in (growth or {}).get("series", {}).items():
        title = f"Time of a meta-gradient as the work grows: {series['title']}"
        found[f"growth-{name}.png"] = title
    if memory_of(results):
        found["memory.png"] = "Peak memory as the inner loop grows"
    return found


def memory_of(
    results: Mapping[str, Mapping[str, Any] | None],
) -> Mapping[str, Any] | None:
    """The result whose memory is drawn: the growth's, which has more points."""
    for kind in ("growth", "speed"):
        result = results.get(kind)
        if result and result.get("memory"):
            return result
    return None


def source_of(
    name: str, results: Mapping[str, Mapping[str, Any] | None]
) -> Mapping[str, Any]:
    """The result that a figure is drawn from."""
    if name == "memory.png":
        found = memory_of(results)
    else:
        found = results.get("growth" if name.startswith("growth-") else "speed")
    assert found is not None, "names() gives only figures that have a result"
    return found


def stale(folder: Path, results: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """What is wrong with a folder of figures; one that isn't there is not wrong."""
    if not folder.is_dir():
        return []
    wanted = names(results)
    wrong = [f"{n}: missing" for n in wanted if not (folder / n).is_file()]
    for path in sorted(folder.glob("*.png")):
        if path.name == AGENTS:
            continue
        if path.name not in wanted:
            wrong.append(f"{path.name}: drawn from no result there is")
        elif read(path) != stamp(source_of(path.name, results)):
            wrong.append(f"{path.name}: drawn from another result")
    return wrong
