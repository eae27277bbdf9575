"""The main job, end to end: a byte-level NSA language model reads a real document.

`nsa demo` (or `make demo`) takes the small model that ships with the package, trained by `nsa
train`, compiles its blocks with `torch.compile(backend="nsa_neuron")`, reads 8K bytes of Python's
documentation that training left out, writes 160 more, and shows which blocks the last query
selected, with the text they cover. Then a second model, trained on recall, is asked for facts that
were planted in 8K bytes of the same document (`nsa_neuron.planted`).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsa_neuron
from nsa_neuron import conformance, planted
from nsa_neuron.conformance import text
from nsa_neuron.nn import ByteLanguageModel, Sampling, stream
from nsa_neuron.nn.checkpoint import RECALL, SHIPPED, load_checkpoint
from nsa_neuron.records import recording
from nsa_neuron.registry import use_backend
from nsa_neuron.show import Look, html, look
from nsa_neuron.simulator import cost
from nsa_neuron.training.corpus import HELD_OUT, help_topics

PROMPT = 8192  # tokens of prefill
SIMULATED_PROMPT = 1024  # where kernels are simulated or interpreted
DECODE = 160  # tokens decoded
# The likeliest byte, or nearly so, makes so small a model repeat a phrase or run into a rule of
# asterisks; far down the tail it misspells. Between them, by reading what seven settings write.
SAMPLING = Sampling(temperature=0.8, top_p=0.85)
COMPARED = 4096  # bytes that the reference reads as well, where the kernels ran on a CPU
REFERENCE = "reference"
FACTS, MIN_FACTS = 8, 1024  # planted in a document of so many bytes at least
MEANING = """
What the lines mean
  lowering   which kernels run NSA's operations here, and what compiles everything between them
  compile    torch.compile of one block, for reading and for writing, once for all lengths
  prefill    reading the document; decode: writing, a byte at a time, from the cache
  beside     the start of it read again, not compiled, by these kernels and by the plain reference
  wrote      what the model believes comes next, drawn at temperature {temperature:g} from the
             likeliest {top_p:.0%}; it is small: real words, mostly phrases, no sense
  planted    facts hidden in the document: a capital and another one behind it; each first one is
             asked for at the end, farther away than the sliding windows of all layers reach
  found      right answers of a model of {parameters:,} parameters, trained on this task
  passage    the block of text that selected attention picked for the farthest fact
"""
ABOUT = (
    "Eight facts, two capitals each, are planted in Python's documentation, whose own capitals are "
    "made small. At its end each first capital is asked for; choose a query to see where the model "
    "looked for it."
)
BAND = ("low", "central", "high")
WARM_UP = 300  # tokens that compile the graphs; sizes are dynamic, so 8K reuses them


@dataclass
class Timings:
    """Seconds, measured on this machine, and kernels that the prefill started on a simulator."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    launches: int = 0


@dataclass
class Modelled:
    """What the nsa ops of one stage would take on simulated cores; no measurement.

    Attributes:
        launches: kernels started.
        low, central, high: their modelled times, one after the other, in microseconds.
    """

    launches: int
    low: float
    central: float
    high: float

    @classmethod
    def of(cls, records: Sequence[Any]) -> Modelled:
        """The sum over the records of simulated launches."""
        bands = [cost.estimate(record).band for record in records]
        times = (sum(getattr(band, end) for band in bands) / 1e3 for end in BAND)
        return cls(len(records), *times)

    def __str__(self) -> str:
        return (
            f"{self.central:,.0f} us ({self.low:,.0f} to {self.high:,.0f}) in {self.launches} "
            "kernel launches"
        )


@dataclass
class Selected:
    """One block that the last query selected; see `nsa_neuron.show.Passage`.

    Attributes:
        block: id. first, last: tokens it covers.
        why: `first`, `before` or `own`, which are always selected, or `importance`.
        text: the bytes it covers, as text.
    """

    block: int
    first: int
    last: int
    why: str
    text: str


