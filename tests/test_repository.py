"""The rules of form that a machine can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "hf_mcsmoe").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(params=SOURCES, ids=name_of)
def source(request):
    return request.param


@pytest.fixture
def tree(source):
    return ast.parse(source.read_text(encoding="utf-8"))


def num_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def body_without_docstring(function):
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def public_definitions(tree, path):
    """Public functions and classes of a module, and public methods unless their base class documents them."""
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        is_family = path.parent.name == "families" and path.name != "base.py"
        if isinstance(node, ast.ClassDef) and not is_family:
            for member in node.body:
                if isinstance(member, FUNCTIONS) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def test_the_package_is_found():
    assert {"hf_mcsmoe/types.py", "hf_mcsmoe/merging/average.py"} <= set(map(name_of, SOURCES))


def test_no_file_is_longer_than_300_lines(source):
    assert num_lines(source) <= 300


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_file_is_longer_than_400_lines(path):
    assert num_lines(path) <= 400


def test_no_function_is_longer_than_50_lines_without_its_docstring(tree):
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and body_without_docstring(node):
            length = node.end_lineno - body_without_docstring(node)[0].lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


def test_only_the_command_line_prints(source, tree):
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines or source.name == "cli.py"


def test_no_error_is_caught_unseen(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = [
                kind for kind in kinds if kind is None or getattr(kind, "id", "") in ("Exception", "BaseException")
            ]
            assert not broad, f"line {node.lineno} catches everything"


def test_no_import_hides_its_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}"


def test_every_module_and_public_name_has_a_docstring(source, tree):
    assert ast.get_docstring(tree), "the module has none"
    undocumented = [name for name, node in public_definitions(tree, source) if not ast.get_docstring(node)]
    assert undocumented == []
