"""Writes the README's benchmark section from a result file.

    python bench/report.py              # the newest full results -> README.md
    python bench/report.py --check      # exit 1 if the README differs from that
    python bench/report.py --figures bench/results/figures

The section stands between two markers; everything in it comes from the JSON file it
names, so no figure is typed by hand. Quick runs are not reported; without any result
the section is empty. A result of ``bench/gpu.sh``, if there is one, adds a table.
Figures in the folder ``figures`` beside the results are shown in it; ``--check`` also
fails when one was drawn from anything but the newest results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # where this file runs as a script
from bench import elsewhere, stamps, targets  # noqa: E402
from bench.rl_report import rl_section  # noqa: E402
from bench.targets import NONE, digits  # noqa: E402

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

KINDS = ("speed", "growth")

Result = dict[str, Any]
Results = Mapping[str, "Result | None"]


def newest(folder: Path, device: str = "cpu", kind: str = "speed") -> Path | None:
    """Returns the latest full result of a device, by the date inside the file.

    Args:
        folder: of the results.
        device: that it was measured on.
        kind: ``speed`` (``bench.run``), ``growth``, ``layers``, ``gpu`` or ``rl``.

    Returns:
        Its path, or ``None`` if there is none.
    """
    dated = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        alike = (result["device"], result.get("kind", "speed")) == (device, kind)
        if alike and not result["quick"]:
            dated.append((result["date"], path))
    return max(dated)[1] if dated else None


# -- cells --------------------------------------------------------------------------


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> str:
    """Makes a Markdown table whose first ``text`` columns are left-aligned."""
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join([_line(head), _line(rule), *map(_line, rows)])


def _contenders(result: Result) -> list[str]:
    """Names in order of first appearance, fastmaml's first, without the all-skipped."""
    seen = dict.fromkeys(
        n for w in result["workloads"].values() for n in w["contenders"]
    )
    return sorted(seen, key=lambda name: not targets.is_ours(name))


def _best_peer(workload: Result, quantity: str) -> tuple[str, float] | None:
    """The fastest peer and how many times longer than fastmaml it takes."""
    ratios = {
        name: row[quantity]["ratio"]["median"]
        for name, row in workload["contenders"].items()
        if not targets.is_ours(name) and "ratio" in row[quantity]
    }
    if not ratios:
        return None
    name = min(ratios, key=lambda n: ratios[n])
    return name, ratios[name]


def _times_cell(workload: Result, name: str, fastest: str) -> str:
    row = workload["contenders"].get(name)
    if row is None:
        return NONE
    cell = digits(row["meta_gradient"]["median"])
    return f"**{cell}**" if name == fastest else cell


def _factor(workload: Result, quantity: str) -> str:
    best = _best_peer(workload, quantity)
    return NONE if best is None else f"{digits(best[1])}×"


# -- parts of the section -----------------------------------------------------------


def speed_table(result: Result) -> str:
    """One row a workload: milliseconds of everyone, our lead, our share of the peak."""
    names = _contenders(result)
    head = ["one meta-gradient, ms", "tasks × (support, query)", *names]
    head += ["fastest peer takes", "with Adam", "% of peak"]
    rows = []
    for workload in result["workloads"].values():
        field = workload["contenders"]
        fastest = min(field, key=lambda n: field[n]["meta_gradient"]["median"])
        mine = next((row for n, row in field.items() if targets.is_ours(n)), None)
        row = [workload["title"], workload["work"]]
        row += [_times_cell(workload, name, fastest) for name in names]
        row += [_factor(workload, q) for q in ("meta_gradient", "meta_step")]
        row += [NONE if mine is None else digits(mine["percent_of_peak"], 2)]
        rows.append(row)
    return _table(head, rows, 2)


def targets_table(result: Result) -> str:
    """One row a workload: the best peer, how far ahead we are, and how far we aim.

    Without fastmaml in the result there is no table.
    """
    rows = [targets.cells(standing) for standing in targets.of_result(result)]
    return _table(targets.HEAD, rows, 1) if rows else ""


def _megabytes(run: Result) -> str:
    return f"{run['peak'] / 2**20:,.0f}" if "peak" in run else NONE


