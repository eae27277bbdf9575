"""How the kernels are compiled and kept; a compiler that copies a made library stands for g++."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron.backends.cpu.native_mode import build, extension
from nsa_neuron.errors import BackendUnavailable
from nsa_neuron.registry import REGISTRY, use_backend

pytestmark = pytest.mark.skipif(bool(build.hindrance()), reason=f"no kernels: {build.hindrance()}")

CACHED = (build.compiler, build.library_name, build._own_folder, extension.load)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not compiled yet, with an empty cache; everything is put back later."""
    made = build.library()

    def forget():
        for function in CACHED:
            function.cache_clear()
        build._failure.clear()
        REGISTRY.forget()

    forget()
    monkeypatch.setenv("NSA_CACHE", str(tmp_path / "cache"))
    yield made
    monkeypatch.undo()
    forget()


def copying_compiler(folder, made):
    """A compiler: `-o` gets the made library; every link is told in `links`."""
    path = folder / "copying-c++"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-shared*) echo link >> ' + str(folder / "links") + "; sleep 0.3;; esac\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp {made} "$2"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_everything_runs_on_torch_and_says_why(fresh, monkeypatch, caplog):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    modes = REGISTRY.get("cpu").modes()
    assert next(iter(modes)) == "torch" and "no C++ compiler" in modes["native"]
    q = torch.randn(1, 5, 2, 8)
    assert nsa.attention(q, q, q)[0].isfinite().all()
    assert "cpu:torch" in caplog.text and "no C++ compiler" in caplog.text
    with pytest.raises(BackendUnavailable, match="no C\\+\\+ compiler"), use_backend("cpu:native"):
        pass


def test_a_compiler_that_fails_is_asked_once_and_quoted(fresh, tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken-c++"
    asked = tmp_path / "asked"
    broken.write_text(
        f"#!/bin/sh\necho once >> {asked}\necho 'note: so far' >&2\n"
        "echo 'error: no such luck' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    q = torch.randn(1, 5, 2, 8)
    assert nsa.attention(q, q, q)[0].isfinite().all()
    times = asked.read_text()
    REGISTRY.forget()
    assert nsa.sliding_window_attention(q, q, q, window=2)[0].isfinite().all()
    with pytest.raises(BackendUnavailable, match="no such luck"):
        build.library()
    assert asked.read_text() == times
    assert "error: no such luck" in caplog.text and "note" not in caplog.text
    assert "no such luck" in REGISTRY.get("cpu").modes()["native"]
    assert not list((tmp_path / "cache").glob("*.so")) and not list(
        (tmp_path / "cache").glob("build*")
    )


def test_a_folder_that_cannot_be_written_is_replaced_by_one_of_the_process(
    fresh, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("a file, where a folder cannot be made")
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, fresh))
    path = build.library()
    assert path.is_file() and tmp_path not in path.parents
    assert extension.load().nsa_call_size() > 0


def test_a_read_only_folder_is_replaced_by_one_of_the_process(fresh, tmp_path, monkeypatch):
    """As root may write everywhere, the folder's refusal is played."""
    real = build.tempfile.TemporaryFile

    def refusing(*args, dir=None, **options):
        if dir is not None and tmp_path in dir.parents:
            raise PermissionError(f"read only: {dir}")
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(build.tempfile, "TemporaryFile", refusing)
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, fresh))
    assert build.library().parent == build._own_folder()


