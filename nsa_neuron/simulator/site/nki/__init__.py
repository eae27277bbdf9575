"""Stands in for the vendor's `nki` where this folder is on PYTHONPATH and NKI_SIMULATOR=1.

`PYTHONPATH=$(python -m nsa_neuron.simulator --path) NKI_SIMULATOR=1 python script.py`
"""

import os
import sys

if os.environ.get("NKI_SIMULATOR") != "1":
    raise ImportError(
        f"nki in {os.path.dirname(__file__)} is nsa-neuron's simulator: set NKI_SIMULATOR=1, or "
        "take the folder off PYTHONPATH to use the vendor's package",
        name="nki",
    )

from nsa_neuron.simulator import activate

# The import that runs this file returns what is in sys.modules afterwards: the facade.
del sys.modules["nki"]
activate(target=os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2"))
