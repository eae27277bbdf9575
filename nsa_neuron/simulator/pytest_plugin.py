"""pytest plugin: tests of NKI kernels on the simulator, and on hardware where there is some.

Loaded through the `pytest11` entry point in every session of an environment that has this package,
so it imports nothing but pytest until a test or an option asks for the simulator.

Fixtures:
    nki_simulate: `nki_simulate(kernel, lnc=None, relax=(), data=True, precise=None, nki=None)`
        gives a callable that runs the kernel on the simulator.
    nki_launch: the same call; on a Neuron device in tests marked `nki_hardware` where the machine
        has one, on the simulator otherwise.

Options (and settings of the same names, `nki_target` and so on, in the configuration file):
    --nki-target trn2: `import nki` means the simulator from before the first conftest.py on.
    --nki-version 0.7: version of NKI that kernels are run as, "0.6" or "0.7"; the newest by itself.
    --nki-relax RULE: note a broken rule in the summary instead of failing.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RAN_ON, _RELAXED = "nki_ran_on", "nki_relaxed"
_ACTIVE: pytest.StashKey[Any] = pytest.StashKey()
MARKER = (
    "nki_hardware: nki_launch runs this test's kernels on a Neuron device where there is one, "
    "on the simulator where there is none"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options and settings."""
    group = parser.getgroup("nki", "NKI kernels")
    group.addoption(
        "--nki-target",
        metavar="NAME",
        help="machine to simulate (trn2); makes `import nki` the simulator for the whole session",
    )
    group.addoption("--nki-version", metavar="VERSION", help="version of NKI: 0.6 or 0.7")
    group.addoption(
        "--nki-relax",
        action="append",
        default=[],
        metavar="RULE",
        help="note breaches of this rule in the summary instead of failing; may be repeated",
    )
    parser.addini("nki_target", "as --nki-target", default="")
    parser.addini("nki_version", "as --nki-version", default="")
    parser.addini("nki_relax", "as --nki-relax, one rule per line", type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker."""
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Activates the simulator where the session asks for it, before any conftest imports `nki`."""
    target = _setting(early_config, "nki_target")
    if _setting(early_config, "nki_version"):
        _check_version(early_config)
    if not target:
        return
    from . import activate
    from .command.testing import devices

    if devices():
        return
    try:
        early_config.stash[_ACTIVE] = activate(
            target, relax=_relaxed(early_config), nki=_version(early_config)
        )
    except ValueError as error:
        raise pytest.UsageError(f"--nki-target, --nki-relax: {error}") from None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Gives `import nki` back its old meaning."""
    active = config.stash.get(_ACTIVE, None)
    if active is not None:
        active.restore()


@pytest.fixture
def nki_simulate(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Run kernels on the simulator, strictly: `nki_simulate(kernel)(a, b)`.

    The callable it returns is a `nsa_neuron.simulator.Simulated`: its `.run` is the record of the
    latest call (instructions, DMA bytes, SBUF and PSUM peaks). While the fixture lives, `import
    nki` in the test means the simulator. A kernel that was imported with the vendor's nki is
    imported once more, privately, with the simulator's.
    """
    from .command.testing import Simulator

    properties = request.node.user_properties
    launcher = Simulator(
        _relaxed(request.config), lambda rules: properties.append((_RELAXED, rules))
    )
    with ExitStack() as stack:
        if request.config.stash.get(_ACTIVE, None) is None:
            from . import activate

            target = _setting(request.config, "nki_target") or "trn2"
            version = _version(request.config)
            stack.enter_context(activate(target, relax=_relaxed(request.config), nki=version))
        yield launcher


@pytest.fixture
def nki_launch(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run kernels on a Neuron device where there is one and the test is marked, else simulate."""
    from .command.testing import Hardware, devices

    marked = request.node.get_closest_marker("nki_hardware") is not None
    found = devices() if marked else ()
    if found:
        request.node.user_properties.append((_RAN_ON, found[0]))
        return Hardware()
    if marked:
        request.node.user_properties.append((_RAN_ON, "simulator"))
    simulate: Callable[..., Any] = request.getfixturevalue("nki_simulate")
    return simulate


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Drops the simulator's frames from tracebacks; shows rule, kernel line and operand table."""
    errors = sys.modules.get(f"{__package__}.rules.errors")
    if call.excinfo is None or errors is None:
        return (yield)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__package__}."):
            module.__tracebackhide__ = _hide  # type: ignore[attr-defined]
    report = yield
    if isinstance(call.excinfo.value, errors.SimulationError):
        from .command.testing import explain

        report.sections.append((f"NKI rule {call.excinfo.value.rule}", explain(call.excinfo.value)))
    return report


def _hide(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether the simulator's frames say nothing: a refusal, or an exception of the kernel's own.

    pytest asks `__tracebackhide__` of a frame's module. An exception raised by the simulator's own
    code that is no refusal may be its defect, and is shown in full.
    """
    refused = isinstance(excinfo.value, sys.modules[f"{__package__}.rules.errors"].SimulationError)
    return refused or not str(excinfo.traceback[-1].path).startswith(_PACKAGE)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says where marked tests ran, and which rules were relaxed: neither must pass unnoticed."""
    places: dict[str, int] = {}
    relaxed: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == _RAN_ON:
                    places[value] = places.get(value, 0) + 1
                elif key == _RELAXED:
                    relaxed[value] = relaxed.get(value, 0) + 1
    for place, count in sorted(places.items()):
        what = "no Neuron device here, NOT run on hardware" if place == "simulator" else "hardware"
        terminalreporter.write_line(f"nki: {count} marked nki_hardware ran on {place} ({what})")
    for rules, count in sorted(relaxed.items()):
        terminalreporter.write_line(f"nki: {count} broke relaxed rules: {rules}")


def _setting(config: pytest.Config, name: str) -> str:
    """An option, or the setting of the same name."""
    given = getattr(config.known_args_namespace, name, None)
    return str(given or config.getini(name) or "")


def _version(config: pytest.Config) -> str:
    """The version of NKI that the session asks for, or the newest."""
    from .rules.versions import NEWEST

    return _setting(config, "nki_version") or NEWEST


def _check_version(config: pytest.Config) -> None:
    """Refuses a version that is not simulated before any test asks for it."""
    from .rules.versions import check_version

    try:
        check_version(_version(config))
    except ValueError as error:
        raise pytest.UsageError(f"--nki-version: {error}") from None


def _relaxed(config: pytest.Config) -> frozenset[str]:
    """Rules relaxed by option or setting."""
    return frozenset([*config.known_args_namespace.nki_relax, *config.getini("nki_relax")])
