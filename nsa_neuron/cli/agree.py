"""Run your model or function on several targets and say where their results part.

FILE.py::make is a function without arguments that returns (model, inputs): an nn.Module or a
function, and a tensor, a tuple of positional or a dictionary of keyword inputs. If the file also
defines decode(model, tokens, steps) -> (tokens [B, steps], logits [B, steps, V]), decoding uses it.

The file of a call that --save has kept is a subject, too: nsa agree DIR/CALL.pt --targets NAME.

Every call of an nsa op is judged against the float64 reference on the inputs that it got; every
module's output and every gradient is compared with a float64 run of the whole.

Exit code: 0 every target agrees, 1 some target parts, 2 it could not be carried out.
"""

from __future__ import annotations

import argparse

from nsa_neuron import agree
from nsa_neuron.agree import html, text
from nsa_neuron.cli import FAILED, shared, values

DECODED = 4


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="FILE.py::make | CALL.pt")
    parser.add_argument(
        "--targets", required=True, type=_names, metavar="NAME[:MODE],...",
        help="e.g. trn2:sim,h200:sim,cpu",
    )  # fmt: skip
    parser.add_argument("--no-backward", action="store_true", help="forward only")
    parser.add_argument(
        "--decode", type=values.whole(0), default=DECODED, metavar="N",
        help=f"tokens (default {DECODED})",
    )  # fmt: skip
    parser.add_argument("--seed", type=values.seed, default=0)
    parser.add_argument(
        "--save", type=values.new_folder, metavar="DIR",
        help="keep each target's first wrong call as a file",
    )  # fmt: skip
    parser.add_argument("--html", type=values.new_file, metavar="FILE", help="write a page as well")
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = agree.agree(
        agree.load(args.subject),
        args.targets,
        backward=not args.no_backward,
        decode=args.decode,
        seed=args.seed,
        save=args.save,
    )
    if args.html:
        args.html.write_text(html.page(found), encoding="utf-8")
    if args.json:
        shared.print_json(found.to_dict())
    else:
        print(text.to_text(found))
    return 0 if found.ok else FAILED


def _names(words: str) -> list[str]:
    """The targets between commas, one at least."""
    names = [name for word in words.split(",") if (name := word.strip())]
    if not names:
        raise argparse.ArgumentTypeError("no target is named")
    return names
