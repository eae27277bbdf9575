"""Models in safetensors files: weights, and what is needed to build the model again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nsa_neuron.errors import BackendUnavailable, NsaError, StateMismatch
from nsa_neuron.nn.config import NsaConfig
from nsa_neuron.nn.model import ByteLanguageModel

_FOLDER = Path(__file__).parent.parent / "checkpoints"
SHIPPED = _FOLDER / "bytes-small.safetensors"
"""The byte model that ships with the package, trained on text; its card lies beside it."""
RECALL = _FOLDER / "bytes-recall.safetensors"
"""A smaller one that was trained to find what is hidden in text."""
FORMAT = 2  # grows when an older reader would misread a file; 2: rows of kv.weight by head
MODEL = "ByteLanguageModel"


def save_checkpoint(
    model: ByteLanguageModel, path: str | Path, notes: Mapping[str, Any] | None = None
) -> None:
    """Writes a model; the file appears whole or not at all.

    Args:
        model: to write.
        path: of the file.
        notes: plain data about it: how it was trained.
    """
    about = {
        "format": FORMAT,
        "model": MODEL,
        "config": model.config.to_dict(),
        "kinds": model.kinds,
        "notes": dict(notes or {}),
    }
    write_tensors(path, model.state_dict(), about)


def load_checkpoint(path: str | Path) -> tuple[ByteLanguageModel, dict[str, Any]]:
    """The model of a file, in evaluation mode on the CPU, and the notes about it.

    Raises:
        StateMismatch: no such file, a damaged one, another format, or weights that do not fit.
    """
    tensors, about = read_tensors(path)
    found = about.get("format"), about.get("model")
    if found not in ((1, MODEL), (FORMAT, MODEL)):
        raise StateMismatch(f"{path} has format and model {found}; expected {(FORMAT, MODEL)}")
    try:
        config = NsaConfig.from_dict(about["config"])
        if found[0] == 1 and config.kv_heads > 1 and not config.shared_kv:
            raise StateMismatch("its format 1 has kv.weight in another order of heads; train again")
        model = ByteLanguageModel(config, about["kinds"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, NsaError) as error:
        raise StateMismatch(f"{path} does not describe a model: {error}") from error
    return model.eval(), about.get("notes") or {}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """A safetensors file with JSON beside the tensors; replaces the old file in one move."""
    save_file = _safetensors().save_file
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        flat = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(flat, beside, {"about": json.dumps(about)})
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `write_tensors`.

    Raises:
        StateMismatch: no such file, or one that is damaged or not ours.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if not isinstance(about, dict):
                raise KeyError("about")
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except FileNotFoundError:
        raise StateMismatch(f"there is no checkpoint {path}") from None
    except KeyError:
        raise StateMismatch(
            f"{path} was not written by nsa-neuron: it says nothing about itself"
        ) from None
    except Exception as error:  # safetensors raises its own class, OSError or ValueError
        raise StateMismatch(f"{path} cannot be read, it may be cut off: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise BackendUnavailable(
            "checkpoints need the package 'safetensors': pip install 'nsa-neuron[hf]'"
        ) from None
    return _Tools(safetensors.safe_open, safetensors.torch.save_file)


class _Tools:
    """The two functions of safetensors that are used."""

    def __init__(self, safe_open: Any, save_file: Any) -> None:
        self.safe_open, self.save_file = safe_open, save_file
