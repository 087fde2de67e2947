"""Tests of the exercises in the notebooks: each check accepts the solution below, and rejects a typical mistake.

The cell with the check is executed unchanged, except that the solution replaces the stub.
"""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# (notebook, function) -> the solution, as in the notebook, and an edit that makes it wrong: (text, wrong text)
SOLUTIONS = {
    ("01_teacher_inspection", "best_temperature"): (
        """
def best_temperature(logits, labels, temperatures):
    return min(temperatures, key=lambda T: torch.nn.functional.cross_entropy(logits / T, labels).item())
""",
        ("logits / T", "logits * T"),
    ),
    ("01_teacher_inspection", "tokens_needed"): (
        """
def tokens_needed(p, mass):
    cumulative = p.sort(-1, descending=True).values.cumsum(-1)
    return (cumulative < mass).sum(-1) + 1
""",
        (" + 1", ""),
    ),
    ("02_loss_math", "reverse_kl_gradient"): (
        """
def reverse_kl_gradient(z, t):
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    q = log_q.exp()
    return q * (log_q - log_p - (q * (log_q - log_p)).sum())
""",
        (" - (q * (log_q - log_p)).sum()", ""),
    ),
    ("02_loss_math", "translate_alpha"): (
        """
def translate_alpha(a, T):
    return a * T**2 / (a * T**2 + 1 - a)
""",
        ("T**2", "T"),
    ),
    ("03_train", "step_loss"): (
        """
def step_loss(sums, counts):
    return sum(sums) / sum(counts)
""",
        ("sum(sums) / sum(counts)", "sum(s / c for s, c in zip(sums, counts)) / len(sums)"),
    ),
    ("03_train", "steps_repeated"): (
        """
def steps_repeated(cut, save_steps):
    return cut % save_steps
""",
        ("cut % save_steps", "cut - save_steps"),
    ),
    ("04_scaling_out", "layout"): (
        """
def layout(rows, ranks, fits):
    per_rank = rows // ranks
    batch_size = max(size for size in range(1, fits + 1) if per_rank % size == 0)
    return batch_size, per_rank // batch_size
""",
        ("per_rank = rows // ranks", "per_rank = rows"),
    ),
    ("04_scaling_out", "tokens_that_fit"): (
        """
def tokens_that_fit(card, teacher, student, per_token, per_token_loss):
    left = card - 2 * teacher - 18 * student
    return int(left // (per_token + per_token_loss))
""",
        ("18 * student", "16 * student"),
    ),
    ("04_scaling_out", "tokens_that_hide"): (
        """
def tokens_that_hide(student, teacher, ranks, link, flops):
    seconds = (ranks - 1) / ranks * (8 * student + 2 * teacher) / link
    return seconds * flops / (2 * (3 * student + teacher))
""",
        ("8 * student", "6 * student"),
    ),
    ("05_evaluate", "gain"): (
        """
def gain(ce_only, distilled):
    differences = torch.tensor(ce_only) - torch.tensor(distilled)
    return differences.mean().item(), (differences.std() / len(differences) ** 0.5).item()
""",
        ("differences.std()", "differences.std(unbiased=False)"),
    ),
    ("05_evaluate", "speedup"): (
        """
def speedup(a, gamma, cost):
    tokens = (1 - a ** (gamma + 1)) / (1 - a)
    return tokens / (gamma * cost + 1)
""",
        ("gamma * cost + 1", "gamma * cost"),
    ),
    ("06_stored_targets", "tokens_on_disk"): (
        """
def tokens_on_disk(free, kind, width, vocabulary, k):
    if kind == "hidden":
        return (free - 2 * vocabulary * width) // (2 * width)
    return free // (k * (2 if vocabulary <= 2**16 else 4) + 2 * (k + 1))
""",
        ("free - 2 * vocabulary * width", "free"),
    ),
    ("06_stored_targets", "tail_gradient"): (
        """
def tail_gradient(q_v, p_tail, q_tail):
    return q_v * (1 - p_tail / q_tail)
""",
        ("1 - p_tail / q_tail", "q_tail - p_tail"),
    ),
    ("07_on_policy", "sequence_kl"): (
        """
def sequence_kl(q1, q2, p1, p2):
    first = (q1 * (q1 / p1).log()).sum()
    second = (q2 * (q2 / p2).log()).sum(-1)  # (V,), one for each first token
    return first + (q1 * second).sum()
""",
        ("(q1 * second)", "(p1 * second)"),
    ),
    ("07_on_policy", "draw"): (
        """
def draw(p, u):
    return torch.searchsorted(p.cumsum(-1), u, right=True)
""",
        (", right=True", ""),
    ),
}


@pytest.fixture
def check(monkeypatch, capsys):
    """Return check(notebook, function, solution), which returns what the check prints with the solution in place."""
    monkeypatch.syspath_prepend(NOTEBOOKS)  # for `import plots`

    def run(notebook: str, function: str, solution: str | None = None) -> str:
        tree, names = exercise(notebook, function)
        if solution is not None:
            (position,) = (i for i, node in enumerate(tree.body) if getattr(node, "name", None) == function)
            tree.body[position : position + 1] = ast.parse(solution).body
        capsys.readouterr()
        exec(compile(tree, notebook, "exec"), names)
        return capsys.readouterr().out.strip().splitlines()[-1]

    return run


def exercise(notebook: str, function: str) -> tuple[ast.Module, dict]:
    """Return the cell with the stub of a function, and the names that the cells before it import."""
    names: dict = {}
    for cell in code_cells(notebook):
        tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
        if any(getattr(node, "name", None) == function for node in tree.body):
            return tree, names
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), notebook, "exec"), names)
    raise AssertionError(f"{notebook} has no exercise {function}")


def code_cells(notebook: str) -> list:
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize(("notebook", "function"), SOLUTIONS)
class TestExercise:
    def test_check_of_the_solution_prints_right(self, notebook, function, check):
        assert check(notebook, function, SOLUTIONS[notebook, function][0]) == "right"

    def test_check_of_the_stub_prints_not_attempted(self, notebook, function, check):
        assert check(notebook, function) == "not attempted yet"

    def test_check_of_a_mistake_prints_not_yet(self, notebook, function, check):
        solution, (right, wrong) = SOLUTIONS[notebook, function]
        assert right in solution
        assert check(notebook, function, solution.replace(right, wrong)).startswith("not yet")

    def test_notebook_shows_the_tested_solution(self, notebook, function):
        cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
        assert any(SOLUTIONS[notebook, function][0].strip() in cell.source for cell in cells)


def test_every_exercise_has_a_solution():
    found = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in code_cells(path.stem):
            if "not attempted yet" in cell.source:
                found |= {(path.stem, n.name) for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef)}
    assert found == set(SOLUTIONS)


def test_handout_has_each_exercise_and_hint_but_no_solution(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(NOTEBOOKS)
    importlib.import_module("run").write_handout(tmp_path)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.ipynb")}
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(texts)
    for (name, function), (solution, _) in SOLUTIONS.items():
        cells = nbformat.reads(texts[name], as_version=4).cells
        assert any(f"def {function}(" in cell.source for cell in cells if cell.cell_type == "code")
        assert not any(solution.strip().splitlines()[-1] in cell.source for cell in cells)
    committed = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("*.ipynb"))
    for tag in ("<summary>Hint", "*Predict:*", "def ", "image/png"):  # all else is kept
        assert "".join(texts.values()).count(tag) >= committed.count(tag) - (len(SOLUTIONS) if tag == "def " else 0)
