"""Do what a how-to page says: `python .ci/patch.py nbs/how_to/add_a_limit.ipynb [folder]`, then `make export`

A patch is a block ```diff in a page. Its first line names a file (`@@ nbs/00_ground/08_settings.ipynb @@`); lines that
begin with a blank or a minus are there before, lines with a blank or a plus after. A notebook is read as its cells,
each under a line `# %%` or `# %% [markdown]`, so that a new cell is lines too; a file that is not there yet has lines
with a plus only. What is there before must be found exactly once.
"""
import hashlib
import json
import re
import sys
from pathlib import Path

CELL = re.compile(r"# %%( \[markdown\])?(?: tags=\[\"(\w+)\"\])?")
EMPTY = {"metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
         "nbformat": 4, "nbformat_minor": 5}


def blocks(page, language):
    "What stands in the fenced blocks of a language in a page"
    cells = [cell for cell in json.loads(Path(page).read_text())["cells"] if cell["cell_type"] == "markdown"]
    return [block for cell in cells
            for block in re.findall(rf"^```{language}\n(.*?)^```", "".join(cell["source"]) + "\n", re.M | re.S)]


def text_of(notebook):
    "A notebook as its cells, one below the other"
    lines = []
    for cell in notebook["cells"]:
        tag = "".join(f' tags=["{each}"]' for each in cell["metadata"].get("tags", [])[:1])
        lines += ["# %%" + " [markdown]" * (cell["cell_type"] == "markdown") + tag, "".join(cell["source"])]
    return "\n".join(lines)


def cell_of(kind, tag, source):
    "A new cell, without outputs"
    made = {"cell_type": kind, "id": hashlib.sha256(source.encode()).hexdigest()[:8],
            "metadata": {"tags": [tag]} if tag else {}, "source": source.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook_of(text, before):
    "The notebook of a text; cells that did not change are those of the notebook before"
    known, cells, rows = {(cell["cell_type"], "".join(cell["source"])): cell for cell in before["cells"]}, [], []
    for line in text.splitlines():
        if match := CELL.fullmatch(line): rows.append(("markdown" if match[1] else "code", match[2], []))
        else: rows[-1][2].append(line)
    for kind, tag, lines in rows:
        source = "\n".join(lines)
        cells.append(known.get((kind, source)) or cell_of(kind, tag, source))
    return before | {"cells": cells}


def patch(block, folder):
    "Apply one block in a folder; the path of the file, relative to it"
    head, *lines = block.splitlines()
    name = head.strip("@ ")
    path = Path(folder) / name
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    notebook = json.loads(path.read_text()) if path.exists() and path.suffix == ".ipynb" else {"cells": []} | EMPTY
    text = text_of(notebook) if path.suffix == ".ipynb" else path.read_text() if path.exists() else ""
    if not before and text: raise SystemExit(f"{name} is there already")
    if before and text.count(before) != 1:
        raise SystemExit(f"{name}: what the page names is there {text.count(before)} times, not once:\n{before}")
    text = text.replace(before, after) if before else after
    path.write_text(json.dumps(notebook_of(text, notebook), indent=1, ensure_ascii=False) + "\n"
                    if path.suffix == ".ipynb" else text)
    return name


def apply(page, folder="."):
    "Apply all patches of a page; the files that they touch"
    return list(dict.fromkeys(patch(block, folder) for block in blocks(page, "diff")))


if __name__ == "__main__": print(*apply(*sys.argv[1:3]), sep="\n")
