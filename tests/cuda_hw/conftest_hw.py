"""What the hardware tests need while they are collected."""

from __future__ import annotations

import os

ON_CPU = os.environ.get("NSA_HW_TESTS_ON_CPU") == "1"
TARGET = "cuda:sim" if ON_CPU else "cuda:hw"


def hindrance() -> str:
    """Why the kernels cannot run on a GPU here; empty where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package 'triton' is not installed"
    from nsa_neuron.backends.cuda import BACKEND

    return BACKEND.modes()["hw"]
