"""The planted faults of mutants.py: each fits the code as it is, and some of them, tried out, are caught."""

import ast
import os
import random
import re
from dataclasses import replace

import mutants
import pytest
from mutants import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_fits_its_file(fault):
    assert fault.old != fault.new
    text = (ROOT / fault.file).read_text()
    compile(mutants.planted(fault, text), fault.file, "exec")


def test_a_fault_that_no_longer_fits_is_told():
    with pytest.raises(AssertionError, match="stands 0 times"):
        mutants.planted(replace(FAULTS[0], old="no such line"), "x = 1\n")


def test_ids_are_unique():
    ids = [fault.id for fault in FAULTS] + [fault.id for some in mutants.places().values() for fault in some]
    assert len(set(ids)) == len(ids)
    assert set(mutants.EQUIVALENT) <= set(ids), "a survivor that is known is no fault any more: take it out"


def test_tests_are_there():
    all_tests = {fault.tests for fault in FAULTS} | {*mutants.TESTS.values()}
    assert all(1 <= len(tests) <= 3 for tests in all_tests)
    named = {one.partition("::")[::2] for tests in all_tests for one in tests}
    for file in {file for file, _ in named}:
        body = ast.parse((ROOT / "tests" / file).read_text()).body
        there = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert {name for of, name in named if of == file} - {""} <= there, file


def test_what_is_drawn_follows_from_the_seed():
    first = mutants.drawn(12, 3)
    assert mutants.drawn(6, 3) == first[:6]
    assert mutants.drawn(6, 4) != first[:6]
    assert len({fault.id for fault in first}) == 12
    for fault in first:
        text = (ROOT / fault.file).read_text()
        changed = mutants.planted(fault, text)
        compile(changed, fault.file, "exec")
        pairs = list(zip(text.splitlines(), changed.splitlines(), strict=True))
        assert [n for n, (a, b) in enumerate(pairs, 1) if a != b] == [fault.line]


def test_what_cannot_show_is_not_drawn():
    text = """def f(x: int = 1) -> "list[0]":
    'not 1 + 1'
    print(1 + 1)
    assert x == 1, 1 + 1
    if x > 1:  # 1 + 1
        raise ValueError(f"{x + 1}")
    return zip(x, f"{x + 1}", strict=True)
"""
    shown = [" ".join(line.split()) for line in mutants.hidden(text)]
    assert shown == ["def f(x: = 1) -> :", "", "", "", "if x > 1:", "", "return zip(x, , )"]


@pytest.mark.parametrize("operator, old, new", [
    ("plus or minus", "a + b", "a - b"), ("times or over", "a * b", "a / b"),
    ("edge of a comparison", "a < b", "a <= b"), ("equal or not", "a == b", "a != b"), ("not dropped", "not a", "a"),
    ("mask turned", "x[~keep]", "x[keep]"), ("and or or", "a and b", "a or b"),
    ("axis", "x.softmax(dim=1)", "x.softmax(dim=0)"), ("axis", "x.sum(-1)", "x.sum(0)"),
    ("constant", "f(1, x)", "f(0, x)"), ("index", "x[:, 0]", "x[:, 1]"), ("twice", "a = 0.5", "a = 1.0"),
    ("detach dropped", "x.detach() + y", "x + y"), ("mean or sum", "x.mean(1)", "x.sum(1)"),
    ("least or most", "x.amax(1)", "x.amin(1)"), ("default", "f(x, causal=False)", "f(x, causal=True)"),
    ("slice", "x[:, 1:T]", "x[:, 0:T]"), ("slice", "x[:, :-1]", "x[:, :-2]")])  # fmt: skip
def test_operators(operator, old, new):
    pattern, change = mutants.OPERATORS[operator]
    assert re.sub(pattern, change, old) == new


def test_a_caught_fault_a_survivor_and_one_that_never_ends(tmp_path):
    copy = tmp_path / "copy"
    (copy / "tests").mkdir(parents=True)
    (copy / "tests" / "test_it.py").write_text("import it\n\n\ndef test_two():\n    assert it.f(1) == 2\n")
    code = "def f(x):\n    return x + 1\n"
    (copy / "it.py").write_text(code)
    (copy / "conftest.py").write_text("")  # so that this folder is on the path
    fault = mutants.Fault("x", "it.py", "x + 1", "x - 1", ("test_it.py",))
    assert mutants.try_out(fault, copy, 60)["caught_by"] == "test_it.py::test_two"
    assert mutants.try_out(replace(fault, new="1 + x"), copy, 60)["caught_by"] == ""
    assert mutants.try_out(replace(fault, new="[0 for _ in iter(int, 1)]"), copy, 5)["caught_by"].startswith("time")
    assert (copy / "it.py").read_text() == code


@pytest.mark.slow
def test_eight_faults_are_caught(tmp_path, capsys):
    seed = int(os.environ.get("MUTANTS_SEED", 0))
    with capsys.disabled():
        print(f"\nMUTANTS_SEED={seed}")
    some = random.Random(seed).sample(FAULTS + mutants.drawn(40, 0), 8)
    copy = mutants.copied(tmp_path)
    found = {fault.id: mutants.try_out(fault, copy, 300)["caught_by"] for fault in some}
    assert [name for name, red in found.items() if not red and name not in mutants.EQUIVALENT] == []
