"""The site of the documentation: its pages are the Markdown files, its reference the docstrings.

bash launch/docs.sh     # writes build/site; every warning is an error
"""

import pathlib
import shutil

from sphinx.application import Sphinx

import calm_jax

# The sources are the project's root, so that links between its Markdown files lead to the same
# places on GitHub and in the site. `_toc.yml` is the navigation; files that it lacks are left out.
extensions = [
    "myst_nb",
    "sphinx_external_toc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
external_toc_path = "docs/_toc.yml"
external_toc_exclude_missing = True
exclude_patterns = [".*", "build", "calm_jax", "runs", "tests", "**/runs"]

project = "calm_jax"
author = "the calm_jax authors"
release = calm_jax.__version__

# Markdown: the anchors of headings are those of GitHub. Notebooks show what is stored in them.
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
highlight_language = "none"
smartquotes_action = "D"  # quotes stay as they are: many are of values

# Docstrings: a name between single backticks is a link if the reference has it.
default_role = "py:obj"
autodoc_member_order = "bysource"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_attr_annotations = False  # signatures have them
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"calm_jax {release}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"footer_icons": []}
html_static_path = ["static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    """Makes the README, the first page, the one that a server shows for the site itself."""
    app.connect("build-finished", _first_page)


def _first_page(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(pathlib.Path(app.outdir, "README.html"), pathlib.Path(app.outdir, "index.html"))
