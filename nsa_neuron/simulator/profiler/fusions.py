"""Pairs of instructions that one instruction of trn2 can do, and the program without the second.

A pair is a producer and the only reader of what it makes, or a producer and a sum over it. What one
instruction can do is documented with `nisa.activation`, `tensor_scalar`, `scalar_tensor_tensor`,
`tensor_scalar_reduce` (docs/trainium2.md 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..issue.timing import Scalar, Vector
from ..nki.isa.act import ActivationParams
from ..semantics import alu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..issue.record import Instruction
    from ..memory.allocation import Access
    from .flow import Flow
    from .sketch import Sketch

WIDE = 32  # elements per partition of a pass worth saving

# Instructions of VectorE and ScalarE that read a tile of any dtype from SBUF or PSUM.
_STREAMS = frozenset({
    "tensor_copy", "tensor_scalar", "tensor_tensor", "scalar_tensor_tensor", "activation",
    "activation_reduce", "tensor_reduce", "tensor_scalar_reduce", "reciprocal",
})  # fmt: skip
_REDUCES = frozenset({"add", "multiply", "maximum", "minimum"})  # with a tensor_scalar
_SCALED = frozenset({"multiply", "add", "subtract"})  # what an activation's scale and bias do

Fusion = tuple[str, "Callable[[Sketch, int, int], None]"]  # what to write, and the rewrite


class _Sides:
    """Which instructions a rewrite has used up: taken out, or changed on one of their sides."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.reads: set[int] = set()
        self.writes: set[int] = set()

    def untouched(self, k: int) -> bool:
        """True where no rewrite so far has to do with an instruction."""
        return k not in self.gone and k not in self.reads and k not in self.writes


def fusions(instructions: list[Instruction], flow: Flow) -> Iterator[tuple[int, int, Fusion]]:
    """Producers, consumers and how one instruction does both.

    An activation may take in both the pass before it and the sum after it; all else is in one pair.
    """
    sides = _Sides()
    for b, second in enumerate(instructions):
        for position, a in enumerate(flow.sources[b]):
            if a < 0 or a in sides.gone:
                continue
            first = instructions[a]
            if not _wide(first):
                continue
            found = _sum(first, second)
            if found and a not in sides.writes:
                if a not in sides.reads or first.opcode == "activation":
                    sides.writes.add(a)
                    sides.gone.add(b)
                    yield a, b, found
                continue
            alone = flow.readers[a] == [b] and a not in flow.shared and len(first.writes) == 1
            found = _chain(first, second, position) if alone else None
            if found is None:
                continue
            if found[1] is _into_copy:
                sides.writes.add(a)
                sides.gone.add(b)
                yield a, b, found
            elif sides.untouched(a) and b not in sides.reads:
                sides.gone.add(a)
                sides.reads.add(b)
                yield a, b, found


def _wide(i: Instruction) -> bool:
    return (
        i.engine in ("vector", "scalar")
        and i.opcode in _STREAMS
        and bool(i.writes)
        and i.writes[0].layout.free >= WIDE
    )


def _sum(first: Instruction, second: Instruction) -> Fusion | None:
    """A sum of each row of what was just made."""
    if second.opcode != "tensor_reduce" or second.writes[0].layout.free != 1:
        return None
    add = second.params.op == "add" and not second.params.negate
    if first.opcode == "activation" and first.params.reduce_op is None and add:
        return (
            "nisa.activation_reduce(..., reduce_op=nl.add) sums each row while it computes",
            _absorb_sum,
        )
    square = first.opcode == "tensor_tensor" and first.params.op == "multiply"
    if square and add and _same(first.reads[0], first.reads[1]):
        return (
            "nisa.activation_reduce(op=nl.square, reduce_op=nl.add) squares and sums on ScalarE "
            "in one pass",
            _square_sum,
        )
    plain = _one_operator(first) and first.engine == "vector" and not first.params.reverse0
    if plain and second.params.op in _REDUCES and not second.params.negate:
        return "nisa.tensor_scalar_reduce does both in one pass", _absorb_sum
    return None


