"""HTML pages that need nothing but themselves: templates with everything inline, hostile text made harmless."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_ASSETS = Path(__file__).parent.parent / "assets" / "report"
# Characters that HTML forbids; a browser would stop at a NUL or show nothing.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def render_page(template: str, context: Mapping[str, Any]) -> bytes:
    """The page of a template in assets/report, in UTF-8; a lone surrogate of some record becomes "?"."""
    html = _environment().get_template(template).render(context).translate(_CONTROLS)
    return html.encode("utf-8", "replace")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["css"] = _asset("report.css")
    environment.globals["themed_css"] = _asset("report.css") + _asset("themed.css")
    script = _asset("inspect.js")
    environment.globals["script"] = script
    # A page allows this one script by its hash: whatever a text smuggles in does not run.
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    environment.globals["script_hash"] = Markup(f"sha256-{base64.b64encode(digest).decode()}")
    return environment


def _asset(name: str) -> Markup:
    """A file of our own, as it is."""
    return Markup((_ASSETS / name).read_text(encoding="utf-8"))
