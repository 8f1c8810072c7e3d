"""Own small files that are no Python: each is a raw cell that begins with `#| asset PATH`, and goes to tradelab/PATH

`assets.py [ROOT]` writes them; `assets.py --check [ROOT]` writes nothing and fails where a file is not what its cell
says, or has no cell. A folder `assets` holds what came from elsewhere: its files stand as they came, each with a row in
the THIRD_PARTY.md beside them that has its name, version, licence and sha256."""
import hashlib
import json
import re
import sys
from pathlib import Path

DIRECTIVE = re.compile(r"#\s*\|\s*asset\s+(\S+)[ \t]*(?:\n|$)")


def assets(root):
    "The text of each asset by its path below tradelab/"
    found = {}
    for notebook in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in notebook.parts: continue
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"])
            asked = DIRECTIVE.match(source)
            if not asked and cell["cell_type"] == "raw" and re.match(r"#\s*\|", source):
                sys.exit(f"{notebook.relative_to(root)}: a raw cell begins with #| asset PATH, was "
                         f"{source.splitlines()[0]!r}")
            if not asked: continue
            name, where = asked[1], f"{notebook.relative_to(root)}: #| asset {asked[1]}"
            path = Path(name)
            if cell["cell_type"] != "raw": sys.exit(f"{where} must be a raw cell, was {cell['cell_type']}")
            if path.is_absolute() or ".." in path.parts or path.suffix in ("", ".py", ".ipynb") and name != "py.typed":
                sys.exit(f"{where} must be a file below tradelab/ that is no Python, with a suffix")
            if "assets" in path.parts: sys.exit(f"{where}: folders named assets hold what came from elsewhere")
            if name in found: sys.exit(f"{where} is written by another cell too")
            text = source[asked.end():].strip("\n")
            found[name] = text + "\n" if text else ""
    return found


def faults(root):
    "What differs between the package and the cells, as lines to read"
    package, wanted = root / "tradelab", assets(root)
    there = {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()
             and path.suffix not in (".py", ".pyc", ".nbi", ".nbc") and ".ipynb_checkpoints" not in path.parts}
    lines = [f"tradelab/{name} is not what its cell says: run make export" for name, text in wanted.items()
             if there.get(name) != text.encode()]
    for name, content in there.items():
        if "assets" in Path(name).parts:
            path = Path(name)
            if path.name == "THIRD_PARTY.md": continue
            rows = there.get((path.parent / "THIRD_PARTY.md").as_posix(), b"").decode().splitlines()
            digest = hashlib.sha256(content).hexdigest()
            if not any(path.name in row and digest in row for row in rows):
                lines.append(f"tradelab/{name} has no row in the THIRD_PARTY.md beside it with its sha256, {digest}")
        elif name not in wanted:
            lines.append(f"tradelab/{name} has no cell: write one that begins with #| asset {name}, or delete it")
    return lines


def main():
    given = [each for each in sys.argv[1:] if each != "--check"]
    root = Path(given[0]).resolve() if given else Path(__file__).resolve().parents[1]
    if "--check" in sys.argv:
        wrong = faults(root)
        if wrong: sys.exit("\n".join(wrong))
        return
    for name, text in assets(root).items():
        path = root / "tradelab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != text.encode(): path.write_bytes(text.encode())


if __name__ == "__main__": main()
