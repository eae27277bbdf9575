"""The simulator's tests lie as its modules do: tests/simulator/FOLDER/test_MODULE.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = ROOT / "nsa_neuron" / "simulator"
TESTS = ROOT / "tests" / "simulator"
# Its tests are named for what a reader asks of a profile, not for the modules that answer.
APART = "profiler"

# Modules without a file of their own, and where they are tested: through what uses them.
THROUGH = {
    "__main__.py": "command/test_simulate.py",
    "pytest_plugin.py": "command/test_pytest_plugin.py",
    "command/check.py": "command/test_simulate.py",
    "command/lint.py": "lint/test_lint.py",
    "command/profile.py": "profiler/test_profile_cli.py",
    "command/testing.py": "command/test_pytest_plugin.py",
    "cost/estimate.py": "cost/test_cost_schedule.py",
    "cost/guesses.py": "cost/test_cost_timing.py",
    "cost/parameters.py": "cost/test_cost_validate.py",
    "cost/patterns.py": "cost/test_cost_properties.py",
    "cost/program.py": "cost/test_cost_schedule.py",
    "cost/space.py": "cost/test_cost_schedule.py",
    "cost/storage.py": "cost/test_cost_properties.py",
    "cost/tables.py": "cost/test_cost_instructions.py",
    "cost/trips.py": "cost/test_cost_extrapolate.py",
    "issue/accumulators.py": "nki/isa/test_isa_dve_accumulate.py",
    "issue/checker.py": "rules/test_table.py",
    "issue/current.py": "issue/test_core.py",
    "issue/faults.py": "rules/test_table.py",
    "issue/ranks.py": "nki/collectives/test_collectives_functions.py",
    "issue/record.py": "issue/test_core.py",
    "issue/spec.py": "cost/test_cost_timing.py",
    "issue/timing.py": "cost/test_cost_timing.py",
    "kernels/bench.py": "../cli/test_bench_simulator.py",
    "kernels/convolution.py": "cost/test_cost_shape_only.py",
    "kernels/listed.py": "cost/test_cost_validate.py",
    "kernels/matmul.py": "cost/test_cost_shape_only.py",
    "kernels/streaming.py": "cost/test_cost_shape_only.py",
    "lint/calls.py": "lint/test_lint.py",
    "lint/names.py": "lint/test_lint.py",
    "lint/rules.py": "lint/test_lint.py",
    "lint/subset.py": "lint/test_lint.py",
    "lint/tensors.py": "lint/test_lint.py",
    "machine/regions.py": "nki/test_nki_surface.py",
    "machine/trn2.py": "rules/test_boundaries.py",
    "memory/allocation.py": "run/test_liveness.py",
    "memory/layout.py": "memory/test_views.py",
    "memory/nki_object.py": "run/test_launch.py",
    "memory/storage.py": "memory/test_written.py",
    "memory/tensor.py": "memory/test_views.py",
    "memory/tensor_base.py": "nki/test_tensor_truth.py",
    "nki/binding.py": "nki/test_misuse.py",
    "nki/compiler.py": "run/test_configuration.py",
    "nki/configuration.py": "run/test_configuration.py",
    "nki/dtype.py": "nki/test_nki_surface.py",
    "nki/launching.py": "run/test_launch.py",
    "nki/meta.py": "nki/test_nki_surface.py",
    "nki/remedies.py": "nki/test_misuse.py",
    "nki/typing.py": "nki/test_nki_surface.py",
    "nki/collectives/group.py": "nki/collectives/test_collectives_functions.py",
    "nki/collectives/variable.py": "nki/collectives/test_collectives_functions.py",
    "nki/isa/act.py": "nki/isa/test_isa_dve.py",
    "nki/isa/constants.py": "nki/test_nki_surface.py",
    "nki/isa/dma_compute.py": "nki/isa/test_isa_dma.py",
    "nki/isa/dma_transpose.py": "nki/isa/test_isa_dma.py",
    "nki/isa/dve_scalar.py": "nki/isa/test_isa_dve.py",
    "nki/isa/dve_search.py": "nki/isa/test_isa_dve_select.py",
    "nki/isa/gen4.py": "rules/test_table.py",
    "nki/isa/indirect.py": "nki/isa/test_isa_dma.py",
    "nki/isa/pair.py": "issue/test_lnc.py",
    "nki/isa/pool_search.py": "nki/isa/test_isa_pool.py",
    "nki/isa/random.py": "nki/isa/test_isa_pool.py",
    "nki/isa/registers.py": "issue/test_control.py",
    "nki/isa/scalars.py": "rules/test_registers.py",
    "nki/isa/shared.py": "nki/isa/test_isa_dve.py",
    "nki/language/making.py": "nki/language/test_language_operators.py",
    "nki/language/reductions.py": "nki/language/test_language_composites.py",
    "nki/language/simulated.py": "nki/language/test_language_operators.py",
    "nki/language/transfers.py": "nki/language/test_language_composites.py",
    "rules/errors.py": "nki/test_misuse.py",
    "rules/legacy.py": "nki/test_misuse.py",
    "rules/options.py": "rules/test_versions.py",
    "rules/session.py": "issue/test_core.py",
    "run/activation.py": "run/test_launch.py",
    "run/arguments.py": "run/test_launch.py",
    "run/cores.py": "issue/test_strict.py",
    "run/coverage.py": "run/test_liveness.py",
    "run/overlap.py": "run/test_liveness.py",
    "semantics/elementwise.py": "semantics/test_semantics_alu.py",
    "site/nki/__init__.py": "command/test_simulate.py",
}


def modules() -> list[str]:
    """Paths of the simulator's modules, below it."""
    found = [p.relative_to(MODULES) for p in sorted(MODULES.rglob("*.py"))]
    return [str(p) for p in found if p.stem != "__init__" and p.parts[0] != APART]


def own_tests(module: str) -> list[Path]:
    """Names under which a module's own tests may lie; a folder's name keeps files apart."""
    path = Path(module)
    names = (path.stem, f"{path.parent.name}_{path.stem}")
    return [TESTS / path.parent / f"test_{name}.py" for name in names]


@pytest.mark.parametrize("module", modules())
def test_a_module_has_tests_of_its_name_or_it_is_said_where_they_are(module):
    own = [path for path in own_tests(module) if path.is_file()]
    through = THROUGH.get(module)
    assert bool(own) != bool(through), f"{module}: either a file of its own or a line in THROUGH"
    assert through is None or (TESTS / through).is_file(), through


def test_no_line_is_about_a_module_that_is_gone():
    assert [m for m in THROUGH if not (MODULES / m).is_file()] == []


def test_every_folder_of_tests_is_a_folder_of_modules():
    folders = {p.parent.relative_to(TESTS) for p in TESTS.rglob("test_*.py")}
    assert [str(f) for f in sorted(folders) if not (MODULES / f).is_dir()] == []


def test_no_two_test_files_have_one_name():
    """tests/ is no package, so pytest imports a file by its bare name, once."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
