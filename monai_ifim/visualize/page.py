# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page from a template of this folder, written as a whole."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.visualize import wording


def png_uri(png: bytes) -> str:
    """A PNG file as the address of a picture inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def check_page(output: Path) -> None:
    """Refuse a place where no page can be written.

    Raises:
        ValueError: When it is not to be an HTML file.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"The page is an HTML file, so its name must end in .html, got {output}.")


def write_page(template: str, content: Mapping[str, Any], output: Path) -> Path:
    """The path of the page, which is written beside its place first, so that a failure leaves nothing half-written.

    Raises:
        FileNotFoundError: When there is no folder to write it to.
    """
    return write_as_a_whole(render_page(template, content), output)


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """The text of the page."""
    return _template(template).render(content)


def write_as_a_whole(text: str, output: Path) -> Path:
    """The path of a text file, which is written beside its place and then moved there.

    Raises:
        FileNotFoundError: When there is no folder to write it to.
    """
    write_together({output: text})
    return output


def write_together(files: Mapping[Path, str]) -> None:
    """Write text files, of which all are complete beside their places before any is moved there.

    Raises:
        FileNotFoundError: When there is no folder to write one to.
    """
    temporary = {file: file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}") for file in files}
    try:
        for file, text in files.items():
            if not file.parent.is_dir():
                raise FileNotFoundError(f"There is no folder {file.parent} to write the page to; make it first.")
            # names may hold what is no text, halves of surrogate pairs
            temporary[file].write_text(text, encoding="utf-8", errors="backslashreplace")
        for file, rest in temporary.items():
            os.replace(rest, file)
    finally:
        for rest in temporary.values():
            rest.unlink(missing_ok=True)


def _contents(body: str) -> list[tuple[str, str]]:
    """The id and the title of each section."""
    return [(id, Markup(title)) for id, title in re.findall(r'<h2 id="([\w-]+)">(.*?)</h2>', body)]


def _file_name(name: str) -> str:
    """Without the folders above it."""
    return PurePath(name).name


def _scroll(label: str) -> Markup:
    """The attributes of what may be wider than a phone: a keyboard can scroll it, a screen reader names it."""
    return Markup('class="scroll" tabindex="0" role="group" aria-label="{}"').format(label)


@cache
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": wording.as_number, "percent": wording.as_percent, "file_name": _file_name}
    environment.filters |= {"p_value": wording.as_p_value, "factor": wording.as_factor}
    environment.globals |= {"interval": wording.as_interval, "threshold": wording.as_strength, "endpoints": ENDPOINTS}
    environment.globals |= {"endpoint_words": wording.endpoint_words}
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # no script runs but this one, whatever a name in the tables may hold
    environment.globals |= {
        "scroll": _scroll,
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "contents": _contents,
    }
    return environment.get_template(name)
