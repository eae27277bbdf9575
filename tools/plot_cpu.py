"""Rows of `nsa bench --target cpu` as the tables and plots of `docs/performance.md`.

Of rows that measure the same, the last one counts; a row says nothing about another revision's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]
BENCHES = ("native", "native stages", "native memory", "native peers", "overhead")
MAIN = (16, 1, 128, "float32")
"""Heads, head dim and dtype of the first table and of the plots."""
MODES = ("cpu:native", "cpu:torch")
WAYS = ("forward", "forward + backward")
RATES = ("gemm", "read")
"""What the machine did in products and in reading memory, measured at each run's start."""
SAME = ("tokens", "Hq", "Hkv", "Dk", "dtype", "pass", "input", "attention", "op", "mode")
"""Facts that tell one measurement of a benchmark from another."""


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each measurement, and the machine's rates of the same runs."""
    found = {
        (row["bench"], row["name"], *(row["facts"].get(name) for name in SAME)): row
        for row in rows if row["name"] not in RATES
    }  # fmt: skip
    runs = {row["when"] for row in found.values()}
    return [row for row in rows if row["name"] in RATES and row["when"] in runs] + [*found.values()]


def shape(row: Row) -> tuple[Any, ...]:
    return tuple(row["facts"].get(name) for name in ("Hq", "Hkv", "Dk", "dtype"))


