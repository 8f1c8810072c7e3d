"The notebooks are the source: the package is what they export, and they are stored clean"
import json
import re
import shutil
import subprocess
import sys
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
    for name in ("nbs", "tradelab"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints",
            ".hypothesis"))
    for name in ("settings.ini", "setup.py"): shutil.copy(ROOT / name, folder)
    return folder


def nbdev(command, folder):
    ran = subprocess.run([BIN / command], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def files(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern)
            if "__pycache__" not in path.parts}


def test_nbdev_works(): subprocess.run([BIN / "nbdev_export", "--help"], check=True, capture_output=True)


def test_the_package_is_what_the_notebooks_export(copy):
    before = files(copy / "tradelab", "*.py")
    nbdev("nbdev_export", copy)
    after = files(copy / "tradelab", "*.py")
    assert {str(path) for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)} == set(), "run make export"


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
