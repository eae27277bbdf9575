"""Page tables on the host: which page of a pool holds which rows of which sequence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from nsa_neuron.errors import CacheExhausted

Ints = NDArray[np.int64]
NONE = -1


@dataclass
class PageTable:
    """Pages of one pool.

    Attributes:
        name: of the pool, for messages.
        page: rows of a page.
        heads: kv heads that have rows of their own, each head's of a page together; 1: a row holds
            all of them.
        table: page of each sequence's rows, `[batch, most]`; -1 where there is none.
        users: how many sequences use each page, `[pages]`.
    """

    name: str
    page: int
    heads: int
    table: Ints
    users: Ints
    copies: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def empty(
        cls, name: str, page: int, heads: int, pages: int, batch: int, most: int
    ) -> PageTable:
        """A table whose sequences may have up to `most` pages each."""
        table = np.full((batch, most), NONE, dtype=np.int64)
        return cls(name, page, heads, table, np.zeros(pages, dtype=np.int64))

    def copy(self) -> PageTable:
        """A table to change; this one stays."""
        return replace(self, table=self.table.copy(), users=self.users.copy(), copies=[])

    @property
    def free(self) -> int:
        """Pages that no sequence uses."""
        return int((self.users == 0).sum())

    def grow(self, sequence: int, old: int, new: int) -> None:
        """Makes rows old..new-1 of a sequence writable: new pages, and copies of shared ones.

        Raises:
            CacheExhausted: no page is free.
        """
        if new <= old:
            return
        for i in range(old // self.page, -(-new // self.page)):
            shared = int(self.table[sequence, i])
            if shared != NONE and self.users[shared] == 1:
                continue
            own = self._take(sequence)
            if shared != NONE:
                self.copies.append((shared, own))
                self.users[shared] -= 1
            self.table[sequence, i] = own

    def _take(self, sequence: int) -> int:
        page = int(self.users.argmin())
        if self.users[page]:
            raise CacheExhausted(
                f"sequence {sequence} needs a page of pool '{self.name}', and all "
                f"{len(self.users)} pages of {self.page} rows are in use; truncate or reset a "
                "sequence, or make the cache with more pages"
            )
        self.users[page] = 1
        return page

    def keep(self, sequence: int, first: int, last: int) -> None:
        """Gives back the pages of a sequence that hold no row of first..last-1."""
        row = self.table[sequence]
        for part in (row[: first // self.page], row[-(-last // self.page) :]):
            held = part[part != NONE]
            np.subtract.at(self.users, held, 1)
            part[:] = NONE

    def take_over(self, order: Ints) -> None:
        """Sequence i becomes what sequence order[i] was."""
        self.table = self.table[order]
        held = self.table[self.table != NONE]
        self.users = np.bincount(held, minlength=len(self.users)).astype(np.int64)

    def resize(self, order: Ints, most: int, pages: int) -> None:
        """As `take_over`, with up to `most` pages of a sequence and at least `pages` in all."""
        old = self.table[order][:, :most]
        self.table = np.full((len(order), most), NONE, dtype=np.int64)
        self.table[:, : old.shape[1]] = old
        self.users = np.zeros(max(pages, len(self.users)), dtype=np.int64)
        self.take_over(np.arange(len(order)))

    def rows(self, sequences: Ints, positions: Ints, otherwise: int) -> Ints:
        """Rows of the flattened pool at which positions of sequences lie, `[..., heads]`.

        Args:
            sequences: broadcastable with positions.
            positions: rows of the sequences; negative ones lie nowhere.
            otherwise: the page, behind those of sequences, of what lies nowhere.
        """
        inside = (positions >= 0) & (positions < self.table.shape[1] * self.page)
        at = np.where(inside, positions, 0)
        pages = np.where(inside, self.table[sequences, at // self.page], NONE)
        first = np.where(pages == NONE, otherwise, pages) * self.heads
        begin = (first[..., None] + np.arange(self.heads)) * self.page
        found: Ints = begin + (at % self.page)[..., None]
        return found


@dataclass
class Books:
    """What a cache knows on the host; replaced as a whole when a step ends well.

    Attributes:
        lengths: tokens of each sequence.
        kept: first token whose row is still there, by pool and sequence.
        tables: by pool.
    """

    lengths: Ints
    kept: dict[str, Ints]
    tables: dict[str, PageTable]

    def copy(self) -> Books:
        """Books to change; these stay."""
        kept = {name: first.copy() for name, first in self.kept.items()}
        tables = {name: table.copy() for name, table in self.tables.items()}
        return Books(self.lengths.copy(), kept, tables)
