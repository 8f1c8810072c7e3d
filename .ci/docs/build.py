"""nbs/ and tradelab/ -> a site that is read from its files: chapters in reading order, jobs, how-to pages, the API

Nothing is executed and nothing imported: pages show the outputs that their notebooks store, the API is read from the
sources."""
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from sources import described

ROOT = Path(__file__).resolve().parents[2]
SOURCE, SITE = ROOT / ".cache/docs/source", ROOT / ".cache/docs/html"
DIRECTIVE = re.compile(r"^#\s*\|\s*(\w+).*\n?", re.M)
DROPPED = {"hide", "default_exp"}


def readable(notebook):
    "The notebook without nbdev's directives, nor the cells that they hide"
    cells = []
    for cell in notebook.cells:
        asked = set(DIRECTIVE.findall(cell.source)) if cell.cell_type != "markdown" else set()
        if asked & DROPPED or cell.cell_type == "code" and not cell.source.strip(): continue
        if cell.cell_type == "raw":
            name = cell.source.partition("\n")[0].split()[-1]
            text = DIRECTIVE.sub("", cell.source)
            kind = Path(name).suffix.strip(".") or "text"
            cell = nbformat.v4.new_markdown_cell(f"`tradelab/{name}`" + (f"\n```{kind}\n{text}\n```" if text else ""))
        elif cell.cell_type == "code": cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
        cells.append(cell)
    notebook.cells = cells
    return notebook


def title_of(notebook):
    "(title, blurb) of a chapter"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    blurb = re.search(r"^> (.+)$", text, re.M)
    return re.search(r"^# (.+)$", text, re.M)[1], blurb[1] if blurb else ""


def contents(title, words, pages, caption=""):
    "A page that lists others: the text of it"
    rows = "\n".join(f"- [{name}]({path}): {blurb}" if blurb else f"- [{name}]({path})" for path, name, blurb in pages)
    tree = "\n".join(path.removesuffix(".md").removesuffix(".ipynb") for path, _, _ in pages)
    return f"# {title}\n\n{words}\n\n{rows}\n\n```{{toctree}}\n:hidden:\n{caption}\n{tree}\n```\n"


def lay_out():
    "The folder that Sphinx reads"
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    folders = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        place = SOURCE / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        notebook = readable(nbformat.read(path, as_version=4))
        nbformat.write(notebook, place)
        if path.stem != "index":
            folders.setdefault(path.parent.name, []).append((path.name, *title_of(notebook)))
    for path in sorted((ROOT / "tradelab").rglob("*.py")):
        if path.name == "_modidx.py": continue
        place = SOURCE / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(described(path.read_text()))
    jobs, how_to = folders.pop("nbs"), folders.pop("how_to", [])
    how_to = [page for page in how_to if page[0] != "trade_on_localnet.ipynb"] # stands beside the start
    how_to.sort(key=lambda page: page[0] != "design.ipynb")
    rooms = [(f"{folder}/index.md", folder.replace("_", " ", 1), ", ".join(name for _, name, _ in pages))
             for folder, pages in sorted(folders.items())]
    for folder, pages in folders.items():
        floor, room = folder.split("_", 1)
        words = f"Floor {floor}. In reading order; a chapter uses only what stands before it."
        (SOURCE / "nbs" / folder / "index.md").write_text(contents(room.capitalize(), words, pages))
    (SOURCE / "nbs/chapters.md").write_text(contents("Chapters", "The house, floor by floor: each room uses only those "
                                                     "below it.", rooms))
    (SOURCE / "nbs/jobs.md").write_text(contents("Jobs", "`tradelab run JOB`: notebooks with parameters.", jobs))
    if how_to:
        (SOURCE / "nbs/how_to/index.md").write_text(contents("How to", "The design, and what to change for a thing "
                                                             "to be added to it.", how_to))
    parts = ["Start <nbs/index>", "nbs/how_to/trade_on_localnet", "nbs/jobs",
             *(["nbs/how_to/index"] if how_to else []), "nbs/chapters", "api/index"]
    (SOURCE / "index.md").write_text("# tradelab\n\n```{toctree}\n:maxdepth: 2\n\n" + "\n".join(parts) + "\n```\n")


class Links(HTMLParser):
    "What a page points to, and the places in it that can be pointed to"

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [(tag, given[name]) for name in ("href", "src") if given.get(name)]


def broken_links():
    "Links to a page or a place that is not there, and what a page would fetch from elsewhere"
    pages = {path.resolve(): Links(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}
    for path, page in pages.items():
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if tag != "a" and parts.scheme != "data": yield f"{path.relative_to(SITE)} fetches {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists(): yield f"{path.relative_to(SITE)}: {link} is not there"
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                yield f"{path.relative_to(SITE)}: {link} points to no place in that page"


def main():
    from sphinx.cmd.build import build_main
    began = time.perf_counter()
    lay_out()
    failed = build_main(["-q", "-W", "--keep-going", "-j", "auto", "-c", str(Path(__file__).parent), "-d",
                         str(ROOT / ".cache/docs/doctrees"), str(SOURCE), str(SITE)])
    if failed: sys.exit("docs: see the warnings above")
    broken = sorted(set(broken_links()))
    if broken: sys.exit("\n".join([*broken, f"docs: {len(broken)} broken links"]))
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) / 1e6
    print(f"{len(list(SITE.rglob('*.html')))} pages, {size:.0f} MB, no warning, no broken link, "
          f"{time.perf_counter() - began:.0f} s: {SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__": main()
