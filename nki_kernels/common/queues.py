"""DMA queues.

A DMA with a run-time address costs its queue about 1.6 us whatever it moves (`dma_run_time` of the
cost model): many of them are dealt to several queues. A queue works in order, and one that an
engine triggers waits for that engine's work before it.
"""

import nki.isa as nisa


def fetch(target, source, queue="y"):
    """One DMA; queue "y" is triggered by the sync engine, "a" by ScalarE, "g" by GpSimd."""
    if queue == "y":
        nisa.dma_copy(target, source, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)
    elif queue == "a":
        nisa.dma_copy(target, source, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
    else:
        nisa.dma_copy(target, source, dge_mode=nisa.dge_mode.swdge)


def move(target, source, queue):
    """One DMA, in a queue of `fetch` if it has one."""
    if queue == "":
        nisa.dma_copy(target, source)
    else:
        fetch(target, source, queue)
