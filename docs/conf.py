"""Sphinx's settings: `make docs` builds the pages of this folder into site/."""

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "extensions")]

# The library is documented under the names that it installs as, and from this checkout.
for name, folder in (("gradwire", "compression"), ("gradwire.search", "search")):
    library = importlib.util.spec_from_file_location(name, ROOT / folder / "__init__.py")
    assert library is not None
    assert library.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(library)
    library.loader.exec_module(sys.modules[name])

project = "gradwire"
html_title = "gradwire"
extensions = ["myst_parser", "sphinx.ext.autodoc", "command_line", "docstrings", "included_files", "mathml"]
exclude_patterns = ["requirements.txt"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
python_display_short_literal_types = True
python_use_unqualified_type_names = True
# Types in signatures: those of other projects cannot be looked up without a network, and inner classes have no entry.
nitpick_ignore_regex = [("py:class", ".*")]
smartquotes = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "navbar_center": [],
    "navbar_persistent": [],
    "article_header_start": [],
    "footer_start": [],
    "footer_center": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "search_bar_text": "Search",
}
html_sidebars = {"**": ["search-field", "pages"]}
html_static_path = ["theme/style.css"]
html_css_files = ["style.css"]
templates_path = ["theme"]
html_show_sourcelink = False
html_copy_source = False
