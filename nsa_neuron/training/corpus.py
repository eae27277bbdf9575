"""Texts that every machine with Python has: its help topics and its standard library."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument

LEAST_DOCSTRING = 60  # bytes
HELD_OUT = 20  # one text in so many is never trained on
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Parts of texts, each one tensor of bytes.

    Attributes:
        parts: uint8, by name; batches draw from all of them alike.
        held_out: uint8, never trained on.
    """

    parts: dict[str, Tensor]
    held_out: Tensor

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random pieces, `[batch, length]` int64, from the parts in turn; where there are fewer
        pieces than parts, chance says with which they begin."""
        parts = list(self.parts.values())
        few = batch < len(parts)
        first = int(torch.randint(len(parts), (), generator=generator)) if few else 0
        return torch.stack(
            [_piece(parts[(first + i) % len(parts)], length, generator) for i in range(batch)]
        ).long()

    def held_out_pieces(self, count: int, length: int) -> Tensor:
        """Evenly spread pieces that were never trained on, `[count, length]` int64."""
        last = len(self.held_out) - length
        if last < 0:
            found = f"{length}, longer than the {len(self.held_out)} bytes held out"
            raise InvalidArgument("Corpus", "length", found, "shorter")
        starts = [last * i // max(1, count - 1) for i in range(count)]
        return torch.stack([self.held_out[at : at + length] for at in starts]).long()


def _piece(part: Tensor, length: int, generator: torch.Generator) -> Tensor:
    if len(part) < length:
        found = f"{length}, longer than a part of {len(part)} bytes"
        raise InvalidArgument("Corpus", "length", found, "shorter")
    at = int(torch.randint(len(part) - length + 1, (), generator=generator))
    return part[at : at + length]


def corpus_of(**groups: Sequence[bytes]) -> Corpus:
    """A corpus of groups of texts; one text in twenty is held out."""
    parts: dict[str, Tensor] = {}
    held: list[bytes] = []
    for name, texts in groups.items():
        parts[name] = _join([t for i, t in enumerate(texts) if i % HELD_OUT])
        held += texts[::HELD_OUT]
    return Corpus(parts, _join(held))


@cache
def python_corpus() -> Corpus:
    """Python's help topics (half a megabyte of English) and the standard library's source."""
    return corpus_of(topics=help_topics(), source=[path.read_bytes() for path in _sources()])


@cache
def prose_corpus() -> Corpus:
    """The same with more English: a third of each batch are docstrings (1.5 MB). The texts held out
    are those of `python_corpus`, and their docstrings are left out, too."""
    usual = python_corpus()
    known = [path for i, path in enumerate(_sources()) if i % HELD_OUT]
    written = _join([text.encode() for path in known for text in docstrings(path.read_bytes())])
    parts = {
        "topics": usual.parts["topics"],
        "docstrings": written,
        "source": usual.parts["source"],
    }
    return Corpus(parts, usual.held_out)


def docstrings(source: bytes) -> list[str]:
    """A Python file's docstrings without their indent, but for those of a few words."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in _statements(ast.parse(source)) if isinstance(node, kinds)]
    return [text for node in nodes if len(text := ast.get_docstring(node) or "") >= LEAST_DOCSTRING]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """In the order of `ast.walk`, without expressions, which are most of a tree."""
    blocks = "body", "handlers", "orelse", "finalbody", "cases"
    level: list[ast.AST] = [tree]
    while level:
        yield from level
        level = [c for node in level for name in blocks for c in getattr(node, name, ())]


def _sources() -> list[Path]:
    found: list[Path] = []
    for folder, inner, names in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = [name for name in inner if name not in SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def help_topics() -> list[bytes]:
    """Python's help topics, by name."""
    from pydoc_data.topics import topics

    return [topics[name].encode() for name in sorted(topics)]


def _join(texts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n\n".join(texts)), dtype=torch.uint8)
