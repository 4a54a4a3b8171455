"""How the site is built: ``sphinx-build -W --keep-going -n docs SITE``, with jensen and its ``docs`` extra installed.

``JENSEN_DOCS_NETWORK=1`` also links the names of Python, NumPy, PyTorch and Pyro to their own documentation; without it
nothing is fetched.
"""

import os
import sys
from pathlib import Path

import jensen

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "jensen"
author = "the authors of jensen"
copyright = author
version = release = jensen.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",  # tabs and cards
    "sphinx-mathjax-offline",  # formulae are set without a network
    "sources",
    "gallery",
    "docstrings",
    "names",
    "anchors",
]
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store"]
nitpicky = True
# Overloads, and distributions, whose class has a signature of its own, are written as their source has them.
nitpick_ignore = [
    ("py:class", name) for name in ("Data", "Distribution", "Kind", "Program", "Split", "Tensor", "Wanted", "_Name")
]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they are committed; the gate executes them
nb_render_markdown_format = "myst"  # tables in text that notebooks compute
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False
python_use_unqualified_type_names = True

intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }
    if os.environ.get("JENSEN_DOCS_NETWORK")
    else {}
)
linkcheck_timeout = 20
linkcheck_anchors = False

html_theme = "furo"
html_title = f"jensen {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "static" / "scorer.js")
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
