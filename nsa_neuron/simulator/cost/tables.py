"""Activation tables: which functions of the Scalar Engine can be used without loading another.

The sets were read from the `act_info.json` of public Trainium2 NEFFs (compiler 2.21); see the fact
sheet, 5.3. Whether newer compilers changed them is not known.
"""

from __future__ import annotations

# In every set, so they never force a load.
RESIDENT = frozenset({"copy", "relu", "abs", "sign", "square"})

SETS: dict[str, frozenset[str]] = {
    "exp_and_others": frozenset({"exp", "tanh"}),
    "natural_log": frozenset({"log"}),
    "natural_log_exp_and_others": frozenset({"log", "exp"}),
    "softplus_and_others": frozenset({"softplus"}),
    "sigmoid_and_others": frozenset({"sigmoid", "tanh", "erf", "arctan"}),
    "erf_derivative": frozenset({"erf_dx"}),
    "sqrt_and_others": frozenset({"sqrt"}),
    "reciprocal_sqrt_and_small": frozenset({"rsqrt"}),
    "reciprocal_and_small": frozenset({"reciprocal"}),
    "trig_and_small": frozenset({"sin", "arctan"}),
    "gelu_and_others": frozenset({"gelu", "gelu_dx", "tanh"}),
    "gelu_apprx_tanh_and_others": frozenset({"gelu_apprx_tanh", "tanh"}),
    "gelu_apprx_sigmoid_and_others": frozenset(
        {"gelu_apprx_sigmoid", "gelu_apprx_sigmoid_dx", "tanh"}
    ),
    "silu_and_others": frozenset({"silu", "tanh", "sin"}),
    "derivative_silu_and_others": frozenset({"silu_dx", "tanh", "sin"}),
    "mish_and_others": frozenset({"mish"}),
}


def holding(function: str) -> str:
    """The set loaded for a function that the resident one lacks; "" for those in every set.

    Which of several sets the compiler takes is not published: the first one listed.

    Raises:
        KeyError: no known set has the function.
    """
    if function in RESIDENT:
        return ""
    for name, functions in SETS.items():
        if function in functions:
            return name
    raise KeyError(f"no activation table is known to hold {function!r}")