@dataclass
class DemoResult:
    """What the demo found; `to_json` gives plain data.

    Attributes:
        document, model: a line about each. tokens: bytes that were read.
        timings: seconds. written: what the model wrote.
        selected, look: what its last query selected and looked at.
        facts: planted ones, and the answers of the recall model, which has `parameters`.
        lowerings, modelled: see `nsa_neuron.explain` and `Modelled`.
        compared: tokens per second of the same prefill by target, see `compare`.
    """

    document: str
    model: str
    tokens: int
    timings: Timings
    written: str
    selected: list[Selected]
    look: Look
    facts: planted.Planted
    parameters: int
    lowerings: dict[str, Any] = field(default_factory=dict)
    modelled: dict[str, Modelled] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)

    @property
    def prefill_rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.timings.prefill

    @property
    def decode_rate(self) -> float:
        """Tokens per second."""
        return DECODE / self.timings.decode

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "document": self.document,
            "model": self.model,
            "prefill": {"tokens": self.tokens, "seconds": self.timings.prefill},
            "decode": {"tokens": DECODE, "seconds": self.timings.decode},
            "compile_seconds": self.timings.compile,
            "compared": self.compared,
            "written": self.written,
            "selected": [vars(block) for block in self.selected],
            "facts": [answer.to_json() for answer in self.facts.answers],
            "lowerings": self.lowerings,
            "modelled": {stage: vars(time) for stage, time in self.modelled.items()},
        }


def document() -> bytes:
    """Half a megabyte of English, Python's help topics: first those that training left out."""
    topics = help_topics()
    held_out = sorted(topics[::HELD_OUT], key=len, reverse=True)
    return b"\n\n".join([*held_out, *(t for i, t in enumerate(topics) if i % HELD_OUT)])


def run(prompt: int = PROMPT, options: dict[str, Any] | None = None) -> DemoResult:
    """Prefill, decode and selection on the document.

    Args:
        prompt: tokens of prefill.
        options: of the compile backend (`target`, `mode`, `rest`).
    """
    prompt_text = document()[:prompt]
    model, notes = load_checkpoint(SHIPPED)
    fast = copy.deepcopy(model)
    compiled = fast.compile_blocks(backend="nsa_neuron", options=options)
    timings, warm_up = Timings(), Timings()
    with torch.no_grad():
        write(fast, prompt_text[:WARM_UP], 4, warm_up)
        timings.compile = warm_up.prefill + warm_up.decode
        with recording() as records:
            written = write(fast, prompt_text, DECODE, timings, records)
        looked = look(model, prompt_text + written, [-1])
    recall, _ = load_checkpoint(RECALL)
    lowerings = nsa_neuron.explain(compiled).to_json()
    return DemoResult(
        document=f"Python's help topics, {len(prompt_text):,} bytes that training left out",
        model=describe(model, notes),
        tokens=len(prompt_text),
        timings=timings,
        written=written.decode(errors="replace"),
        selected=selected_blocks(looked),
        look=looked,
        facts=planted.plant(recall, document()[: max(prompt, MIN_FACTS)], FACTS),
        parameters=sum(p.numel() for p in recall.parameters()),
        lowerings=lowerings,
        modelled=modelled_stages(records, timings.launches),
        compared=compare(model, prompt_text[:COMPARED], lowerings),
    )


def compare(
    model: ByteLanguageModel, prompt_text: bytes, lowerings: dict[str, Any]
) -> dict[str, float]:
    """Tokens per second of reading a text by the kernels that ran here and by the reference.

    Both run the model as it is, not compiled, after a short text. Nothing is compared where
    kernels are simulated, or run on an accelerator.
    """
    targets = {choice["target"] for choice in lowerings["choices"]}
    if not all(target.startswith("cpu:") for target in targets):
        return {}
    rates = {}
    with torch.no_grad():
        for target in (*sorted(targets), REFERENCE):
            with use_backend(target):
                write(model, prompt_text[:WARM_UP], 1, Timings())
                taken = Timings()
                write(model, prompt_text, 1, taken)
            rates[target] = len(prompt_text) / taken.prefill
    return rates


def describe(model: ByteLanguageModel, notes: dict[str, Any]) -> str:
    """A line about the model."""
    c, count = model.config, sum(p.numel() for p in model.parameters())
    return (
        f"{len(model.kinds)} NSA blocks, {c.heads} query heads on {c.kv_heads} kv head, width "
        f"{c.dim}, {count / 1e6:.2f} M parameters, trained {notes['trained_bytes'] / 1e6:.1f} MB"
    )


def modelled_stages(records: Sequence[Any], prefill: int) -> dict[str, Modelled]:
    """Modelled time of prefill, whose launches are the first `prefill`, and of all decoding."""
    stages = {"prefill": records[:prefill], "decode": records[prefill:]}
    return {stage: Modelled.of(launches) for stage, launches in stages.items() if launches}


def write(
    model: ByteLanguageModel,
    prompt_text: bytes,
    count: int,
    timings: Timings,
    records: Sequence[Any] = (),
) -> bytes:
    """Decoding through the cache.

    Args:
        model: its blocks may be compiled.
        prompt_text: what is continued.
        count: bytes to write.
        timings: receives the seconds of prefill and decode, and the launches of prefill.
        records: of simulated launches, growing.
    """
    started = time.perf_counter()
    new = stream(model, [prompt_text], count, sampling=SAMPLING, chunk=len(prompt_text))
    written = [next(new)]
    read = time.perf_counter()
    timings.launches = len(records)
    written += new
    timings.prefill = read - started
    timings.decode = time.perf_counter() - read
    return bytes(torch.cat(written).tolist())


