"""Docstrings as Markdown, for the reference: nothing in them is lost, no equation flows together.

They are written to be read as text: an equation is indented or has a line of its own, `<a, b>` is a
product, `T * K` another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the tests have no griffe, and call `as_markdown`
    Extension = object

WIDTH = 100
_CODE = re.compile(r"(`[^`\n]*`)")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
_ITEM = re.compile(r"- |\d+\. ")


class Docstrings(Extension):
    """Puts Markdown in the place of every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **given: Any) -> None:
        """Of a module, class, function or attribute.

        Args:
            obj: as griffe has it.
            given: not used.
        """
        if obj.docstring is not None:
            depth = 2 if obj.parent is not None and obj.parent.is_class else 1
            if obj.is_module:
                depth = 0
            obj.docstring.value = as_markdown(obj.docstring.value, WIDTH - 4 * depth)


def as_markdown(text: str, width: int) -> str:
    """The docstring, with its equations as code or on lines of their own.

    An equation's line is broken on purpose where the next word would have had room.

    Args:
        text: the docstring, without its indentation.
        width: of its lines.

    Returns:
        The Markdown.
    """
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    prose = list(_prose(lines[:end], width))
    return "\n".join([*prose, *map(_escaped, lines[end:])])


def _prose(lines: list[str], width: int) -> Iterator[str]:
    in_list = False
    for i, line in enumerate(lines):
        before = lines[i - 1] if i else ""
        after = lines[i + 1] if i + 1 < len(lines) else ""
        in_list = bool(_ITEM.match(line)) or (in_list and (not line or line.startswith(" ")))
        if line.startswith("    ") and not in_list:
            if before and not before.startswith("    "):
                yield ""
            yield line
            if after and not after.startswith("    "):
                yield ""
            continue
        yield _escaped(line) + ("  " if _is_broken(line, after, width) else "")


def _is_broken(line: str, after: str, width: int) -> bool:
    if not line or not after or after.startswith("    ") or _ITEM.match(after):
        return False
    has_room = len(line) + 1 + len(after.split()[0]) <= width
    return has_room and (" = " in after or line.endswith((";", ":")))


def _escaped(line: str) -> str:
    start = re.match(r" *(?:[-*] )?", line)
    head = start[0] if start else ""
    parts = _CODE.split(line[len(head) :])
    parts[::2] = [p.replace("*", r"\*").replace("<", "&lt;") for p in parts[::2]]
    return head + "".join(parts)
