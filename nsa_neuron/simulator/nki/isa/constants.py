"""Enums of `nki.isa`; members are hashed by identity, as keys of cached checks."""

from enum import Enum


class engine(Enum):
    """Engine of a NeuronCore."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0

    __hash__ = object.__hash__


class reduce_cmd(Enum):
    """What an instruction does with the accumulator registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4

    __hash__ = object.__hash__


class dge_mode(Enum):
    """Who generates DMA descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3

    __hash__ = object.__hash__


class oob_mode(Enum):
    """What a run-time index outside its tensor does."""

    error = 0
    skip = 1

    __hash__ = object.__hash__


class matmul_perf_mode(str, Enum):
    """Performance mode of the PE; compares equal to its string, which AWS's kernels also pass."""

    none = "none"
    double_row = "double_row"

    __hash__ = str.__hash__  # members are part of the keys of cached checks


class nc_version(Enum):
    """Generation of the NeuronCore."""

    gen2 = 2
    gen3 = 3
    gen4 = 4

    def __lt__(self, other: "nc_version") -> bool:
        return self.value < other.value

    def __le__(self, other: "nc_version") -> bool:
        return self.value <= other.value

    def __gt__(self, other: "nc_version") -> bool:
        return self.value > other.value

    def __ge__(self, other: "nc_version") -> bool:
        return self.value >= other.value


class dma_engine(Enum):
    """Who moves the data of `sendrecv`."""

    dma = 1
    gpsimd_dma = 2

    __hash__ = object.__hash__


tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown
