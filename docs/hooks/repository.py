"""Files of the repository in the site, and links to them that hold in both.

A page in docs/ links to `../benchmarks/README.md`, as it stands in the repository; in the site that
file is `repository/benchmarks/README.md`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = "repository"
# What pages link to. What is no Markdown is a file to look at or to keep.
SHOWN = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/results/*/*.json",
    "benchmarks/results/*/*.md",
    "benchmarks/results/*/*.svg",
    "examples/*.py",
    "examples/README.md",
    "tests/aot_facts.json",
    "tests/test_accuracy.py",
)
_LINK = re.compile(r"(\]\()([^)\s#]+)([)#\s])")


def on_files(files: Any, config: Any) -> Any:
    """Adds what is shown.

    Args:
        files: of the site.
        config: of mkdocs.

    Returns:
        The files.
    """
    from mkdocs.structure.files import File

    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            place = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **given: Any) -> str:
    """Links of a page, as they hold in the site.

    Args:
        markdown: the page's.
        page: of mkdocs.
        given: not used.

    Returns:
        The Markdown.
    """
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """Links of the page of this address, as they hold in the site.

    Args:
        markdown: the page's.
        page: its address in the site, such as "methods/acmoe.md".

    Returns:
        The Markdown.
    """

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if ":" in target:
            return found[0]
        address = _in_site(posixpath.normpath(posixpath.join(_in_repository(page), "..", target)))
        return found[1] + posixpath.relpath(address, posixpath.dirname(page) or ".") + found[3]

    return _LINK.sub(moved, markdown)


def _in_repository(address: str) -> str:
    inside = address.removeprefix(f"{FOLDER}/")
    return inside if inside != address else f"docs/{address}"


def _in_site(path: str) -> str:
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"{FOLDER}/{path}"
