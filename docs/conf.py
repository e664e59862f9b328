"""Sphinx configuration. The build reads nothing from the network, unless asked for links to other projects."""

import html
import os
import re
import shutil
from importlib.metadata import version as installed
from pathlib import Path
from urllib.parse import unquote

from docutils import nodes

HERE = Path(__file__).parent

project = "he2gene_sc"
author = "The he2gene_sc developers"
copyright = f"2026, {author}"
version = release = installed("he2gene_sc")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
# Links to the pages of other projects need their inventories from the network: on Read the Docs, or where asked for.
if os.environ.get("READTHEDOCS") or os.environ.get("HE2GENE_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_timeout = 20
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
exclude_patterns = ["_build", "jupyter_execute", "generated/jupyter_cache", "**.ipynb_checkpoints"]

# Sphinx reads below this folder only: the notebooks are copied to a place that git ignores.
tutorials = HERE / "generated" / "tutorials"
shutil.rmtree(tutorials, ignore_errors=True)
tutorials.mkdir(parents=True)
for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
    shutil.copy(notebook, tutorials)

# `pytest` executes the notebooks on real sections and leaves them in this cache; what is not there is executed now.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "generated" / "jupyter_cache")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True
# Kernels show no figure where the shell names another backend, as servers do.
os.environ.pop("MPLBACKEND", None)
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found,ignore::SyntaxWarning")  # read by the kernels
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
# One parameter a line where a signature would be wider than a phone.
python_maximum_signature_line_length = 80
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"he2gene_sc {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

#: Pages that have moved: links from elsewhere find them.
MOVED = {"bring_your_slide": "howto/index", "statistics": "statistics/index"}
GALLERY = "generated/tutorials/gallery"


def show_picture(app, doctree, docname):
    """Put the picture of the gallery on the page of a plot."""
    module, _, name = docname.rpartition(".")
    if module != "generated/api/he2gene_sc.pl" or app.config.nb_execution_mode == "off":
        return
    for section in app.env.get_doctree(GALLERY).findall(nodes.section):
        picture = next(section.findall(nodes.image), None)
        if name in section["names"] and picture is not None:
            next(doctree.findall(nodes.section)).append(picture.deepcopy())
            return
    raise ValueError(f"the gallery has no picture of hg.pl.{name}")


def write_llms(app, error):
    """List the pages with their first paragraphs in ``llms.txt``, for language models."""
    if error or app.builder.format != "html":
        return
    lines = [f"# {project} {release}", ""]
    for docname, title in sorted(app.env.titles.items()):
        paragraph = next(app.env.get_doctree(docname).findall(nodes.paragraph), None)
        first = "" if paragraph is None else " ".join(paragraph.astext().split()).partition(". ")[0]
        lines.append(f"- [{title.astext()}]({docname}.html): {first[:200]}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_moved(app, error):
    """Lead from the old place of a page to the new one."""
    if error or app.builder.format != "html":
        return
    for old, new in MOVED.items():
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={new}.html"><a href="{new}.html">This page has moved.</a>'
        (Path(app.outdir) / f"{old}.html").write_text(page, encoding="utf-8")


def check_links(app, error):
    """Refuse links to a page, or a place on it, that these pages do not have."""
    if error or app.builder.name != "html":
        return
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in Path(app.outdir).rglob("*.html")}
    places = {
        page: {html.unescape(name) for name in re.findall(r'\bid="([^"]+)"', text)} for page, text in pages.items()
    }
    broken = []
    for page, text in pages.items():
        if (
            "_modules" in page.parts
        ):  # made by viewcode, whose links back are by the module that a function is written in
            continue
        for link in set(re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', text)):
            target, _, place = unquote(html.unescape(link)).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found = (page.parent / target).resolve() if target else page
            if not found.exists() or (place and found in places and place not in places[found]):
                broken.append(f"{page.relative_to(Path(app.outdir).resolve())}: {link}")
    if broken:
        raise ValueError("links that lead nowhere:\n" + "\n".join(sorted(broken)))


def setup(app):
    app.connect("doctree-resolved", show_picture)
    for write in (write_llms, write_moved, check_links):
        app.connect("build-finished", write)
