"""The models and schedules that are trained here, by name."""

from __future__ import annotations

from typing import Any

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import check_int
from nsa_neuron.nn.attention import KINDS
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.training.corpus import prose_corpus, python_corpus
from nsa_neuron.training.loop import TrainConfig
from nsa_neuron.training.tasks import MultiQueryRecall, Task, Text

_GEOMETRY: dict[str, Any] = {
    "block": 16, "stride": 8, "select_block": 32, "num_selected": 8, "window": 128,
}  # fmt: skip
CONFIGS = {
    "tiny": NsaConfig(dim=32, heads=2, kv_heads=1, dk=16, dv=16, phi="linear", **_GEOMETRY),
    "recall": NsaConfig(
        dim=64,
        heads=4,
        kv_heads=2,
        dk=16,
        dv=16,
        phi="linear",
        rope_base=1e5,
        block=8,
        stride=4,
        select_block=16,
        num_selected=8,
        window=32,
    ),
    "small": NsaConfig(dim=128, heads=4, kv_heads=2, dk=32, dv=32, phi="linear", **_GEOMETRY),
}
"""Windows are short: a task that needs more is one that window-only attention must fail."""
LAYERS = {"tiny": 2, "recall": 2, "small": 4}
SCHEDULES = {
    "text": TrainConfig(steps=400, batch=4, length=512, growth=((0.8, 4096),)),
    "prose": TrainConfig(
        steps=850, batch=8, length=512, rate=2.4e-3, muon=0.016, warm_up=10,
        growth=((0.5, 2048), (0.8, 4096)),
    ),
    "mqar": TrainConfig(
        steps=400, batch=32, length=128, rate=5e-3, muon=0.03,
        growth=((0.3, 512), (0.6, 2048), (0.85, 4096)),
    ),
    "needle": TrainConfig(
        steps=300, batch=8, length=512, rate=5e-3, muon=0.03,
        growth=((0.35, 2048), (0.6, 4096)),
    ),
}  # fmt: skip
TASKS = tuple(SCHEDULES)


def task_of(name: str) -> Task:
    """A task by name: `text`, `prose`, `mqar`, or `needle`, which is mqar in real text.

    Raises:
        InvalidArgument: there is none of that name.
    """
    if name not in TASKS:
        raise InvalidArgument("train", "task", repr(name), f"one of {', '.join(TASKS)}")
    if name == "mqar":
        return MultiQueryRecall()
    if name == "prose":
        return Text(prose_corpus())
    corpus = python_corpus()
    return MultiQueryRecall(corpus=corpus) if name == "needle" else Text(corpus)


def kinds_of(attention: str, layers: int) -> tuple[str, ...]:
    """Kinds of layers: one name for all of them, or a name for each, separated by commas.

    Raises:
        InvalidArgument: an unknown kind, or another number of them.
    """
    if not isinstance(attention, str):
        raise InvalidType("train", "attention", type(attention).__name__, "text")
    check_int("train", "layers", layers, 1)
    names = attention.split(",")
    kinds = tuple(names * layers if len(names) == 1 else names)
    if len(kinds) != layers or not set(kinds) <= set(KINDS):
        expected = f"one or {layers} of {', '.join(KINDS)}, separated by commas"
        raise InvalidArgument("train", "attention", repr(attention), expected)
    return kinds
