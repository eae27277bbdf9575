"""Kernels, arguments and references as command lines name them, word by word."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron.simulator import Kernel
from nsa_neuron.simulator.command import check, loading
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.run.arguments import ShapeDtype


def value(text, data=True):
    return loading.parse_value(text, np.random.default_rng(0), data)


def refusal(function, *arguments):
    with pytest.raises(loading.LoadingError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("zeros:2x3", np.zeros((2, 3), np.float32)),
        ("ones:2x3:bf16", np.ones((2, 3), ml_dtypes.bfloat16)),
        ("arange:2x3:int32", np.arange(6, dtype=np.int32).reshape(2, 3)),
        ("full(2.5):4", np.full(4, 2.5, np.float32)),
        ("full(-3):1x1:int8", np.full((1, 1), -3, np.int8)),
        ("ones:2:bool", np.ones(2, np.bool_)),
    ],
)
def test_tensors_are_filled_as_named(text, want):
    got = value(text)
    np.testing.assert_array_equal(got, want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)


def test_random_tensors_come_from_the_seed():
    normal, uniform = value("randn:64x64"), value("rand:64x64:fp32")
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(normal, rng.standard_normal((64, 64)).astype(np.float32))
    assert 0.0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1.0
    drawn = value("randint(-2,3):1000:int32")
    assert sorted(set(drawn.tolist())) == [-2, -1, 0, 1, 2] and drawn.dtype == np.int32


def test_shapes_alone_are_not_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros((3, 4), np.float16))
    for text, shape, name in (
        ("zeros:2x3", (2, 3), "float32"), ("randint(0,2):5:int32", (5,), "int32"),
        ("a.npy", (3, 4), "float16"),
    ):  # fmt: skip
        made = value(text, data=False)
        assert isinstance(made, ShapeDtype) and tuple(made.shape) == shape
        assert getattr(made.dtype, "name", str(made.dtype)) == name


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("none", None), ("None", None), ("TRUE", True), ("false", False), ("3", 3), ("2.5", 2.5),
        ("(1,2)", (1, 2)), ("[1, 'a']", [1, "a"]), ("causal", "causal"), ("a b", "a b"), ("", ""),
        ("dtype:bf16", nl.bfloat16), ("{'k': 1}", {"k": 1}), ("x:y", "x:y"),
    ],
)  # fmt: skip
def test_other_words_are_literals_or_text(text, want):
    got = value(text)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ramp:2x3", "no fill 'ramp'; there are randn, rand, zeros"),
        ("zeros", "cannot read 'zeros'; write e.g. randn:128x512:bf16"),
        ("full(2)", "cannot read 'full(2)'"),
        ("zeros:2xN", "cannot read 'zeros:2xN'"),
        ("full:2x3", "full cannot use (); write e.g."),
        ("full(1,2):3", "full cannot use (1,2)"),
        ("randint(5,1):3:int32", "randint cannot use (5,1)"),
        ("zeros:2:float99", "float99"),
        ("dtype:float99", "float99"),
        ("absent.npy", "no file absent.npy"),
    ],
)
def test_words_that_cannot_be_read(text, said):
    assert said in refusal(value, text)


def test_files_of_numbers_without_a_dtype(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3, np.complex64))
    assert refusal(value, str(path)).endswith("holds complex64, which NKI has no dtype for")


def plain(a, b, c=1, *rest, **more):
    pass


def test_arguments_by_name():
    kernel = Kernel(plain)

    def parsed(*words):
        return loading.parse_arguments(kernel, words, 0, True)

    assert parsed("a=1", "b=x=y") == {"a": 1, "b": "x=y"}
    assert parsed("a=1", "b=2", "c=none") == {"a": 1, "b": 2, "c": None}
    said = "plain(a, b, c=1, *rest, **more)"
    assert refusal(parsed, "a=1") == f"{said} needs b: --arg b=randn:128x512:bf16"
    assert refusal(parsed, "a=1", "d=2") == f"--arg d=2: {said} has no 'd'"
    assert refusal(parsed, "a") == "--arg a: write NAME=VALUE, e.g. a=randn:128x512:bf16"
    assert refusal(parsed, "a=full:3").startswith("--arg a=full:3: full cannot use ()")
    one = loading.parse_arguments(kernel, ("a=randn:4", "b=randn:4"), 7, True)
    two = loading.parse_arguments(kernel, ("a=randn:4", "b=randn:4"), 7, True)
    assert (one["a"] == two["a"]).all() and (one["a"] != one["b"]).all()
    other = loading.parse_arguments(kernel, ("a=randn:4", "b=1"), 8, True)
    assert (other["a"] != one["a"]).all()


def test_kernels_by_name():
    first, second = Kernel(plain), Kernel(test_arguments_by_name)
    inner = SimpleNamespace(second=second)
    module = SimpleNamespace(__name__=__name__, __file__="f.py", b=first, plain=plain, inner=inner)
    assert loading.find_kernel(module, "") is loading.find_kernel(module, "b") is first
    assert loading.find_kernel(module, "inner.second") is second
    assert loading.find_kernel(module, "plain").fn is plain
    module.a = second
    assert refusal(loading.find_kernel, module, "") == (
        "which kernel? write f.py::NAME; there are: a, b"
    )
    assert refusal(loading.find_kernel, module, "c") == "no kernel 'c' in f.py; there are: a, b"
    assert "no kernel 'a.c'" in refusal(loading.find_kernel, module, "a.c")
    brought_in = SimpleNamespace(__name__="other", __file__="f.py", a=first)
    assert "there are: a" in refusal(loading.find_kernel, brought_in, "")
    none = SimpleNamespace(__name__="other", __file__="f.py")
    assert "there are: none decorated with @nki.jit" in refusal(loading.find_kernel, none, "")
    assert loading.split("f.py::k") == ("f.py", "k") and loading.split("f.py") == ("f.py", "")


def test_a_file_is_a_module_for_a_while(tmp_path):
    package = tmp_path / "outer_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "kernels.py").write_text("from . import beside\nname = __name__\n")
    (package / "beside.py").write_text("")
    path, loaded = list(sys.path), set(sys.modules)
    with loading.imported(package / "kernels.py") as module:
        assert module.name == "outer_package.inner.kernels"
        assert sys.path[0] == str(tmp_path) and "outer_package.inner.beside" in sys.modules
    assert sys.path == path and set(sys.modules) == loaded
    (tmp_path / "words.txt").write_text("")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    (tmp_path / "wrong.py").write_text("\n\nx = (")
    for name, said in (
        ("absent.py", "no file "), ("words.txt", "is no Python file: write FILE.py::KERNEL"),
        ("ends.py", "ends the process (exit code 3) on import"), ("wrong.py", "wrong.py:3: "),
    ):  # fmt: skip
        with pytest.raises(loading.LoadingError) as caught, loading.imported(tmp_path / name):
            pass
        assert said in str(caught.value)
    assert sys.path == path


def test_a_module_of_that_name_comes_back(tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("mine = 1\n")
    before = SimpleNamespace(__file__="elsewhere.py")
    monkeypatch.setitem(sys.modules, "told", before)
    with loading.imported(tmp_path / "told.py") as module:
        assert module.mine == 1
    assert sys.modules["told"] is before


def test_references_by_name():
    module = SimpleNamespace(__file__="f.py", b=plain, a=refusal, number=3)
    assert check.find_reference(module, "b") is plain
    for name in ("c", "number", ""):
        said = f"--check: no function {name!r} in f.py; there are: a, b"
        assert refusal(check.find_reference, module, name) == said
    none = SimpleNamespace(__file__="f.py")
    assert refusal(check.find_reference, none, "a").endswith("there are: none")


def test_references_see_what_they_name_in_float64():
    values = {"a": np.ones(2, np.float32), "b": np.ones(2, ml_dtypes.bfloat16),
              "c": np.ones(2, np.int32), "d": "text"}  # fmt: skip
    seen = {}

    def some(a, b, c):
        seen.update(a=a, b=b, c=c)
        c[0] = 9
        return (a, c)

    _, c = check.wanted(some, values)
    assert (seen["a"].dtype, seen["b"].dtype, c.dtype) == (np.float64, np.float64, np.int32)
    assert values["c"].tolist() == [1, 1] and c.tolist() == [9, 1]
    (got,) = check.wanted(lambda **named: np.array(len(named)), values)
    assert got == 4
    (number,) = check.wanted(lambda a: 3, values)
    assert number.shape == () and number == 3
    for wrong in (lambda a: None, lambda a: "text", lambda a: [a, None], lambda a: {1}):
        assert "gives no array of numbers" in refusal(check.wanted, wrong, values)
    assert "TypeError" in refusal(check.wanted, lambda z: z, values)


@pytest.mark.parametrize(
    ("got", "want", "within", "found"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5, (2.0, 0.5, [1], True)),
        ([1.0, 2.0], [1.0, 4.0], 0.499, (2.0, 0.5, [1], False)),
        ([1.0, 2.0], [1.0, 4.0], None, (2.0, 0.5, [1], True)),
        ([-5.0, 0.0], [-4.0, 0.0], None, (1.0, 0.25, [0], True)),
        ([0.0], [0.0], 0.0, (0.0, 0.0, [0], True)),
        ([0.5], [0.0], 0.5, (0.5, 1.0, [0], False)),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0, (0.0, 0.0, [0], True)),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0, (0.0, 0.0, [0], True)),
        ([1.0, np.nan], [1.0, 2.0], None, (np.inf, np.inf, [1], False)),
        ([np.inf], [-np.inf], None, (np.inf, 1.0, [0], False)),
        ([np.inf, 3.0], [np.inf, 2.0], None, (1.0, 0.5, [1], True)),
    ],
)
def test_the_largest_error_is_found_and_judged(got, want, within, found):
    (one,) = check.compare([np.array(got)], [np.array(want)], within)
    assert (one["error"], one["relative"], one["index"], one["agrees"]) == found
    place = one["index"][0]
    np.testing.assert_array_equal([one["got"], one["wanted"]], [got[place], want[place]])


def test_what_has_no_elements_agrees():
    (one,) = check.compare([np.zeros((0, 4))], [np.zeros((0, 4))], 0.0)
    assert one == {"error": 0.0, "relative": 0.0, "agrees": True}
    assert check.text([one], "f", None) == ["  check result 0 against f: largest error 0"]


def test_what_is_said_of_an_error():
    results = [np.array([[1.0, 3.0]]), np.array([2.0])]
    found = check.compare(results, [np.array([[1.0, 2.0]]), np.array([2.0])], 0.25)
    assert check.text(found, "f.py::g", 0.25) == [
        "  check result 0 against f.py::g: largest error 1 (5.00e-01 of the largest magnitude) at "
        "[0, 1]: 3, wanted 2; DIFFERS, more than 0.25 allow",
        "  check result 1 against f.py::g: largest error 0",
    ]
    lost = check.compare([np.array([np.nan])], [np.array([2.0])], None)
    assert check.text(lost, "g", None)[0].endswith("at [0]: nan, wanted 2; DIFFERS")
