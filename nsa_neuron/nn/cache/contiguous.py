"""A cache that gives each sequence memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nsa_neuron.nn.cache.cache import SPARE, KvCache

if TYPE_CHECKING:
    from nsa_neuron.nn.cache.pages import Books, Ints
    from nsa_neuron.nn.config import NsaConfig


class ContiguousCache(KvCache):
    """Each sequence's rows lie one behind the other, in memory that is its own from the start.

    Args:
        config, kinds, batch, capacity, dtype, device: see `KvCache`.
    """

    def __init__(
        self,
        config: NsaConfig,
        kinds: Sequence[str],
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, kinds, batch, capacity, dtype, device, batch, None)

    def _empty_books(self, names: Sequence[str], pages: int) -> Books:
        books = super()._empty_books(names, pages)
        for table in books.tables.values():
            table.table[:] = np.arange(table.table.size).reshape(table.table.shape)
            table.users = np.ones(table.table.size, dtype=np.int64)
        return books

    def _keep(self, books: Books) -> None:
        """Nothing is given back."""

    def _reorder_pages(self, books: Books, order: Ints) -> None:
        """Every sequence's memory is copied."""
        index = torch.as_tensor(order, device=self.device)
        for pools in self.layers:
            for pair in pools.values():
                for x in pair:
                    own = x[:-SPARE].unflatten(0, (self.batch, -1))
                    own.copy_(own[index])
