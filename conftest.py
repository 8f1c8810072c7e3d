"One bridge from nbdev to nbval, the fixtures that tests share, and a summary that names what was skipped and why"
import json
import os
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
SKIPPED_CELL = re.compile(r"^\s*#\s*\|\s*(eval:\s*false|slow|notest)\b", re.M | re.I)
PASSES = ROOT / ".cache" / "test-passes.jsonl"  # one line for each pytest run, for .ci/summary.py


@pytest.fixture
def root():
    "The repository"
    return ROOT


@pytest.fixture
def shared():
    "Real candles that are not part of the repository"
    folder = ROOT.parent / "shared"
    if not folder.is_dir(): pytest.skip(f"real data is not here ({folder.name}/ beside the repository)")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project: a folder of its own, and no settings from anywhere"
    for name in [name for name in os.environ if name.startswith("TRADELAB_")]: monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tradelab.toml").write_text("")
    (tmp_path / "nbs").mkdir()
    return tmp_path


def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ != "IPyNbCell": continue
        if directive := SKIPPED_CELL.search(item.cell.source): item.add_marker(pytest.mark.skip(reason=f"#| {directive[1]}"))
        if item.cell.outputs and item.cell.execution_count is None: item.cell.execution_count = 1  # nbdev_clean removes the counts, nbval wants them


def pytest_terminal_summary(terminalreporter):
    if hasattr(terminalreporter.config, "workerinput"): return
    stats = terminalreporter.stats
    skipped = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "") for report in stats.get("skipped", [])]
    if skipped:
        terminalreporter.section("skipped")
        for name, reason in skipped: terminalreporter.write_line(f"{name}: {reason or 'no reason given'}")
    counts = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "error", "xfailed", "xpassed", "warnings")}
    started = getattr(terminalreporter, "_sessionstarttime", None)
    seconds = time.time() - (started if started is not None else terminalreporter._session_start.time)
    PASSES.parent.mkdir(exist_ok=True)
    with PASSES.open("a") as file: print(json.dumps({**counts, "skipped": skipped, "seconds": seconds}), file=file)
