"""The command ``fastmaml train | evaluate | plot | render | info | bench``.

Settings are dataclasses, which tyro turns into options. Errors a user can put right
are one line on standard error and exit code 2; a second Ctrl-C, or one outside of
training, ends with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

USAGE = """\
usage: fastmaml COMMAND ...

  train EXPERIMENT   meta-train: {experiments}
  evaluate RUN       the paper's table row for a run, on new tasks
  plot RUN [RUN...]  learning curve and figures of a run, beside others, as PNGs
  render RUN         an animation of an agent that has adapted, as a GIF or mp4
  info               version, build, devices, and why anything is missing
  bench              a quick table of speeds on this machine

fastmaml COMMAND --help tells the options; try: fastmaml train sinusoid"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows ``fastmaml``; the process's own unless told.

    Returns:
        The exit code: 0, 1 where a command says so, 2 for errors of the user, 130
        after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        from fastmaml.recipes import names

        print(USAGE.format(experiments=", ".join(names())))
        return 0 if given else 2
    if given[0] in ("--version", "-V"):
        import fastmaml

        print(f"fastmaml {getattr(fastmaml, '__version__', 'unknown')}")
        return 0
    command = _COMMANDS.get(given[0])
    if command is None:
        return _fail(f"no command {given[0]!r}: choose one of {', '.join(_COMMANDS)}")
    return _guarded(command, given[1:])


def _guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    from fastmaml.recipes.common import UserError

    try:
        return command(arguments)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _fail(message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    print(f"fastmaml: {line}", file=sys.stderr)
    return code


def _train(arguments: list[str]) -> int:
    from fastmaml.recipes import names, recipe

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: fastmaml train {{{','.join(names())}}} [options]")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in names():
        return _fail(f"no experiment {name!r}: choose one of {', '.join(names())}")
    kind = recipe(name)
    program = f"fastmaml train {name}"
    return _parse(kind, rest, program, _defaults(kind, rest)).train()


def _defaults(kind: Any, arguments: list[str]) -> Any:
    """The settings that options change: those of a run to resume, or of a preset.

    Some options choose the defaults of others (``--preset``, and ``--ways`` where
    more ways need other rates), so they are read before the rest.
    """
    from fastmaml.recipes.common import load_experiment

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = _ignore  # type: ignore[method-assign,assignment]
    first.add_argument("--resume")
    first.add_argument("--preset", default="paper")
    for option, type_ in kind.selectors.items():
        first.add_argument(f"--{option}", type=type_)
    try:
        known, _ = first.parse_known_args(arguments)
    except ValueError:
        return kind.from_preset("paper")
    if known.resume is not None:
        before = load_experiment(known.resume)
        return before if isinstance(before, kind) else kind.from_preset("paper")
    selected = {k: getattr(known, k) for k in kind.selectors}
    selected = {k: v for k, v in selected.items() if v is not None}
    preset = known.preset if known.preset in kind.presets else "paper"
    return kind.from_preset(preset, **selected)


def _ignore(message: str) -> None:
    """Leaves malformed options to tyro, which says what is wrong with them."""
    raise ValueError(message)


def _parse(kind: Any, arguments: list[str], program: str, default: Any = None) -> Any:
    import tyro

    from fastmaml.recipes.common import UserError

    options = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=program, args=arguments, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = _unboxed(errors.getvalue())
        raise UserError(f"{message} (see {program} --help)") from stop


def _unboxed(text: str) -> str:
    """What a box drawn by tyro says first, before the rule under it."""
    said = []
    for line in text.splitlines()[1:]:
        inner = line.strip("│╭╮╰╯ ")
        if inner.startswith("──"):
            break
        said.append(inner)
    return " ".join(said) or text


def _evaluate(arguments: list[str]) -> int:
    from fastmaml.recipes.evaluation import Evaluate, evaluate

    evaluate(_parse(Evaluate, arguments, "fastmaml evaluate"))
    return 0


def _plot(arguments: list[str]) -> int:
    from fastmaml.plot import Plot, plot_run

    options = _parse(Plot, arguments, "fastmaml plot")
    for path in plot_run(
        options.run,
        others=options.others,
        checkpoint=options.checkpoint,
        seed=options.seed,
    ):
        print(f"wrote {path}")
    return 0


def _render(arguments: list[str]) -> int:
    from fastmaml.rl.render import Render, render

    print(f"wrote {render(_parse(Render, arguments, 'fastmaml render'))}")
    return 0


def _info(arguments: list[str]) -> int:
    from fastmaml import info

    if arguments:
        return _fail(f"fastmaml info takes no options, got {' '.join(arguments)}")
    print(info.render())
    return 0


def _bench(arguments: list[str]) -> int:
    from fastmaml import quick_bench

    return int(quick_bench.main(arguments) or 0)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "plot": _plot,
    "render": _render,
    "info": _info,
    "bench": _bench,
}
