"""A cache whose sequences share pools of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.fields import check_int
from nsa_neuron.nn.cache.cache import SPARE, KvCache, page_tokens

if TYPE_CHECKING:
    from nsa_neuron.nn.config import NsaConfig


class PagedCache(KvCache):
    """Sequences share pools of pages; forks share pages until one of them writes.

    Args:
        config, kinds, batch, capacity, dtype, device: see `KvCache`.
        pages: of each pool; default: enough for every sequence at full capacity. A page holds
            `cache.page` tokens, or the blocks that start in them.
        slack: None: keep every row. Else rows of the window branch and of phi's input are given
            back once no query sees them, except for truncations of up to so many tokens.
        longest_step: most new tokens of a step that is not the first, where that is known: with
            `slack`, pools whose rows are given back are then no larger than needed for it.
    """

    def __init__(
        self,
        config: NsaConfig,
        kinds: Sequence[str],
        batch: int,
        capacity: int,
        *,
        pages: int | None = None,
        slack: int | None = None,
        longest_step: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (
            ("batch", batch, 1), ("capacity", capacity, 1), ("slack", slack, 0),
            ("longest_step", longest_step, 1),
        ):  # fmt: skip
            if value is not None or name in ("batch", "capacity"):
                check_int("PagedCache", name, value, least)
        full = batch * -(-capacity // page_tokens(config))
        pages = full if pages is None else pages
        super().__init__(config, kinds, batch, capacity, dtype, device, pages, slack, longest_step)

    def resize(self, order: Sequence[int], capacity: int, longest_step: int | None = None) -> None:
        """Sequence i becomes what sequence order[i] was, with room for more or fewer sequences and
        tokens. Pools grow if they have to; they never shrink.

        Args:
            order: a sequence for each that there will be.
            capacity: tokens of the longest.
            longest_step: see the class.

        Raises:
            InvalidArgument: no such sequence, or longer ones than the new capacity; nothing has
                changed.
        """
        if not order:
            raise InvalidArgument("resize", "order", list(order), "one or more sequences")
        for sequence in order:
            check_int("resize", "order", sequence, 0, self.batch - 1)
        check_int("resize", "capacity", capacity, 1, self.config.max_positions)
        if longest_step is not None:
            check_int("resize", "longest_step", longest_step, 1)
        books, wanted = self._books_to_change("resize"), np.asarray(order, dtype=np.int64)
        books.lengths = books.lengths[wanted]
        if (books.lengths > capacity).any():
            raise InvalidArgument("resize", "capacity", capacity, f"at least {max(books.lengths)}")
        books.kept = {name: kept[wanted] for name, kept in books.kept.items()}
        self.batch, self.capacity, self.longest_step = len(order), capacity, longest_step
        most = -(-capacity // self.page)
        for name, table in books.tables.items():
            table.resize(wanted, most, self._pages(name, self.batch * most))
            for pools in self.layers:
                if name in pools:
                    k, v = pools[name]
                    pages = len(table.users) + SPARE
                    pools[name] = self._grown(name, k, pages), self._grown(name, v, pages)
        self.books = books

    def _grown(self, name: str, pool: Tensor, pages: int) -> Tensor:
        """The pool with so many pages; the spare ones, at its end, hold nothing that is read but
        zeros."""
        if len(pool) == pages:
            return pool
        made = self._zeros(name, pages, pool.shape[3])
        made[: len(pool) - SPARE] = pool[:-SPARE]
        return made
