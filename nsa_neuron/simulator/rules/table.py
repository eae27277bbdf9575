"""The rule table: what is refused, why, and where it is documented.

A rule is declared once with `declare` and broken through `NeuronCore.violate`, which raises or,
where the user relaxed the rule by name, writes a line in the run's record and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import errors

ISA = "SDK nki/api/nki/isa"
LANG = "SDK nki/api/nki/language"
ARCH = "SDK nki/guides/architecture/trainium2_arch.rst"
ARCH2 = "SDK nki/guides/architecture/trainium_inferentia2_arch.rst"
APS = "SDK nki/deep-dives/nki-aps.rst"
MIGRATION = "SDK nki/migration/index.rst"
LNC = "SDK nki/get-started/about/lnc.rst"
DGE = "SDK nki/deep-dives/nki-dge.rst"
SIM = "SDK nki/guides/nki_simulator.rst"
SCALAR = "AWS docs v2.33.1 nki/deep-dives/nki-scalar, nki.isa.NkiScalar"
FROM_6 = "AWS docs v2.33.1 nki/migration, NKI 0.6.0 to 0.7.0"
CONFIG = "AWS docs v2.33.1 nki.jit, nki.compiler"
GRIDS = "AWS docs v2.33.1 nki.language.tiles, blocks, NkiGrid"


@dataclass(frozen=True)
class Rule:
    """One documented constraint.

    Attributes:
        id: stable kebab-case name, also the name to relax it by.
        source: document that states it.
        text: one sentence.
        error: exception type raised when it is broken.
    """

    id: str
    source: str
    text: str
    error: type[errors.SimulationError] = errors.ConstraintError


RULES: dict[str, Rule] = {}


def declare(
    id: str, source: str, text: str, error: type[errors.SimulationError] = errors.ConstraintError
) -> str:
    """Add a rule to the table and return its id."""
    if id in RULES:
        raise ValueError(f"rule {id!r} is declared twice")
    RULES[id] = Rule(id, source, text, error)
    return id


for _row in (
    ("usage", LANG, "the call does not fit the documented signature", errors.UsageError),
    ("legacy-api", MIGRATION, "an API of NKI 0.1 that NKI 0.2 removed", errors.UsageError),
    (
        "enum",
        MIGRATION,
        "arguments are enum members: integers went with NKI 0.3",
        errors.UsageError,
    ),
    ("generation", ISA, "the instruction exists on a later NeuronCore only"),
    ("partition-limit", ARCH2, "an operand uses 1 to 128 partitions"),
    ("partition-step", APS, "partitions of an operand are contiguous: step 1"),
    ("start-partition", ARCH2, "<= 32 partitions start at 0/32/64/96, <= 64 at 0/64, more at 0"),
    ("partition-match", ARCH2, "operands of one instruction use equal partition counts"),
    ("element-count", ISA, "operands hold equal element counts"),
    ("free-dims", ARCH2, "an access pattern has at most 4 free dims"),
    ("free-dim-range", ARCH2, "free dim sizes fit uint16, strides int16"),
    ("buffer", ARCH, "the engine cannot reach that memory"),
    ("psum-inputs", ISA, "at most one input of a two-tensor instruction is in PSUM"),
    ("psum-bank", ARCH, "a matmul writes inside one 2 KiB PSUM bank"),
    ("psum-accumulate", ISA, "accumulate=True needs a location a matmul has written"),
    ("psum-foreign", ISA, "a matmul cannot accumulate onto values another engine wrote"),
    ("tile-size", ISA, "an operand exceeds the instruction's tile size"),
    ("tile-position", ISA, "tile_position and tile_size describe a legal PE tile"),
    ("dtype", ISA, "the instruction does not take that dtype"),
    ("dtype-match", ISA, "operand dtypes do not fit together"),
    ("engine", ISA, "the instruction does not run on that engine"),
    ("operator", ISA, "the instruction does not take that operator"),
    ("value", ISA, "the argument's value is not allowed"),
    ("shape", ISA, "the operand's shape is not allowed"),
    ("axis", ISA, "the axis is not one the instruction can reduce"),
    ("dge", DGE, "the DGE mode cannot do this transfer"),
    ("oob", DGE, "a dynamic index leaves the tensor", errors.OutOfBoundsError),
    ("bounds", APS, "an access leaves the tensor", errors.OutOfBoundsError),
    ("index", LANG, "the index does not fit the tensor", errors.OutOfBoundsError),
    ("view", LANG, "the view method cannot do this"),
    ("tensor-truth", LANG, "a tensor is true whatever its elements: no branch may depend on them"),
    ("doubtful", SIM, "strict=True refuses what a run otherwise only warns of"),
    ("on-chip-rank", LANG, "on-chip tensors have at least 2 dims"),
    ("address", LANG, "address=(partition, byte) places the tensor inside its memory"),
    (
        "uninitialized-read",
        SIM,
        "an element is read before anything wrote it",
        errors.UninitializedReadError,
    ),
    (
        "undefined-accumulator",
        ISA,
        "a reduce register is read before an instruction set it",
        errors.UninitializedReadError,
    ),
    (
        "address-overlap",
        SIM,
        "two tensors with overlapping address= are live together",
        errors.CapacityError,
    ),
    (
        "sbuf-capacity",
        ARCH,
        "live SBUF tensors exceed 212,984 bytes per partition",
        errors.CapacityError,
    ),
    ("psum-capacity", ARCH, "live PSUM tensors exceed 8 banks of 2 KiB", errors.CapacityError),
    (
        "hbm-capacity",
        ARCH,
        "live HBM tensors exceed the 24 GiB of a stack",
        errors.CapacityError,
    ),
    (
        "output-unwritten",
        SIM,
        "a returned tensor has elements nothing wrote",
        errors.UninitializedReadError,
    ),
    ("output-buffer", MIGRATION, "kernel outputs live in nl.shared_hbm"),
    ("output-kind", LANG, "a kernel returns a tensor or a tuple of tensors", errors.UsageError),
    (
        "argument-kind",
        MIGRATION,
        "the kernel argument is not of a documented kind",
        errors.UsageError,
    ),
    ("lnc", LNC, "kernel[lnc] takes 1 or 2", errors.UsageError),
    ("lnc-race", LNC, "cores share HBM without synchronising", errors.RaceError),
    ("lnc-deadlock", LNC, "cores wait for each other for ever", errors.DeadlockError),
    ("lnc-sync", ISA, "the synchronisation call does not fit the launch"),
    ("register", ISA, "the register operation is not allowed"),
    (
        "register-value",
        FROM_6,
        "a run-time scalar has no value while the kernel is built",
        errors.UsageError,
    ),
    ("scalar", SCALAR, "a run-time scalar has 32 or 64 bits and few operations"),
    ("version", FROM_6, "the name belongs to another version of NKI", errors.UsageError),
    ("configuration", CONFIG, "the configuration of a kernel is not allowed", errors.UsageError),
    ("grid", GRIDS, "the grid of tiles or blocks cannot do this"),
    ("loop", LANG, "the loop's bounds or body are not allowed"),
    ("loop-scope", MIGRATION, "a tensor made in a dynamic loop body is invisible outside"),
    (
        "no-data",
        "nsa-neuron docs/simulator-internals.md",
        "a shape-only run cannot decide on data",
        errors.DataUnavailableError,
    ),
):
    declare(*_row)
