"""Sphinx: pages in Markdown, reference from docstrings, gallery from ``tutorials/``.

``sphinx-build docs docs/_build`` runs every tutorial in full, ``-t smoke`` for a few steps each.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import pyro_ext

sys.path.insert(0, str(Path(__file__).parent))

PACKAGES = ("distributed", "distributions", "diagnostics", "infer", "nn", "ops")

project = "pyro_ext"
author = "pyro_ext contributors"
copyright = "pyro_ext contributors"
version = release = pyro_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # ships MathJax: formulas need no network
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_ext {version}"
html_static_path: list[str] = []
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pyro|numpy|np|arviz|az|xarray|xr|matplotlib|tqdm|collections|os)\b.*"),
    (r"py:.*", r"jaxtyping\.\w+|Tensor|.*'.*"),  # shapes in annotations
    (
        r"py:.*",
        r"pyro_ext\.(tracing|infer|nn)\.[a-z_.]+\.[A-Z]\w+",
    ),  # classes inside of the package
    (r"py:.*", r"PyroOptim|ELBO|Module|pandas\.DataFrame|.*\.T_co"),
]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "member-order": "bysource"}

sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"figure_style\.py$",
    "within_subsection_order": "gallery.position",
    "reset_argv": f"gallery.{'smoke_arguments' if tags.has('smoke') else 'arguments'}",
    "abort_on_example_error": True,
    "show_memory": False,
    "parallel": 2,
    "remove_config_comments": True,
}


def check_reference(app: Sphinx, env: Any) -> None:
    """A public name that is on no page, or has no docstring, is a warning: in CI, an error."""
    logger = logging.getLogger(__name__)
    for package in PACKAGES:
        module = importlib.import_module(f"pyro_ext.{package}")
        for name in module.__all__:
            full_name = f"pyro_ext.{package}.{name}"
            if full_name not in env.domains["py"].objects:
                logger.warning("%s is on no page", full_name)
            for member, docstring in docstrings(full_name, getattr(module, name)):
                if not docstring:
                    logger.warning("%s has no docstring", member)


def docstrings(full_name: str, public: Any) -> Iterator[tuple[str, str | None]]:
    """Of a class or function, and of the public methods and properties that a class defines."""
    if callable(public):
        yield full_name, inspect.getdoc(public)
    if inspect.isclass(public):
        for name, member in vars(public).items():
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                yield f"{full_name}.{name}", inspect.getdoc(getattr(public, name))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("env-check-consistency", check_reference)
