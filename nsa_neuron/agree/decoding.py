"""Greedy continuation of token ids, and where two of them first differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.agree.report import Token
from nsa_neuron.agree.subject import Subject, tensors
from nsa_neuron.errors import NsaError
from nsa_neuron.numerics import Budget

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Continuation:
    """What was decoded, on the CPU.

    Attributes:
        tokens: `[B, steps]`.
        logits: what each was chosen from, `[B, steps, V]`.
    """

    tokens: Tensor
    logits: Tensor


def greedy(subject: Subject, steps: int) -> Continuation:
    """The likeliest tokens behind the prompt.

    Raises:
        NsaError: the model gives no logits `[B, S, V]` or `[B, V]`, or the subject's own `decode`
            something else than was asked for.
    """
    prompt = subject.prompt
    assert prompt is not None
    decode = subject.decode or again
    tokens, logits = decode(subject.model, prompt, steps)
    wanted = (prompt.shape[0], steps)
    if tuple(tokens.shape) != wanted or tuple(logits.shape[:-1]) != wanted:
        raise NsaError(
            f"decode returned tokens {list(tokens.shape)} and logits {list(logits.shape)}; they "
            f"must be {list(wanted)} and [{wanted[0]}, {wanted[1]}, V]"
        )
    return Continuation(tokens.cpu(), logits.detach().cpu())


def again(model: Callable[..., Any], tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Decodes by running the whole once more for each token; needs no cache."""
    chosen, scores = [], []
    for _ in range(steps):
        found = [x for x in tensors(model(tokens)) if x.is_floating_point()]
        if not found or found[0].dim() not in (2, 3):
            raise NsaError("decoding needs a model that returns logits [B, S, V] or [B, V]")
        logits = found[0][:, -1] if found[0].dim() == 3 else found[0]
        scores.append(logits)
        chosen.append(logits.argmax(-1))
        tokens = torch.cat([tokens, chosen[-1][:, None]], 1)
    return torch.stack(chosen, 1), torch.stack(scores, 1)


def differences(mine: Continuation, exact: Continuation, plain: Continuation) -> list[Token]:
    """Where each row first differs from the float64 reference.

    What follows a difference has another prefix, so it is not compared. The margin that makes a
    difference a tie is what the logits' budget allows, as plain torch's error grants it where its
    own continuation has the same prefix.
    """
    found = []
    for row in range(mine.tokens.shape[0]):
        differ = (mine.tokens[row] != exact.tokens[row]).nonzero()
        if not differ.numel():
            continue
        step = int(differ[0])
        wanted, got = int(exact.tokens[row, step]), int(mine.tokens[row, step])
        oracle = exact.logits[row, step]
        same_prefix = torch.equal(plain.tokens[row, :step], exact.tokens[row, :step])
        eager = plain.logits[row, step] if same_prefix else oracle
        budget = Budget()(mine.logits[row, step], oracle, eager, {}).budget
        margin = float(oracle[wanted] - oracle[got])
        found.append(Token(row, step, wanted, got, margin, 2 * budget))
    return found
