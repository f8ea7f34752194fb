"""The built site loads nothing from elsewhere: a page that does fails the build."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Of tags that load something by themselves, what names it. A link that is clicked loads nothing.
_LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# Kinds of <link> that name a page and load none.
_NAMES = {"canonical", "next", "prev", "alternate"}


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kinds = set((given.get("rel") or "").split())
        if tag == "link" and kinds and kinds <= _NAMES:
            return
        for name in _LOADS.get(tag, ()):
            value = given.get(name) or ""
            if value.startswith("//") or "://" in value:
                self.found.append(f"<{tag} {name}={value!r}>")


def foreign(page: str) -> list[str]:
    """What this HTML loads from elsewhere.

    Args:
        page: the HTML.

    Returns:
        A text for each.
    """
    parser = _Resources()
    parser.feed(page)
    return parser.found


def _all(site: Path) -> Iterator[str]:
    for path in sorted(site.rglob("*.html")):
        for found in foreign(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: {found}"
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        if "url(http" in text or "url(//" in text or "@import" in text:
            yield f"{path.relative_to(site)}: a url or an @import"


def on_post_build(config: Any, **given: Any) -> None:
    """Fails where something is loaded from elsewhere.

    Args:
        config: of mkdocs.
        given: not used.

    Raises:
        PluginError: with every page that does.
    """
    from mkdocs.exceptions import PluginError

    if found := list(_all(Path(config["site_dir"]))):
        raise PluginError("loaded from elsewhere:\n" + "\n".join(found))
