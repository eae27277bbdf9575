"""The model of model.py, and a backend with a fault: its window is a token short, if it is 20.

    nsa agree examples/porting/wrong_window.py::make --targets acme

A real backend is an entry point of its own distribution, see CONTRIBUTING.md.
"""

from model import make  # noqa: F401

from nsa_neuron.backends import composite
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY, Supported


class Acme:
    """Runs the references, but for the fault."""

    name = "acme"

    def modes(self):
        return {"eager": ""}

    def supports(self, bound, mode):
        if bound.spec.name in composite.WHOLE:
            return composite.supports(bound, lambda part: self.supports(part, mode))
        return Supported()

    def lower(self, bound, plan):
        if bound.spec.name in composite.WHOLE:
            return composite.lower(bound, plan, self.lower)
        right = get(bound.spec.name).reference
        if bound.spec.name == "sliding_window_attention" and bound["w"] == 20:
            return lambda **values: right(**{**values, "window": 19})
        return right


REGISTRY.register(Acme())
