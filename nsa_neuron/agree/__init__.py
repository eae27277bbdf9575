"""Do two accelerators agree on a model? `nsa agree`, for people who port models.

A model or function runs on each target: forward, backward, a few decoded tokens. Two questions are
asked of every run, by the one tolerance policy of the project (`nsa_neuron.numerics`):

- **Calls.** Is every call of an nsa op right on the very inputs that it got? Each is judged against
  the float64 reference on those inputs, so an error does not spread from one call to the next, and
  a wrong call is found where it is. What is composed of other ops is taken apart.
- **Modules.** Where do results part from those of the reference? Every module's output and every
  gradient is compared with a float64 run of the whole model.

From Python: `agree(load("model.py::make"), ["h200:sim", "cpu"])` returns an `Agreement`.
"""

from nsa_neuron.agree.report import Agreement, Call, Point, Run, Token
from nsa_neuron.agree.run import agree
from nsa_neuron.agree.subject import Subject, load

__all__ = ["Agreement", "Call", "Point", "Run", "Subject", "Token", "agree", "load"]
