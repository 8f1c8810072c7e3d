"What the runbook promises: private files, hashes and licences of what is installed, baselines, and its pages"
import json
import os
import re
import runpy
import stat
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from tradelab.config import settings
from tradelab.live.audit import export
from tradelab.log import configure, get_logger
from tradelab.watching import example_session

ROOT = Path(__file__).parents[1]


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


def locked(line=re.compile(r"([A-Za-z0-9._-]+)==(\S+)")):
    "Version by name, as the lock has them"
    found = map(line.match, (ROOT / "requirements.lock").read_text().splitlines())
    return {name_of(each[1]): each[2] for each in found if each}


def name_of(text): return re.sub(r"[-_.]+", "-", text).lower()


def test_each_package_of_the_lock_has_hashes_and_nothing_else_has():
    "torch has many builds; make lock writes both files"
    text = (ROOT / "requirements.hashes").read_text()
    found = dict(re.findall(r"^(\S+)==(\S+) \\$", text, re.M))
    assert {name_of(name): version for name, version in found.items()} == {
        name: version for name, version in locked().items() if name != "torch"}
    assert len(re.findall(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}\b", text)) == len(found)


# what asks for its source to be passed on, and why it may be here: nothing of it is copied or changed, all of it is
# imported as it was installed, and can be replaced
COPYLEFT = {"psycopg": "LGPL: the driver of PostgreSQL", "psycopg-binary": "LGPL: the same, compiled",
            "python-telegram-bot": "LGPL: only with a bot of Telegram", "certifi": "MPL: a file of certificates",
            "hypothesis": "MPL: only in tests", "tqdm": "MPL: a progress bar", "pathspec": "MPL: only for mypy",
            "orjson": "MPL: JSON for ccxt's clients", "fqdn": "MPL: a check of names for JupyterLab",
            "astroid": "LGPL: only for the site of the documents", "docutils": "GPL in parts: the same"}
SILENT = {"peewee": "MIT, in its repository", "ta-lib": "BSD, in its repository"} # say nothing in their metadata
FREE = r"MIT|BSD|Apache|PSF|Python Software|ISC|Zlib|Unlicense|HPND|Historical|CC0|NCSA|CNRI|BlueOak|Public Domain"
SHARED = r"GPL|General Public|MPL|Mozilla|EPL|Eclipse|CDDL|EUPL|SSPL|BUSL|Commons Clause|CC-BY-SA|CC-BY-NC"


def licence(metadata):
    "What a package says of its licence"
    classified = [each.split("::")[-1].strip() for each in metadata.get_all("Classifier") or []
                  if each.startswith("License ::")]
    return metadata.get("License-Expression") or "; ".join(classified) or (metadata.get("License") or "")[:100]


def test_what_is_installed_may_be_used():
    "Nothing copyleft beyond what is listed with a reason, nothing unknown"
    known = {name_of(each.metadata["Name"]): licence(each.metadata) for each in distributions()}
    told = {name: text for name, text in known.items() if name in locked()}
    assert len(told) > 150
    assert {name: text for name, text in told.items() if re.search(SHARED, text) and name not in COPYLEFT} == {}
    assert {name: text for name, text in told.items() if not re.search(f"{FREE}|{SHARED}", text)
            and name not in SILENT} == {}
    assert not [name for name in {**COPYLEFT, **SILENT} if name not in locked()]


@pytest.mark.parametrize("installed, said", [("1.5", []), ("1.5+cpu", []),
                                             ("1.4", ["numba 1.4 is installed, 1.5 is locked"])])
def test_an_audit_says_what_is_not_as_it_was_locked(tmp_path, monkeypatch, installed, said):
    audit = runpy.run_path(str(ROOT / ".ci/audit.py"))
    (tmp_path / "lock").write_text("# made\nNumba==1.5\nabsent==3\n")
    assert audit["locked"](tmp_path / "lock") == {"numba": "1.5", "absent": "3"}
    monkeypatch.setitem(audit["apart"].__globals__, "locked", lambda: {"numba": "1.5", "absent": "3"})
    one = SimpleNamespace(metadata={"Name": "numba"}, version=installed)
    monkeypatch.setitem(audit["apart"].__globals__, "distributions", lambda: [one])
    assert audit["apart"]() == said


def test_a_baseline_names_what_became_slower():
    check = runpy.run_path(str(ROOT / "benchmarks/check.py"))
    kept = json.loads((ROOT / "benchmarks/baselines.json").read_text())
    assert set(kept) == set(check["MEASURES"])
    assert check["slower"](kept, kept) == []
    assert check["slower"]({"ledger": 3.1}, {"ledger": 2.}) == ["ledger: 3.10, baseline 2.00: 1.6 times as slow"]
    assert check["slower"]({"new": 1.}, {}) == ["new: 1.00, there is no baseline: python benchmarks/check.py --write"]
    assert check["beside"](lambda: sum(range(200_000)), lambda: sum(range(20_000)), 3) > 3.
