"What the runbook promises: private files, hashes and licences of what is installed, baselines, and its pages"
import os
import stat
from pathlib import Path

import pytest

from tradelab.config import settings
from tradelab.live.audit import export
from tradelab.log import configure, get_logger
from tradelab.watching import example_session


@pytest.fixture
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.integration
def test_what_is_written_of_an_account_is_its_owners_alone(project, open_umask):
    with example_session(candles=8, pace=0., finished=True) as place:
        export(place.database, project / "exported")
        there = [Path(place.database.removeprefix("sqlite:///")).parent, project / "exported"]
        configure(settings(), console=False)
        get_logger("tradelab.test").warning("something of the account")
        files = [path for folder in (*there, project / "logs") for path in folder.rglob("*") if path.is_file()]
        assert {"tradelab.db", "tradelab.db-wal", "recording.zst", "session.json", "journal.csv", "tradelab.jsonl",
                "trades.csv"} <= {path.name for path in files}
        assert not [path.name for path in files if stat.S_IMODE(path.stat().st_mode) != 0o600 and path.name != "lock"]
