"""What `nsa` says before it knows which command."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

import nsa_neuron
from nsa_neuron import cli
from nsa_neuron.cli import agree, main
from nsa_neuron.errors import MissingPackage


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


def test_the_front_page_lists_commands_and_says_where_there_is_more(capsys) -> None:
    assert main([]) == 0
    shown = lines(capsys.readouterr().out)
    assert shown[0] == "usage: nsa [--version] <command> ..."
    first = shown.index("commands:") + 1
    listed = shown[first : shown.index("", first)]
    assert listed == [f"  {c.name:13}  {c.help}" for c in cli.COMMANDS]
    assert shown[-1] == "`nsa <command> --help` explains each." and "SUPPRESS" not in str(shown)


def test_the_version_is_this_package_s(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nsa-neuron {nsa_neuron.__version__}\n"


def test_words_come_from_the_command_line_unless_they_are_given(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["nsa", "frobnicate"])
    assert main() == cli.UNUSABLE and main([]) == 0
    assert "no command 'frobnicate'; there are ops, backends, " in capsys.readouterr().err


def test_help_of_a_command_is_its_module_s_words_as_they_stand(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["agree", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: nsa agree ") and agree.__doc__ is not None
    assert agree.__doc__.strip() in shown


@pytest.mark.parametrize(
    ("module", "there"),
    [("nsa_neuron.cli.ops", True), ("nsa_neuron.simulator.command.lint", True),
     ("nsa_neuron.cli.nothing", False), ("nsa_neuron.terminal.nothing", False),
     ("nsa_neuron.nothing.ops", False), ("nsa_neuron", True)],
)  # fmt: skip
def test_a_command_exists_where_its_module_is_found(module: str, there: bool) -> None:
    assert cli.exists(module) is there


def test_the_simulator_s_commands_and_bench_do_without_torch() -> None:
    without = {command.name for command in cli.COMMANDS if not command.torch}
    assert without == {"bench", "simulate", "profile", "lint"}


@pytest.mark.parametrize(("command", "needs"), [("ops", True), ("bench", False)])
def test_commands_that_need_torch_say_that_it_is_missing(monkeypatch, capsys, command, needs):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    fake = SimpleNamespace(configure=lambda parser: None, run=lambda args: 0, __doc__="")
    monkeypatch.setitem(sys.modules, f"nsa_neuron.cli.{command}", fake)
    assert main([command]) == (cli.UNUSABLE if needs else 0)
    assert ("this command needs torch" in capsys.readouterr().err.replace("'", "")) is needs
    with pytest.raises(MissingPackage, match="a thing"):
        cli.need_torch("a thing")


def test_a_command_s_code_is_what_it_returned_and_its_output_is_flushed(monkeypatch) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    fake = SimpleNamespace(main=lambda words: print("said") or 3)
    monkeypatch.setitem(sys.modules, "nsa_neuron.demo", fake)
    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["demo"]) == 3 and flushed[-1] == "said\n"
