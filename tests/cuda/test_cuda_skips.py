"""Where the interpreter cannot run, these tests skip with the reason; elsewhere they never do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
RUN = """
import sys, numpy, triton
triton.__version__, numpy.__version__ = {versions}
import pytest
sys.exit(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *{files}]))
"""
LOADS_AT_IMPORT, NEEDS_NONE = "test_cuda_gated_sum.py", "test_cuda_interpreter.py"


FILE = """
from nsa_neuron.errors import ToolchainError
from nsa_neuron.toolchain import triton_interpreter

def test_kernels():
    with triton_interpreter():
        pass

def test_other_refusal():
    raise ToolchainError("something else is missing")
"""


def run(folder: Path, triton: str, numpy: str, *files: str) -> str:
    """What pytest, told other versions, says about files of a folder."""
    paths = [str(folder / file) for file in files]
    code = RUN.format(versions=(triton, numpy), files=paths)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    return done.stdout + done.stderr


def test_a_file_that_loads_kernels_is_skipped_and_others_run():
    said = run(HERE, "3.6.0", "2.4.0", LOADS_AT_IMPORT, NEEDS_NONE)
    assert re.search(r"SKIPPED.*Triton 3\.6\.0's interpreter cannot loop", said), said
    assert re.search(r"\b6 passed, 1 skipped", said), said


@pytest.mark.parametrize(
    ("triton", "numpy", "outcome"),
    [("3.6.0", "2.4.0", "1 failed, 1 skipped"), ("3.7.1", "2.4.0", "1 failed, 1 passed")],
)
def test_only_the_interpreters_refusal_skips_a_test(tmp_path, triton, numpy, outcome):
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_written.py").write_text(FILE)
    said = run(tmp_path, triton, numpy, "test_written.py")
    assert re.search(rf"\b{outcome}\b", said), said
