"""Runs a subject on targets beside a float64 run of the reference, and compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nsa_neuron.library  # noqa: F401  registers torch.ops.nsa
from nsa_neuron.agree import decoding
from nsa_neuron.agree.compare import apart, gradient_floor, point
from nsa_neuron.agree.record import Recorder, judged, watched
from nsa_neuron.agree.report import (
    BACKWARD,
    DECODE,
    FORWARD,
    Agreement,
    Run,
    module_name,
)
from nsa_neuron.agree.subject import Subject, tensors
from nsa_neuron.conformance.targets import find_targets
from nsa_neuron.errors import InvalidArgument, NoLowering, NsaError
from nsa_neuron.registry import REGISTRY, Target, use_backend

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Truth:
    """One run of the reference: what every module returned, and every gradient.

    Attributes:
        modules: by name and number of the call.
        gradients: by leaf.
        outputs: of the whole.
        continuation: what decoding gave.
    """

    modules: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    continuation: decoding.Continuation | None = None


def agree(
    subject: Subject,
    targets: Sequence[str],
    *,
    backward: bool = True,
    decode: int = 4,
    seed: int = 0,
    save: Path | None = None,
) -> Agreement:
    """Runs a subject on each target and says where results part.

    Args:
        subject: a model or function and its inputs.
        targets: `backend:mode`, or a machine: `h200:sim`, `trn2:sim`, `cpu`.
        backward: gradients as well, of a random direction of the outputs.
        decode: tokens to decode; 0: none.
        seed: of that direction, and of whatever the model draws.
        save: folder that gets each target's first wrong call; `load` makes a subject of its file.

    Raises:
        InvalidArgument: `decode` or `seed` is out of range.
        UnknownBackend, BackendUnavailable: of the targets.
        NsaError: the subject cannot be run in float64 on the reference, which is the truth, or
            gives nothing that could be compared.
    """
    if decode < 0:
        raise InvalidArgument("agree", "decode", decode, "0 or more tokens")
    if not -(2**63) <= seed < 2**63:
        raise InvalidArgument("agree", "seed", seed, "a 64-bit number")
    chosen = list(dict.fromkeys(REGISTRY.target(name) for name in targets))
    for target in chosen:
        REGISTRY.usable(target)
    plan = _Plan(subject, backward, decode, seed, [], save)
    exact, plain = plan.truth(torch.float64), plan.truth(None)
    runs = [plan.run(target, exact, plain) for target in chosen]
    finals = plan.finals
    for one in runs:
        for other in runs:
            if one is not other and one.target in finals and other.target in finals:
                one.between[other.target] = apart(finals[one.target], finals[other.target])
    if not any(run.calls for run in runs):
        plan.notes.append(
            "no nsa op was called on any target: only the rest of the model was compared "
            "(a use_backend of the model's own goes before the targets)"
        )
    return Agreement(subject.name, subject.describe(), runs, plan.notes)


@dataclass
class _Plan:
    subject: Subject
    backward: bool
    decode: int
    seed: int
    notes: list[str]
    save: Path | None = None
    finals: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decode and self.subject.prompt is None:
            self.notes.append(
                "nothing was decoded: the only positional input is not token ids [B, S]"
            )
            self.decode = 0

    def truth(self, dtype: torch.dtype | None) -> Truth:
        """A run of the reference, in float64 or in the subject's own dtype."""
        made, recorder = Truth(), Recorder()
        subject = self.subject.placed("cpu", dtype)
        kind = "float64" if dtype else "its own dtype"

        def visit(name: str, count: int, outputs: list[Tensor]) -> None:
            made.modules[name, count] = [x.detach().clone() for x in outputs]

        with use_backend("reference"):
            with self._must_run(f"be run in {kind}"):
                with watched(subject.modules, recorder, visit):
                    made.outputs = self._forward(subject)
                made.gradients = self._gradients(subject, made.outputs)
            made.outputs = [x.detach() for x in made.outputs]
            with self._must_run(f"decode in {kind}", "; decode=0 (--decode 0) leaves that out"):
                made.continuation = self._continue(subject)
        if dtype:
            self._must_tell(made)
        return made

    @contextmanager
    def _must_run(self, what: str, hint: str = "") -> Iterator[None]:
        """Without a truth there is nothing to compare with: what it raises ends everything."""
        try:
            yield
        except InvalidArgument:
            raise
        except Exception as error:
            said = str(error) if isinstance(error, NsaError) else f"{type(error).__name__}: {error}"
            raise NsaError(
                f"{self.subject.name} cannot {what} on the reference: {said}{hint}"
            ) from error

    def _must_tell(self, exact: Truth) -> None:
        """Refuses a run that gives nothing to compare; notes what is left out."""
        if any(x.isnan().any() for x in exact.outputs):
            found = exact.modules.items()
            first = next((n for (n, _), xs in found if any(x.isnan().any() for x in xs)), "")
            raise NsaError(
                f"{self.subject.name} gives NaN in float64 on the reference, first in "
                f"{module_name(first)}: there is nothing to compare with"
            )
        if not exact.outputs:
            self.notes.append(
                "outputs were not compared: there is no floating tensor in what the model returns"
            )
        if self.backward and not exact.gradients:
            self.notes.append(
                "gradients were not compared: no output has any, of a parameter or an input"
            )

    def run(self, target: Target, exact: Truth, plain: Truth) -> Run:
        """One target's run; an error ends its phase and is part of the result."""
        run, recorder = Run(str(target)), Recorder(self.save)
        subject = self.subject.placed(find_targets([str(target)])[0].device)

        def visit(name: str, count: int, outputs: list[Tensor]) -> None:
            calls = len(recorder.calls)
            truth = (exact.modules.get((name, count)), plain.modules.get((name, count)))
            run.points.append(point(recorder.phase, name, count, outputs, *truth, calls))

        with judged(target, recorder):
            with _phase(run, recorder, FORWARD):
                with watched(subject.modules, recorder, visit):
                    outputs = self._forward(subject)
                if not subject.modules:
                    truth = (exact.outputs, plain.outputs)
                    run.points.append(point(FORWARD, "", 0, outputs, *truth, len(recorder.calls)))
                self.finals[run.target] = [x.detach().cpu() for x in outputs]
                with _phase(run, recorder, BACKWARD):
                    found = self._gradients(subject, outputs)
                    depth = len(recorder.calls)
                    floor = gradient_floor(exact.gradients.values())
                    for name in dict.fromkeys([*exact.gradients, *found]):
                        mine, wanted, eager = (
                            _of(x, name) for x in (found, exact.gradients, plain.gradients)
                        )
                        run.points.append(
                            point(BACKWARD, name, 0, mine, wanted, eager, depth, floor)
                        )
            with _phase(run, recorder, DECODE), watched(subject.modules, recorder, _nothing):
                written = self._continue(subject)
                if written and exact.continuation and plain.continuation:
                    run.decoded = self.decode
                    run.tokens = decoding.differences(
                        written, exact.continuation, plain.continuation
                    )
        run.calls = recorder.calls
        run.saved = str(recorder.saved or "")
        return run

    def _forward(self, subject: Subject) -> list[Tensor]:
        torch.manual_seed(self.seed)
        with torch.set_grad_enabled(self.backward):
            return [x for x in tensors(subject()) if x.is_floating_point()]

    def _gradients(self, subject: Subject, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of every leaf, for one random direction of every output."""
        if not self.backward:
            return {}
        gen = torch.Generator().manual_seed(self.seed)
        asked = [x for x in outputs if x.requires_grad]
        directions = [torch.randn(x.shape, generator=gen).to(x) for x in asked]
        leaves = subject.leaves
        if not asked or not leaves:
            return {}
        grads = torch.autograd.grad(asked, [*leaves.values()], directions, allow_unused=True)
        found = zip(leaves, grads, strict=True)
        return {name: grad.detach().cpu() for name, grad in found if grad is not None}

    def _continue(self, subject: Subject) -> decoding.Continuation | None:
        if not self.decode or subject.prompt is None:
            return None
        with torch.no_grad():
            return decoding.greedy(subject, self.decode)


@contextmanager
def _phase(run: Run, recorder: Recorder, name: str) -> Iterator[None]:
    """A phase of a run; what it raises ends it, and is said once."""
    recorder.phase = name
    recorder.modules.clear()
    try:
        yield
    except Exception as error:
        if not run.failure:
            said = error.op if isinstance(error, NoLowering) else str(error).partition("\n")[0]
            run.failure = f"{name} ended with {type(error).__name__}: {said}"


def _of(gradients: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [gradients[name]] if name in gradients else []


def _nothing(name: str, count: int, outputs: list[Tensor]) -> None:
    """Modules are not compared while decoding: continuations may differ."""
