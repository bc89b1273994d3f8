"""Sphinx configuration; warnings are errors in `make docs`."""

from __future__ import annotations

import re
from typing import Any

project = "robustrl"
author = "The robustrl authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Source", "params_style")]
autodoc_mock_imports: list[str] = []


def _escape_shapes(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shapes such as (n, *frame) are no emphasis."""
    lines[:] = [re.sub(r"(?<=[( ])\*(\w+)(?!\w*\*)", r"\\*\1", line) for line in lines]


def setup(app: Any) -> None:
    """Connect the hook."""
    app.connect("autodoc-process-docstring", _escape_shapes)
