"""nbs/index.ipynb -> README.md, without quarto

`readme.py` executes the notebook first; `readme.py --check` takes its stored outputs and fails where README.md
differs."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, IMAGES, README = ROOT / "nbs/index.ipynb", ROOT / "nbs/index_files", ROOT / "README.md"
NOTE = "<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n\n"


def execute():
    from nbconvert.preprocessors import ExecutePreprocessor
    notebook = nbformat.read(INDEX, as_version=4)
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(notebook,
        {"metadata": {"path": str(INDEX.parent)}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code": cell.execution_count = None
        for output in cell.get("outputs", []):
            if "execution_count" in output: output.execution_count = None
    notebook.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, INDEX)


def render():
    notebook, shown = nbformat.read(INDEX, as_version=4), []
    for cell in notebook.cells:
        if re.search(r"^#\s*\|\s*(hide\b|include:\s*false)", cell.source, re.M): continue
        cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip()
        for output in cell.get("outputs", []):
            if {"text/plain", "image/png"} & set(output.get("data", {})): output.data.pop("text/html", None)
            if "image/png" in output.get("data", {}): output.data.pop("text/plain", None)
        if cell.source: shown.append(cell)
    notebook.cells, notebook.metadata["language_info"] = shown, {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(notebook,
                                                            {"unique_key": "index",
                                                             "output_files_dir": "nbs/index_files"})
    body = re.sub(r"\]\((?=[\w/]+\.ipynb\))", "](nbs/", body)
    body = body.replace("](../", "](")
    images = {ROOT / name: data for name, data in resources["outputs"].items()}
    return NOTE + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", images


def main():
    check = "--check" in sys.argv
    if not check: execute()
    text, images = render()
    if check:
        sys.exit(0 if README.exists() and README.read_text() == text and all(path.exists() for path in images)
                 else "README.md is not what nbs/index.ipynb says: run make readme")
    for old in IMAGES.glob("*.png"): old.unlink()
    for path, data in images.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    README.write_text(text)


if __name__ == "__main__": main()
