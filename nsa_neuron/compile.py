"""The torch.compile backend `nsa_neuron`.

    torch.compile(model, backend="nsa_neuron", options={"target": "h200", "mode": "sim"})

For every `nsa::*` node of a captured graph, forward or backward, it asks the registry at compile
time, fixes the chosen lowering in the graph (`torch.ops.nsa_lowered.<op>__<backend>_<mode>`), and
hands the rest to inductor (CPU, CUDA) or to the vendor's `neuron` backend. When a node has no
lowering it fails at once, with every reason. `explain(compiled)` tells what was chosen.

Options:
    target: `"trn2"`, `"h200"`, `"cpu"`, or a backend's name; default: by the tensors' device.
    mode: `"hw"`, `"sim"`, `"torch"`, `"eager"`; default: the target's first, which is the hardware.
    rest: `"inductor"`, `"eager"` or `"neuron"`, for everything that is no nsa op; default:
        `"neuron"` for trn2 hardware, else inductor where it has a C++ compiler, else eager.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron import torch_private
from nsa_neuron.errors import BackendUnavailable, NsaError
from nsa_neuron.library import LOWERED, NAMESPACE, pinned
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY, Refusal, Target

if TYPE_CHECKING:
    from types import CodeType

    from nsa_neuron.registry import Lowered
    from nsa_neuron.spec import Bound

log = logging.getLogger("nsa_neuron")

OPTIONS = ("target", "mode", "rest")
RESTS = ("inductor", "eager", "neuron")

GraphCompiler = Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one node.

    Attributes:
        op: the nsa op.
        call: sizes, dtype and device, for people (dynamic sizes as their hints).
        target: who runs it.
        rejected: whom else was asked before, and why they refused.
        node: the node's name in the graph.
    """

    op: str
    call: str
    target: Target
    rejected: tuple[Refusal, ...]
    node: str

    def __str__(self) -> str:
        lines = [f"{self.node}: {self.op} -> {self.target}   ({self.call})"]
        lines += [f"    not {r.target}: {r.rule}: {r.reason}" for r in self.rejected]
        return "\n".join(lines)


@dataclass
class Explanation:
    """The choices made for one compiled callable.

    Attributes:
        choices: one per nsa node of every graph compiled so far.
        rest: what compiles everything else.
    """

    choices: list[Choice] = field(default_factory=list)
    rest: str = ""

    def __str__(self) -> str:
        lines = [str(choice) for choice in self.choices] or ["no nsa op has been compiled yet"]
        return "\n".join([*lines, f"everything else: {self.rest or 'not compiled yet'}"])

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        choices = [
            {
                "node": c.node,
                "op": c.op,
                "call": c.call,
                "target": str(c.target),
                "rejected": [[str(r.target), r.rule, r.reason] for r in c.rejected],
            }
            for c in self.choices
        ]
        return {"choices": choices, "rest": self.rest}


# One explanation per compiled code object and options, for `explain`.
Key = tuple[str, int, str]
_explanations: dict[Key, Explanation] = {}


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph; see the module docstring.

    Args:
        gm: the graph that dynamo captured.
        example_inputs: its inputs.
        options: `target`, `mode`, `rest`.

    Raises:
        NoLowering: a node that no asked backend takes, with every reason.
        UnknownBackend, BackendUnavailable: of the options.
        NsaError: an unknown option.
    """
    given = dict(options or {})
    policy = policy_of(given)
    rest = given.get("rest") or _default_rest(policy)
    explanation = _explanations.setdefault(
        _key(torch_private.code_being_compiled(), given), Explanation()
    )
    explanation.rest = rest

    def choose(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        return choose_lowerings(graph, policy, explanation.choices)

    return _compile_rest(gm, example_inputs, rest, choose)


def policy_of(options: Mapping[str, Any]) -> str | None:
    """The registry policy that options ask for: `backend:mode`, or None for automatic.

    Raises:
        NsaError: an unknown option or value.
        UnknownBackend, BackendUnavailable: no such target or mode, or it cannot run here.
    """
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise NsaError(f"unknown option '{unknown[0]}'; there are {', '.join(OPTIONS)}")
    if options.get("rest") not in (None, *RESTS):
        raise NsaError(f"option 'rest' is {options['rest']!r}; it must be one of {RESTS}")
    name, mode = options.get("target"), options.get("mode")
    if name is None:
        if mode is not None:
            raise NsaError("option 'mode' needs 'target': give both, or neither for automatic")
        return None
    target = REGISTRY.target(f"{name}:{mode}" if mode else name)
    REGISTRY.usable(target)
    return str(target)


def choose_lowerings(
    graph: torch.fx.GraphModule, policy: str | None, choices: list[Choice]
) -> torch.fx.GraphModule:
    """Fixes a lowering for every `nsa::*` node of an ATen-level graph, in place.

    Args:
        graph: nodes carry fake tensors in `meta["val"]`.
        policy: `backend:mode`, or None for the automatic choice.
        choices: what was chosen is added here.

    Raises:
        NoLowering: see `backend`.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch_private.OpOverload):
            continue
        if node.target.namespace != NAMESPACE:
            continue
        choice, lowered = _choose(node, policy)
        choices.append(choice)
        # A lowering that is an operator itself stands in the graph, where a vendor's compiler can
        # see into it; any other is called through ours.
        own = isinstance(lowered, torch_private.OpOverload)
        node.target = lowered if own else pinned(choice.op, choice.target)
    graph.recompile()
    return graph


