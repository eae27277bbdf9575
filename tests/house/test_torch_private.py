"""Private names of torch: each does what we use it for, and they stand in one module."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh

from nsa_neuron import torch_private as private

PACKAGE = Path(__file__).parents[2] / "nsa_neuron"


def dotted(node: ast.AST) -> str:
    """`torch._C.x` of an attribute; empty if it does not start with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_names(path: Path) -> list[str]:
    """Names of torch in a file that have a part with one underscore in front."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        for name in names:
            first, *rest = name.split(".")
            hidden = any(part.startswith("_") and not part.endswith("__") for part in rest)
            if first in ("torch", "functorch", "forward_ad") and (hidden or first == "functorch"):
                found.append(name)
    return found


def test_no_other_module_uses_a_private_name_of_torch():
    assert private_names(PACKAGE / "torch_private.py")
    wrong = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_private.py" and (names := private_names(path))
    }
    assert wrong == {}


def test_any_requires_grad_sees_every_argument():
    x = torch.ones(1)
    assert not private.any_requires_grad(x, x)
    assert private.any_requires_grad(x, x.clone().requires_grad_())


def test_below_autograd_nothing_is_recorded():
    x = torch.ones(1, requires_grad=True)
    with private.below_autograd():
        y = torch.ops.aten.mul.Tensor(x, 2.0)
    assert not y.requires_grad and (x * 2).requires_grad


def test_transforming_is_so_inside_torch_func_only():
    seen = []
    torch.func.vmap(lambda x: seen.append(private.transforming()) or x)(torch.ones(2))
    assert seen == [True] and not private.transforming()


def test_forward_mode_is_so_inside_a_dual_level_only():
    assert not private.forward_mode()
    with forward_ad.dual_level():
        assert private.forward_mode()


def test_keys_behind_autograd_hold_the_backend_and_not_autograd():
    x = torch.ones(1)
    keys = torch._C._dispatch_keys(x)
    left = keys & private.AFTER_AUTOGRAD
    assert left.has(private.DispatchKey.CPU) and not left.has(private.DispatchKey.AutogradCPU)
    assert keys.has(private.DispatchKey.AutogradCPU) and keys.raw_repr() != left.raw_repr()


class Double(private.SingleLevelFunction):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def test_a_function_of_one_level_is_a_node_of_the_graph():
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(Double.apply(x).sum(), x)
    assert grad.tolist() == [2, 2]


def test_ops_are_overloads():
    assert isinstance(torch.ops.aten.mul.Tensor, private.OpOverload)


def graph(x: torch.Tensor) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(lambda x: x.sin() + 1)


@pytest.mark.parametrize("compiler", ["inductor", "aot"])
def test_compilers_show_forward_and_backward_graphs_before_they_run(compiler: str):
    if compiler == "inductor" and not private.has_cpp_compiler():
        pytest.skip("no C++ compiler")
    seen = []

    def choose(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        seen.append(gm)
        return gm

    def compile_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return private.boxed(choose(gm).forward)

    x = torch.rand(3, requires_grad=True)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if compiler == "inductor":
            return private.inductor(gm, inputs, choose)
        return private.aot(gm, inputs, compile_graph)

    out = torch.compile(lambda x: x.sin() + 1, backend=backend)(x)
    torch.testing.assert_close(out, x.sin() + 1)
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.cos())
    assert len(seen) == 2


def test_backends_of_torch_compile_by_name():
    assert private.dynamo_backend("inductor") is not None
    assert private.dynamo_backend("no such backend") is None


def test_code_being_compiled_and_the_code_before_a_break():
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        code = private.code_being_compiled()
        seen.append((code, private.code_before_breaks(code)))
        return gm.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    assert private.code_being_compiled() is None
    torch.compile(broken, backend=backend)(torch.ones(2))
    assert len(seen) == 2 and seen[0][0] is broken.__code__
    assert seen[1][0] is not broken.__code__ and seen[1][1] is broken.__code__


def test_what_is_behind_a_compiled_callable():
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, backend="eager", options=None)
    assert private.original_of(compiled) is double
    assert private.compile_record(compiled).compiler_name == "eager"
    assert private.compile_record(double) is None
    module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert private.original_of(module) is torch.nn.Linear.forward


def test_process_groups_have_names_and_meshes_flatten(tmp_path):
    assert private.process_group("") is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        assert private.process_group(world.group_name) is world
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
        flat = private.flatten_mesh(mesh, "both")
        assert flat.ndim == 1 and flat.size() == 1 and flat.mesh_dim_names == ("both",)
    finally:
        dist.destroy_process_group()
