"""The pages miss no public name, and what they link to is there; what mkdocs is taught is right."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import molex_kernels
from molex_kernels import parallel, published, testing
from molex_kernels.integrations import timm, transformers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PUBLIC = {
    "molex_kernels": molex_kernels,
    "molex_kernels.parallel": parallel,
    "molex_kernels.published": published,
    "molex_kernels.testing": testing,
    "molex_kernels.integrations.timm": timm,
    "molex_kernels.integrations.transformers": transformers,
}


def _hook(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name_once():
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    public = {f"{place}.{name}" for place, module in PUBLIC.items() for name in module.__all__}
    assert sorted(shown) == sorted(public)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path):
    text = path.read_text()
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", text):
        if ":" in target:
            continue
        other = (path.parent / target) if target else path
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_targets_exist(path: Path):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", path.read_text(), re.MULTILINE)):
        assert re.search(rf"^{target}:|^GPU_STEPS := .*\b{target}\b", makefile, re.MULTILINE)


def test_files_of_the_repository_are_in_the_site():
    hook = _hook("repository")
    shown = {path for pattern in hook.SHOWN for path in ROOT.glob(pattern)}
    assert all(any(ROOT.glob(pattern)) for pattern in hook.SHOWN)
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#:]+)", path.read_text()):
            found = (path.parent / target).resolve()
            assert found.is_relative_to(DOCS) or found in shown, f"{path.name}: {target}"


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("benchmarks.md", "../benchmarks/README.md", "repository/benchmarks/README.md"),
        ("methods/acmoe.md", "../../examples/README.md", "../repository/examples/README.md"),
        ("methods/acmoe.md", "../benchmarks.md", "../benchmarks.md"),
        ("repository/benchmarks/README.md", "../docs/benchmarks.md", "../../benchmarks.md"),
        ("repository/benchmarks/results/a/README.md", "run.json", "run.json"),
        ("index.md", "https://arxiv.org/abs/2502.15315", "https://arxiv.org/abs/2502.15315"),
    ],
)
def test_links_hold_in_the_site(page: str, link: str, expected: str):
    hook = _hook("repository")
    assert hook.rewritten(f"[a]({link}#b), ![c]({link})", page) == (
        f"[a]({expected}#b), ![c]({expected})"
    )


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ('<script src="https://elsewhere/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//elsewhere/x.css">', 1),
        ('<link href="https://elsewhere/x.css">', 1),
        ("<img src=http://elsewhere/x.png>", 1),
        ('<img srcset="x.png 1x, https://elsewhere/x.png 2x">', 1),
        ('<link rel="canonical" href="https://here/"><link rel="next" href="https://here/b">', 0),
        ('<a href="https://elsewhere/">a link loads nothing</a><script src="x.js"></script>', 0),
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(page: str, number: int):
    assert len(_hook("offline").foreign(page)) == number


def test_docstrings_keep_their_equations():
    text = """One line, a * b.

With i, j of
    y = <x, w> * 2
here `a * b` and <dW, D>:

y = x - step;
z = y

Filled text whose line is short
goes on, x = 1.

Args:
    x: <a, b>, T * K.
"""
    expected = """One line, a \\* b.

With i, j of

    y = <x, w> * 2

here `a * b` and &lt;dW, D>:

y = x - step;|
z = y

Filled text whose line is short|
goes on, x = 1.

Args:
    x: &lt;a, b>, T \\* K.""".replace("|", "  ")
    assert _hook("docstrings").as_markdown(text, 96) == expected
    full = "x = a word that goes up to the very end of\na line, y = 2"
    assert _hook("docstrings").as_markdown(full, 43) == full


def test_names_lead_to_the_reference():
    hook = _hook("names")
    assert hook.names()["topk_route"] == "molex_kernels.topk_route"
    text = "# `f`\n`f`, `mk.g`, `f`, [`f`](x.md) `h`\n```\n`g`\n```\n`g`, `k`\n"
    assert hook.linked(text, {"f": "m.f", "g": "m.g", "k": "m.k"}) == (
        "# `f`\n[`f`][m.f], [`mk.g`][m.g], `f`, [`f`](x.md) `h`\n```\n`g`\n```\n`g`, [`k`][m.k]\n"
    )
