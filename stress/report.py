"""The page: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reporting.machine import in_words
from stress.plots import curves_svg

__all__ = ["write_report"]

PAGE = Path(__file__).with_name("page.html")


def write_report(document: dict[str, Any], path: Path) -> None:
    """Write the page of a run's JSON."""
    plots = {name: Markup(curves_svg(profile)) for name, profile in document["profiles"].items()}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        PAGE.read_text("utf-8")
    )
    path.write_text(template.render(document=document, origin=in_words(document["about"]), plots=plots), "utf-8")