def memory_table(result: Result) -> str:
    """Peak memory of a process over the number of inner steps."""
    memory = result["memory"]
    steps = [str(k) for k in memory["steps"]]
    head = ["peak memory of the process, MiB", *(f"K = {k}" for k in steps), "growth"]
    rows = []
    for name, entry in memory["contenders"].items():
        if any("peak" in run for run in entry["runs"].values()):
            grown = entry.get("growth")
            cells = [_megabytes(entry["runs"][k]) for k in steps]
            cells.append(NONE if grown is None else f"{grown / 2**20:,.0f}")
            rows.append([name, *cells])
    for whose, key in (
        ("all tasks", "growth"),
        ("one task a thread", "growth_per_worker"),
    ):
        copies = memory["copies"][key] / 2**20
        label = f"*K parameter copies of {whose}*"
        rows.append([label, *[""] * len(steps), f"{copies:,.0f}"])
    return _table(head, rows, 1)


def _left_out(result: Result) -> str:
    """The reasons for the dashes, alike ones together."""
    reasons: dict[str, list[str]] = {}
    for name, workload in result["workloads"].items():
        for peer, reason in workload["skipped"].items():
            reasons.setdefault(f"{peer} ({reason}", []).append(name)
    everywhere = len(result["workloads"])
    parts = [
        f"{why})" if len(names) == everywhere else f"{why}; {', '.join(names)})"
        for why, names in reasons.items()
    ]
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _worst_error(result: Result, ours: bool) -> str:
    errors = [
        row["error"]
        for workload in result["workloads"].values()
        for name, row in workload["contenders"].items()
        if targets.is_ours(name) == ours
    ]
    return f"{max(errors):.0e}" if errors else NONE


def provenance(result: Result, source: str) -> str:
    """Where the figures come from, in one paragraph."""
    machine, versions, peak = result["machine"], result["versions"], result["peak"]
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if v is not None)
    state = " with local changes" if result["modified"] else ""
    return (
        "Medians of interleaved rounds in one process, float32, second order; ratios "
        "are medians over rounds, `with Adam` is that of a whole meta-step; a training "
        "step also draws its tasks. `% of peak` is the direct method's arithmetic by "
        "the rate of torch's matrix product in the same run, "
        f"{peak['matrix_flops'] / 1e9:,.0f} GFLOP/s; `% of memory bound` likewise "
        "its traffic by a cache's measured bandwidth. More than 100 is possible: the "
        "library leaves hardware unused, and fastmaml does less than the direct method "
        "where it can (Winograd's filtering, factored updates). Below 1×, the peer is "
        "faster. "
        "Largest relative error against "
        f"float64: fastmaml {_worst_error(result, True)}, peers "
        f"{_worst_error(result, False)} (at small sizes "
        "all agree in float64; the likely cause, not proven, is rounding that flips "
        "single branches of ReLU and max pooling). "
        f"{machine['cpu']}, "
        f"{machine['threads']} threads, {machine['torch_capability']}; {packages}; "
        f"{result['date'][:10]}, commit {result['commit']}{state}; all samples' "
        f"statistics in [{source}]({source}), written by `{result['command']}`."
    )


def section(result: Result, source: str) -> str:
    """Returns everything between the markers."""
    parts = [speed_table(result), targets_table(result)]
    if "memory" in result:
        title = result["workloads"].get(result["memory"]["workload"], {}).get("title")
        parts += (
            [f"Memory as the inner loop grows to K steps ({title}):"] if title else []
        )
        parts += [memory_table(result)]
    parts += [_left_out(result), provenance(result, source)]
    return "\n\n".join(part for part in parts if part)


# -- the README ---------------------------------------------------------------------


def gpu_table(result: Result) -> str:
    """One row a workload: milliseconds of everyone on a GPU, and of one CUDA graph."""
    names = _contenders(result)
    head = ["on a GPU, ms", "tasks × (support, query)", *names, "fastest peer takes"]
    head += ["step with Adam, one graph", "% of FP32 product"]
    rows = []
    for workload in result["workloads"].values():
        field = workload["contenders"]
        if not field:
            continue
        fastest = min(field, key=lambda n: field[n]["meta_gradient"]["median"])
        mine = next((row for n, row in field.items() if targets.is_ours(n)), {})
        row = [workload["title"], workload["work"]]
        row += [_times_cell(workload, name, fastest) for name in names]
        graph = mine.get("captured_step", {}).get("median")
        row += [_factor(workload, "meta_gradient"), digits(graph)]
        row += [digits(mine.get("percent_of_peak"), 2)]
        rows.append(row)
    return _table(head, rows, 2) if rows else ""


