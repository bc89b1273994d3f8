"""Sphinx configuration; warnings are errors in `make docs`."""

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
