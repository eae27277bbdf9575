"""`python -m nsa_neuron.cli` is `nsa`."""

import sys

from nsa_neuron.cli import main

sys.exit(main())
