"""The first wrong call of a target, kept in a file and tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_agree import acme, subject

from nsa_neuron.agree import agree, load
from nsa_neuron.agree.saved import save
from nsa_neuron.agree.text import to_text
from nsa_neuron.cli import main
from nsa_neuron.errors import NsaError
from nsa_neuron.ops import get


def saved_by(fault: str, folder: Path) -> Path:
    with acme(fault):
        run = agree(subject(), ["acme"], decode=0, save=folder).runs[0]
    assert run.saved
    return Path(run.saved)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("window edge", "acme-eager-call6-nsa_attention_forward.pt"),
        ("scale in dq", "acme-eager-call7-nsa_attention_backward.pt"),
    ],
)
def test_the_first_wrong_call_can_be_tried_again(
    fault: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved_by(fault, tmp_path / "calls")
    assert [x.name for x in (tmp_path / "calls").iterdir()] == [name] == [file.name]
    with acme(fault):
        found = agree(load(str(file)), ["acme", "reference", "cpu:torch"])
    wrong, reference, torch_mode = found.runs
    assert [len(run.calls) for run in found.runs] == [1, 1, 1]
    assert wrong.bad_calls and not wrong.ok and wrong.calls[0].op in file.name
    assert reference.ok and torch_mode.ok
    assert main(["agree", str(file), "--targets", "reference"]) == 0
    assert "agrees" in capsys.readouterr().out


def test_what_is_right_leaves_no_file(tmp_path: Path) -> None:
    with acme():
        found = agree(subject(), ["acme"], decode=0, save=tmp_path / "calls")
    assert found.ok and found.runs[0].saved == "" and not (tmp_path / "calls").exists()


def test_the_report_says_how_to_try_again(tmp_path: Path) -> None:
    with acme("window edge"):
        found = agree(subject(), ["acme"], decode=0, save=tmp_path)
    said = f"try it again: nsa agree {found.runs[0].saved} --targets acme:eager"
    assert said in to_text(found) and found.to_dict()["runs"][0]["saved"] in said


def test_a_view_is_saved_without_its_storage(tmp_path: Path) -> None:
    x = torch.randn(1, 1_000_000, 1, 4)[:, :8]
    values: dict[str, Any] = {**get("compress").defaults, "x": x, "block": 4, "stride": 4}
    assert save(tmp_path, "small", get("compress"), values).stat().st_size < 10_000


def test_files_that_hold_no_call(tmp_path: Path) -> None:
    with pytest.raises(NsaError, match="there is no file"):
        load(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(NsaError, match="cannot be read"):
        load(str(tmp_path / "text.pt"))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(NsaError, match="holds no saved call"):
        load(str(tmp_path / "weights.pt"))


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(found: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", breaks)
    values = {**get("compress").defaults, "x": torch.randn(1, 8, 1, 4), "block": 4, "stride": 4}
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, "call", get("compress"), values)
    assert list(tmp_path.iterdir()) == []
