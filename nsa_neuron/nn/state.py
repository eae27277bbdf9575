"""State dicts that are checked as a whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nsa_neuron.errors import StateMismatch

SHOWN = 3  # names in a message


class CheckedModule(nn.Module):
    """A module whose `load_state_dict` loads everything or, raising, nothing.

    Attributes:
        _version: of the layout of its parameters; torch keeps it in a state dict's metadata.
    """

    _version = 1

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but a mismatch leaves the module as it was.

        Raises:
            StateMismatch: names or shapes of another configuration, or a newer layout.
        """
        own = self.state_dict()
        versions = getattr(state_dict, "_metadata", {}).get("", {})
        if versions.get("version", self._version) > self._version:
            raise StateMismatch(
                f"the state dict has version {versions['version']} of {type(self).__name__}'s "
                f"layout; this nsa-neuron knows up to {self._version}: update it"
            )
        wrong = [
            f"{name} is {list(state_dict[name].shape)}, not {list(value.shape)}"
            for name, value in own.items()
            if name in state_dict
            and isinstance(value, Tensor)
            and state_dict[name].shape != value.shape
        ]
        if strict:
            wrong += [f"{name} is missing" for name in own if name not in state_dict]
            wrong += [f"{name} is unknown" for name in state_dict if name not in own]
        if wrong:
            more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise StateMismatch(
                f"the state dict is of another configuration than this {type(self).__name__}: "
                f"{'; '.join(wrong[:SHOWN])}{more}"
            )
        return super().load_state_dict(state_dict, strict, assign)
