"""``pytest bench`` ends with the table of targets."""

import pytest

from bench import targets

MEDIANS = pytest.StashKey[dict]()
PERCENTS = pytest.StashKey[dict]()


def pytest_configure(config):
    """Starts with an empty table."""
    config.stash[MEDIANS] = {}
    config.stash[PERCENTS] = {}


@pytest.fixture
def record(request):
    """Returns what keeps one median for the table: (workload, quantity, name, s)."""

    def keep(workload, quantity, name, seconds, percent=None):
        times = request.config.stash[MEDIANS].setdefault(workload, {})
        times.setdefault(quantity, {})[name] = seconds
        if percent is not None:
            request.config.stash[PERCENTS][workload] = percent

    return keep


def pytest_terminal_summary(terminalreporter, config):
    """Prints the table, if any meta-gradient of ours was timed."""
    standings = targets.of_medians(config.stash[MEDIANS], config.stash[PERCENTS])
    if not standings:
        return
    terminalreporter.section("fastmaml against its best peer, one meta-gradient")
    terminalreporter.write_line(targets.text_table(standings))
    terminalreporter.write_line(
        "Timed one after the other; figures to quote come from python -m bench.run."
    )
