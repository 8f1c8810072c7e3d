"""The chapters against the package, uncompiled: every cell that shows or asserts runs with the names of the exported
module, not of the notebook's own cells

Only collected with NUMBA_DISABLE_JIT=1: it is how coverage sees the bodies of compiled functions. A cell marked `#|
compiled` speaks about compilation itself and is left out."""
import ast
import asyncio
import builtins
import importlib
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.uncompiled
ROOT = Path(__file__).parents[1]
NOT_HERE = re.compile(r"^\s*#\s*\|\s*(export|exporti|default_exp|eval:\s*false|slow|notest|compiled)\b", re.M)


def module_of(path):
    found = re.search(r"#\s*\|\s*default_exp\s+([\w.]+)", path.read_text())
    return found and f"tradelab.{found[1]}"


CHAPTERS = [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb"))
            if path.parent.name != "how_to" and module_of(path)] # pages of how-to show chapters in their patches


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(builtins, "display", lambda *things, **_: None, raising=False)
    for name in [name for name in os.environ if name.startswith("TRADELAB_")]: monkeypatch.delenv(name)
    main = types.ModuleType("__main__") # as in a kernel
    exported = vars(importlib.import_module(module_of(path)))
    vars(main).update({name: value for name, value in exported.items() if not re.fullmatch("__.*__", name)})
    monkeypatch.setitem(sys.modules, "__main__", main)
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or NOT_HERE.search(source): continue
        code = compile(source, f"{path.stem}, cell {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, vars(main))
        if inspect.iscoroutine(result): asyncio.run(result)
