"""The tutorials: notebooks that open with a question, close with its answer, and compute the numbers in their text."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.\d+(?:e[-+]?\d+)?(?![\w.]*\w)|[-+]?\d[\d,.]*(?= (?:%|nats?\b))")
NO_PROSE = re.compile(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", re.S)  # code, formulae, the targets of links
NOMINAL = {0.7, 50, 80, 90, 95, 99, 100}  # the limit of k-hat; levels of intervals, in per cent
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|private)/|[A-Z]:\\\\")
HIDDEN = {"tags": ["remove-input"]}
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


def _sentences(cell):
    """The Markdown that a code cell computes in its last line; None for any other cell."""
    if cell["cell_type"] != "code":
        return None
    *_, last = ast.parse(_source(cell)).body
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "Markdown":
        (text,) = last.value.args
        return text
    return None


def _typed(cell):
    """The text of a cell as its author typed it, without code, formulae and links."""
    if cell["cell_type"] == "markdown":
        return NO_PROSE.sub(" ", _source(cell))
    text = _sentences(cell)
    return "" if text is None else " _ ".join(part.value for part in text.values if isinstance(part, ast.Constant))


def _read(cell):
    """The text of a cell as it is read."""
    if cell["cell_type"] == "markdown":
        return _source(cell)
    return "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in cell["outputs"])


def _numbers(text):
    """The numbers with a decimal point, and those of per cent and of nats."""
    return [
        float(number.strip(".,").replace(",", "")) for number in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    ]


def _constants(path):
    """The numbers that the code sets."""
    trees = [ast.walk(ast.parse(_source(cell))) for cell in _cells(path, "code") if _sentences(cell) is None]
    values = [node.value for tree in trees for node in tree if isinstance(node, ast.Constant)]
    return {float(value) for value in values if isinstance(value, int | float)}


def _title(path):
    return _source(_cells(path)[0]).splitlines()[0].removeprefix("# ")


def _way(path):
    """The line that leads to the notebooks before and after."""
    i = PATHS.index(path)
    before = [f"Previous: [{_title(other)}]({other.name})" for other in PATHS[:i][-1:]]
    after = [f"Next: [{_title(other)}]({other.name})" for other in PATHS[i + 1 : i + 2]]
    return " · ".join(before + after)


def test_the_tutorials_are_complete_and_in_order():
    assert [path.name[:3] for path in PATHS] == [f"{i:02d}_" for i in range(1, len(PATHS) + 1)]
    assert len(PATHS) >= 16


@each
def test_opens_with_a_question_and_closes_with_its_answer(path):
    first, *_, answer, last = _cells(path)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    title, way, question, before, *_ = _source(first).split("\n\n")
    assert re.fullmatch(rf"# {path.name[:2]} · \S.*", title)
    assert question.startswith("**Question.** ")
    assert "?" in question
    assert before.startswith("**From before.** ")
    assert _read(answer).startswith("**Answer.** ")
    assert _numbers(_read(answer)), "an answer rests on numbers"
    assert way == _source(last) == _way(path)


@each
def test_no_measured_number_is_typed(path):
    """A decimal or a percentage in the text is one that the code sets, or the code computes it where it stands."""
    known = _constants(path) | NOMINAL
    for cell in _cells(path):
        assert {abs(number) for number in _numbers(_typed(cell))} <= known, cell["id"]


@each
def test_sentences_with_numbers_show_no_code(path):
    for cell in _cells(path, "code"):
        text = _sentences(cell)
        assert cell["metadata"] == ({} if text is None else HIDDEN), cell["id"]
        if text is not None:
            *before, _ = ast.parse(_source(cell)).body
            assert all(isinstance(statement, ast.Assign) for statement in before), cell["id"]
            assert isinstance(text, ast.JoinedStr), f"{cell['id']} computes nothing: it is a Markdown cell"
            computed = [part.value for part in text.values if isinstance(part, ast.FormattedValue)]
            assert not any(isinstance(value, ast.Constant) for value in computed), cell["id"]
            assert "$" not in _read(cell), f"{cell['id']}: the site sets formulae in Markdown cells only"


@each
def test_defines_nothing_but_pyro_programs(path):
    for cell in _cells(path, "code"):
        for node in ast.walk(ast.parse(_source(cell))):
            assert not isinstance(node, ast.Lambda), _source(cell)
        for node in ast.parse(_source(cell)).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert "pyro.sample(" in ast.unparse(node), _source(cell)


@each
def test_imports_what_there_is(path):
    for cell in _cells(path, "code"):
        for node in ast.walk(ast.parse(_source(cell))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("jensen"):
                module = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(module.__all__)


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
    assert all(cell["metadata"] == {} for cell in notebook["cells"] if cell["cell_type"] == "markdown")
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
