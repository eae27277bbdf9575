"""The `nsa` command: what it prints, its exit codes, its errors, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from nsa_neuron import cli
from nsa_neuron.cli import main
from nsa_neuron.ops import OPS
from nsa_neuron.registry import REGISTRY, requesting


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must succeed; returns its JSON."""

    def run(*words: str):
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_ops_lists_every_op_with_dims_returns_and_cost(read) -> None:
    rows = {row["op"]: row for row in read("ops")}
    assert list(rows) == [spec.name for spec in OPS]
    q = rows["attention"]["args"][0]
    assert (q["name"], q["dims"]) == ("q", "B S Hq Dk")
    assert [item["name"] for item in rows["attention"]["returns"]] == ["o", "lse"]
    assert all(row["cost"]["bytes"] > 0 for row in rows.values())


def test_cost_follows_the_sizes_asked_for(read) -> None:
    words = ("ops", "sliding_window_attention", "--set", "window=1", "--size", "Hq=2", "Dk=8")
    small, large = (read(*words, "Dv=8", f"S={s}")[0]["cost"] for s in (64, 128))
    # One visible key per query: QK and PV of Hq heads, a multiply-add is 2.
    assert small["flops"] == 64 * 2 * (2 * 8 + 2 * 8)
    assert large["flops"] == 2 * small["flops"]


def test_ops_as_text_names_dims_and_defaults(capsys) -> None:
    assert main(["ops", "compress", "--set", "method=mlp"]) == 0
    out = capsys.readouterr().out
    assert "[B, T, Hkv, D]" in out and "method" in out and "GFLOP" in out


def test_backends_says_what_hinders_each_mode(read) -> None:
    rows = {f"{row['backend']}:{row['mode']}": row for row in read("backends")}
    assert rows["reference:eager"]["available"]
    for row in rows.values():
        assert row["available"] == (row["reason"] == "")
    hindrance = REGISTRY.get("cuda").modes()["hw"]
    assert rows["cuda:hw"]["reason"] == hindrance


def test_explain_names_the_chosen_target_and_every_refusal(read) -> None:
    found = read("explain", "attention", "--device", "cpu")["verdicts"]
    assert [row["target"].split(":")[0] for row in found if row["chosen"]] == ["cpu"]
    refusal = next(row for row in found if row["target"] == "cuda:hw")
    assert refusal["rule"] == "device" and "cpu" in refusal["reason"]


def test_explain_tells_a_refusal_from_a_missing_device(capsys) -> None:
    if not REGISTRY.get("cuda").modes()["hw"]:
        pytest.skip("a CUDA device is here")
    main(["explain", "attention", "--device", "cuda"])
    assert "would take it, but cannot run here" in capsys.readouterr().out


def test_explain_of_a_policy_that_refuses_fails(capsys) -> None:
    words = ["explain", "attention", "--device", "cpu", "--policy", "cuda:sim"]
    assert main([*words, "--dtype", "bf16"]) == 0
    assert main([*words, "--dtype", "fp64"]) == cli.FAILED
    assert "refuses by rule 'dtype'" in capsys.readouterr().out


WRONG = [
    (["conform", "--backend", "nobody"], "no backend or target 'nobody'"),
    (["conform", "--backend", "cuda:fast"], "no mode 'fast'"),
    (["conform", "--op", "nothing"], "no op 'nothing'"),
    (["ops", "nothing"], "no op 'nothing'"),
    (["ops", "attention", "--set", "window=3"], "no scalar argument 'window'"),
    (["ops", "sliding_window_attention", "--set", "window=wide"], "must be of type int"),
    (["ops", "attention", "--size", "S"], "not of the form NAME=VALUE"),
    (["ops", "attention", "--size", "S=many"], "must be a whole number"),
    (["ops", "attention", "--size", "Hq=5", "Hkv=2"], "argument 'q'"),
    (["explain", "attention", "--device", "toaster"], "no device type 'toaster'"),
    (["frobnicate"], "no command 'frobnicate'"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_wrong_usage_is_one_message_and_exit_code_2(words, said, capsys) -> None:
    assert main(words) == cli.UNUSABLE
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [["conform", "--dtype", "int8"], ["conform", "--tag", "bench"], ["bench"], ["ops", "-x"]],
)
def test_argparse_refuses_with_exit_code_2(words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == cli.UNUSABLE


def test_debugging_keeps_the_traceback(monkeypatch) -> None:
    monkeypatch.setenv("NSA_DEBUG", "1")
    with pytest.raises(Exception, match="no op 'nothing'"):
        main(["ops", "nothing"])


def test_commands_of_missing_modules_are_not_offered(monkeypatch, capsys) -> None:
    missing = cli.Command("levitate", "not here", "nsa_neuron.levitation", "main")
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, missing))
    assert main([]) == 0
    assert "levitate" not in capsys.readouterr().out
    assert main(["levitate"]) == cli.UNUSABLE


