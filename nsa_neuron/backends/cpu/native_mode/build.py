"""Compiles the C++ kernels for this machine, once, into a cache that many processes may share.

A library is named by what it depends on: torch's version, the sources, the compiler's command and
the instruction set. It is linked under a name of its own and renamed into place, so nobody ever
sees half of one; a lock lets processes that start together compile once. Where the cache cannot be
written, a folder of this process serves, and is removed when it ends.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from nsa_neuron.errors import BackendUnavailable

log = logging.getLogger("nsa_neuron")

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
# Named as torch names them; `ATEN_CPU_CAPABILITY=avx2` chooses for torch and for us.
INSTRUCTION_SETS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-fopenmp")
TIMEOUT_S = 300
"""A compiler that takes longer hangs; it needs about 6 s of CPU time."""


def hindrance() -> str:
    """Why the kernels cannot be had here, as far as that is known without compiling; empty: none.

    A library in the cache needs no compiler.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        return f"the kernels are for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if instruction_set() not in INSTRUCTION_SETS:
        return "the CPU has neither AVX2 nor AVX-512 (or ATEN_CPU_CAPABILITY hides them)"
    if "CPUBLAS_BRGEMM_F32F32F32" not in _torch_header():
        return f"torch {torch.__version__} has no at::native::cpublas::brgemm for float32"
    if torch.backends.openmp.is_available() is False:
        return f"torch {torch.__version__} was built without OpenMP"
    if _failure:
        return _failure[0]
    if not compiler() and not cached():
        names = ", ".join(COMPILERS)
        return f"no C++ compiler ({names}; set CXX) and no library in {cache_folder()}"
    return ""


_failure: list[str] = []  # why compiling failed in this process: it is not tried again


def library() -> Path:
    """The compiled kernels; compiles them where the cache has none.

    Raises:
        BackendUnavailable: they cannot be compiled here; says what the compiler said.
    """
    if why := hindrance():
        raise BackendUnavailable(f"cpu:native cannot run here: {why}")
    found = cached()
    if found is not None:
        return found
    try:
        return _compile_once()
    except (OSError, subprocess.SubprocessError) as error:
        _failure[:] = [f"the kernels do not compile: {_said(error)}"]
        raise BackendUnavailable(f"cpu:native cannot run here: {_failure[0]}") from error


def cached() -> Path | None:
    """The library in the cache; None if it is not there, or damaged."""
    path = cache_folder() / library_name()
    try:
        whole = _digest_file(path).read_text() == _digest(path)
    except OSError:
        return None
    return path if whole else None


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def cache_folder() -> Path:
    """`$NSA_CACHE`, else `nsa_neuron` in the user's cache folder.

    A user without a home, as in a container with an arbitrary uid, has a folder of the process.
    """
    if given := os.environ.get("NSA_CACHE"):
        return Path(given)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return _own_folder()
    return Path(base) / "nsa_neuron"


@cache
def instruction_set() -> str:
    """`AVX512`, `AVX2` or `DEFAULT`: the best that this CPU has and torch would use."""
    return str(torch.backends.cpu.get_cpu_capability()).split("_")[0]


@cache
def compiler() -> str:
    """Path of the C++ compiler, `$CXX` first; empty if there is none."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return ""


@cache
def library_name() -> str:
    """The file name that says all that a library depends on."""
    told = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *FLAGS, *_flags()):
        told.update(f"{part}\0".encode())
    for path in sorted(SOURCES.iterdir()):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"nsa_cpu-{instruction_set().lower()}-{told.hexdigest()[:20]}.so"


def _flags() -> tuple[str, ...]:
    return INSTRUCTION_SETS.get(instruction_set(), ())


@cache
def _torch_header() -> str:
    path = _torch_folder() / "include" / "ATen" / "native" / "CPUBlas.h"
    return path.read_text() if path.is_file() else ""


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _compile_once() -> Path:
    folder = cache_folder()
    if not _writable(folder):
        return _compile(_own_folder())
    with _locked(folder / f"{library_name()}.lock"):
        return cached() or _compile(folder)


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@cache
def _own_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="nsa_neuron-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path) -> Path:
    """Compiles every source, two at a time, links, and renames the library into `folder`."""
    log.warning("compiling the CPU kernels into %s, once, about 10 s", folder)
    torch_folder = _torch_folder()
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
        work = Path(temporary)

        def one(source: Path) -> str:
            out = str(work / f"{source.stem}.o")
            include = ("-isystem", str(torch_folder / "include"))
            _run(compiler(), *FLAGS, *_flags(), *include, "-c", str(source), "-o", out)
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(one, sorted(SOURCES.glob("*.cpp"))))
        lib, result = torch_folder / "lib", work / library_name()
        _run(
            compiler(), "-shared", "-fopenmp", *objects, "-o", str(result),
            f"-L{lib}", "-ltorch_cpu", "-lc10",
        )  # fmt: skip
        path = folder / library_name()
        digest = work / "digest"
        digest.write_text(_digest(result))
        digest.replace(_digest_file(path))
        return result.replace(path)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)


def _said(error: Exception) -> str:
    """The first line of what went wrong that is worth reading."""
    output = getattr(error, "stderr", None) or str(error)
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or [repr(error)]
    return telling[0]
