"""Settings of the whole suite: one torch thread, and property tests that repeat themselves."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "nsa",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nsa")

try:
    import torch
except ImportError:  # the simulator's tests run without torch
    pass
else:
    torch.set_num_threads(1)
