"Sphinx: what `make docs` builds from the folder that build.py has laid out"
from docutils.utils.math.latex2mathml import tex2mathml

project, author, copyright = "tradelab", "The tradelab authors", "2026 onwards, The tradelab authors"
extensions = ["myst_nb", "autodoc2"]
exclude_patterns = ["tradelab"]
html_theme = "pydata_sphinx_theme"
html_title = "tradelab"
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False  # it is fetched, which a page read from a file must not
html_theme_options = {"show_prev_next": True, "navigation_depth": 3, "footer_start": ["copyright"], "footer_end": [],
                      "secondary_sidebar_items": ["page-toc"], "navbar_align": "left"}
html_static_path = html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_sidebars = {page: [] for page in ("index", "nbs/index", "nbs/how_to/trade_on_localnet")}  # nothing below them
nb_execution_mode = "off"  # the stored outputs are the page
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc2_packages = [{"path": "tradelab", "auto_mode": True}]
autodoc2_output_dir = "api"
autodoc2_render_plugin = "myst"
autodoc2_hidden_objects = {"private", "dunder", "inherited"}
autodoc2_module_summary = True
html_math_renderer = "mathml"


def inline(writer, node):
    "Browsers set MathML themselves: no script, nothing to fetch"
    import docutils.nodes
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise docutils.nodes.SkipNode


def block(writer, node):
    import docutils.nodes
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise docutils.nodes.SkipNode


def setup(app): app.add_html_math_renderer("mathml", (inline, None), (block, None))
