"""Documents: what their commands print, their code, and that every command has been tried."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from console import ROOT, output, refreshed

from nsa_neuron import simulator
from nsa_neuron.simulator.command import loading

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|\d+e-\d+|\[[\d, ]+\](?= is )|\d[\d.]* > ")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for tag, block in found if tag == language]


def test_the_first_kernel_s_numbers_are_what_the_commands_print(tmp_path: Path):
    text = page("first_kernel.md")
    assert refreshed(text, tmp_path) == text, "python tests/docs/console.py docs/first_kernel.md"
    assert text.count("\n$ nsa") >= 8


def test_the_first_kernel_s_code_is_the_example_s():
    example = ROOT / "examples" / "first_kernel"
    files = "".join(path.read_text() for path in example.glob("*.py"))
    code = blocks(page("first_kernel.md"), "python")
    kernels = [block for block in code if "nisa." in block]
    assert len(kernels) == 4 and all(block in files for block in kernels)


@pytest.mark.parametrize("name", ["tokens_on_partitions", "blocks_on_partitions", "halves"])
def test_every_version_of_the_first_kernel_passes_the_page_s_test(name: str):
    code = blocks(page("first_kernel.md"), "python")
    formula = next(block for block in code if block.startswith("y = "))
    test = next(block for block in code if "nki_simulate" in block)
    path = ROOT / "examples" / "first_kernel" / "block_mean.py"
    with simulator.activate(), loading.imported(path) as module:
        kernel = loading.find_kernel(module, name)
        names = {"np": np, "tokens_on_partitions": kernel}
        exec(test, names)
        names["test_means"](simulator.simulate)
        x = np.random.default_rng(1).standard_normal((320, 48)).astype(np.float32)
        want = eval(formula.removeprefix("y = "), {"x": x})
        np.testing.assert_allclose(simulator.simulate(kernel)(x), want, atol=1e-6)


def test_the_first_kernel_gets_faster_at_each_step():
    path = ROOT / "examples" / "first_kernel" / "block_mean.py"
    with simulator.activate(), loading.imported(path) as module:
        shape = simulator.ShapeDtype((8192, 128), "float32")
        times = [
            simulator.profile(loading.find_kernel(module, name))(shape).time.central
            for name in ("tokens_on_partitions", "blocks_on_partitions", "halves")
        ]
    assert times[0] > 3 * times[1] > 3 * times[2]


def test_what_agree_prints_is_what_the_page_shows(tmp_path: Path):
    """Up to the numbers, which depend on the machine's rounding."""
    text = page("porting.md")
    masked = [NUMBER.sub("#", version) for version in (text, refreshed(text, tmp_path))]
    assert masked[0] == masked[1], "python tests/docs/console.py docs/porting.md"
    assert "exit code 1" in text and "layers.1" in text
    assert blocks(text, "python")[0] in (ROOT / "examples" / "porting" / "model.py").read_text()


@pytest.mark.sim
def test_the_porter_s_job_runs_as_it_stands(tmp_path: Path):
    pytest.importorskip("triton")
    job = blocks(page("porting.md"), "yaml")[0]
    steps = re.findall(r"- run: (.*)", job)
    assert [step.split()[0] for step in steps] == ["pip", "pip", "nsa"]
    said = output(steps[-1], tmp_path)
    assert said.count("agrees") == 2 and (tmp_path / "agree.html").read_text().count("<h2>") == 2


