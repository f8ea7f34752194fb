"""Formulas as MathML, made when the site is built: no script and no font is needed to read them."""

from __future__ import annotations

import html
import re
from typing import Any

# What pymdownx.arithmatex leaves, with `generic` on.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **given: Any) -> str:
    """Puts MathML in the place of every formula of a page.

    Args:
        content: the page's HTML, before it is put into the theme's.
        given: not used.

    Returns:
        The HTML.

    Raises:
        PluginError: a formula is left.
    """
    from mkdocs.exceptions import PluginError

    content = _FORMULA.sub(_converted, content)
    if 'class="arithmatex"' in content:
        raise PluginError("a formula is left as it was written")
    return content


def _converted(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)
