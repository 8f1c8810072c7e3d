"For tests and notebooks alike: the bridge from nbdev to nbval, and a summary that names what was skipped and why"
import json
import re
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

SKIPPED_CELL = re.compile(r"^\s*#\s*\|\s*(eval:\s*false|slow|notest)\b", re.M | re.I)
PASSES = Path(__file__).parent / ".cache" / "test-passes.jsonl"  # one line for each run of pytest, for .ci/summary.py


# a property does not fail because the machine is slow
hypothesis.settings.register_profile("tradelab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tradelab")


def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ != "IPyNbCell": continue
        if directive := SKIPPED_CELL.search(item.cell.source):
            item.add_marker(pytest.mark.skip(reason=f"#| {directive[1]}"))
        # nbdev_clean removes the counts, nbval asks for them
        if item.cell.outputs and item.cell.execution_count is None: item.cell.execution_count = 1


def pytest_sessionstart(session):
    session.config.started = time.time()


def pytest_terminal_summary(terminalreporter, config):
    stats = terminalreporter.stats
    skipped = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple)
                else "") for report in stats.get("skipped", [])]
    kinds = Counter((name.split("[")[0], reason) for name, reason in skipped)
    if kinds: terminalreporter.section("skipped tests and cells")
    for (name, reason), count in kinds.items():
        terminalreporter.write_line(f"{name}{f' ({count} times)' if count > 1 else ''}: {reason or 'no reason given'}")
    counts = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "error", "xfailed", "xpassed",
                                                          "warnings")}
    if not PASSES.exists() or hasattr(config, "workerinput"): return # only `make test` asks for it, and once
    with PASSES.open("a") as file:
        print(json.dumps({**counts, "skipped": skipped, "seconds": time.time() - config.started}), file=file)
