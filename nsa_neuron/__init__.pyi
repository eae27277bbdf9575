"""The public names: `__init__.py` reads them here, so that they are listed once."""

from typing import Any

from nsa_neuron.compile import explain as explain
from nsa_neuron.errors import NsaError as NsaError
from nsa_neuron.functional import attention as attention
from nsa_neuron.functional import compress as compress
from nsa_neuron.functional import compressed_attention as compressed_attention
from nsa_neuron.functional import decode as decode
from nsa_neuron.functional import gated_sum as gated_sum
from nsa_neuron.functional import nsa_attention as nsa_attention
from nsa_neuron.functional import select_blocks as select_blocks
from nsa_neuron.functional import selected_attention as selected_attention
from nsa_neuron.functional import sliding_window_attention as sliding_window_attention
from nsa_neuron.registry import use_backend as use_backend

__version__: str

def __getattr__(name: str) -> Any: ...  # submodules, imported on first use