def size(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(rows: list[Row], bench: str, **facts: Any) -> list[Row]:
    """Rows of a benchmark with these facts."""
    return [
        row for row in rows
        if row["bench"] == bench and all(row["facts"].get(k) == v for k, v in facts.items())
    ]  # fmt: skip


def render(rows: list[Row], figures: list[str]) -> str:
    """Everything between the page's markers."""
    kept = latest(rows)
    parts = [about(kept), *(f"![time and memory against length]({name})" for name in figures)]
    for made in (against_dense, decoding, stages, memory, peers, overhead):
        if text := made(kept):
            parts.append(text)
    return "\n" + "\n\n".join(parts) + "\n"


def about(rows: list[Row]) -> str:
    """On what, with what and beside which load it was measured."""
    here = [row["environment"] for row in rows]
    unlike = {
        name: ", ".join(dict.fromkeys(str(x[name]) for x in here))
        for name in ("cpu", "cores", "revision")
    }
    threads = ", ".join(dict.fromkeys(str(row["facts"]["threads"]) for row in rows))
    loads = [row["facts"]["load"] for row in rows if row["facts"].get("load") is not None]
    days = sorted({row["when"][:10] for row in rows})
    torch = ", ".join(dict.fromkeys(x["versions"]["torch"] for x in here))
    return (
        f"Measured on {unlike['cpu']}, {unlike['cores']} cores, {threads} threads, torch "
        f"{torch}, revision {unlike['revision']}, {' and '.join(days)}; load while measuring, this "
        f"job included, {min(loads, default=0):.1f} to {max(loads, default=0):.1f}. B = 1, l=32, "
        "d=16, m=64, n=16, w=512, compression included; medians, milliseconds."
    )


def against_dense(rows: list[Row]) -> str:
    """NSA beside dense attention, a table per shape."""
    parts = []
    mine = [row for row in of(rows, "native") if row["facts"].get("pass") in WAYS]
    for kind in sorted(dict.fromkeys(map(shape, mine)), key=lambda x: x != MAIN):
        of_kind = [row for row in mine if shape(row) == kind]
        lengths = sorted({row["facts"]["tokens"] for row in of_kind})
        cells = {
            (row["name"], row["facts"]["pass"], row["facts"]["tokens"]): row for row in of_kind
        }
        lines = []
        for way in WAYS:
            for name in ("sdpa", *MODES):
                found = [cells.get((name, way, x)) for x in lengths]
                times = ["" if row is None else number(row["median"]) for row in found]
                if any(times):
                    lines.append([f"`{name}`, {way}", *times])
            for name in MODES:
                ratios = []
                for x in lengths:
                    dense, ours = cells.get(("sdpa", way, x)), cells.get((name, way, x))
                    if dense is None or ours is None:
                        ratios.append("")
                    else:
                        ratios.append(f"**{dense['median'] / ours['median']:.2f}**")
                if any(ratios):
                    lines.append([f"SDPA / `{name}`, {way}", *ratios])
        hq, hkv, dim, dtype = kind
        title = f"{hq}/{hkv} heads, D = {dim}, {dtype}:"
        parts.append(title + "\n\n" + grid(["", *map(size, lengths)], lines))
    return "\n\n".join(parts)


def decoding(rows: list[Row]) -> str:
    """One new token, its floor of bytes, and dense attention."""
    steps = of(rows, "native", **{"pass": "decode"})
    lines, rates = [], set()
    for step in (row for row in steps if row["name"] == "decode"):
        rates.add(rate := rate_beside(step, rows, "read"))
        same = {name: step["facts"][name] for name in ("tokens", "Hq", "Hkv", "Dk", "dtype")}
        (dense,) = (r for r in of(steps, "native", **same) if r["name"] == "sdpa decode")
        what = "{Hq}/{Hkv} D={Dk} {dtype}".format(**same)
        lines.append([
            f"{what}, {size(same['tokens'])}", f"{step['median']:.3f}",
            f"{step['facts']['bytes'] / rate / 1e6:.3f}", f"{dense['median']:.3f}",
            f"{dense['median'] / step['median']:.1f}",
        ])  # fmt: skip
    if not lines:
        return ""
    head = ["one new token", "decode", "its bytes at the memory's rate", "SDPA", "SDPA / decode"]
    return f"Decoding; this machine read {span(rates)} GB/s in these runs:\n\n" + grid(head, lines)


def rate_beside(row: Row, rows: list[Row], name: str) -> float:
    """The rate that was measured in the same run as a row; NaN if there is none."""
    same = (r["median"] for r in rows if r["name"] == name and r["when"] == row["when"])
    return float(next(same, "nan"))


def span(values: set[float]) -> str:
    """`10.6`, or `10.6 to 20.3`."""
    return " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(values), max(values))))


def stages(rows: list[Row]) -> str:
    """Where the time goes, and at which share of the machine's product rate."""
    mine = of(rows, "native stages")
    lines, machine = [], set()
    for row in mine:
        machine.add(rate := rate_beside(row, rows, "gemm"))
        same = {name: row["facts"][name] for name in ("tokens", "pass", "input")}
        group = of(mine, "native stages", **same)
        whole = next(r["median"] for r in group if r["name"] == "whole")
        flops = row["facts"].get("gflops")
        rates = ["", ""] if flops is None else [f"{flops:.0f}", f"{flops / rate:.0%}"]
        what = f"{size(same['tokens'])}, {same['pass']}, {same['input']}"
        lines.append([
            f"{what} ({row['facts']['replaced']:.0%} new)", row["name"], number(row["median"]),
            f"{row['median'] / whole:.0%}", *rates,
        ])  # fmt: skip
    if not lines:
        return ""
    head = ["pass, input (blocks new per query)", "stage", "ms", "share", "GFLOP/s", "of a GEMM"]
    title = f"Stages of `cpu:native`, beside products at {span(machine)} GFLOP/s"
    return f"{title}:\n\n" + grid(head, lines)


def memory(rows: list[Row]) -> str:
    """Peaks, by length."""
    mine = of(rows, "native memory")
    lengths = sorted({row["facts"]["tokens"] for row in mine})
    lines = []
    for name, way in dict.fromkeys((r["name"], r["facts"]["pass"]) for r in mine):
        both = of(mine, "native memory", **{"pass": way})
        cells = {r["facts"]["tokens"]: r for r in both if r["name"] == name}
        last = cells[max(cells)]
        per_token = last["median"] * 1024 / last["facts"]["tokens"]
        found = [f"{cells[x]['median']:.0f}" if x in cells else "" for x in lengths]
        lines.append([f"`{name}`, {way}", *found, f"{per_token:.1f}"])
    if not lines:
        return ""
    head = ["MiB", *map(size, lengths), "KiB per token, longest"]
    return (
        "Peak memory above inputs and outputs, each pass in a process of its own:\n\n"
        + grid(head, lines)
    )  # fmt: skip


def peers(rows: list[Row]) -> str:
    """Others' sparse attention."""
    lines = []
    mine = of(rows, "native peers")
    for row in mine:
        facts = row["facts"]
        same = {name: facts[name] for name in ("tokens", "attention", "Hq", "Dk", "dtype")}
        ours = next((r for r in of(mine, "native peers", **same) if r["name"] == MODES[0]), None)
        if row["kind"] == "absent" or ours is None:
            cells = [row.get("reason", ""), ""]
        else:
            cells = [number(row["median"]), f"{row['median'] / ours['median']:.2f}"]
        lines.append([f"{size(facts['tokens'])}, {facts['attention']}", row["name"], *cells])
    head = ["forward", "who", "ms", f"over `{MODES[0]}`"]
    return "Peers, in one run:\n\n" + grid(head, lines) if lines else ""


def overhead(rows: list[Row]) -> str:
    """What a call costs beside an empty op of its signature."""
    lines = [
        [row["facts"]["op"], row["facts"]["mode"], f"{row['median']:.2f}"]
        for row in of(rows, "overhead") if row["name"] == "ratio"
    ]  # fmt: skip
    head = ["op", "how it is called", "ratio"]
    return (
        "One call against an empty op of the same signature:\n\n" + grid(head, lines)
        if lines
        else ""
    )


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Time against length, and memory against length, of the main shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = [row for row in latest(rows) if shape(row) == MAIN]
    panels = [
        ("native", "forward", "forward", "ms"),
        ("native", "forward + backward", "forward + backward", "ms"),
        ("native", "decode", "one new token", "ms"),
        ("native memory", "forward + backward", "peak memory, forward + backward", "MiB"),
    ]
    panels = [panel for panel in panels if of(kept, panel[0], **{"pass": panel[1]})]
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nsa"})  # small, reproducible
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.75 * len(panels), 3.6), squeeze=False)
    for axis, (bench, way, title, unit) in zip(axes[0], panels, strict=True):
        mine = of(kept, bench, **{"pass": way})
        for name in dict.fromkeys(row["name"] for row in mine):
            points = sorted((r["facts"]["tokens"], r["median"]) for r in mine if r["name"] == name)
            axis.plot(*zip(*points, strict=True), "-o", markersize=3, label=name)
        axis.set(xlabel="tokens", ylabel=unit, title=title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cpu.svg"
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return [path]
