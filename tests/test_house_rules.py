"""The language of the code: names, lengths of functions and modules, repeated passages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("medsa_deploy", "exporters", "kernels", "benchmarks")


def read_room(room: str) -> dict[str, str]:
    """Path in the repository → text of each module below a folder."""
    paths = sorted((ROOT / room).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


FILES = {path: text for room in ROOMS for path, text in read_room(room).items()}
TESTS = {path: text for path, text in read_room("tests").items() if "/golden/" not in path}
MOST_LINES, MOST_FUNCTION_LINES, SHARED_LINES = 400, 60, 10
MOST_TEST_LINES = 600

PRONOUNS = frozenset(
    "anything asked everything few found given held here it its itself kept made many nothing one "
    "ones others own rest said several some something stuff taken that them these thing things "
    "this those told wanted what where which whole whose".split()
)
"""Words that are no noun: a name is the noun of its value."""
JSON_FIELDS = {("medsa_deploy/evaluation/latency.py", "what")}
"""Fields of result files, which keep their names."""

OLD_MODULES = (
    "scopes lent trials pairs labelled template proof contract timing profiling islands tokens "
    "own_encoders page trt"
).split()
OLD_NAMES = frozenset(
    "LentMemory Trials Trial WatchingBackend PROFILES MasksWanted MadeMasks splitting "
    "taking_frames listener _named _quiet _own _few _judged _says_anything check_shown _Options "
    "own_encoders own_encoder OWN_ENCODERS scopes trials labelled cut".split()
)
"""Names that have better ones, or that meant several things."""
ONE_CLASS = ("Comparison", "Layer", "Graph", "Options", "Outputs")
"""Names that were classes of several modules."""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end; of a command, without its options and its help text."""
    start = node.lineno
    if any("command" in ast.unparse(decorator) for decorator in node.decorator_list):
        start = node.body[0].end_lineno or start
    return (node.end_lineno or start) - start + 1


def is_pronoun(name: str) -> bool:
    words = [word for word in name.lower().split("_") if word]
    return bool(words) and all(word in PRONOUNS for word in words)


@pytest.mark.parametrize("path", FILES | TESTS)
def test_names_are_nouns(path: str) -> None:
    tree = ast.parse((FILES | TESTS)[path])
    bad = {(line, name) for line, name in names(tree) if is_pronoun(name)}
    assert not sorted(f"{line}: {name}" for line, name in bad if (path, name) not in JSON_FIELDS)


@pytest.mark.parametrize("path", FILES)
def test_old_names_are_gone(path: str) -> None:
    assert Path(path).stem not in OLD_MODULES
    assert not [f"{n}: {name}" for n, name in names(ast.parse(FILES[path])) if name in OLD_NAMES]


@pytest.mark.parametrize("path", FILES)
def test_modules_and_functions_are_short(path: str) -> None:
    assert len(FILES[path].splitlines()) <= MOST_LINES
    long = [
        f"{node.lineno}: {node.name} has {function_lines(node)} lines"
        for node in ast.walk(ast.parse(FILES[path]))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and function_lines(node) > MOST_FUNCTION_LINES
    ]
    assert not long


@pytest.mark.parametrize("path", TESTS)
def test_test_modules_have_one_subject(path: str) -> None:
    assert len(TESTS[path].splitlines()) <= MOST_TEST_LINES


@pytest.mark.parametrize("name", ONE_CLASS)
def test_a_class_has_one_meaning(name: str) -> None:
    homes = [
        path
        for path, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    assert len(homes) < 2


def code_lines(text: str) -> list[tuple[int, str]]:
    """Line numbers and lines without blanks and imports, which may repeat."""
    imports = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate((" ".join(line.split()) for line in text.splitlines()), 1)
    return [(number, line) for number, line in lines if line and number not in imports]


def test_no_passage_stands_twice() -> None:
    places: dict[tuple[str, ...], str] = {}
    twice = []
    for path, text in FILES.items():
        lines = code_lines(text)
        for i in range(len(lines) - SHARED_LINES + 1):
            passage = tuple(line for _, line in lines[i : i + SHARED_LINES])
            place = f"{path}:{lines[i][0]}"
            if passage in places:
                twice.append(f"{place} and {places[passage]}")
            places.setdefault(passage, place)
    assert not twice
