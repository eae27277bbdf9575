"""An agreement as text and as a web page, letter by letter; and the words of where a run parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nsa_neuron import environment
from nsa_neuron.agree import Agreement, Call, Point, Run, Token
from nsa_neuron.agree.html import page
from nsa_neuron.agree.text import POLICY, to_text

RIGHT = Call(1, "forward", "", "attention", "right", "o", 1.0, 4.0, inputs="B=1 on cpu")
WRONG = Call(
    2, "backward", "layers.<0>", "nsa_attention_backward", "wrong", "dq", 9.0, 3.0, "dq: 9 > 3",
    ("compress", "gated_sum"), "B=2 <on> cpu",
)  # fmt: skip
REFUSED = Call(13, "decode", "layers.1", "decode", "refused", detail="<no>", inputs="B=3 on cpu")
WITHIN = Point("forward", "", 0, True, 1.0, 4.0)
BEYOND = Point("forward", "norm<1>", 1, False, 5.0, 2.5, "5 > <2.5>")
GRADIENT = Point("backward", "w", 0, False, 0.5, 0.0, "w < 0")
TIE, DIFFERS = Token(0, 1, 2, 3, 0.1, 0.1), Token(4, 5, 6, 7, 0.12345, 0.1)
AGREES = Run("cpu:torch", [RIGHT], [WITHIN], between={"cuda:sim": 0.25})
PARTS = Run(
    "cuda:sim", [RIGHT, WRONG, REFUSED], [WITHIN, BEYOND, GRADIENT], [TIE, DIFFERS], 8,
    "decode ended with <Error>", {"cpu:torch": 0.25}, "calls/x.pt",
)  # fmt: skip
FOUND = Agreement("m<x>", "Model & inputs", [AGREES, PARTS], ["<note> one", "note two"])
FIRST = (
    "backward, layers.<0>: call 2, nsa_attention_backward (its part compress, gated_sum) "
    "is wrong: dq: 9 > 3"
)

TEXT = f"""\
m<x>: Model & inputs
{POLICY}

target     nsa calls                    modules, gradients  decoded                  verdict
---------  ---------------------------  ------------------  -----------------------  -------
cpu:torch  1 right                      1 within            -                        agrees
cuda:sim   1 right, 1 wrong, 1 refused  1 within, 2 beyond  8 each, 1 differ, 1 tie  PARTS

cuda:sim first parts at {FIRST}

cuda:sim
  backward call   2  layers.<0>  nsa_attention_backward [compress, gated_sum]
      wrong: dq: 9 > 3
      on B=2 <on> cpu
  decode   call  13  layers.1  decode
      refused: <no>
      on B=3 on cpu
  try it again: nsa agree calls/x.pt --targets cuda:sim
  forward  norm<1>  5 > <2.5>
  backward w  w < 0
  decode   row 0, step 1: 3, not 2: tie (margin 0.1, ties up to 0.1)
  decode   row 4, step 5: 7, not 6: differs (margin 0.123, ties up to 0.1)
  decode ended with <Error>

largest difference of the final output between targets
target     target    difference
---------  --------  ----------
cpu:torch  cuda:sim  0.25

<note> one

note two"""

BAR = '<span class="bar"><i style="width:25%"></i></span>1 of 4'
FULL = '<span class="bar bad"><i style="width:100%"></i></span>'
CALLS = (
    '<div class="scroll"><table><tr><th>#</th><th>phase</th><th>module</th><th>op</th>'
    "<th>verdict</th><th>error</th><th>detail</th><th>inputs</th></tr>\n"
    "<tr><td>1</td><td>forward</td><td>(model)</td><td>attention</td><td>right</td>"
    f"<td>{BAR}</td><td></td><td>B=1 on cpu</td></tr>"
)
POINTS = (
    '<div class="scroll"><table><tr><th>phase</th><th>module</th><th>verdict</th><th>error</th>'
    "<th>detail</th></tr>\n"
    f"<tr><td>forward</td><td>(model)</td><td>within</td><td>{BAR}</td><td></td></tr>"
)
END = "</table></div>"
HTML = f"""
<h1>nsa agree</h1>
<p><b>m&lt;x&gt;</b>: Model &amp; inputs</p>
<p class="bad">cuda:sim: parts</p>
<p class="quiet">a &lt;cpu&gt; · torch 9 · numpy 8$revision</p>
<p class="quiet">{POLICY}</p>
<p>&lt;note&gt; one</p><p>note two</p>
<h2>cpu:torch: <span class="ok">agrees</span></h2>


{CALLS}{END}
{POINTS}{END}

