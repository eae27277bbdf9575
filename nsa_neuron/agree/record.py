"""A backend that passes every call on to another and has it judged; and the modules around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nsa_neuron.agree.judge import Judgement, judge
from nsa_neuron.agree.report import BACKWARD, FORWARD, Call
from nsa_neuron.agree.saved import save
from nsa_neuron.agree.subject import tensors
from nsa_neuron.errors import ContractViolation
from nsa_neuron.library import check_results
from nsa_neuron.registry import REGISTRY, Lowered, Target, Unsupported, Verdict, use_backend

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.spec import Bound, OpSpec

Visit = Callable[[str, int, list[Tensor]], None]
"""Told of a module's name, the number of its call from 0, and the tensors that it returned."""


class Recorder:
    """Where a run is: its phase, the modules entered, the calls so far.

    Args:
        save: folder that gets the first wrong call; None: it is not kept.

    Attributes:
        calls: of nsa ops, judged, in order.
        saved: the file of the first wrong call.
        phase: of `report.PHASES`.
        modules: names of those entered, outermost first.
    """

    def __init__(self, save: Path | None = None) -> None:
        self.calls: list[Call] = []
        self.saved: Path | None = None
        self._folder = save
        self.phase = FORWARD
        self.modules: list[str] = []
        # A backward op gets tensors that a forward op got, which live as long as both.
        self._makers: dict[tuple[str, int], str] = {}

    @property
    def module(self) -> str:
        return self.modules[-1] if self.modules else ""

    def maker(self, bound: Bound, values: Mapping[str, Any]) -> str:
        """The module whose call this is; a backward op belongs to that of its forward op."""
        name = bound.spec.name
        first = next(
            x for arg in bound.spec.args if _forward_input(arg.name, x := values[arg.name])
        )
        key = (_family(name), first.data_ptr())
        if name.endswith("_backward"):
            return self._makers.get(key, self.module)
        self._makers[key] = self.module
        return self.module

    def guessed_maker(self, op: str) -> str:
        """The module of a refused call; of a backward op, that whose forward op's turn it is."""
        if not op.endswith("_backward"):
            return self.module
        calls = [call for call in self.calls if _family(call.op) == _family(op)]
        forward = [call.module for call in calls if call.phase == FORWARD]
        back = sum(call.phase == BACKWARD for call in calls)
        return forward[-1 - back] if back < len(forward) else self.module

    def add(self, bound: Bound, module: str, status: str, **facts: Any) -> None:
        number = len(self.calls) + 1
        call = Call(number, self.phase, module, bound.spec.name, status, **facts)
        self.calls.append(call)

    def keep(self, target: Target, spec: OpSpec, values: Mapping[str, Any]) -> None:
        """Saves the latest call if it is wrong and the first such."""
        call = self.calls[-1]
        if self._folder is None or self.saved or call.status != "wrong":
            return
        name = f"{target.backend}-{target.mode}-call{call.number}-{spec.name}"
        self.saved = save(self._folder, name, spec, values)


def _forward_input(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and not name.startswith("grad_")


def _family(op: str) -> str:
    return op.removesuffix("_backward").removesuffix("_forward")


class RecordingBackend:
    """Runs on `target` and has every call judged.

    Args:
        name: of this backend.
        target: who really runs.
        recorder: gets the calls.
    """

    def __init__(self, name: str, target: Target, recorder: Recorder) -> None:
        self.name = name
        self._target = target
        self._recorder = recorder
        self._backend = REGISTRY.get(target.backend)

    def modes(self) -> Mapping[str, str]:
        return {"judged": self._backend.modes()[self._target.mode]}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        verdict = self._backend.supports(bound, self._target.mode)
        if isinstance(verdict, Unsupported):
            detail = f"rule {verdict.rule}: {verdict.reason}"
            module = self._recorder.guessed_maker(bound.spec.name)
            self._recorder.add(bound, module, "refused", detail=detail, inputs=bound.describe())
        return verdict

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        run = self._backend.lower(bound, plan)

        def call(**values: Any) -> Any:
            module = self._recorder.maker(bound, values)
            try:
                results = run(**values)
                check_results(bound, results, self._target)
            except Exception as error:
                said = str(error) if isinstance(error, ContractViolation) else _raised(error)
                self._add(bound, values, module, Judgement(False, "", 0.0, 0.0, said))
                raise
            self._add(bound, values, module, judge(bound.spec, self._target, values, results))
            return results

        return call

    def _add(self, bound: Bound, values: Mapping[str, Any], module: str, found: Judgement) -> None:
        facts = {**vars(found), "inputs": bound.describe()}
        self._recorder.add(bound, module, "right" if facts.pop("ok") else "wrong", **facts)
        self._recorder.keep(self._target, bound.spec, values)


def _raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextmanager
def judged(target: Target, recorder: Recorder) -> Iterator[None]:
    """Every nsa call inside runs on a target and is judged."""
    backend = RecordingBackend(f"judged-{target.backend}-{target.mode}", target, recorder)
    REGISTRY.register(backend)
    try:
        with use_backend(backend.name):
            yield
    finally:
        REGISTRY.unregister(backend.name)


@contextmanager
def watched(modules: Mapping[str, nn.Module], recorder: Recorder, visit: Visit) -> Iterator[None]:
    """Keeps the recorder's list of entered modules, and tells `visit` what each returns."""
    counts: dict[str, int] = {}

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: recorder.modules.append(name)

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recorder.modules.pop()
            visit(name, counts.get(name, 0), [x for x in tensors(output) if x.is_floating_point()])
            counts[name] = counts.get(name, 0) + 1

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            for handle in (
                module.register_forward_pre_hook(enter(name)),
                module.register_forward_hook(leave(name)),
            ):
                stack.callback(handle.remove)
        yield
    recorder.modules.clear()
