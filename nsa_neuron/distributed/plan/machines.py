"""Devices and links, as published, and the times of NSA's stages that they are planned with.

Nothing here was measured by us on such a machine. Stage times are of 64K tokens, 64/4/192/128,
bfloat16, one kernel after the other; other sizes follow from the specs' counts of operations.
"""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE = {"S": 65536, "T": 65536, "Hq": 64, "Hkv": 4, "Dk": 192, "Dv": 128}
"""Sizes of the call that stage times are of."""


@dataclass(frozen=True)
class Link:
    """What connects the devices of a domain.

    Attributes:
        devices: of the largest group that it connects.
        bandwidth: bytes per second that a device sends, one direction.
        latency: seconds per message.
        source: of the numbers.
    """

    devices: int
    bandwidth: float
    latency: float
    source: str


@dataclass(frozen=True)
class Machine:
    """One kind of device.

    Attributes:
        name: of the target.
        device: what counts as one.
        flops: dense bfloat16 operations per second.
        memory: bytes.
        matmul: share of `flops` that large products reach.
        units: parts of a device that run kernels side by side, each as fast as the stage times say.
        links: from the nearest domain to the farthest.
        forward, backward: milliseconds of each stage for the reference call, on one unit.
        sources: of all this.
    """

    name: str
    device: str
    flops: float
    memory: float
    matmul: float
    units: int
    links: tuple[Link, ...]
    forward: dict[str, float]
    backward: dict[str, float]
    sources: tuple[str, ...]

    def link(self, span: int) -> Link:
        """Of a group whose members lie within `span` consecutive devices."""
        return next((link for link in self.links if span <= link.devices), self.links[-1])


_TRN2 = "aws-neuron-sdk, about-neuron/arch/neuron-hardware/trn2-arch.rst (2026-08-21)"
_EFA = 1e9 / 8  # bytes per second of a Gbps

TRN2 = Machine(
    name="trn2",
    device="Trainium2 chip (8 NeuronCores)",
    flops=10.7e15 / 16,
    memory=96 * 2**30,
    matmul=0.8,
    units=8,
    links=(
        # 1,024 and 256 GB/s per chip, taken as the sum of both directions.
        Link(16, 512e9, 3e-6, f"NeuronLink-v3 within an instance, 1,024 GB/s per chip: {_TRN2}"),
        Link(64, 128e9, 5e-6, f"NeuronLink-v3 within an UltraServer, 256 GB/s per chip: {_TRN2}"),
        Link(2**30, 3200 * _EFA / 16, 20e-6, f"EFAv3, 3,200 Gbps per instance: {_TRN2}"),
    ),
    forward={
        "compress": 1.3, "compressed_attention": 105, "select_blocks": 116,
        "selected_attention": 713, "sliding_window_attention": 66, "gated_sum": 18.1,
    },
    backward={},
    sources=(
        f"peak, memory: {_TRN2}",
        "stage times: the simulator's cycle model, docs/performance.md, revision e7b770d; one "
        "core; backward = forward x the specs' ratio of operations",
        "assumed: products reach 0.8 of peak; kv heads and token ranges fill the 8 cores evenly; "
        "3, 5 and 20 us per message",
    ),
)  # fmt: skip

H200 = Machine(
    name="h200",
    device="H200 GPU",
    flops=989e12,
    memory=141e9,
    matmul=0.8,
    units=1,
    links=(
        Link(8, 450e9, 3e-6, "NVLink, 900 GB/s both directions: NVIDIA's H200 datasheet"),
        Link(2**30, 3200 * _EFA / 8, 20e-6, "EFAv3, 3,200 Gbps per 8 GPUs: AWS p5en.48xlarge"),
    ),
    forward={
        "compress": 0.05, "compressed_attention": 10, "select_blocks": 5.5,
        "selected_attention": 17, "sliding_window_attention": 3.5, "gated_sum": 1.05,
    },
    backward={
        "compressed_attention": 36, "selected_attention": 38.5,
        "sliding_window_attention": 11, "gated_sum": 3.5,
    },
    sources=(
        "peak, memory: NVIDIA's H200 datasheet",
        "stage times: estimates of a review of the Triton kernels (random selection), "
        "docs/performance.md, second round; plus or minus a quarter, not measured; the sum of dq "
        "and the deltas are in gated_sum's backward",
        "assumed: products reach 0.8 of peak; 3 and 20 us per message",
    ),
)  # fmt: skip

MACHINES = {machine.name: machine for machine in (TRN2, H200)}