@pytest.mark.parametrize(
    "command", [c for c in cli.COMMANDS if "simulator" in c.module], ids=lambda c: c.name
)
def test_simulator_commands_hand_over_their_words(monkeypatch, command) -> None:
    seen: list[list[str]] = []
    fake = types.ModuleType(command.module)
    setattr(fake, command.function, lambda words: seen.append(words) or 3)
    monkeypatch.setitem(sys.modules, command.module, fake)
    monkeypatch.setattr(cli, "exists", lambda module: True)
    assert main([command.name, "kernel.py", "--json"]) == 3
    assert seen == [["kernel.py", "--json"]]


def test_a_simulator_without_a_command_says_so(monkeypatch, capsys) -> None:
    fake = types.ModuleType("nsa_neuron.simulator.command.lint")
    monkeypatch.setitem(sys.modules, "nsa_neuron.simulator.command.lint", fake)
    monkeypatch.setattr(cli, "exists", lambda module: True)
    assert main(["lint", "kernel.py"]) == cli.UNUSABLE
    assert "cannot lint" in capsys.readouterr().err


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_front_page_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from nsa_neuron.cli import main; main([]); "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["simulate", "profile", "lint"])
def test_simulator_commands_do_not_import_torch(name: str) -> None:
    code = (
        "import sys; from nsa_neuron.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "False"


def test_decode_is_counted_for_one_new_token(capsys) -> None:
    assert main(["ops", "decode", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["returns"][0]["shape"] == [1, 1, 16, 128]
    # 511 compressed, 16 * 64 selected and 512 window tokens of keys and values, at two bytes
    least = (511 + 1024 + 512) * 2 * 128 * 2
    assert least < row["cost"]["bytes"] < 1.05 * least


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("X=3", "no op has a size 'X'; there are B, D"),
        ("w=3", "w is the argument window: --set window=N"),
        ("S=many", "S is 'many'; it must be a whole number"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(size: str, said: str, capsys) -> None:
    assert main(["ops", "attention", "--size", size]) == 2
    assert said in capsys.readouterr().err


def test_backends_says_which_ops_have_a_kernel(capsys) -> None:
    assert main(["backends", "--json"]) == 0
    rows = {f"{row['backend']}:{row['mode']}": row for row in json.loads(capsys.readouterr().out)}
    assert rows["cuda:sim"]["kernels"]["select_blocks"] == "fwd"
    assert rows["reference:eager"]["kernels"]["attention"] == "fwd, bwd"
    assert not any(row["requested"] for row in rows.values())


def test_nsa_backend_is_what_explain_and_backends_go_by(capsys) -> None:
    with requesting("h200:sim"):
        assert main(["explain", "attention", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["backends", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
    assert found["policy"] == "h200:sim"
    assert [(row["target"], row["chosen"]) for row in found["verdicts"]] == [("cuda:sim", True)]
    asked = [row for row in rows if row["requested"]]
    assert [(row["backend"], row["mode"]) for row in asked] == [("cuda", "sim")]


def test_a_policy_without_a_mode_is_the_hardware_as_use_backend_has_it(capsys) -> None:
    assert main(["explain", "attention", "--policy", "cuda", "--json"]) == 1
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    assert {row["target"] for row in verdicts} == {"cuda:hw"}