# Every command line in an untagged or shell block of a page is here: what has to be there for it
# to run, or why no test runs it.
INSTALL = "needs a package index; tests/newcomer installs"
FOREIGN = "needs checkouts of AWS's repositories; tests/foreign runs it where they are"
HARDWARE = "needs an H200; tests/tools runs the script on a CPU"
RUN = ""
COMMANDS = {
    "make demo": "make -n; tests/model/test_demo.py runs what it runs",
    "make test": "make -n; this is it",
    "pip install": INSTALL,
    "nsa simulate my_kernel.py::kernel": RUN,
    "nsa profile my_kernel.py::kernel": RUN,
    "nsa lint my_kernel.py": RUN,
    "nsa agree examples/porting/model.py": "test_the_porter_s_job_runs_as_it_stands",
    "nsa lint kernels": "tests/simulator/command/test_ci_example.py",
    "nsa simulate kernels/rmsnorm.py": "tests/simulator/command/test_ci_example.py",
    "python -m nsa_neuron.simulator script.py": RUN,
    "export PYTHONPATH=$(python -m nsa_neuron.simulator --path) NKI_SIMULATOR=1": RUN,
    "python script.py arguments": "run behind the line above it",
    "tools/h200.sh": HARDWARE,
    "cp OUT/bench.jsonl": HARDWARE,
    "python -m tools.tune --install": HARDWARE,
    "nsa compile-check": "tests/cuda/test_compile_check.py",
    "nsa bench --target cpu --part layer": "half a minute; tests/cli/test_bench.py runs it, small",
    "nsa bench --target cpu --part model": "minutes; tests/cli/test_bench.py runs it, small",
    "make bench-cpu": "fourteen minutes of an idle machine: nothing to run beside other tests",
    "python -m tools.distributed_evidence": "minutes; tests/distributed runs its parts, small",
    "nsa plan": "tests/distributed/test_plan.py",
    "python examples/train_bytes.py": "half an hour; tests/model/test_examples.py runs it, small",
    "python examples/workloads/run.py": "half an hour; tests/model/test_examples.py runs it, small",
    "nsa train": "minutes; tests/model/test_training.py runs the command, small",
    "nsa conform --backend neuron:hw": "needs a Trainium2",
    "python -m tools.plot_results": HARDWARE,
    "export AWS_NEURON_SDK_PATH": FOREIGN,
    "export NKI_LIBRARY_PATH": FOREIGN,
    "export TRITON_VIZ_PATH": FOREIGN,
    "pytest tests/foreign": FOREIGN,
    "python -m tests.foreign.survey": FOREIGN,
    "python -m tests.foreign.table": FOREIGN,
}
WORDS = ("make ", "pip ", "nsa ", "python ", "export ", "cp ", "pytest ", "tools/")


DIAGRAM = "nsa (command)"  # of docs/design.md


def commands() -> list[tuple[str, str]]:
    """Page and command, of every untagged or shell block; comments are cut off."""
    found = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]:
        for text in (b for tag in ("", "sh", "bash") for b in blocks(path.read_text(), tag)):
            lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]
            found += [
                (path.name, line)
                for line in lines
                if line.startswith(WORDS) and not line.startswith(DIAGRAM)
            ]
    return found


def how(command: str) -> str | None:
    return next((why for start, why in COMMANDS.items() if command.startswith(start)), None)


def test_every_command_is_known_and_every_entry_is_used():
    lines = commands()
    assert [line for line in lines if how(line[1]) is None] == []
    unused = [start for start in COMMANDS if not any(c.startswith(start) for _, c in lines)]
    assert unused == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the commands name."""
    (tmp_path / "my_kernel.py").write_text(
        "import nki\nimport nki.isa as nisa\nimport nki.language as nl\n\n\n@nki.jit\n"
        "def kernel(a):\n"
        "    b = nl.ndarray(a.shape, a.dtype, buffer=nl.shared_hbm)\n"
        "    tile = nl.ndarray(a.shape, a.dtype, buffer=nl.sbuf)\n"
        "    nisa.dma_copy(dst=tile, src=a)\n"
        "    nisa.dma_copy(dst=b, src=tile)\n"
        "    return b\n"
    )
    (tmp_path / "script.py").write_text(
        "import sys\nimport nki\nimport numpy as np\nfrom my_kernel import kernel\n"
        "a = np.ones((4, 8), np.float32)\n"
        "print(sys.argv[1:], kernel(a).sum())\n"
    )
    return tmp_path


@pytest.mark.parametrize("command", sorted({c for _, c in commands() if how(c) == RUN}))
def test_commands_run(command: str, folder: Path):
    if command.startswith("export"):
        said = output(f"{command}; python script.py arguments", folder)
    else:
        said = output(command, folder)
    if "script.py" in command or command.startswith("export"):
        assert said == "['arguments'] 32.0"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_name_commands_that_exist(target: str):
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    last = done.stdout.splitlines()[-1]
    assert {"demo": "bin/nsa demo", "test": "bin/pytest"}[target] in last