<h2>cuda:sim: <span class="bad">parts</span></h2>
<p>First parts at {FIRST.replace("<", "&lt;").replace(">", "&gt;")}</p>
<p>decode ended with &lt;Error&gt;</p>
{CALLS}
<tr><td>2</td><td>backward</td><td>layers.&lt;0&gt;</td><td>nsa_attention_backward</td>\
<td>wrong</td><td>{FULL}9 of 3</td><td>dq: 9 &gt; 3</td><td>B=2 &lt;on&gt; cpu</td></tr>
<tr><td>13</td><td>decode</td><td>layers.1</td><td>decode</td><td>refused</td><td></td>\
<td>&lt;no&gt;</td><td>B=3 on cpu</td></tr>{END}
{POINTS}
<tr><td>forward</td><td>norm&lt;1&gt;</td><td>beyond</td><td>{FULL}5 of 2.5</td>\
<td>5 &gt; &lt;2.5&gt;</td></tr>
<tr><td>backward</td><td>gradient of w</td><td>beyond</td><td></td><td>w &lt; 0</td></tr>{END}
<div class="scroll"><table><tr><th>row</th><th>step</th><th>wanted</th><th>got</th>\
<th>margin</th><th>verdict</th></tr>
<tr><td>0</td><td>1</td><td>2</td><td>3</td><td>0.1</td><td>tie</td></tr>
<tr><td>4</td><td>5</td><td>6</td><td>7</td><td>0.123</td><td>differs</td></tr>{END}
</html>
"""


def test_an_agreement_as_text() -> None:
    assert to_text(FOUND) == TEXT


@pytest.mark.parametrize("revision", ["", "abc"])
def test_an_agreement_as_a_page(monkeypatch, revision: str) -> None:
    monkeypatch.setattr(environment, "describe", lambda: {"cpu": "a <cpu>", "revision": revision})
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "9", "numpy": "8"})
    head, shown = page(FOUND).split("</style>")
    assert head.startswith("<!doctype html>\n") and "<title>nsa agree: m&lt;x&gt;</title>" in head
    assert shown == HTML.replace("$revision", f" · revision {revision}" if revision else "")


def test_a_page_of_targets_that_agree_has_one_verdict_for_all() -> None:
    shown = page(Agreement("x", "y", [AGREES, Run("cuda:hw")]))
    assert '<p class="ok">every target agrees</p>' in shown and "First parts" not in shown
    assert shown.count("<table>") == 2, "of what a run has none of there is no table"
    both = page(Agreement("x", "y", [PARTS, replace(PARTS, target="cuda:hw")]))
    assert '<p class="bad">cuda:sim, cuda:hw: parts</p>' in both


def test_texts_of_little_say_nothing_of_what_there_is_not() -> None:
    alone = to_text(Agreement("x", "y", [Run("cpu:torch", decoded=4)]))
    _, table = alone.split("\n\n")
    cells = [cell.strip() for cell in table.splitlines()[-1].split("  ") if cell]
    assert cells == ["cpu:torch", "0 right", "0 within", "4 each", "agrees"]


def test_each_pair_of_targets_stands_once_in_the_order_of_the_runs() -> None:
    names = ("a:x", "b:x", "c:x")
    runs = [
        Run(one, between={other: i + j / 10 for j, other in enumerate(names) if other != one})
        for i, one in enumerate(names)
    ]
    rows = to_text(Agreement("x", "y", runs)).split("\n\n")[-1].splitlines()[3:]
    assert [row.split() for row in rows] == [
        ["a:x", "b:x", "0.1"], ["a:x", "c:x", "0.2"], ["b:x", "c:x", "1.2"]
    ]  # fmt: skip


def test_of_many_only_the_first_eight_are_shown_of_each_kind() -> None:
    calls = [replace(REFUSED, number=i) for i in range(9)]
    points = [replace(BEYOND, name=f"m{i}") for i in range(10)]
    tokens = [replace(DIFFERS, row=i) for i in range(11)]
    text = to_text(Agreement("x", "y", [Run("cpu:torch", calls, points, tokens)]))
    for kind, last in (("  decode   call ", "7  layers.1  decode"),
                       ("  forward  m", "m7  5 > <2.5>"),
                       ("  decode   row ", "row 7, step 5")):  # fmt: skip
        lines = [line for line in text.splitlines() if line.startswith(kind)]
        assert len(lines) == 8 and last in lines[-1]
    assert text.endswith("\n  ... and 3 more; --json has all")


# ---- where a run first parts


@pytest.mark.parametrize(
    ("run", "first"),
    [
        (PARTS, FIRST),
        (replace(PARTS, calls=[replace(REFUSED, module="")]),
         "decode, (model): call 13, decode is refused: <no>"),
        (replace(PARTS, calls=[RIGHT]),
         "forward, norm<1>: 5 > <2.5>; every call of an nsa op is right on its own inputs"),
        (replace(PARTS, calls=[], points=[GRADIENT]),
         "backward, gradient of w: w < 0; every call of an nsa op is right on its own inputs"),
        (replace(PARTS, calls=[], points=[]),
         "decode, row 4, step 5: token 7, not 6, whose logit is 0.123 higher"),
        (replace(PARTS, calls=[], points=[], tokens=[TIE]), "decode ended with <Error>"),
    ],
)  # fmt: skip
def test_the_first_parting_is_a_call_then_a_module_then_a_token(run: Run, first: str) -> None:
    assert run.first == first and not run.ok


def test_an_agreement_as_data_is_whole() -> None:
    data = Agreement("x", "y", [AGREES, PARTS], ("note",)).to_dict()
    assert (data["subject"], data["description"], data["notes"]) == ("x", "y", ["note"])
    assert [set(vars(AGREES)) | {"ok", "first"} == set(run) for run in data["runs"]] == [True] * 2
    agrees, parts = data["runs"]
    assert (agrees["ok"], agrees["first"], parts["first"]) == (True, "", FIRST)
    assert parts["calls"][1] == vars(WRONG) and parts["points"][1] == vars(BEYOND)
    assert parts["tokens"][0] == vars(TIE) and parts["between"] == {"cpu:torch": 0.25}


def test_what_nothing_says_of_a_call_is_nothing() -> None:
    """`Call`'s and `Point`'s unnamed facts."""
    call, point = Call(1, "forward", "", "attention", "right"), Point("forward", "", 0, True, 0, 0)
    assert (call.result, call.error, call.budget, call.detail, call.parts, call.inputs) == (
        "", 0.0, 0.0, "", (), ""
    )  # fmt: skip
    assert point.detail == "" and Run("x").decoded == 0 and Run("x").saved == ""
    assert Token(0, 0, 0, 0, 0.1, 0.1).tie and not Token(0, 0, 0, 0, math.inf, 0.1).tie
