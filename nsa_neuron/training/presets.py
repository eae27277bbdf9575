"""The models and schedules that are trained here, by name."""

from __future__ import annotations

from typing import Any

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.attention import KINDS
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.training.corpus import python_corpus
from nsa_neuron.training.loop import TrainConfig
from nsa_neuron.training.tasks import MultiQueryRecall, Needle, Task, Text

_GEOMETRY: dict[str, Any] = {
    "block": 16, "stride": 8, "select_block": 32, "num_selected": 8, "window": 128,
}  # fmt: skip
CONFIGS = {
    "tiny": NsaConfig(dim=32, heads=2, kv_heads=1, dk=16, dv=16, phi="linear", **_GEOMETRY),
    "small": NsaConfig(dim=128, heads=4, kv_heads=1, dk=32, dv=32, phi="linear", **_GEOMETRY),
}
"""Windows of 128 bytes: a task that needs more is one that window-only attention must fail."""
LAYERS = {"tiny": 2, "small": 4}
SCHEDULES = {
    "text": TrainConfig(),
    "mqar": TrainConfig(steps=2000, batch=16, length=256, long_share=0.0, rate=2e-3),
    "needle": TrainConfig(steps=2000, batch=4, length=1024, long_length=4096, rate=2e-3),
}
TASKS = tuple(SCHEDULES)


def task_of(name: str) -> Task:
    """A task by name: `text`, `mqar`, `needle`."""
    if name == "mqar":
        return MultiQueryRecall()
    return Needle(python_corpus()) if name == "needle" else Text(python_corpus())


def kinds_of(attention: str, layers: int) -> tuple[str, ...]:
    """Kinds of layers: one name for all of them, or a name for each, separated by commas.

    Raises:
        InvalidArgument: an unknown kind, or another number of them.
    """
    names = attention.split(",")
    kinds = tuple(names * layers if len(names) == 1 else names)
    if len(kinds) != layers or not set(kinds) <= set(KINDS):
        expected = f"one or {layers} of {', '.join(KINDS)}, separated by commas"
        raise InvalidArgument("train", "attention", repr(attention), expected)
    return kinds
