"""The site: ``sphinx-build -W -b html docs docs/_build``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from inventories import reachable_inventories  # noqa: E402

from ppo_kit import __version__  # noqa: E402

project = "ppo_kit"
author = "The ppo_kit authors"
copyright = "the ppo_kit authors, Apache-2.0"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "pictures",
    "reference_pages",
]
exclude_patterns = ["_build", "_ext", "jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"ppo_kit {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

# The pages are read on the repository's web view as well: $…$ is an equation there too.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
# Commands are shown as they are typed; their fences name no language.
highlight_language = "text"

# Notebooks run once and again when they change. PPO_KIT_DOCS_NOTEBOOKS=off shows them without output.
nb_execution_mode = os.environ.get("PPO_KIT_DOCS_NOTEBOOKS", "cache")
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
# Warnings of other packages about the machine that built the site. DeepSpeed prints its own to stdout.
nb_output_stderr = "remove"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

intersphinx_mapping = reachable_inventories(
    {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "tensordict": "https://docs.pytorch.org/tensordict/stable/",
        "transformers": "https://huggingface.co/docs/transformers/main/en/",
    },
    folder=HERE / "_build" / ".inventories",
)
