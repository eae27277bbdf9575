"""Shared by the tests of the simulator's core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_neuron.simulator.issue.core import NeuronCore
from nsa_neuron.simulator.issue.lnc import Launch
from nsa_neuron.simulator.rules.options import Options

if TYPE_CHECKING:
    from nsa_neuron.simulator.memory.tensor import NkiTensor


def make_core(**options: Any) -> NeuronCore:
    """A core outside any launch of a kernel."""
    opts = Options(**options)
    return NeuronCore(0, Launch(opts, 1), opts)


def numbered(core: NeuronCore, shape: tuple[int, ...], buffer: str, **kwargs: Any) -> NkiTensor:
    """A float32 tensor whose element k holds k, in storage order."""
    tensor = core.allocate(shape, "float32", buffer, **kwargs)
    tensor.array()[...] = np.arange(tensor.size, dtype=np.float32).reshape(shape)
    tensor.memory.written.fill()
    return tensor
