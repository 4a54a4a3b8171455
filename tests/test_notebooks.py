"""The course: notebooks that open with a question, close with its answer, define nothing, and say what was printed."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.\d+(?:e[-+]?\d+)?(?![\w.]*\w)")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|private)/|[A-Z]:\\\\")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def _cells(path, kind=None):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if kind in (None, cell["cell_type"])]


def _source(cell):
    return "".join(cell["source"])


def _printed(cell):
    """Everything that a cell's outputs say in words."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts += [
            "".join(output.get("text", "")),
            "".join(data.get("text/plain", "")),
            "".join(data.get("text/html", "")),
        ]
    return "\n".join(texts)


def _numbers(text):
    """The numbers with a decimal point, each with the number of its decimals."""
    found = [number.replace(",", "") for number in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]
    return [(float(number), len(number.split("e")[0].split(".")[1]), number) for number in found]


def _title(path):
    return _source(_cells(path)[0]).splitlines()[0].removeprefix("# ")


def _way(path):
    """The line that leads to the notebooks before and after."""
    i = PATHS.index(path)
    before = [f"Previous: [{_title(other)}]({other.name})" for other in PATHS[:i][-1:]]
    after = [f"Next: [{_title(other)}]({other.name})" for other in PATHS[i + 1 : i + 2]]
    return " · ".join(before + after)


def test_the_course_is_complete_and_in_order():
    assert [path.name[:3] for path in PATHS] == [f"{i:02d}_" for i in range(1, len(PATHS) + 1)]
    assert len(PATHS) >= 9


@each
def test_opens_with_a_question_and_closes_with_its_answer(path):
    first, *_, last = _cells(path)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    title, way, question, before, *_ = _source(first).split("\n\n")
    assert re.fullmatch(rf"# {path.name[:2]} · \S.*", title)
    assert question.startswith("**Question.** ")
    assert "?" in question
    assert before.startswith("**From before.** ")
    answer = _source(last)
    assert answer.startswith("**Answer.** ")
    assert _numbers(answer), "an answer rests on numbers"
    assert way == answer.split("\n\n")[-1] == _way(path)


@each
def test_the_text_says_what_was_printed(path):
    """A number with a decimal point in the text stands in the code, or was printed above it (a share, per cent)."""
    code = "\n".join(_source(cell) for cell in _cells(path, "code"))
    known = [0.7, *(value for value, *_ in _numbers(code))]  # 0.7: the limit of k-hat
    for cell in _cells(path):
        if cell["cell_type"] == "code":
            known += [value for value, *_ in _numbers(_printed(cell))]
            continue
        text = re.sub(r"\]\([^)]*\)", "]", _source(cell))
        for value, decimals, number in _numbers(text):
            close = 0.5000001 * 10.0**-decimals
            if "e" in number:
                assert any(f"{other:.{decimals}e}" == f"{value:.{decimals}e}" for other in known), number
            else:
                assert any(
                    min(abs(abs(value) - scale * abs(other)) for scale in (1, 100)) <= close for other in known
                ), f"{number} was never printed"


@each
def test_defines_nothing(path):
    for cell in _cells(path, "code"):
        for node in ast.walk(ast.parse(_source(cell))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), _source(
                cell
            )


@each
def test_imports_what_there_is(path):
    for cell in _cells(path, "code"):
        for node in ast.walk(ast.parse(_source(cell))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("jensen"):
                room = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(room.__all__)


@each
def test_was_run_once_from_the_first_cell_to_the_last(path):
    cells = _cells(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert any(_printed(cell).strip() for cell in cells)


@each
def test_has_the_same_form(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i:02d}" for i in range(len(notebook["cells"]))]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_names_no_folder_of_the_machine_that_ran_it(path):
    for cell in _cells(path):
        assert not ABSOLUTE.search(_source(cell) + _printed(cell)), cell["id"]


@each
def test_links_lead_somewhere(path):
    for cell in _cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", _source(cell)):
            assert target.startswith("https://") or (FOLDER / target.split("#")[0]).is_file(), target


@each
def test_is_small(path):
    assert path.stat().st_size <= 800_000
