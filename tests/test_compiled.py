"A compiled function that is edited in its notebook changes its callers in other modules, in the next process"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from tradelab.compiled import compiled

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]


def notebook(path, module, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = [f"#| default_exp {module}", f"# {module}\n> an example", f"#| export\n{code}"]
    kinds = ["code", "markdown", "code"]
    cells = [{"cell_type": kind, "id": str(n), "metadata": {}, "source": source,
              **({"outputs": [], "execution_count": None} if kind == "code" else {})} for n,
              (kind, source) in enumerate(zip(kinds, sources, strict=True))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def python(folder, program, **variables):
    "A fresh process that imports the package of this folder"
    environment = (os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"),
                                 "HOME": str(folder)} | variables)
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def export(folder):
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=folder, check=True, capture_output=True)


def test_an_edit_of_a_called_function_reaches_its_callers(tmp_path):
    for name in ("nbs", "tradelab"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints",
            ".hypothesis"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    callee = tmp_path / "nbs/00_ground/08_callee.ipynb"
    notebook(callee, "callee", "from tradelab.compiled import compiled\n\n@compiled\ndef rate(): return 1.")
    notebook(tmp_path / "nbs/10_market/19_caller.ipynb", "market.caller", "from tradelab.callee import rate\nfrom "
             "tradelab.compiled import compiled\n\n@compiled\ndef cost(x): return x * rate()")
    export(tmp_path)
    show = ("import tradelab; from tradelab.market.caller import cost; print(tradelab.__file__, cost(3.), "
            "sum(cost.stats.cache_hits.values()))")
    place = str(tmp_path / "tradelab/__init__.py")
    assert python(tmp_path, show).split() == [place, "3.0", "0"]
    assert python(tmp_path, show).split() == [place, "3.0", "1"]    # the machine code was kept ...
    callee.write_text(callee.read_text().replace("return 1.", "return 2."))
    export(tmp_path)
    assert python(tmp_path, show).split() == [place, "6.0", "0"]    # ... and is not used after an edit in another file


def test_a_constant_does_not_compile_a_function_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("tradelab.compiled.cache_folder", lambda: tmp_path) # the next run must not find this function
    def inner(a, b): return a + b
    inner.__module__ = "tradelab.trial"
    inner = compiled(inner)
    outer = numba.njit(lambda x: inner(x, 1) + inner(x, 2) + inner(x, 3))
    assert outer(1) == 9
    assert len(inner.signatures) == 1
