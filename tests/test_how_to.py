"""The how-to pages do what they say: a page's patch on a copy of the project, exported there, and what the page says
works is run there; pages without a patch are their own proof"""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCH = runpy.run_path(str(ROOT / ".ci/patch.py"))
PAGES = {path.stem: path for path in sorted((ROOT / "nbs/how_to").glob("*.ipynb"))}
# what each touches of the house: chapters, and what else there is
TOUCHED = {"add_an_indicator": {"20_features/06_momentum"},
           "add_a_limit": {"00_ground/08_settings"}, # the entry, and the rule below it
           "add_an_order_type": {"00_ground/09_orders", "50_sim/02_matching"},
           "add_a_venue": {"00_ground/12_config", "75_venues/11_shadow"},    # its settings, its adapter
           "add_a_job": set()}
BESIDES = {"add_a_limit": {"tradelab.toml.example"},
           "add_an_order_type": {"tests/test_kernel.py"}, "add_a_job": {"nbs/stress.ipynb"}}


FILES = ("settings.ini", "setup.py", "README.md", "tradelab.toml.example")
# what `make export` does, with the chapters that the page touches: the others are what they were
EXPORT = """
from nbdev.export import add_init, get_config, nb_export
for path in {chapters}: nb_export(path)
add_init(get_config().lib_path)
"""
# after what the page says: the chapters that were touched, cell by cell, and the tests that name what was added
PROOF = """
import runpy
from pathlib import Path
import pytest
import tradelab
assert Path(tradelab.__file__).is_relative_to(Path.cwd())
chapter = runpy.run_path("tests/test_chapters.py")["test_chapter"]
for path in {chapters}:
    with pytest.MonkeyPatch.context() as patch: chapter(Path(path).absolute(), patch)
tests = runpy.run_path("tests/test_limits.py") if {names} else dict()
for name in {names}: tests[name]()
"""
TESTS = {"add_a_limit": ["test_each_limit_is_one_entry",
                         "test_each_limit_that_denies_has_a_sentence_that_names_it"]}


@pytest.fixture
def copy(tmp_path):
    "The project in a folder of its own"
    left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".hypothesis")
    for name in ("nbs", "tradelab", "tests"): shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for name in FILES: shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(command, folder):
    "A command in the copy, with its package before all others, uncompiled: its sources are new"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRADELAB_")}
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                         env=clean | {"PYTHONPATH": str(folder), "NUMBA_DISABLE_JIT": "1", "MPLBACKEND": "Agg"})
    assert ran.returncode == 0, ran.stdout + ran.stderr


# pages that change nothing: their cells are the proof
READ = {"runbook_start_and_stop", "runbook_incident", "runbook_hardening", "runbook_upgrade", "ask_by_telegram",
        "ask_by_api", "design", "trade_on_localnet", "keep_keys", "watch_with_grafana", "be_told",
        "schedule_jobs"}


def test_every_page_is_here():
    assert set(TOUCHED) == set(PAGES) - READ
    code = {name: [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
            for name, path in PAGES.items()}
    assert not [name for name, cells in code.items() if any("default_exp" in "".join(cell["source"]) for cell in cells)]
    assert not [name for name in READ if PATCH["blocks"](PAGES[name], "diff")]


@pytest.mark.integration
@pytest.mark.parametrize("page", TOUCHED)
def test_a_page_does_what_it_says(copy, page):
    files = PATCH["apply"](PAGES[page], copy)
    chapters = {name[len("nbs/"):-len(".ipynb")] for name in files if re.match(r"nbs/\d", name)}
    assert chapters == TOUCHED[page]
    assert set(files) - {f"nbs/{chapter}.ipynb" for chapter in chapters} == BESIDES.get(page, set())
    touched = [f"nbs/{chapter}.ipynb" for chapter in chapters]
    export = EXPORT.format(chapters=touched) if touched else ""
    (check,) = PATCH["blocks"](PAGES[page], "python")
    assert "assert" in check
    proof = PROOF.format(chapters=touched, names=TESTS.get(page, []))
    run([sys.executable, "-c", export + check + proof], copy)


def notebook(*sources):
    return {"cells": [PATCH["cell_of"]("code", None, source) for source in sources]} | PATCH["EMPTY"]


def test_a_patch_keeps_what_it_does_not_touch(tmp_path):
    before = notebook("one = 1", "two = 2\n\nthree = 3")
    before["cells"][0]["outputs"] = ["kept"]
    (tmp_path / "a.ipynb").write_text(json.dumps(before))
    lines = ["@@ a.ipynb @@", " two = 2", "+# %% [markdown]", "+## New", "+# %% tags=[\"check\"]", " ", "-three = 3",
             "+four = 4"]
    PATCH["patch"]("\n".join(lines), tmp_path)
    after = json.loads((tmp_path / "a.ipynb").read_text())
    assert after["cells"][0] == before["cells"][0]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in after["cells"]] == [
        ("code", "one = 1"), ("code", "two = 2"), ("markdown", "## New"), ("code", "\nfour = 4")]
    assert after["cells"][3]["metadata"] == {"tags": ["check"]}


@pytest.mark.parametrize("lines, message", [(" x\n+y", "a.py: what the page names is there 2 times, not once:\nx"),
                                            ("-z\n+y", "a.py: what the page names is there 0 times, not once:\nz"),
                                            ("+y", "a.py is there already")], ids=["twice", "nowhere", "exists"])
def test_a_patch_that_does_not_fit_changes_nothing(tmp_path, lines, message):
    (tmp_path / "a.py").write_text("x\nx\n")
    with pytest.raises(SystemExit, match=message): PATCH["patch"](f"@@ a.py @@\n{lines}", tmp_path)
    assert (tmp_path / "a.py").read_text() == "x\nx\n"