def gpu_provenance(result: Result, source: str) -> str:
    """Card, versions, and which stages of the run did not go well."""
    peak, versions = result["peak"], result.get("versions", {})
    card = {"name": NONE, "driver": NONE, "cuda": NONE, **result.get("gpu", {})}
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if v is not None)
    wrong = [
        f"{n} ({s['status']})"
        for n, s in result["stages"].items()
        if s["status"] != "ok"
    ]
    tests = result["stages"].get("tests", {}).get("tests", {})
    told = ", ".join(f"{n} {what}" for what, n in tests.items())
    return (
        "Medians of interleaved rounds in one process on one card, float32 without "
        "TF32 for everyone; torch.compile with CUDA graphs. Ceilings of the same run: "
        f"{peak.get('copy_bytes', 0) / 1e12:.2f} TB/s copied, "
        f"{peak.get('matrix_flops', 0) / 1e12:.1f} TFLOP/s in an FP32 product. "
        f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}; {packages}; "
        f"{result['date'][:10]}, commit {result['commit']}. "
        + (f"Tests on the card: {told}. " if told else "")
        + (f"Not ok: {', '.join(wrong)}. " if wrong else "")
        + f"Everything in [{source}]({source}), written by `{result['command']}`."
    )


def gpu_section(result: Result, source: str) -> str:
    """What of a result of ``bench/gpu.sh`` stands in the README."""
    parts = [gpu_table(result), _left_out(result), gpu_provenance(result, source)]
    return "\n\n".join(part for part in parts if part)


def updated(text: str, body: str) -> str:
    """Returns the README with its section replaced.

    Raises:
        ValueError: if the markers are missing, doubled or out of order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README: expected {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise ValueError(f"README: {END} stands before {BEGIN}")
    lines = [BEGIN, body, END] if body else [BEGIN, END]
    return before + "\n".join(lines) + rest.split(END)[1]


def _relative(path: Path, base: Path) -> str:
    path, base = path.resolve(), base.resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) else path.name


def pictures(folder: Path, results: Results, base: Path) -> str:
    """Markdown of the figures that stand in a folder, in a fixed order."""
    lines = [
        f"![{title}]({_relative(folder / name, base)})"
        for name, title in stamps.names(results).items()
        if (folder / name).is_file()
    ]
    return "\n\n".join(lines)


def _learning(folder: Path, base: Path) -> str:
    """The section of reinforcement learning, if it was measured."""
    path = newest(folder, kind="rl")
    return (
        ""
        if path is None
        else rl_section(json.loads(path.read_text()), _relative(path, base))
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the README, and draws figures.

    Returns:
        0, or 1 if the README has no markers or ``--check`` finds it or a figure stale.
    """
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument(
        "--figures", type=Path, help="draw PNG figures into this folder"
    )
    options = parser.parse_args(argv)
    sources = {kind: newest(options.results, kind=kind) for kind in KINDS}
    results = {k: p and json.loads(p.read_text()) for k, p in sources.items()}
    folder, base = options.results / "figures", options.readme.parent
    if options.figures is not None and not options.check:
        from bench import figures

        figures.draw(results, options.figures)
    body, text = "", options.readme.read_text()
    if sources["speed"] is not None and results["speed"] is not None:
        body = section(results["speed"], _relative(sources["speed"], base))
        parts = [
            body,
            *(
                elsewhere.table(json.loads(other.read_text()), _relative(other, base))
                for other in elsewhere.others(options.results, sources["speed"])
            ),
            _learning(options.results, base),
            pictures(folder, results, base),
        ]
        body = "\n\n".join(filter(None, parts))
    card = newest(options.results, "cuda", "gpu")
    if card is not None:
        told = gpu_section(json.loads(card.read_text()), _relative(card, base))
        body = "\n\n".join(filter(None, [body, told]))
    try:
        new = updated(text, body)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.check:
        options.readme.write_text(new)
        return 0
    wrong = [f"{options.readme.name}: stale"] if new != text else []
    wrong += stamps.stale(folder, results)
    for line in wrong:
        print(f"{line}, run {parser.prog} --figures {folder}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
