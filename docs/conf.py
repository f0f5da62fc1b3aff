# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: ``python -m sphinx -W --keep-going docs site``.

Where ``DOCS_ADDRESS`` has the address of the repository's files, such as ``https://.../blob/main``, links that lead out
of ``docs`` go there; without it they become the path of the file.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import monai_ifim  # noqa: E402

project, author = "monai_ifim", "monai_ifim contributors"
version = release = monai_ifim.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["*.py"]

html_theme = "furo"  # no fonts and no scripts from elsewhere
html_title = f"monai_ifim {version}"
html_show_sphinx = html_show_copyright = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b57a4", "color-brand-content": "#0b57a4"},
}
highlight_language = "text"  # of blocks that name none
pygments_style, pygments_dark_style = "default", "monokai"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("LikelihoodLike", "LikelihoodName", "RegionLike")}
maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_use_rtype = False

_ADDRESS = os.environ.get("DOCS_ADDRESS", "").rstrip("/")
_LINK = r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)"  # its text, the path, the place in the file
_CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]+`(?!\])|" + _LINK, re.M | re.S)
_LITERAL_OR_MARK = re.compile(r"``.*?``|::\n\n.*\Z|^ *>>> .*?(?=\n\s*\n|\Z)|[*|]", re.M | re.S)


def lead_outside(app: Any, name: str, source: list[str]) -> None:
    """Links to files of the repository that are no pages."""

    def replaced(found: re.Match[str]) -> str:
        text, target, place = found[1], found[2], found[3] or ""
        if target is None:
            return found[0]
        file = (Path(app.srcdir) / name).parent.joinpath(target).resolve()
        if file.is_relative_to(app.srcdir):
            return found[0]
        path = file.relative_to(ROOT).as_posix()
        return f"[{text}]({_ADDRESS}/{path}{place})" if _ADDRESS else f"{text} (`{path}`)"

    source[0] = _CODE_OR_LINK.sub(replaced, source[0])


def escape(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Stars and bars of docstrings, as in (B, C, *grid), are no markup."""
    text = _LITERAL_OR_MARK.sub(lambda found: rf"\{found[0]}" if found[0] in "*|" else found[0], "\n".join(lines))
    lines[:] = text.split("\n")


def find_by_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """What a docstring calls by another path than the one it is documented at."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    found = [name for name in domain.objects if name.endswith("." + node["reftarget"].rpartition(".")[2])]
    if len(found) != 1:
        return None
    arguments = (env, node["refdoc"], app.builder, domain.objects[found[0]].objtype, found[0], node, content)
    return domain.resolve_xref(*arguments)


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("source-read", lead_outside)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon adds markup
    app.connect("missing-reference", find_by_name)
