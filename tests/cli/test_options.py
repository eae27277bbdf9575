"""What is typed reaches what it is for, nothing else does, and exit codes follow what was found.

The work behind each command is replaced by a list of what it was asked for.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_neuron import cli, compile_check, conformance
from nsa_neuron.agree import Agreement, Run
from nsa_neuron.bench import attention, decoding, native, overhead, trainium
from nsa_neuron.bench.record import Modelled, Record
from nsa_neuron.cli import agree as agree_command
from nsa_neuron.cli import build as build_command
from nsa_neuron.cli import conform as conform_command
from nsa_neuron.cli import generate as generate_command
from nsa_neuron.cli import main
from nsa_neuron.cli import show as show_command
from nsa_neuron.cli import train as train_command
from nsa_neuron.conformance import Report
from nsa_neuron.conformance.outcome import Outcome, Status
from nsa_neuron.errors import NsaError
from nsa_neuron.nn import Sampling
from nsa_neuron.training.presets import CONFIGS, SCHEDULES

Asked = list[tuple[tuple[Any, ...], dict[str, Any]]]


def spied(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, gives: Any) -> Asked:
    """Replaces a function; what it is called with is appended to the result."""
    asked: Asked = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return gives(*args, **kwargs) if callable(gives) else gives

    monkeypatch.setattr(module, name, spy)
    return asked


# ---- exit codes of the command line itself


@pytest.mark.parametrize(
    ("ends", "code"),
    [(0, 0), (None, 0), (1, 1), (2, 2), (NsaError("no"), 2), (OSError("no"), 2),
     (KeyboardInterrupt(), 130), (BrokenPipeError(), 0)],
    ids=repr,
)  # fmt: skip
def test_a_command_ends_as_its_function_does(monkeypatch, capsys, ends: Any, code: int) -> None:
    def function(words: list[str]) -> Any:
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setitem(sys.modules, "nsa_neuron.demo", SimpleNamespace(main=function))
    monkeypatch.setattr(cli, "_forget_output", lambda: None)  # pytest's own
    assert main(["demo"]) == code
    assert ("nsa demo: no" in capsys.readouterr().err) == (code == 2 and ends != 2)


# ---- nsa conform

ROW = {"op": "gated_sum", "target": "cpu:torch", "dtype": "float32", "case": "one_token"}


def report(*statuses: Status) -> Report:
    return Report((), [Outcome(**ROW, status=status) for status in statuses])


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ("", {}, "Every case of every op"),
        ("--backend cpu --backend h200:sim", {"targets": ["cpu", "h200:sim"]},
         "A selection: backend cpu, h200:sim."),
        ("--op compress", {"ops": ["compress"]}, "A selection: op compress."),
        ("--dtype bf16 --dtype fp64", {"dtypes": [torch.bfloat16, torch.float64]},
         "A selection: dtype bfloat16, float64."),
        ("--tag edge", {"tags": ["edge"]}, "A selection: cases tagged edge."),
        ("--case one_token", {"case": "one_token"}, "A selection: case one_token."),
        ("--device cpu", {"device": "cpu"}, "Every case of every op"),
    ],
)  # fmt: skip
def test_conform_tries_what_was_asked_for_and_its_page_says_what(
    monkeypatch, tmp_path: Path, words: str, changes: dict[str, Any], said: str
) -> None:
    asked = spied(monkeypatch, conformance, "run", report(Status.PASS))
    page = tmp_path / "page.html"
    assert main(["conform", *words.split(), "--html", str(page)]) == 0
    usual = {"targets": [], "ops": [], "dtypes": None, "tags": None, "case": None, "device": None}
    ((targets,), given), = asked  # fmt: skip
    assert {"targets": targets, **given} == {**usual, "gaps": {}, **changes}
    assert said in page.read_text()


def test_conform_reads_gaps_under_the_backend_s_own_name(monkeypatch, tmp_path: Path) -> None:
    asked = spied(monkeypatch, conformance, "run", report(Status.PASS))
    gap = {"op": "*", "mode": "sim", "dtype": "*", "case": "l", "reason": "known"}
    file = tmp_path / "gaps.json"
    file.write_text(json.dumps({"gaps": [gap]}))
    assert main(["conform", "--known-gaps", f"h200={file}"]) == 0
    assert {name: [g.reason for g in gaps] for name, gaps in asked[0][1]["gaps"].items()} == {
        "cuda": ["known"]
    }


def test_conform_of_one_case_names_the_cases_that_other_options_leave(capsys) -> None:
    words = ["conform", "--op", "gated_sum", "--tag", "smoke", "--case"]
    assert main([*words, "several_tiles"]) == cli.UNUSABLE
    assert "no case 'several_tiles'; there are one_token, group4_s40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "code", "last"),
    [
        ([Status.PASS], 0, "0 of 1 cases fail"),
        ([Status.PASS, Status.FAIL], 1, "1 of 2 cases fail"),
        ([Status.GAP], 0, "0 of 1 cases fail"),
        ([Status.UNSUPPORTED], 2, "nothing could be run here"),
        ([], 2, "no case matches"),
    ],
)
def test_conform_ends_as_its_report_says(monkeypatch, capsys, statuses, code, last) -> None:
    spied(monkeypatch, conform_command.conformance, "run", report(*statuses))
    for form in ([], ["--json"], ["--verbose"]):
        assert main(["conform", *form]) == code
        out = capsys.readouterr().out.strip().splitlines()
        if "--json" not in form:
            assert out[-1] == last


# ---- nsa agree


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--seed", "7"], {"seed": 7}),
        (["--decode", "0"], {"decode": 0}),
        (["--no-backward"], {"backward": False}),
        (["--save", "calls"], {"save": Path("calls")}),
    ],
    ids=str,
)
def test_agree_asks_for_what_was_typed(monkeypatch, tmp_path: Path, words, changes) -> None:
    monkeypatch.chdir(tmp_path)
    spied(monkeypatch, agree_command.agree, "load", lambda text: text)
    found = Agreement("x", "y", [Run("cpu:torch")])
    asked = spied(monkeypatch, agree_command.agree, "agree", found)
    assert main(["agree", "model.py::make", "--targets", "h200:sim, cpu", *words]) == 0
    usual = {"backward": True, "decode": 4, "seed": 0, "save": None}
    assert asked == [(("model.py::make", ["h200:sim", "cpu"]), {**usual, **changes})]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_agree_is_exit_code_1_where_one_of_two_targets_parts(monkeypatch, capsys, form) -> None:
    runs = [Run("cpu:torch"), Run("cuda:sim", failure="forward ended with RuntimeError: boom")]
    spied(monkeypatch, agree_command.agree, "load", lambda text: text)
    spied(monkeypatch, agree_command.agree, "agree", Agreement("x", "y", runs))
    assert main(["agree", "model.py", "--targets", "cpu", *form]) == cli.FAILED
    assert "boom" in capsys.readouterr().out


# ---- nsa generate, show, train


def test_generate_samples_as_asked_and_reads_what_comes(monkeypatch, capsysbinary) -> None:
    def stream(model: Any, prompts: Any, length: int, sampling: Sampling) -> Any:
        return (torch.tensor([65 + i % 26]) for i in range(length))

    spied(monkeypatch, generate_command, "load_checkpoint", ("model", None))
    asked = spied(monkeypatch, generate_command, "stream", stream)
    words = "--bytes 3 --temperature 0.5 --top-k 9 --top-p 0.25 --seed -6".split()
    assert main(["generate", "m.safetensors", "abc", *words]) == 0
    assert capsysbinary.readouterr().out == b"ABC\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from stdin")))
    assert main(["generate", "m.safetensors"]) == 0
    assert len(capsysbinary.readouterr().out) == 201
    assert asked == [
        (("model", [b"abc"], 3), {"sampling": Sampling(0.5, 9, 0.25, -6)}),
        (("model", [b"from stdin"], 200), {"sampling": Sampling(0.0, 0, 1.0, 0)}),
    ]


def seen(*importances: float) -> Any:
    """What `look` gives: a view whose forced block is the most important of all."""
    picked = [SimpleNamespace(why="first", importance=9.0, first=0, last=15)]
    picked += [
        SimpleNamespace(why="importance", importance=x, first=16 * i, last=16 * i + 15)
        for i, x in enumerate(importances, 1)
    ]
    return SimpleNamespace(views=[SimpleNamespace(query=70, layer=1, kv_head=2, picked=picked)])


@pytest.mark.parametrize(
    ("asks", "text", "positions"),
    [
        ([], b"hello", [-1]),
        (["3", "-2"], b"hello", [3, -2]),
        (["Where?"], b"hello\n\nWhere?", [-1]),
        (["3", "Where?"], b"hello\n\nWhere?", [3, -1]),
    ],
)
def test_show_looks_where_it_was_asked(
    monkeypatch, tmp_path: Path, capsys, asks, text: bytes, positions: list[int]
) -> None:
    (tmp_path / "t.txt").write_bytes(b"hello")
    spied(monkeypatch, show_command, "load_checkpoint", ("model", None))
    wrote = spied(monkeypatch, show_command, "generate", [b"there"])
    looked = spied(monkeypatch, show_command, "look", seen(0.25, 0.5, 0.125))
    paged = spied(monkeypatch, show_command, "html", "<html>")
    drawn = spied(monkeypatch, show_command, "picture", None)
    words = [word for ask in asks for word in ("--ask", ask)]
    out, png = tmp_path / "p.html", tmp_path / "p.png"
    command = ["show", str(tmp_path / "t.txt"), "m.safetensors", "--out", str(out)]
    assert main([*command, *words, "--png", str(png)]) == 0
    assert looked == [(("model", text, positions), {})]
    assert wrote == ([(("model", [text], 48), {})] if "Where?" in asks else [])
    assert out.read_text() == "<html>" and drawn[0][0][1:] == (png, "t.txt")
    about = paged[0][0][2]
    assert "5 bytes, read by m.safetensors" in about
    assert ("Asked: 'Where?'. Wrote: 'there'." in about) == ("Where?" in asks)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "byte 70 layer 1 head 2: most important passage 32..47"


@pytest.mark.parametrize(("size", "code"), [(128 * 1024, 0), (128 * 1024 + 1, 2)])
def test_show_takes_a_text_of_its_limit(monkeypatch, tmp_path: Path, size: int, code: int) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(size))
    spied(monkeypatch, show_command, "load_checkpoint", ("model", None))
    spied(monkeypatch, show_command, "look", seen())
    spied(monkeypatch, show_command, "html", "<html>")
    words = ["m.safetensors", "--out", str(tmp_path / "p.html")]
    assert main(["show", str(tmp_path / "t.txt"), *words]) == code


@pytest.mark.parametrize("task", SCHEDULES)
def test_train_takes_its_task_s_schedule_but_for_what_is_given(monkeypatch, capsys, task) -> None:
    asked = spied(monkeypatch, train_command, "train", "model")
    judged = spied(monkeypatch, train_command, "evaluate", {"loss": 1.25, "accuracy": 0.5})
    monkeypatch.setattr(train_command, "task_of", lambda name: f"task {name}")
    usual = SCHEDULES[task]
    assert main(["train", "run", "--task", task]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "held out: loss 1.2500 nats a byte, accuracy 50.0%"
    )
    words = "--steps 3 --batch 5 --length 96 --rate 0.5 --muon 0.25 --seed 4 --save-every 7"
    more = ["--until", "2", "--preset", "tiny", "--attention", "nsa,full", "--json"]
    assert main(["train", "run", "--task", task, *words.split(), *more]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == ["nsa", "full"]
    (plain, _), (given, _) = asked
    assert plain[0] == CONFIGS["small"] and set(plain[1]) == {"nsa"}
    assert (
        plain[2] == f"task {task}"
        and plain[3] == usual
        and plain[4] == Path("run")
        and plain[6:] == (None, None)
    )
    how = given[3]
    assert (how.steps, how.batch, how.length, how.rate, how.muon, how.seed, how.save_every) == (
        3, 5, 96, 0.5, 0.25, 4, 7
    )  # fmt: skip
    assert given[0] == CONFIGS["tiny"] and given[1] == ("nsa", "full") and given[6] == 2
    assert [args[-1] for args, _ in judged] == [usual.length, 96]


def test_train_begins_with_a_checkpoint_s_sizes_unless_others_are_named(monkeypatch) -> None:
    old = SimpleNamespace(config=CONFIGS["tiny"], kinds=("full", "nsa"))
    spied(monkeypatch, train_command, "load_checkpoint", (old, None))
    spied(monkeypatch, train_command, "evaluate", {"loss": 1.0, "accuracy": 0.5})
    asked = spied(monkeypatch, train_command, "train", "model")
    words = ["train", "run", "--task", "mqar", "--begin-with", "old.safetensors"]
    for more in ([], ["--attention", "window"], ["--preset", "small"]):
        assert main([*words, *more]) == 0
    kinds = [args[1] for args, _ in asked]
    assert kinds[:2] == [("full", "nsa"), ("window", "window")] and set(kinds[2]) == {"nsa"}
    assert [args[0] for args, _ in asked] == [CONFIGS["tiny"]] * 2 + [CONFIGS["small"]]
    assert all(args[7] == Path("old.safetensors") for args, _ in asked)


# ---- nsa build, compile-check


@pytest.mark.parametrize("there", [True, False])
def test_build_says_whether_it_compiled(monkeypatch, capsys, there: bool) -> None:
    made: list[str] = []
    library = Path("kernels.so")
    spied(monkeypatch, build_command.build, "cached", lambda: library if there or made else None)
    spied(monkeypatch, build_command.build, "library", lambda: made.append("built") or library)
    spied(monkeypatch, build_command.build, "instruction_set", "avx512")
    loaded = spied(monkeypatch, build_command.extension, "load", None)
    assert main(["build", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["compiled"] is not there and facts["library"] == "kernels.so"
    made.clear()
    assert main(["build"]) == 0 and len(loaded) == 2
    said = "was there already" if there else "compiled in"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("problems", "left", "code"),
    [([False, False], [], 0), ([False, True], [], 1), ([False, False], ["gone"], 1)],
)
def test_compile_check_fails_of_a_problem_or_of_one_that_is_gone(
    monkeypatch, capsys, problems: list[bool], left: list[str], code: int
) -> None:
    pytest.importorskip("triton")
    jobs = [SimpleNamespace(entry=SimpleNamespace(op=op)) for op in ("attention", "compress")]
    rows = [
        compile_check.Row(
            "attention", "forward", 64, 64, 4, "bf16", {}, 1, 2, 0, 0, "wgmma", 1.0, 64, (), False,
            (), "", problems=("spills",) if bad else (),
        )
        for bad in problems
    ]  # fmt: skip
    chosen = spied(monkeypatch, compile_check, "jobs", jobs)
    ran = spied(monkeypatch, compile_check, "run", rows)
    spied(monkeypatch, compile_check, "outlived", left)
    words = ["compile-check", "--op", "compress", "--processes", "3"]
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out.strip().endswith(f"2 kernels and plans, {sum(problems)} with a problem")
    assert err == "".join(f"{line}\n" for line in left)
    assert main([*words, "--all"]) == code
    assert [kwargs for _, kwargs in chosen] == [{"full": False}, {"full": True}]
    assert ran[0][0] == ([jobs[1]], 3)


# ---- nsa bench

MEASURED = Record.of("b", "n", "ms", [1.0])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], {"overhead": ((), {"rounds": 150}), "attention": (([2048, 8192, 16384],), {})}),
        (["--part", "overhead", "--rounds", "3"], {"overhead": ((), {"rounds": 3})}),
        (["--part", "attention", "--tokens", "5", "9"], {"attention": (([5, 9],), {})}),
        (["--part", "native"], {"native": (([4096, 8192, 16384], (16, 1), 128, "float32"), {})}),
        (
            ["--part", "native", "--forward", "--shape", "8/2/64/bfloat16", "--tokens", "7"],
            {"native": (([7], (8, 2), 64, "bfloat16"), {"gradients": False})},
        ),
    ],
    ids=str,
)
def test_bench_on_this_machine_measures_the_parts_asked_for(
    monkeypatch, capsys, words: list[str], wanted: dict[str, Any]
) -> None:
    found = {}
    for name, module in (("overhead", overhead), ("attention", attention), ("native", native)):
        found[name] = spied(monkeypatch, module, "measure", [MEASURED])
        monkeypatch.setattr(module, "to_text", lambda records, name=name: f"text of {name}")
    assert main(["bench", "--target", "cpu", *words]) == 0
    assert {name: asked[0] for name, asked in found.items() if asked} == wanted
    head, *texts = capsys.readouterr().out.strip().split("\n\n")
    assert head.startswith("measured on") and texts == [f"text of {name}" for name in wanted]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ([trainium.Problem(65536, (64, 4), (192, 128), 0.05)], True, [])),
        (
            "--tokens 5 --dims 64/32 8/8 --replaced 1 --backward --cores 8 --no-dense "
            "--stage compress attention".split(),
            ([trainium.Problem(5, (64, 4), dims, 1.0, True, 8) for dims in ((64, 32), (8, 8))],
             False, ["compress", "attention"]),
        ),
    ],
    ids=["default", "all"],
)  # fmt: skip
def test_bench_models_the_problems_asked_for(monkeypatch, capsys, words, wanted) -> None:
    asked = spied(monkeypatch, trainium, "measure", [Modelled("trn2", "n", "ms", 1, 2, 3)])
    monkeypatch.setattr(trainium, "to_text", lambda found: "text")
    assert main(["bench", "--target", "trn2", *words]) == 0
    assert asked == [(wanted, {})]
    assert capsys.readouterr().out == "text\n", "nothing says `measured`"


def test_bench_models_decode_steps(monkeypatch, capsys) -> None:
    asked = spied(monkeypatch, decoding, "measure", [Modelled("trn2-decode", "n", "us", 1, 2, 3)])
    monkeypatch.setattr(decoding, "to_text", lambda found: "text")
    words = "--decode 1 32 --tokens 4 8 --dims 64/32".split()
    assert main(["bench", "--target", "trn2", *words]) == 0
    assert [args for args, _ in asked] == [(x, [1, 32], (64, 4), (64, 32)) for x in (4, 8)]
    assert main(["bench", "--target", "trn2", "--decode", "2", "--json"]) == 0
    assert asked[-1][0] == (65536, [2], (64, 4), (192, 128))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "modelled"


def test_bench_appends_to_a_file_and_keeps_what_was_there(monkeypatch, tmp_path: Path) -> None:
    spied(monkeypatch, overhead, "measure", [MEASURED])
    monkeypatch.setattr(overhead, "to_text", lambda records: "text")
    file = tmp_path / "folder" / "rows.jsonl"
    for _ in range(2):
        words = ["--target", "cpu", "--part", "overhead", "--out", str(file)]
        assert main(["bench", *words]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["name"], row["median"], row["kind"]) for row in rows] == [
        ("n", 1.0, "measured")
    ] * 2
