"""`python -m nsa_neuron.simulator SCRIPT.py`, called in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator import __main__ as script
from nsa_neuron.simulator.rules.options import Options
from nsa_neuron.simulator.run.launch import default_options

SCRIPT = """
import sys
import nki
from nsa_neuron.simulator.run.launch import default_options
print(__name__, sys.argv, sys.path[0], sorted(default_options().relax), default_options().nki)
assert nki.__name__ != "absent"
if "fail" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ran_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_script_sees_its_arguments_and_its_folder(folder, capsys):
    argv, path = sys.argv, list(sys.path)
    assert script.main(["sub/ran_script.py", "one", "--two"]) == 0
    said = f"__main__ ['sub/ran_script.py', 'one', '--two'] {folder / 'sub'} [] "
    assert capsys.readouterr().out.startswith(said)
    assert sys.argv is argv and sys.path == path and "nki" not in sys.modules


def test_a_module_sees_where_it_was_called(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder / "sub")
    assert script.main(["-m", "ran_script", "one"]) == 0
    name, rest = capsys.readouterr().out.split(" ", 1)
    assert name == "__main__" and f"'one'] {folder / 'sub'} []" in rest


def test_options_hold_while_the_script_runs(folder, capsys):
    words = ["--relax", "oob", "--relax", "lnc", "--nki", "0.6", "sub/ran_script.py"]
    assert script.main(words) == 0
    assert capsys.readouterr().out.endswith("['lnc', 'oob'] 0.6\n")
    assert isinstance(default_options(), Options) and not default_options().relax


def test_the_exit_code_of_a_script_is_its_own(folder):
    argv, path = sys.argv, list(sys.path)
    with pytest.raises(SystemExit) as ended:
        script.main(["sub/ran_script.py", "fail"])
    assert ended.value.code == 7
    assert sys.argv is argv and sys.path == path and "nki" not in sys.modules


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: python -m nsa_neuron.simulator [options] SCRIPT.py"),
        (["absent.py"], "python -m nsa_neuron.simulator: no file absent.py"),
        (["--nki", "0.1", "sub/ran_script.py"], "python -m nsa_neuron.simulator: "),
        (["--target", "trn9", "sub/ran_script.py"], "trn9"),
        (["--relax", "absent", "sub/ran_script.py"], "absent"),
    ],
)
def test_what_cannot_run_is_said_with_exit_code_2(folder, capsys, words, said):
    assert script.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_the_folder_for_pythonpath_holds_the_package_nki(capsys):
    assert script.main(["--path", "absent.py"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path(simulator.__file__).parent / "site" and (path / "nki").is_dir()
