"What all tests share"
import os
from pathlib import Path

import numba
import pytest
from postgres import database_url, own_server, postgres, server_url  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
# the chapters run compiled under nbval, uncompiled here
collect_ignore = [] if numba.config.DISABLE_JIT else ["test_chapters.py"]


@pytest.fixture(scope="session")
def root()->Path:
    "The repository"
    return ROOT


@pytest.fixture(scope="session")
def shared()->Path:
    "The folder of real data beside the repository; what needs it is skipped where it is absent"
    folder = ROOT.parent / "shared"
    if not (folder / "data").exists():
        pytest.skip("real data is absent: there is no folder shared/data beside the repository")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch)->Path:
    "An empty project: a folder of its own, which is the current one, and no settings from anywhere"
    for name in [name for name in os.environ if name.startswith("TRADELAB_")]: monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tradelab.toml").touch()
    (tmp_path / "nbs").mkdir()
    return tmp_path