def explain(compiled: Callable[..., Any]) -> Explanation:
    """What `backend="nsa_neuron"` chose for a callable that `torch.compile` made.

    Args:
        compiled: the result of `torch.compile(..., backend="nsa_neuron")`; call it once before.

    Raises:
        NsaError: it is not such a callable.
    """
    wrapper = torch_private.compile_record(compiled)
    if wrapper is None or wrapper.compiler_name != "nsa_neuron":
        raise NsaError('explain needs a callable made by torch.compile(..., backend="nsa_neuron")')
    original = torch_private.original_of(compiled)
    code = getattr(original, "__code__", None) or original.__call__.__code__  # type: ignore[operator]
    options = wrapper.kwargs.get("options") or {}
    found = _explanations.get(_key(code, options))
    return found if found is not None else Explanation()


def _choose(node: torch.fx.Node, policy: str | None) -> tuple[Choice, Lowered]:
    """Asks the registry about one node; the choice and the callable."""
    op = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    bound = _bind(op, node)
    selection = REGISTRY.select(bound, policy)
    choice = Choice(op, bound.describe(), selection.target, selection.rejected, node.name)
    return choice, selection.lowered


def _bind(op: str, node: torch.fx.Node) -> Bound:
    """Binds a node's fake arguments, with dynamic sizes at their hints, so nothing is guarded."""
    spec = get(op)
    devices: list[torch.device] = []

    def stand_in(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            value = value.meta["val"]
        if isinstance(value, Tensor):
            devices.append(value.device)
            shape = [_hint(size) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="meta")
        return _hint(value)

    values = dict(spec.defaults)
    values.update(zip(spec.names, map(stand_in, node.args), strict=False))
    values.update({name: stand_in(value) for name, value in node.kwargs.items()})
    return replace(spec.bind(values), device=devices[0])


def _hint(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    return value


def _compile_rest(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    rest: str,
    choose: Callable[[torch.fx.GraphModule], torch.fx.GraphModule],
) -> Callable[..., Any]:
    """Runs AOTAutograd, so that forward and backward both pass `choose`, and compiles the rest."""
    if rest == "inductor":
        return torch_private.inductor(gm, example_inputs, choose)

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        chosen = choose(graph)
        if rest == "neuron":
            return _vendor_backend()(chosen, inputs)
        return torch_private.boxed(chosen.forward)

    return torch_private.aot(gm, example_inputs, compile_graph)


def _default_rest(policy: str | None) -> str:
    if policy == "neuron:hw":
        return "neuron"
    if torch_private.has_cpp_compiler():
        return "inductor"
    log.warning("inductor has no C++ compiler here; what is no nsa op runs eagerly")
    return "eager"


def _vendor_backend() -> GraphCompiler:
    """AWS's dynamo backend. Not yet run on hardware."""
    compiler: GraphCompiler | None = torch_private.dynamo_backend("neuron")
    if compiler is None:
        raise BackendUnavailable(
            "torch.compile has no backend 'neuron' here: it comes with AWS's torch-neuronx"
        )
    return compiler


def _key(code: CodeType | None, options: Mapping[str, Any]) -> Key:
    """Identifies code and options; what follows a graph break belongs to the code before it."""
    code = torch_private.code_before_breaks(code)
    place = (code.co_filename, code.co_firstlineno) if code else ("", 0)
    return (*place, repr(sorted(options.items())))


__all__ = ["LOWERED", "Choice", "Explanation", "backend", "choose_lowerings", "explain"]
