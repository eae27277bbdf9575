"""What AWS's documents say where a rule of the simulator refuses AWS's own kernels."""

from __future__ import annotations

# rule -> what AWS's kernels do, and whether AWS's documents agree with the refusal.
VERDICTS = {
    "enum": (
        "pass the integer 3 for `dge_mode`",
        "they do: integers went with NKI 0.3 (update guide of 0.3)",
    ),
    "uninitialized-read": (
        "read elements of an on-chip tile that nothing wrote, and use none of what comes of them",
        "they say nothing of what such a read gives",
    ),
    "lnc-race": (
        "touch shared HBM from both cores without a meeting between",
        "they do: the order of two cores is only that of `core_barrier` and `sendrecv`",
    ),
    "dge": (
        "ask `dma_transpose` for no DGE (`dge_mode=3`)",
        "they do: its page lets it be hwdge or left to the compiler",
    ),
    "buffer": (
        "give `core_barrier` a tensor in SBUF",
        "they do: its page asks for a tensor in HBM",
    ),
    "generation": (
        "use MX instructions, which NeuronCore-v4 brings",
        "they do: their pages name the generation",
    ),
    "sbuf-capacity": (
        "make tiles long before their first use; in program order they do not fit",
        "they leave placement to the compiler, which may move what the program order has first",
    ),
}
