from __future__ import annotations

import ast
from pathlib import Path

import muntin
from muntin.artifact.answers import ANSWERS
from muntin.tasks.answers import ANSWERING
from muntin.tasks.learning import LEARNING

SOURCE = Path(muntin.__file__).parent
MOST_PLACES, MOST_FILES = 25, 12


def named_tasks(path: Path) -> set[int]:
    """Return the lines of a file that name a task, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return {node.lineno for node in constants if node.value in ANSWERS}


def test_every_task_has_facts_answers_and_learning() -> None:
    assert set(ANSWERS) == set(ANSWERING) == set(LEARNING)
    assert {path.name for path in (SOURCE / "tasks").iterdir() if (path / "__init__.py").exists()} == set(ANSWERS)


def test_few_places_name_a_task() -> None:
    places = {path.relative_to(SOURCE): named_tasks(path) for path in SOURCE.rglob("*.py") if SOURCE / "tasks" not in path.parents}
    named = {str(path): sorted(lines) for path, lines in places.items() if lines}
    assert sum(map(len, named.values())) <= MOST_PLACES and len(named) <= MOST_FILES, named
