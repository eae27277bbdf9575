"""The `nsa` command.

Each command is a module of this package with `configure(parser)` and `run(args) -> int`, imported
only when it is asked for, so that `nsa simulate` never imports torch. Exit codes: 0 nothing wrong,
1 something failed its check, 2 the command could not be carried out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec

from nsa_neuron import __version__
from nsa_neuron.errors import MissingPackage, NsaError

FAILED, UNUSABLE = 1, 2


@dataclass(frozen=True)
class Command:
    """A command of `nsa`.

    Attributes:
        name: what is typed.
        help: one line.
        module: what carries it out.
        function: takes the rest of the command line and returns an exit code; empty: the module
            is one of this package's, see above.
        torch: whether it needs torch, which the simulator's commands do without.
    """

    name: str
    help: str
    module: str
    function: str = ""
    torch: bool = True


COMMANDS = (
    Command("ops", "what each operation takes, gives and costs", "nsa_neuron.cli.ops"),
    Command("backends", "what can run here, and why not", "nsa_neuron.cli.backends"),
    Command("build", "compile the CPU kernels now", "nsa_neuron.cli.build"),
    Command("conform", "try every op on every backend", "nsa_neuron.cli.conform"),
    Command("agree", "do targets agree on your model, and where not", "nsa_neuron.cli.agree"),
    Command("explain", "who would run a call, and who refuses it", "nsa_neuron.cli.explain"),
    Command("bench", "measure on this machine", "nsa_neuron.cli.bench", torch=False),
    Command(
        "compile-check",
        "compile the Triton kernels for an H200, without one",
        "nsa_neuron.cli.compile_check",
    ),
    Command("train", "train a small byte-level model here", "nsa_neuron.cli.train"),
    Command("plan", "a training step on many accelerators, modelled", "nsa_neuron.cli.plan"),
    Command("generate", "continue a text with a checkpoint", "nsa_neuron.cli.generate"),
    Command("show", "which parts of a text an answer looked at", "nsa_neuron.cli.show"),
    Command("demo", "NSA on a real text", "nsa_neuron.demo", "main"),
    Command(
        "simulate",
        "run a NKI kernel on the simulator",
        "nsa_neuron.simulator.command.simulate",
        "simulate_main",
        torch=False,
    ),
    Command(
        "profile",
        "where a NKI kernel spends time",
        "nsa_neuron.simulator.command.profile",
        "profile_main",
        torch=False,
    ),
    Command(
        "lint",
        "check NKI kernels without running",
        "nsa_neuron.simulator.command.lint",
        "lint_main",
        torch=False,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = {command.name: command for command in COMMANDS if exists(command.module)}
    if not words or words[0] not in known:
        return _front_page(words, list(known.values()))
    command = known[words[0]]
    _let_write_anywhere()
    try:
        code = _carry_out(command, words[1:])
        sys.stdout.flush()  # a reader that went away shows here, and not when Python exits
        return code
    except NsaError as error:
        if os.environ.get("NSA_DEBUG") == "1":
            raise
        print(f"nsa {command.name}: {error}", file=sys.stderr)
        return UNUSABLE
    except BrokenPipeError:
        # The reader of a pipe went away (`nsa ops | head`); nothing is left to say to it.
        _forget_output()
        return 0
    except OSError as error:  # a file of the user's, mostly: its name is in the message
        if os.environ.get("NSA_DEBUG") == "1":
            raise
        print(f"nsa {command.name}: {error}", file=sys.stderr)
        _forget_output()
        return UNUSABLE
    except KeyboardInterrupt:
        return 130


def _let_write_anywhere() -> None:
    """What is closed reads as empty and takes everything; a terminal of few letters gets `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _forget_output() -> None:
    """Python tries to write what is left in the buffer once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _front_page(words: Sequence[str], commands: Sequence[Command]) -> int:
    """Help, version, and the complaint about an unknown command."""
    width = max(len(command.name) for command in commands)
    listing = "\n".join(f"  {command.name:{width}}  {command.help}" for command in commands)
    parser = argparse.ArgumentParser(
        prog="nsa",
        description="Native Sparse Attention on Trainium2, H200 and any CPU.",
        epilog=f"commands:\n{listing}\n\n`nsa <command> --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nsa [--version] <command> ...",
    )
    parser.add_argument("--version", action="version", version=f"nsa-neuron {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    if not words:
        parser.print_help()
        return 0
    args, _ = parser.parse_known_args(words)
    names = ", ".join(command.name for command in commands)
    print(f"nsa: no command '{args.command}'; there are {names}", file=sys.stderr)
    return UNUSABLE


def _carry_out(command: Command, words: Sequence[str]) -> int:
    if command.torch:
        need_torch("this command")
    module = importlib.import_module(command.module)
    if command.function:
        function = getattr(module, command.function, None)
        if function is None:
            raise NsaError(f"this version of {command.module} cannot {command.name}")
        return int(function(list(words)) or 0)
    parser = argparse.ArgumentParser(
        prog=f"nsa {command.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.configure(parser)
    return int(module.run(parser.parse_args(words)))


def need_torch(what: str) -> None:
    """Makes sure that torch is there.

    Raises:
        MissingPackage: it is not; says what needs it.
    """
    if find_spec("torch") is None:
        raise MissingPackage("torch", "torch", what)


def exists(dotted: str) -> bool:
    """Whether a module of this package can be found; imports none of its parents."""
    first, *rest = dotted.split(".")
    path = sys.modules[first].__path__
    for depth in range(len(rest)):
        spec = PathFinder.find_spec(".".join([first, *rest[: depth + 1]]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations or []
    return True
