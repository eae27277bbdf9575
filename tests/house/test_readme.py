"""What the README shows: a short example (tests/newcomer runs it), kernels, targets, pages."""

from __future__ import annotations

import re
from pathlib import Path

from nsa_neuron.cli import coverage

ROOT = Path(__file__).parents[2]


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return str(blocks[0])


def test_the_example_is_short():
    assert len([line for line in example().splitlines() if line.strip()]) <= 18


def test_the_table_of_kernels_is_what_the_backends_say():
    page = (ROOT / "README.md").read_text()
    assert page == coverage.rewrite(page), "make readme"


def test_every_make_target_is_explained():
    targets = re.findall(r"^([a-z-]+):.*?(##.*)?$", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "lint", "types", "bench", "help"} <= {name for name, _ in targets}
    assert [name for name, text in targets if not text] == []


def test_every_document_that_is_named_exists():
    ours = [page for page in (ROOT / "docs").glob("*.md") if page.name != "ci.md"]
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ours]:
        for name in re.findall(
            r"`((?:docs|tools|nsa_neuron|tests)/[\w/.-]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_picture_and_page_that_is_linked_exists():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_readme_shows_a_picture_of_each_product():
    page = (ROOT / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(docs/images/(\w+)\.png\)", page)
    assert {*shown} == {"selection_page", "conform_page", "profile_page"}
