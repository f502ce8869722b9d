"""``python -m fastmaml``: the same as the command ``fastmaml``."""

from fastmaml.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
