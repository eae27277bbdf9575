"""What code and documents cite can be opened: pages, sections, rules of the contract."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("nsa_neuron", "nki_kernels", "cuda_kernels", "tests", "tools", "examples", "docs")
# Pages of other people's documentation, which are cited with where they stand.
FOREIGN = re.compile(
    r"(README|neuron-notes|writeup|block_sparse_attention_trn2|index|conventions|SKILL)\.md"
    r"|nki-[\w-]+\.md"
)
FACTS = ("trainium2.md", "hopper.md", "nki_0_7.md")
CITED = re.compile(r"trainium2\.md`? (\d[\d.]*(?:, \d[\d.]*)*)")


def texts() -> Iterator[tuple[Path, str]]:
    """Every file of ours that people read, but for this one."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for folder in FOLDERS:
        pages += [p for kind in ("*.py", "*.md", "*.sh") for p in (ROOT / folder).rglob(kind)]
    for path in pages:
        if path != Path(__file__) and "__pycache__" not in path.parts:
            yield path, path.read_text()


def sections(page: str) -> set[str]:
    """Numbers of a page's headings."""
    text = (ROOT / "docs" / page).read_text()
    return {number.rstrip(".") for number in re.findall(r"^#+ (\d[\d.]*) ", text, re.M)}


def test_every_page_that_is_named_exists():
    for path, text in texts():
        if path.name in FACTS or "tests" in path.parts:  # these name other people's pages, and none
            continue
        for name in re.findall(r"[\w./-]*\w\.md\b", text):
            page = Path(name)
            if FOREIGN.fullmatch(page.name):
                continue
            places = (ROOT / page, ROOT / "docs" / page, path.parent / page)
            assert any(place.exists() for place in places), f"{path.name} names {name}"


def test_every_section_that_is_cited_exists():
    known, cited = sections("trainium2.md"), 0
    assert {"3", "2.6", "3.5", "6.5", "7.1"} <= known
    for path, text in texts():
        for run in CITED.findall(re.sub(r"\s*\n[\s#]*", " ", text)):
            for number in run.rstrip(".").split(", "):
                cited += 1
                assert number.rstrip(".") in known, f"{path.name} cites section {number}"
    assert cited > 15


def test_rules_of_the_contract_are_numbered_and_those_that_are_cited_exist():
    page = (ROOT / "docs" / "contract.md").read_text()
    rules = [int(n) for n in re.findall(r"^(\d+)\. \*\*", page, re.M)]
    assert rules == [*range(1, 16)]
    for path, text in texts():
        if "simulator" in path.parts or path.name == "trainium2.md":
            continue
        for number in re.findall(r"\b[Rr]ules? (\d+)", text):
            assert int(number) in rules, f"{path.name} cites rule {number}"