def selected_blocks(found: Look) -> list[Selected]:
    """What the last byte's query selects in the last layer."""
    return [
        Selected(p.block, p.first, p.last, p.why, printable(found.text[p.first : p.last + 1]))
        for p in found.views[-1].picked
    ]


def as_tokens(text: bytes) -> Tensor:
    """`[1, S]` int64."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]


def printable(text: bytes) -> str:
    """Bytes as one line of text."""
    raw = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else "·" for c in raw)


def report(result: DemoResult) -> str:
    """The result for people."""
    t = result.timings
    targets = sorted({choice["target"] for choice in result.lowerings["choices"]})
    lines = [
        f"document   {result.document}",
        f"model      {result.model}",
        f"lowering   nsa ops -> {', '.join(targets)}; the rest -> {result.lowerings['rest']}",
        f"compile    {t.compile:.1f} s (once; sizes are dynamic)",
        f"prefill    {result.tokens} tokens in {t.prefill:.2f} s = "
        f"{result.prefill_rate:,.0f} tokens/s",
        f"decode     {DECODE} tokens in {t.decode:.2f} s = {result.decode_rate:,.1f} tokens/s",
        *([beside(result)] if result.compared else []),
        f"read       … {printable(result.look.text[: result.tokens][-160:])}",
        f"wrote      {result.written!r}",
    ]
    lines.append(planted.report(result.facts))
    for stage, model in result.modelled.items():
        lines.append(f"modelled   nsa ops of {stage}, one simulated NeuronCore: {model}")
    return "\n".join(lines)


def beside(result: DemoResult) -> str:
    """How fast the start of the document was read by whom."""
    count, slow = min(result.tokens, COMPARED), result.compared[REFERENCE]
    rates = [
        f"{target} {rate:,.0f} tokens/s ({rate / slow:.1f} times {REFERENCE})"
        for target, rate in result.compared.items() if target != REFERENCE
    ]  # fmt: skip
    told = ", ".join([*rates, f"{REFERENCE} {slow:,.0f}"])
    return f"beside     {count} tokens, not compiled: {told}"


def selection_report(result: DemoResult) -> str:
    """The last query's selection, a line per block."""
    lines = ["Blocks that the last query selected (last layer), and the text they cover:"]
    for row in result.selected:
        place = f"{row.block:4d}  tokens {row.first:5d}..{row.last:<5d}"
        lines.append(f"  {place}  {row.why:<18} {row.text}")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> int:
    """`nsa demo`: prints the run, the portability matrix of this machine, and the selection.

    Args:
        argv: `--json`, `--prompt N`, `--target T`, `--mode M`, `--page FILE`.

    Returns:
        0, or 1 if a backend fails the smoke cases of the matrix.
    """
    parser = argparse.ArgumentParser(prog="nsa demo", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--prompt", type=int, help=f"tokens of prefill ({PROMPT}; simulated {SIMULATED_PROMPT})"
    )
    parser.add_argument("--target", help="trn2, h200, cpu (default: by the tensors' device)")
    parser.add_argument("--mode", help="hw, sim, eager")
    parser.add_argument("--page", type=Path, help="write what the questions looked at as a page")
    given = parser.parse_args(list(argv))
    options = {k: v for k, v in (("target", given.target), ("mode", given.mode)) if v is not None}
    _say("compiling the model, reading and decoding (about a minute) ...")
    usual = SIMULATED_PROMPT if given.mode == "sim" else PROMPT
    result = run(given.prompt or usual, options or None)
    if given.page and result.facts.look is not None:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        given.page.write_text(html(result.facts.look, "Facts asked for, and where", ABOUT))
        _say(f"wrote {given.page}")
    _say("trying every backend on the smoke cases (about half a minute) ...")
    matrix = conformance.run(tags=("smoke",))
    if given.json:
        print(json.dumps({"demo": result.to_json(), "matrix": matrix.to_dict()}, indent=1))
        return 0 if matrix.ok else 1
    print(report(result))
    print("\nWhat runs here, and how it compares to the float64 reference (smoke cases):\n")
    print(text.matrix(matrix))
    print()
    print(selection_report(result))
    print(MEANING.format(parameters=result.parameters, **asdict(SAMPLING)))
    return 0 if matrix.ok else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
