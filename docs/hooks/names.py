"""Public names in the pages lead to the reference: the first `name` of each page, as code.

On a forge, which has no reference, they are code and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_API = Path(__file__).parents[1] / "api"
_FENCE = re.compile(r"^( *```.*?^ *```)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(?<!\[)`(?:mk\.)?([A-Za-z_]+)`(?!\])")


def on_page_markdown(markdown: str, page: Any, **given: Any) -> str:
    """Links the names of a page of docs/ that is not of the reference.

    Args:
        markdown: the page's.
        page: of mkdocs.
        given: not used.

    Returns:
        The Markdown.
    """
    if page.file.src_uri.startswith(("api/", "repository/")):
        return markdown
    return linked(markdown, names())


def names() -> dict[str, str]:
    """What the reference has: the path of each name.

    Returns:
        By the last part of the path.
    """
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted(_API.glob("*.md")))
    return {path.split(".")[-1]: path for path in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}


def linked(markdown: str, paths: dict[str, str]) -> str:
    """The Markdown with a link on the first mention of each name, outside of code and headings.

    Args:
        markdown: of a page.
        paths: as `names` has them.

    Returns:
        The Markdown.
    """
    seen: set[str] = set()

    def link(found: re.Match[str]) -> str:
        name = found[1]
        if name not in paths or name in seen:
            return found[0]
        seen.add(name)
        return f"[{found[0]}][{paths[name]}]"

    parts = _FENCE.split(markdown)
    for i in range(0, len(parts), 2):
        lines = parts[i].split("\n")
        parts[i] = "\n".join(s if s.startswith("#") else _CODE.sub(link, s) for s in lines)
    return "".join(parts)
