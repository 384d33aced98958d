"""Sphinx: MyST Markdown, the theme furo, and pages written from the code itself (`written.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import written  # noqa: E402 - it lies beside this file

import carvae  # noqa: E402

project = "carvae"
copyright = "carvae founders, BSD-3-Clause"
release = version = carvae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_written"]
default_role = "py:obj"  # what stands in single backticks in docstrings names something of the code
suppress_warnings = ["myst.header"]  # the README's headings begin below its title

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"carvae {release}"
html_static_path = ["_static"]
html_css_files = ["carvae.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _link_to_the_pages(_: Sphinx, __: str, source: list[str]) -> None:
    """The README's page in place of the file, which a reader on the code's own site sees."""
    source[0] = source[0].replace("](../README.md", "](readme.md").replace("](../CHANGELOG.md", "](changelog.md")


def setup(app: Sphinx) -> None:
    """Write the pages that come from the code before the sources are listed."""
    app.connect("builder-inited", lambda _: written.write_all(HERE / "_written"))
    app.connect("source-read", _link_to_the_pages)
