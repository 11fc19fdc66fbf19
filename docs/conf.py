"""Settings of the site: `make docs` builds it with Sphinx from the guides, the notebooks and the docstrings.

The source folder is the project's root, so that links between files work on the site as they do in a clone.
"""

import re
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

import hloss

project = "hloss"
release = hloss.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "hloss"
html_show_copyright = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_js_files = ["scrollable.js"]
html_extra_path = ["start", "../reports/sample/report.html"]  # the report of the committed results

nb_execution_mode = "off"  # The notebooks are committed with the outputs of their defaults.
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # Docstrings write names in single backticks.
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
napoleon_use_rtype = False


def describe_fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Add the description of each field of a pydantic model."""
    if isinstance(obj, type) and issubclass(obj, BaseModel):
        lines += ["", *(f":param {field}: {info.description or ''}" for field, info in obj.model_fields.items())]


def escape_bars(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings write |x| for an absolute value or a size, which reStructuredText takes for a substitution."""
    lines[:] = [re.sub(r"(?<!\\)\|", r"\\|", line) for line in lines]


def level_captions(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Sphinx writes the captions of tables of contents as headings without a level, which screen readers need."""
    for part in ("body", "furo_navigation_tree"):
        if part in context:
            context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> None:
    """Register the hooks."""
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("html-page-context", level_captions, priority=900)  # after the theme has made its navigation
