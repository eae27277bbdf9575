"""The caches' books: lengths, capacity, pages; forks, truncation, and the steps between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nsa_neuron.errors import CacheExhausted, InvalidArgument, InvalidType
from nsa_neuron.fields import check_int
from nsa_neuron.nn.cache.pages import Books, Ints, PageTable
from nsa_neuron.nn.cache.plan import plan_step
from nsa_neuron.nn.cache.step import LayerStep, Pools, Step
from nsa_neuron.spec import FLOATS

if TYPE_CHECKING:
    from nsa_neuron.nn.config import NsaConfig

SPARE = 2  # pages behind each pool's own: one takes what has no token, one stays zero
PAGE_TOKENS = 256
"""Of a page, at least: its compressed blocks are then 16 rows, which a Trainium's DMA has to find
one after the other."""
FAR = 2**40  # tokens: more than any sequence has


class KvCache:
    """Keys and values of a batch of sequences, for every layer of a model.

    Pools, by name: `cmp` compressed blocks; `slc` raw keys and values of the selected branch (and
    of full attention), rotated; `win` of the window branch; `raw` what phi compresses. Branches
    that hold the same rows share a pool. A compressed block is added exactly when its last token
    arrives. Pages of the selected branch hold each kv head's rows together, so that a chosen block
    of a head is one piece of memory; those of the others each row's heads.

    Args:
        config: of every layer.
        kinds: of the layers: `nsa`, `full`, `window`.
        batch: sequences. capacity: longest sequence, tokens.
        dtype, device: of the pools.
        pages: of a pool that keeps every row.
        slack, longest_step: see `PagedCache`.
    """

    def __init__(
        self,
        config: NsaConfig,
        kinds: Sequence[str],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pages: int,
        slack: int | None,
        longest_step: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("capacity", capacity), ("pages", pages)):
            check_int(type(self).__name__, name, value, 1)
        if capacity > config.max_positions:
            expected = f"at most max_positions = {config.max_positions}"
            raise InvalidArgument(type(self).__name__, "capacity", capacity, expected)
        wrong = [kind for kind in kinds if kind not in ("nsa", "full", "window")]
        if wrong or isinstance(kinds, str) or not kinds:
            expected = "a kind for each layer: nsa, full, window"
            raise InvalidArgument(type(self).__name__, "kinds", repr(kinds), expected)
        if dtype not in FLOATS:
            raise InvalidType(
                type(self).__name__, "dtype", str(dtype), "a floating dtype of the ops"
            )
        self.config, self.kinds, self.slack = config, tuple(kinds), slack
        self.batch, self.capacity, self.longest_step = batch, capacity, longest_step
        self.dtype, self.device = dtype, torch.device(device)
        self.page = page_tokens(config)
        self.alias = _alias(config)
        self._names = {
            "nsa": {*self.alias.values(), "cmp"},
            "full": {self.alias["slc"]},
            "window": {self.alias["win"]},
        }
        names = sorted(set().union(*(self._names[kind] for kind in kinds)))
        self.books = self._empty_books(names, pages)
        self._stepping = False
        self.layers: list[Pools] = [self._pools(kind) for kind in self.kinds]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(n) for n in self.books.lengths]

    @property
    def nbytes(self) -> int:
        """Memory of the pools in bytes."""
        pools = [x for layer in self.layers for pair in layer.values() for x in pair]
        return sum(x.numel() * x.element_size() for x in pools)

    @contextmanager
    def step(self, tokens: int, counts: Sequence[int] | None = None) -> Iterator[Step]:
        """Room for new tokens; they count as cached once the `with` block ends well.

        Args:
            tokens: S, new tokens of each row.
            counts: how many of them each sequence has, at the end of its row; None: all.

        Raises:
            InvalidArgument: bad counts, or more tokens than `longest_step`.
            CacheExhausted: they do not fit; nothing has changed.
        """
        given = self._counts(tokens, counts)
        books = self._books_to_change("step")
        old, books.lengths = books.lengths, books.lengths + given
        over = np.nonzero(books.lengths > self.capacity)[0]
        if len(over):
            b = int(over[0])
            raise CacheExhausted(
                f"sequence {b} has {old[b]} tokens and gets {given[b]} more; the cache's capacity "
                f"is {self.capacity} tokens"
            )
        whole = not old.any() and bool((given == tokens).all())
        if not whole and self.longest_step is not None and tokens > self.longest_step:
            expected = f"at most longest_step = {self.longest_step}, but for a first step of all"
            raise InvalidArgument("cache step", "tokens", tokens, expected)
        for name, table in books.tables.items():
            first = self._first_written(name, books.lengths) if whole else old
            for i in np.nonzero(given)[0].tolist():
                table.grow(i, self._rows(name, first[i]), self._rows(name, books.lengths[i]))
        self._copy_pages(books)
        step = plan_step(books, old, given, tokens, self)
        step.layers = [LayerStep(step, pools, self.alias) for pools in self.layers]
        self._stepping = True
        try:
            yield step
        finally:
            self._stepping = step.open = False
        self._release(books)
        self.books = books

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets each sequence's tokens from a length on (rejected speculative tokens).

        Raises:
            InvalidArgument: a length that is not within the sequence, or rows that the shortened
                sequence needs were given back already (see `slack`); nothing has changed.
        """
        books = self._books_to_change("truncate")
        wanted = self._per_sequence("truncate", "lengths", lengths)
        if (wanted < 0).any() or (wanted > self.books.lengths).any():
            expected = f"from 0 to the sequences' {self.lengths}"
            raise InvalidArgument("truncate", "lengths", list(lengths), expected)
        for name, kept in self.books.kept.items():
            lost = np.nonzero((self._needed(name, wanted) < kept) & (wanted > 0))[0]
            if len(lost):
                b = int(lost[0])
                found = f"{wanted[b]} for sequence {b} of {self.lengths[b]} tokens"
                expected = f"at least what slack = {self.slack} keeps"
                raise InvalidArgument("truncate", "lengths", found, expected)
        books.lengths = wanted
        self._keep(books)
        self.books = books

    def reset(self) -> None:
        """Forgets everything."""
        self.truncate([0] * self.batch)

    def fork(self, source: int, target: int) -> None:
        """Sequence `target`, which must be empty, becomes a copy of `source`.

        Raises:
            InvalidArgument: no such sequences, or the target is not empty.
        """
        for name, b in (("source", source), ("target", target)):
            check_int("fork", name, b, 0, self.batch - 1)
        if self.books.lengths[target]:
            raise InvalidArgument("fork", "target", f"{self.lengths[target]} tokens long", "empty")
        order = np.arange(self.batch)
        order[target] = source
        self.reorder(order.tolist())

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence order[i] was (beam search).

        Raises:
            InvalidArgument: not one sequence for each.
        """
        books = self._books_to_change("reorder")
        wanted = self._per_sequence("reorder", "order", order)
        if (wanted < 0).any() or (wanted >= self.batch).any():
            expected = f"within 0 .. {self.batch - 1}"
            raise InvalidArgument("reorder", "order", list(order), expected)
        books.lengths = books.lengths[wanted]
        books.kept = {name: kept[wanted] for name, kept in books.kept.items()}
        self._reorder_pages(books, wanted)
        self.books = books

    def _books_to_change(self, op: str) -> Books:
        if self._stepping:
            raise InvalidArgument(op, "cache", "inside a step", "left alone until the step ends")
        return self.books.copy()

    def _counts(self, tokens: int, counts: Sequence[int] | None) -> Ints:
        check_int("cache step", "tokens", tokens, 1)
        given = self._per_sequence(
            "cache step", "counts", [tokens] * self.batch if counts is None else counts
        )
        if (given < 0).any() or (given > tokens).any() or not given.any():
            expected = f"from 0 to {tokens}, not all 0"
            raise InvalidArgument("cache step", "counts", counts, expected)
        return given

    def _per_sequence(self, op: str, name: str, values: Sequence[int]) -> Ints:
        try:
            array = np.asarray(values)
        except ValueError:  # rows of several lengths
            array = np.empty(0)
        if array.shape != (self.batch,) or not np.issubdtype(array.dtype, np.integer):
            raise InvalidArgument(op, name, values, f"{self.batch} ints, one per sequence")
        return array.astype(np.int64)

    def _rows(self, name: str, tokens: int) -> int:
        """Rows of a pool that so many tokens take."""
        return int(self.blocks(tokens)) if name == "cmp" else int(tokens)

    def blocks(self, tokens: Ints | int) -> Ints:
        """Complete compressed blocks."""
        return np.maximum(0, (tokens - self.config.block) // self.config.stride + 1)

    def _needed(self, name: str, lengths: Ints) -> Ints:
        """First token whose row sequences of such lengths still need."""
        needs = []
        if name == "cmp" or (name == self.alias["slc"] and set(self.kinds) != {"window"}):
            needs.append(np.zeros_like(lengths))
        if name == self.alias["win"]:
            needs.append(np.maximum(0, lengths - self.config.window + 1))
        if name == self.alias["raw"]:
            needs.append(self.blocks(lengths) * self.config.stride)
        least: Ints = np.minimum.reduce(needs)
        return least

    def _first_written(self, name: str, lengths: Ints) -> Ints:
        """First token that a step has to write which reads nothing cached: the first that will be
        needed afterwards."""
        if self.slack is None:
            return np.zeros_like(lengths)
        return self._needed(name, np.maximum(0, lengths - self.slack))

    def _release(self, books: Books) -> None:
        """Gives back what no query will see any more, and no truncation within the slack needs."""
        if self.slack is None:
            return
        for name in books.kept:
            old = np.maximum(0, books.lengths - self.slack)
            books.kept[name] = np.maximum(books.kept[name], self._needed(name, old))
        self._keep(books)

    def _keep(self, books: Books) -> None:
        """Gives back pages outside of what is kept."""
        for name, table in books.tables.items():
            for b in range(self.batch):
                length = int(books.lengths[b])
                first = int(books.kept[name][b]) if length else 0
                books.kept[name][b] = first
                rows = (self._rows(name, length), 0 if name == "cmp" else first)
                table.keep(b, rows[1], rows[0])

    def _copy_pages(self, books: Books) -> None:
        """Copies of shared pages that are about to be written; nobody reads them yet."""
        for name, table in books.tables.items():
            for source, target in table.copies:
                for pools in self.layers:
                    for x in pools.get(name, ()):
                        x[target].copy_(x[source])

    def _reorder_pages(self, books: Books, order: Ints) -> None:
        for table in books.tables.values():
            table.take_over(order)

    def _empty_books(self, names: Sequence[str], pages: int) -> Books:
        most = -(-self.capacity // self.page)
        tables = {
            name: PageTable.empty(
                name, self.page_rows(name), self._heads_apart(name), self._pages(name, pages),
                self.batch, most,
            )
            for name in names
        }  # fmt: skip
        zeros = np.zeros(self.batch, dtype=np.int64)
        return Books(zeros, {name: zeros.copy() for name in names}, tables)

    def _pages(self, name: str, pages: int) -> int:
        """Pages of a pool: as many in every pool, so that compiled steps see equal sizes whatever
        the capacity, unless steps are known to be short enough for fewer."""
        if self.slack is None or self.longest_step is None:
            return pages
        far = np.asarray(FAR)
        kept = FAR - int(self._needed(name, far)) + self.config.stride
        if kept > FAR:
            return pages
        rows = kept + self.slack + self.longest_step
        return min(pages, self.batch * (-(-rows // self.page) + 1))

    def page_rows(self, name: str) -> int:
        """Rows of a page of a pool."""
        return self.page // self.config.stride if name == "cmp" else self.page

    def _heads_apart(self, name: str) -> int:
        """Kv heads that have rows of their own in a pool, see `PageTable`."""
        chosen = "nsa" in self.kinds and name == self.alias["slc"]
        return self.config.kv_heads if chosen else 1

    def _pools(self, kind: str) -> Pools:
        """A layer's memory: zeros."""
        pools = {}
        for name in sorted(self._names[kind]):
            pages = len(self.books.tables[name].users) + SPARE
            pools[name] = (
                self._zeros(name, pages, self.config.dk),
                self._zeros(name, pages, self.config.dv),
            )
        return pools

    def _zeros(self, name: str, pages: int, dim: int) -> Tensor:
        """A pool `[pages, page, Hkv, dim]`, in memory as its name has it."""
        heads = self.config.kv_heads
        if self._heads_apart(name) > 1:
            shape = (pages, heads, self.page_rows(name), dim)
            return torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(1, 2)
        shape = (pages, self.page_rows(name), heads, dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def page_tokens(config: NsaConfig) -> int:
    """Tokens of a page: whole selection blocks, as `decode` wants them."""
    return -(-PAGE_TOKENS // config.select_block) * config.select_block


def _alias(config: NsaConfig) -> dict[str, str]:
    """Which pool holds the raw rows of each branch."""
    if not config.shared_kv:
        return {"slc": "slc", "win": "win", "raw": "raw"}
    rotated = config.rope == "before" or config.rope_base == 0
    return {"slc": "slc", "win": "slc", "raw": "slc" if rotated else "raw"}