def test_a_user_without_a_home_has_a_folder_of_the_process(fresh, tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("CXX", copying_compiler(tmp_path, fresh))
    for name in ("NSA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.Path, "home", nobody)
    assert build.library().parent == build._own_folder() == build.cache_folder()
    assert build.cached() == build.library()


@pytest.mark.parametrize("damage", ["truncated", "no digest", "empty digest"])
def test_a_damaged_library_is_compiled_again(fresh, tmp_path, monkeypatch, damage):
    folder = tmp_path / "cache"
    folder.mkdir()
    library = folder / build.library_name()
    shutil.copy(fresh, library)
    if damage == "truncated":
        build._digest_file(library).write_text(build._digest(library))
        library.write_bytes(library.read_bytes()[:1000])
    elif damage == "empty digest":
        build._digest_file(library).write_text("")
    monkeypatch.setenv("CXX", copying_compiler(tmp_path, fresh))
    assert build.cached() is None
    assert build.library() == library and build.cached() == library
    assert extension.load().nsa_call_size() > 0


def test_processes_that_start_together_compile_once(fresh, tmp_path):
    env = {
        **os.environ,
        "CXX": copying_compiler(tmp_path, fresh),
        "NSA_CACHE": str(tmp_path / "cache"),
    }
    code = "from nsa_neuron.backends.cpu.native_mode import extension; extension.load()"
    started = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert (tmp_path / "links").read_text().splitlines() == ["link"]


def test_the_cache_is_where_the_environment_says(fresh, tmp_path, monkeypatch):
    assert build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NSA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "nsa_neuron"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", lambda: tmp_path)
    assert build.cache_folder() == tmp_path / ".cache" / "nsa_neuron"


def test_the_compiler_is_the_one_that_the_environment_names(fresh, tmp_path, monkeypatch):
    own = copying_compiler(tmp_path, fresh)
    monkeypatch.setenv("CXX", own)
    assert build.compiler() == own
    build.compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "COMPILERS", ("nor-this", own))
    assert build.compiler() == own


def test_a_library_changes_its_name_with_everything_in_its_sources(fresh, tmp_path, monkeypatch):
    """One of other sources, flags or another machine must not be taken for this one."""
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    names = [build.library_name()]

    def named():
        build.library_name.cache_clear()
        names.append(build.library_name())

    monkeypatch.setattr(build, "SOURCES", sources)
    named()
    assert names[0] == names[1]  # wherever they lie
    for name in ("half.h", "runtime.cpp"):
        (sources / name).write_text((sources / name).read_text() + " ")
        named()
    (sources / "half.h").rename(sources / "quarter.h")
    named()
    monkeypatch.setattr(build, "FLAGS", build.FLAGS[:-1])
    named()
    monkeypatch.setattr(build.platform, "machine", lambda: "amd64")
    named()
    monkeypatch.setattr(build, "_flags", lambda: ("-march=native",))
    named()
    assert len(set(names[1:])) == len(names) - 1


def test_a_file_that_is_no_library_is_named(fresh, tmp_path):
    """Whole by its digest, but of no use."""
    folder = tmp_path / "cache"
    folder.mkdir()
    library = folder / build.library_name()
    library.write_text("no library")
    build._digest_file(library).write_text(build._digest(library))
    with pytest.raises(BackendUnavailable, match=f"{library.name} cannot be loaded.*delete it"):
        extension.load()


def test_a_library_with_another_record_of_a_call_is_refused(fresh, monkeypatch):
    class Shorter(ctypes.Structure):
        _fields_ = extension.Call._fields_[:-1]

    monkeypatch.delenv("NSA_CACHE")
    monkeypatch.setattr(build, "library", lambda: fresh)
    monkeypatch.setattr(extension, "Call", Shorter)
    with pytest.raises(BackendUnavailable, match="record of a call differs"):
        extension.load()


def test_a_library_is_named_by_all_that_it_depends_on(fresh, monkeypatch):
    name = build.library_name()
    monkeypatch.setattr(torch, "__version__", "9.9")
    build.library_name.cache_clear()
    assert build.library_name() != name
    monkeypatch.setattr(build, "instruction_set", lambda: "AVX2")
    build.library_name.cache_clear()
    assert "avx2" in build.library_name()


@pytest.mark.parametrize(
    ("what", "name", "value", "said"),
    [
        (build.platform, "machine", lambda: "aarch64", "not linux on aarch64"),
        (build.sys, "platform", "darwin", "not darwin on"),
        (build, "instruction_set", lambda: "DEFAULT", "neither AVX2 nor AVX-512"),
        (build, "_torch_header", lambda: "", "brgemm"),
        (torch.backends.openmp, "is_available", lambda: False, "without OpenMP"),
    ],
    ids=["arm", "mac", "old cpu", "unknown torch", "no threads"],
)
def test_a_machine_that_cannot_run_them_is_refused_by_name(monkeypatch, what, name, value, said):
    monkeypatch.setattr(what, name, value)
    modes = REGISTRY.get("cpu").modes()
    assert next(iter(modes)) == "torch" and said in modes["native"]
