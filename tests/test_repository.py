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


@pytest.fixture(scope="module")
def trees():
    """Every source file of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


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


def test_no_file_is_longer_than_it_may_be():
    assert [name_of(path) for path in SOURCES if num_lines(path) > 300] == []
    assert [name_of(path) for path in TESTS if num_lines(path) > 400] == []


def test_no_function_is_longer_than_50_lines_without_its_docstring(trees):
    found = []
    for path, node in nodes_of(trees, FUNCTIONS):
        if body_without_docstring(node):
            length = node.end_lineno - body_without_docstring(node)[0].lineno + 1
            found += [f"{name_of(path)}: {node.name} has {length} lines"] if length > 50 else []
    assert found == []


def nodes_of(trees, kinds):
    """(path, node) of all nodes of these kinds in all files."""
    return ((path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, kinds))


def test_only_the_command_line_prints(trees):
    calls = [(path, call) for path, call in nodes_of(trees, ast.Call) if isinstance(call.func, ast.Name)]
    assert calls
    prints = [(path, call) for path, call in calls if call.func.id == "print" and path.name != "cli.py"]
    assert [f"{name_of(path)}:{call.lineno}" for path, call in prints] == []


def test_no_error_is_caught_unseen(trees):
    found = []
    for path, node in nodes_of(trees, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = [kind for kind in kinds if kind is None or getattr(kind, "id", "") in ("Exception", "BaseException")]
        found += [f"{name_of(path)}:{node.lineno} catches everything"] if broad else []
    assert found == []


def test_no_import_hides_its_names(trees):
    imports = list(nodes_of(trees, ast.ImportFrom))
    assert imports
    hidden = [(path, node) for path, node in imports if any(alias.name == "*" for alias in node.names)]
    assert [f"{name_of(path)}:{node.lineno}" for path, node in hidden] == []


def test_every_module_and_public_name_has_a_docstring(trees):
    undocumented = [name_of(path) for path, tree in trees.items() if not ast.get_docstring(tree)]
    for path, tree in trees.items():
        names = [name for name, node in public_definitions(tree, path) if not ast.get_docstring(node)]
        undocumented += [f"{name_of(path)}: {name}" for name in names]
    assert undocumented == []
