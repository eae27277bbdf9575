"""Key-value caches: contiguous and paged, one interface.

    cache = model.new_cache(batch=2, capacity=8192)
    with cache.step(tokens.shape[1]) as step:
        logits = model(tokens, step=step)

A cache keeps books on the host (lengths, pages); a `Step` is what one forward pass needs of them,
as tensors. The books change when the `with` block ends without an error: a step that fails, for
whatever reason, leaves the cache as it was.
"""

from nsa_neuron.nn.cache.cache import KvCache
from nsa_neuron.nn.cache.contiguous import ContiguousCache
from nsa_neuron.nn.cache.paged import PagedCache
from nsa_neuron.nn.cache.step import LayerStep, Step

__all__ = ["ContiguousCache", "KvCache", "LayerStep", "PagedCache", "Step"]
