"""Values on the command line: bad ones end a command before it computes, with one line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_neuron import cli, terminal
from nsa_neuron.cli import main, values

MODEL = str(Path(__file__).parents[2] / "examples" / "porting" / "model.py")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ops attention --size T=²", "it must be a whole number up to"),
        (f"ops attention --size T={2**31}", "it must be a whole number up to"),
        ("ops attention --size B=2000000000 Hq=2000000000", "more than fits memory"),
        ("ops --set windw=3", "no op has a scalar argument 'windw'; there are block"),
        ("plan --devices 64..16", "'64..16' is no number, nor a range"),
        ("plan --devices ²", "'²' is no number, nor a range"),
        ("conform --backend reference --device meta", "no device 'meta' here"),
        ("conform --backend reference --device gpu", "no device 'gpu' here"),
        ("conform --known-gaps cpu=none.json", "none.json is no file of known gaps"),
        ("conform --known-gaps cpu=.", ". is no file of known gaps"),
        ("conform --known-gaps cpu=list.json", "list.json is no file of known gaps"),
        ("conform --known-gaps acme=list.json", "no backend or target 'acme'"),
        ("train list.json --steps 1", "File exists: 'list.json'"),
        ("train run --length 1", "argument 'length' is 1; it must be at least 2"),
        ("bench --target cpu --part attention --out .", "Is a directory: '.'"),
        ("bench --target cpu --part native --shape ²/1/128/float32", "--shape is"),
    ],
)
def test_bad_values_are_refused_by_the_command(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    assert main(words.split()) == cli.UNUSABLE
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plan --tokens ²", "'²' is no whole number above 0"),
        ("plan --rows -1", "-1 is too small; it must be at least 0"),
        (f"agree {MODEL} --targets ,", "no target is named"),
        (f"agree {MODEL} --targets cpu --decode -1", "-1 is too small"),
        (f"agree {MODEL} --targets cpu --seed {2**63}", "is too large"),
        (f"agree {MODEL} --targets cpu --html none/a.html", "there is no folder 'none'"),
        (f"agree {MODEL} --targets cpu --save {MODEL}/calls", "no folder that can be written to"),
        ("conform --html .", "'.' is a folder; it must be a file"),
        ("show text.txt --png none/a.png", "there is no folder 'none'"),
        ("train run --until -1", "-1 is too small"),
        ("train run --seed x", "'x' is no whole number"),
        ("bench --target cpu --tokens 0", "0 is too small; it must be at least 1"),
        ("bench --target cpu --rounds 0", "0 is too small"),
        ("bench --target trn2 --replaced nan", "'nan' is no number from 0 to 1"),
        ("bench --target trn2 --decode 0", "0 is too small"),
        ("backends --markdown --json", "not allowed with argument --markdown"),
    ],
)
def test_bad_values_are_refused_by_the_parser(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == cli.UNUSABLE and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_have_to_be_made(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert values.new_folder(str(deep)) == deep and not deep.exists()
    assert values.new_folder("here") == Path("here")
    assert values.new_file("here.html") == Path("here.html")
    assert values.share("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError):
        values.share("1.5")


def test_files_that_cannot_be_written_are_one_line(capsys, monkeypatch) -> None:
    def full(args: argparse.Namespace) -> int:
        raise OSError(28, "No space left on device", "page.html")

    monkeypatch.setattr("nsa_neuron.cli.ops.run", full)
    monkeypatch.setattr(cli, "_forget_output", lambda: None)  # pytest's own
    assert main(["ops"]) == cli.UNUSABLE
    assert "nsa ops: [Errno 28] No space left on device: 'page.html'" in capsys.readouterr().err
    monkeypatch.setenv("NSA_DEBUG", "1")
    with pytest.raises(OSError, match="No space left"):
        main(["ops"])


@pytest.mark.parametrize("target", ["gone", "/dev/full"])
def test_output_that_nobody_takes(target: str) -> None:
    """A short output is written when the command ends: nothing may be left for Python's exit."""
    lint = [sys.executable, "-m", "nsa_neuron.cli", "lint", "--rules"]
    if target == "gone":
        shell = ["bash", "-c", 'sleep 0.1; exec "$@" > >(exec true)', "-", *lint]
        found = subprocess.run(shell, capture_output=True, text=True, timeout=60)
        assert (found.returncode, found.stderr) == (0, "")
        return
    with open(target, "w") as full:
        found = subprocess.run(lint, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("nsa lint: [Errno 28]")


def test_letters_that_a_terminal_has_not_are_replaced() -> None:
    shown = "from nsa_neuron.cli import main; main(['lint', '--ignore', 'Ünknöwn'])"
    ran = [sys.executable, "-X", "utf8=0", "-c", shown]
    found = subprocess.run(ran, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, timeout=60)
    assert b"?" in found.stderr and b"UnicodeEncodeError" not in found.stderr


def test_an_op_without_kernels_is_nothing_that_compiles(capsys) -> None:
    pytest.importorskip("triton")
    assert main(["compile-check", "--op", "nothing"]) == cli.UNUSABLE
    assert "'nothing' has no kernel; there are those of attention" in capsys.readouterr().err


def test_closed_streams_are_empty_and_take_everything() -> None:
    ops = [sys.executable, "-m", "nsa_neuron.cli", "plan"]
    closed = ["bash", "-c", '"$@" <&- >&-', "-", *ops]
    found = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("unwanted", [True, False])
def test_tables_are_coloured_unless_nobody_wants_it(unwanted: bool, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1" if unwanted else "")
    made = terminal.table("", ["target"], [["cpu"]], ["good"])
    assert ("\x1b" not in made) is unwanted
