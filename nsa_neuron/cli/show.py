"""Show which parts of a text a model's answer looked at: one web page, and a picture.

The text is a file. `--ask` is a position in it (negative: from the end), or a question that is put
behind it. Blocks that were picked, that could have been, and that the query cannot see are told
apart, per layer and kv head, with gates, compressed and window attention.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron.cli import values
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import generate
from nsa_neuron.nn.checkpoint import SHIPPED, load_checkpoint
from nsa_neuron.show import html, look, picture

if TYPE_CHECKING:
    import argparse

MOST = 128 * 1024  # bytes of a text
ANSWER = 48  # bytes that are written behind a question
POSITION = re.compile("-?[0-9]+")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=f"a text, up to {MOST:,} bytes")
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=SHIPPED,
        help="model.safetensors of `nsa train`; default: the text model that ships with this",
    )  # fmt: skip
    parser.add_argument(
        "--ask", action="append", default=[], metavar="POSITION_OR_TEXT",
        help="may be repeated, but for one question; default: the last byte",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=values.new_file, default="show.html", help="default show.html"
    )
    parser.add_argument("--png", type=values.new_file, help="write a picture as well")


def run(args: argparse.Namespace) -> int:
    model, _ = load_checkpoint(args.checkpoint)
    try:
        text = args.file.read_bytes()
    except OSError as error:
        raise InvalidArgument(
            "nsa show", "file", error.strerror or "unreadable", "a file"
        ) from None
    if len(text) > MOST:
        raise InvalidArgument("nsa show", "file", f"{len(text)} bytes long", f"at most {MOST}")
    positions, questions = _asked(args.ask)
    about = f"{args.file}, {len(text):,} bytes, read by {args.checkpoint.name}."
    if questions:
        text += b"\n\n" + questions[0].encode()
        (answer,) = generate(model, [text], ANSWER)
        about += f" Asked: {questions[0]!r}. Wrote: {answer.decode(errors='replace')!r}."
    found = look(model, text, [*positions, *([-1] if questions or not positions else [])])
    args.out.write_text(
        html(found, f"What {args.file.name} was searched for", about), encoding="utf-8"
    )
    print(f"page     {args.out}")
    if args.png:
        picture(found, args.png, args.file.name)
        print(f"picture  {args.png}")
    for view in found.views:
        chosen = [p for p in view.picked if p.why == "importance"]
        best = max(chosen, key=lambda p: p.importance, default=None)
        if best is not None:
            where = f"byte {view.query} layer {view.layer} head {view.kv_head}"
            print(f"{where}: most important passage {best.first}..{best.last}")
    return 0


def _asked(words: list[str]) -> tuple[list[int], list[str]]:
    """Positions and questions."""
    positions = [int(word) for word in words if POSITION.fullmatch(word)]
    questions = [word for word in words if not POSITION.fullmatch(word)]
    if len(questions) > 1:
        raise InvalidArgument("nsa show", "--ask", f"{len(questions)} questions", "one at most")
    return positions, questions
