"""What people bring to `nsa agree`: forms of inputs and results, files that do odd things."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nsa_neuron
from nsa_neuron.agree import Agreement, Subject, agree, load
from nsa_neuron.agree.compare import apart, gradient_floor
from nsa_neuron.cli.shared import print_json
from nsa_neuron.errors import InvalidArgument, NsaError

if TYPE_CHECKING:
    from pathlib import Path


class Pair(NamedTuple):
    q: Tensor
    k: Tensor


def attend(q: Tensor, k: Tensor) -> Tensor:
    o: Tensor = nsa_neuron.attention(q, k, k)[0]
    return o


def qk(tokens: int = 5) -> Pair:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, tokens, 2, 4, generator=gen)
    return Pair(q, torch.randn(1, tokens, 1, 4, generator=gen))


def tried(model: Any, *args: Any, **options: Any) -> Agreement:
    return agree(Subject("mine", model, args), ["cpu:torch"], **options)


def gradients(found: Agreement) -> set[str]:
    return {p.name for p in found.runs[0].points if p.phase == "backward"}


def written(folder: Path, text: str) -> str:
    path = folder / "random.py"  # the name of a module that others need
    path.write_text(text)
    return f"{path}::make"


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
import torch, nsa_neuron

@dataclass
class Both:
    q: torch.Tensor
    k: torch.Tensor
    heads: int = 2  # dataclass looks such an annotation up in the module

def model(x):
    return Both(*nsa_neuron.attention(x.q, x.k, x.k))

def make():
    return model, (Both(torch.randn(1, 5, 2, 4), torch.randn(1, 5, 1, 4)),)
"""


def test_dataclasses_and_named_tuples_are_looked_into(tmp_path: Path) -> None:
    made = load(written(tmp_path, DATACLASS))
    assert not hasattr(random, "make")
    found = agree(made, ["cpu:torch"])
    assert found.ok and gradients(found) == {"input 0", "input 0[1]"}
    assert made.placed("cpu", torch.float64)().q.dtype == torch.float64
    found = tried(lambda pair: attend(pair.q, pair.k), qk())
    assert found.ok and gradients(found) == {"input 0", "input 0[1]"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import sys; sys.exit(0)", "raised SystemExit: 0"),
        ("return print, [1]", "inputs of type list; they must be a tensor, a tuple"),
        ("return print, 3", "inputs of type int"),
    ],
)
def test_files_whose_make_is_none(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(NsaError, match=said):
        load(written(tmp_path, f"def make():\n    {body}\n"))


def test_what_is_not_compared_is_said() -> None:
    ids = tried(lambda q, k: attend(q, k).argmax(-1), *qk())
    assert ids.runs[0].calls and "outputs were not compared" in ids.notes[-2]
    assert "gradients were not compared" in ids.notes[-1] and not gradients(ids)
    weights = nn.Parameter(torch.ones(4))  # no input of the function: it gets no gradient
    closed = tried(lambda tokens: weights * tokens[..., None], torch.arange(6)[None], decode=0)
    assert "gradients were not compared" in "".join(closed.notes)


class Broken(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return attend(q / 0 * 0, k)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Broken()

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        made: Tensor = self.inner(q, k)
        return made


def test_nan_of_the_model_itself_is_no_backend_s_fault() -> None:
    with pytest.raises(NsaError, match="gives NaN in float64 on the reference, first in inner"):
        tried(Around(), *qk())


def test_a_gradient_that_a_target_loses_is_found() -> None:
    def model(q: Tensor, k: Tensor) -> Tensor:
        on_target = "judged" in (nsa_neuron.registry.requested() or "")
        return attend(q, k.detach() if on_target else k)

    run = tried(model, *qk()).runs[0]
    assert [p.name for p in run.parted] == ["input 1"]
    assert run.parted[0].detail == "no gradient; the reference's run has one"


def test_gradients_that_cancel_are_judged_by_what_cancels() -> None:
    """A query with one key has no gradient: what is left of it is rounding of the others'."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
    none = torch.zeros(1, 0, 2, 8)

    def one_token(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Any:
        return nsa_neuron.nsa_attention(q, none.to(q), none.to(q), k, v, k, v, gates)

    run = tried(one_token, q, k, v, torch.rand(1, 1, 4, 3)).runs[0]
    assert run.ok, run.first
    left = [p.error for p in run.points if p.name in ("input 0", "input 1")]
    assert min(left) > 1e-8, "nothing was left: this tests nothing"


def test_a_gradient_without_end_makes_others_no_laxer() -> None:
    x = torch.tensor([torch.inf, torch.nan, 2.0])
    assert gradient_floor([x, torch.zeros(0)]) == 0.1 and gradient_floor([x[:2]]) == 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decode": -1}, "argument 'decode' is -1; it must be 0 or more tokens"),
        ({"seed": 2**63}, "argument 'seed' is 9223372036854775808; it must be a 64-bit number"),
    ],
)
def test_options_out_of_range(options: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        tried(attend, *qk(), **options)


def test_a_decode_that_stops_early_is_refused() -> None:
    def decode(model: Any, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        return tokens[:, :1], torch.zeros(1, 1, 4)

    mine = Subject("mine", lambda tokens: torch.zeros(1, 6, 4), (torch.zeros(1, 6).long(),))
    early = Subject("early", mine.model, mine.args, {}, decode)
    with pytest.raises(
        NsaError, match=r"decode returned tokens \[1, 1\].*must be \[1, 4\].*--decode 0"
    ):
        agree(early, ["cpu:torch"])
    hidden = Subject("hidden", lambda tokens: torch.zeros(1), mine.args)
    with pytest.raises(NsaError, match=r"logits \[B, S, V\] or \[B, V\]; decode=0"):
        agree(hidden, ["cpu:torch"])


def test_results_of_targets_that_cannot_be_compared_are_infinitelyapart() -> None:
    one, two = torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])
    assert apart([one], [two]) == 0.5 and apart([one], [one]) == 0
    assert apart([one], [two[:1]]) == apart([one], []) == torch.inf
    assert apart([one], [one * torch.nan]) == torch.inf


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"error": torch.inf, "rows": ({"x": float("nan")}, [0.5])})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"error": "inf", "rows": [{"x": "nan"}, [0.5]]}
