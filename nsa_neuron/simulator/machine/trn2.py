"""Sizes and limits of a NeuronCore-v3 (Trainium2), with units and sources.

Section numbers refer to `docs/trainium2.md`; "SDK" is aws-neuron-sdk.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One NeuronCore.

    Attributes carry their unit in the name or in the comment beside the source.
    """

    name: str = "trn2"
    generation: int = 3  # NeuronCore-v3
    cores_per_launch: int = 2  # LNC 1 or 2 (SDK nki/get-started/about/lnc.rst)

    # SDK nki/guides/architecture/trainium2_arch.rst
    partitions: int = 128
    sbuf_physical_bytes: int = 224 * 1024  # bytes per partition
    # 229,376 less 16,384 of dynamic-DMA scratch and 8 reserved (nki-library, mlp_cte_constants)
    sbuf_bytes: int = 212_984  # usable bytes per partition
    psum_banks: int = 8
    psum_bank_bytes: int = 2048  # bytes per partition and bank
    hbm_bytes: int = 24 * 1024**3  # bytes per stack, one stack per pair of cores

    # SDK nki/api/nki/language (tile_size), isa docstrings
    stationary_free: int = 128  # elements
    moving_free: int = 512  # elements
    bn_stats_free: int = 512  # elements
    quadrant: int = 32  # partitions; start-partition granularity
    max_free_dims: int = 4  # dims of an access pattern below the partition dim
    max_dim_size: int = 0xFFFF  # uint16 count of one pattern step
    max_dim_stride: int = 0x7FFF  # int16 step of one pattern step, elements
    dma_max_sources: int = 16  # dma_compute
    search_free: tuple[int, int] = (8, 16_384)  # max8 and friends, elements

    @property
    def psum_bytes(self) -> int:
        """PSUM bytes per partition."""
        return self.psum_banks * self.psum_bank_bytes

    @property
    def psum_bank_fp32(self) -> int:
        """fp32 elements per PSUM bank and partition."""
        return self.psum_bank_bytes // 4


TRN2 = Machine()

_TARGETS = {"trn2": TRN2, "gen3": TRN2}


def machine_for(target: str) -> Machine:
    """Return the machine of a target name.

    Args:
        target: "trn2" or "gen3".

    Raises:
        ValueError: for a target that is not modelled.
    """
    try:
        return _TARGETS[target]
    except KeyError:
        known = ", ".join(sorted(_TARGETS))
        raise ValueError(f"target {target!r} is not modelled; known targets: {known}") from None
