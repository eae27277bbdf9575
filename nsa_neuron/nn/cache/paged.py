"""A cache whose sequences share pools of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.cache.cache import KvCache, page_tokens

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if slack is not None and (isinstance(slack, bool) or slack < 0):
            raise InvalidArgument("PagedCache", "slack", slack, "None or at least 0")
        full = max(1, batch) * -(-max(1, capacity) // page_tokens(config))
        pages = full if pages is None else pages
        super().__init__(config, kinds, batch, capacity, dtype, device, pages, slack)
