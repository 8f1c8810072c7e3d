"The notebooks are the source: the package is what they export, and they are stored clean"
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = [path.relative_to(ROOT) for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not
             in path.parts]


def source_of(path):
    return "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / path).read_text())["cells"])


def exported(path):
    found = re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", source_of(path), re.M)
    return found and found[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The sources in a folder of their own, so that a check changes nothing here"
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "tradelab", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints",
            ".hypothesis"))
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, folder)
    return folder


def nbdev(command, folder):
    ran = subprocess.run([BIN / command], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def files(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts}


def assets(folder, *options):
    "The exporter of what is no Python, over this folder: what it refused, or nothing"
    ran = subprocess.run([sys.executable, ROOT / ".ci/assets.py", *options, folder], capture_output=True, text=True)
    assert (ran.returncode == 0) == (ran.stderr == ""), ran.stderr
    return ran.stderr.strip()


@pytest.fixture
def house(tmp_path):
    "A house of one chapter with one asset, exported"
    def write(*cells):
        "The chapter, of (kind, source)"
        cells = [{"cell_type": kind, "source": source} for kind, source in cells]
        (tmp_path / "nbs/10_room/01_page.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "nbs/10_room").mkdir(parents=True)
    (tmp_path / "tradelab/room").mkdir(parents=True)
    (tmp_path / "tradelab/room/page.py").write_text("")
    write(("code", "#| export\nx = 1"), ("raw", "#| asset room/page.js\nexport const one = 1"))
    assert assets(tmp_path) == ""
    return tmp_path, write


def test_nbdev_works(): subprocess.run([BIN / "nbdev_export", "--help"], check=True, capture_output=True)


def test_the_package_is_what_the_notebooks_export(copy):
    before = files(copy / "tradelab", "*.py")
    nbdev("nbdev_export", copy)
    after = files(copy / "tradelab", "*.py")
    assert {str(path) for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)} == set(), "run make export"


def test_what_is_no_python_is_what_the_notebooks_export():
    assert assets(ROOT, "--check") == ""


def test_an_asset_is_what_its_cell_says(house):
    folder, write = house
    page = folder / "tradelab/room/page.js"
    assert page.read_text() == "export const one = 1\n"
    assert assets(folder, "--check") == ""
    write(("raw", "#| asset room/page.js\nexport const one = 2"), ("raw", "#| asset py.typed"))
    assert assets(folder, "--check").splitlines() == [
        "tradelab/room/page.js is not what its cell says: run make export",
        "tradelab/py.typed is not what its cell says: run make export"]
    assert page.read_text() == "export const one = 1\n", "a check writes nothing"
    assert assets(folder) == assets(folder, "--check") == ""
    assert page.read_text() == "export const one = 2\n"
    assert (folder / "tradelab/py.typed").read_bytes() == b""
    write(("raw", "#| asset py.typed"))
    assert assets(folder, "--check") == ("tradelab/room/page.js has no cell: write one that begins with #| asset "
                                         "room/page.js, or delete it")


@pytest.mark.parametrize("cells, refused", [
    ([("code", "#| asset room/a.js\n1")], "must be a raw cell, was code"),
    ([("raw", "#| asset ../a.js\n1")], "must be a file below tradelab/"),
    ([("raw", "#| asset /a.js\n1")], "must be a file below tradelab/"),
    ([("raw", "#| asset room/a.py\n1")], "that is no Python"),
    ([("raw", "#| asset room/a\n1")], "with a suffix"),
    ([("raw", "#| asset room/assets/a.js\n1")], "folders named assets hold what came from elsewhere"),
    ([("raw", "#| asset a.js\n1"), ("raw", "#| asset a.js\n2")], "is written by another cell too"),
    ([("raw", "#| assets a.js\n1")], "begins with #| asset PATH, was '#| assets a.js'")])
def test_an_asset_that_cannot_be_is_refused(house, cells, refused):
    folder, write = house
    write(*cells)
    assert refused in assets(folder)
    assert not list(folder.rglob("a*.js"))


def test_what_came_from_elsewhere_has_a_row_with_its_hash(house):
    folder, _ = house
    place = folder / "tradelab/room/assets"
    place.mkdir()
    (place / "chart.js").write_text("/* of others */")
    digest = hashlib.sha256(b"/* of others */").hexdigest()
    assert assets(folder, "--check") == ("tradelab/room/assets/chart.js has no row in the THIRD_PARTY.md beside it "
                                         f"with its sha256, {digest}")
    (place / "THIRD_PARTY.md").write_text(f"| chart.js | 1.2.3 | MIT | {digest} |\n")
    assert assets(folder, "--check") == ""
    (place / "chart.js").write_text("/* changed */")
    assert "has no row in the THIRD_PARTY.md" in assets(folder, "--check")


@pytest.mark.integration
def test_the_wheel_carries_all_that_runs(copy, tmp_path):
    "Made from the source distribution, which is made from the tree: neither lacks a file"
    (copy / "build/lib/tradelab").mkdir(parents=True)
    (copy / "build/lib/tradelab/gone.py").write_text("raise SystemExit('of an earlier build')")
    make = ("import sys; from setuptools import build_meta as b; "
            "print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))")
    def built(kind, tree):
        ran = subprocess.run([sys.executable, "-c", make, kind, tmp_path], cwd=tree, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return tmp_path / ran.stdout.splitlines()[-1]
    shutil.unpack_archive(built("sdist", copy), tmp_path)
    tree = next(path for path in tmp_path.iterdir() if path.is_dir() and (path / "PKG-INFO").exists())
    for source in (copy, tree):
        with zipfile.ZipFile(built("wheel", source)) as archive:
            inside = {name: archive.read(name) for name in archive.namelist()}
            about = [name for name in inside if ".dist-info/" in name]
            points = next(inside[name] for name in about if name.endswith("entry_points.txt")).decode()
            for name in about: inside.pop(name)
        package = {f"tradelab/{path.as_posix()}": content for path, content in files(copy / "tradelab", "*").items()}
        jobs = {f"tradelab/notebooks/{path.name}": path.read_bytes() for path in (ROOT / "nbs").glob("*.ipynb")
                if path.name != "index.ipynb"}
        assert len(jobs) > 4
        assert inside == package | jobs
        assert "tradelab = tradelab.command:main" in points
        assert "tradelab = tradelab.jobs:SignalEngine" in points


def test_the_notebooks_are_clean(copy):
    before = files(copy / "nbs", "*.ipynb")
    nbdev("nbdev_clean", copy)
    after = files(copy / "nbs", "*.ipynb")
    assert {str(path) for path in before
            if json.loads(before[path]) != json.loads(after[path])} == set(), "run make export"


def test_every_module_comes_from_the_notebook_of_its_name():
    modules = {str(path.relative_to(ROOT / "tradelab").with_suffix("")).replace("/", ".")
               for path in (ROOT / "tradelab").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")}
    assert modules == {exported(path) for path in NOTEBOOKS if exported(path)} - {"__init__"}


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if exported(path)], ids=lambda path: path.stem)
def test_a_chapter_stands_where_it_exports_to(path):
    room = path.parent.name.split("_", 1)[1]
    name = path.stem.split("_", 1)[1].replace("front_door", "__init__")
    assert exported(path) == (name if room in ("ground", "top") else f"{room}.{name}")
    assert path.stem[:2].isdigit()
    assert path.parent.name[:2].isdigit()


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name == "nbs" and path.stem != "index"],
                         ids=lambda path: path.stem)
def test_a_job_still_has_its_parameters(path):
    from papermill import inspect_notebook
    assert inspect_notebook(str(ROOT / path))


def test_the_readme_is_what_the_index_says():
    if not (ROOT / "nbs/index.ipynb").exists(): pytest.skip("there is no nbs/index.ipynb yet")
    ran = subprocess.run([sys.executable, ROOT / ".ci/readme.py", "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
