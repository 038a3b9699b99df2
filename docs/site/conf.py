"""Settings of Sphinx for the documentation site (docs/site/build.py)."""

import diffprune_fast

project = "diffprune_fast"
release = diffprune_fast.__version__
html_title = f"diffprune_fast {release}"
html_theme = "furo"
html_show_sourcelink = False
html_show_copyright = False
exclude_patterns = ["**/_build"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinxcontrib.mermaid"]
myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
# Unfenced code blocks are commands and printed results.
highlight_language = "text"