def _one_operator(i: Instruction) -> bool:
    """A tensor_scalar that has room for a second operator beside its own, of arithmetic."""
    return i.opcode == "tensor_scalar" and i.params.op1 is None and _in_hardware(i.params.op0)


def _in_hardware(op: str) -> bool:
    """Arithmetic that engines have, so that it may stand beside another operator."""
    return op not in alu.BITVEC and op not in alu.SIMULATION_ONLY


def _same(a: Access, b: Access) -> bool:
    return a.allocation is b.allocation and a.place is b.place


def _absorb_sum(sketch: Sketch, a: int, b: int) -> None:
    first, second = sketch[a], sketch[b]
    formula = Vector.STREAM if first.engine == "vector" else None
    sketch.edit(a, formula=formula, writes=(*first.writes, *second.writes), accumulator=True)
    sketch.drop(b, a)


def _square_sum(sketch: Sketch, a: int, b: int) -> None:
    first, second = sketch[a], sketch[b]
    sketch.edit(
        a,
        engine="scalar",
        formula=Scalar.FUNCTION,
        reads=first.reads[:1],
        writes=(*first.writes, *second.writes),
        accumulator=True,
        params=ActivationParams("square", "add", "reset_reduce"),
    )
    sketch.drop(b, a)


def _chain(first: Instruction, second: Instruction, position: int) -> Fusion | None:
    """A pass whose result only the next pass reads."""
    if second.opcode == "tensor_copy" and first.engine != "tensor":
        if first.writes[0].p0 == second.writes[0].p0:
            return "write the result where the copy takes it, in its dtype", _into_copy
        return None
    if first.opcode == "tensor_copy":
        reads = [r for k, r in enumerate(second.reads) if k != position and r.layout.free > 1]
        psum = first.reads[0].allocation.buffer == "psum"
        streams = second.opcode in _STREAMS and second.engine in ("vector", "scalar")
        if streams and not (psum and any(r.allocation.buffer == "psum" for r in reads)):
            return "read what is copied instead of the copy; engines convert as they read", _direct
        return None
    if not _one_operator(first):
        return None
    if second.engine == "vector" and _one_operator(second) and position == 0:
        return "one nisa.tensor_scalar with op0 and op1 does both", _into(Vector.ONE_INPUT)
    if second.engine == "vector" and second.opcode == "tensor_tensor":
        if _in_hardware(second.params.op) and not _reads_twice(second, position):
            return "one nisa.scalar_tensor_tensor does both", _into(Vector.TWO_INPUTS)
    bare = second.opcode in ("activation", "activation_reduce") and len(second.reads) == 1
    if bare and first.params.op0 in _SCALED:
        return (
            "nisa.activation computes op(data * scale + bias): give it the operand as scale or "
            "bias (for a difference the negated one, tensor_reduce(negate=True))",
            _into(None),
        )
    return None


def _reads_twice(i: Instruction, position: int) -> bool:
    """True where an instruction reads one tile as both of its inputs."""
    return any(_same(r, i.reads[position]) for k, r in enumerate(i.reads) if k != position)


def _into(formula: Vector | None) -> Callable[[Sketch, int, int], None]:
    """The second instruction takes the first one's operands in the place of its result."""

    def rewrite(sketch: Sketch, a: int, b: int) -> None:
        sketch.edit(b, formula=formula, reads=_instead(sketch, a, b))
        sketch.drop(a, b)

    return rewrite


def _direct(sketch: Sketch, a: int, b: int) -> None:
    sketch.edit(b, reads=_instead(sketch, a, b))
    sketch.drop(a, b)


def _instead(sketch: Sketch, a: int, b: int) -> list[Access]:
    reads: list[Access] = []
    for source, read in zip(sketch.flow.sources[b], sketch[b].reads, strict=True):
        reads += sketch[a].reads if source == a else [read]
    return reads


def _into_copy(sketch: Sketch, a: int, b: int) -> None:
    sketch.edit(a, writes=sketch[b].writes)
    sketch.drop(b, a)
