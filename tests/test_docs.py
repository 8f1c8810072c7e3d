"What `make docs` lays out for Sphinx; the build itself is outside `make test`"
import ast
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / ".ci/docs"))
        spec = importlib.util.spec_from_file_location("docs_build", ROOT / ".ci/docs/build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("sources", None)


def test_a_comment_behind_a_parameter_is_part_of_the_api(build):
    said = build.described('''
def cost(
    quantity:float,   # signed base units, <0 is short
    shares=tuple(x for x in "é"), # of `quantity`
)->float:             # in quote
    "What a fill costs"
    return quantity


class Row:
    fee:float = 0. # in quote
    count:int
''')
    function, row = ast.parse(said).body
    assert ast.get_docstring(function) == ("What a fill costs\n\n- `quantity`: signed base units, \\<0 is short\n"
                                           "- `shares`: of `quantity`\n- returns in quote")
    assert ast.unparse(function.args.defaults[0]) == "..."
    assert [ast.unparse(part) for part in row.body] == ["fee: float = 0.0", "'in quote'", "count: int"]


def test_sections_of_a_docstring_are_lists_and_not_headings(build):
    said = ast.get_docstring(ast.parse(build.described('''
def cost(quantity, price=1.):
    """What a fill costs.

    Parameters
    ----------
    quantity, price : float
        Signed base units, [-1, 1];
        quote.

    Returns
    -------
    float

    Examples
    --------
    >>> cost(1.)
    """
''')).body[0])
    assert said == ("What a fill costs.\n\n**Parameters**\n\n- `quantity`, `price` (float): Signed base units, "
                    "\\[-1, 1\\]; quote.\n\n**Returns**\n\n- `float`\n\n**Examples**\n\n```python\n>>> cost(1.)\n```")


@pytest.mark.parametrize("path", sorted((ROOT / "tradelab").glob("**/*.py")), ids=lambda path: path.stem)
def test_an_api_page_shows_the_names_and_parameters_of_its_module(build, path):
    def names(source):
        return [(node.name, ast.unparse(node.args) if isinstance(node, ast.FunctionDef) and "..." not in
                 ast.unparse(node.args) else "") for node in ast.walk(ast.parse(source))
                if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    before, after = names(path.read_text()), names(build.described(path.read_text()))
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(new in ("", old) for (_, old), (_, new) in zip(before, after, strict=True))


def test_a_page_has_no_directives_and_no_hidden_cells(build):
    cells = [nbformat.v4.new_code_cell("#| default_exp room.page"), nbformat.v4.new_markdown_cell("# Page\n> `x`: one"),
             nbformat.v4.new_code_cell("#| hide\nimport pytest"), nbformat.v4.new_code_cell("#| export\nx = 1"),
             nbformat.v4.new_raw_cell("#| asset room/page.js\nexport const one = 1")]
    page = build.readable(nbformat.v4.new_notebook(cells=cells))
    assert [cell.source for cell in page.cells] == ["# Page\n> `x`: one", "x = 1", "`tradelab/room/page.js`\n```js\n"
                                                    "export const one = 1\n```"]
    assert build.title_of(page) == ("Page", "`x`: one")


def test_a_link_to_nowhere_is_found(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path)
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#x">b</a><a href="#top">up</a>'
                                     '<a href="https://example.org">out</a>')
    (tmp_path / "b.html").write_text('<p id="x">B</p><a href="a.html">a</a>')
    assert list(build.broken_links()) == []
    (tmp_path / "b.html").write_text('<a href="a.html#gone">a</a><a href="c.html">c</a>'
                                     '<script src="https://cdn.example.org/x.js"></script>')
    assert sorted(build.broken_links()) == [
        "a.html: b.html#x points to no place in that page", "b.html fetches https://cdn.example.org/x.js",
        "b.html: a.html#gone points to no place in that page", "b.html: c.html is not there"]


def test_localnet_stands_beside_the_start(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCE", tmp_path / "docs/source")
    build.lay_out()
    first = (tmp_path / "docs/source/index.md").read_text()
    assert "Start <nbs/index>\nnbs/how_to/trade_on_localnet\nnbs/jobs" in first
    assert (tmp_path / "docs/source/nbs/how_to/trade_on_localnet.ipynb").exists()
    assert "trade_on_localnet" not in (tmp_path / "docs/source/nbs/how_to/index.md").read_text() # one page, one place
