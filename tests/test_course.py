"""The course's tools: fences, the students' copy, the grader. Every docstring states the bug that its test prevents."""
import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from data import InputError
from tests.grade import Pupil, submitted
from tests.make_assignment import FILES, HOME, between, left_out, make_assignment, read, read_exercises
from tests.make_assignment import main as make_assignment_main
from tests.mutants import MUTANTS, mutated
from tests.mutants import main as mutants_main

EXERCISES = read_exercises()


def run(*argv, cwd=HOME):
    """A Python command's output; its environment asks for no extra pytest options."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr


# -- the students' copy

def test_exercises_are_fenced():
    """A fence that lost its partner in an edit: the students' copy would hold the answer."""
    assert 12 <= len(EXERCISES) <= 16 and [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert (EXERCISES[2].title, EXERCISES[2].points, EXERCISES[2].file) == ("mah_dpo_loss", 3, "mah_dpo.py")
    tests = read(HOME, os.path.join("tests", "test_exercises.py"))
    for e in EXERCISES:
        assert len(re.findall(rf"^def test_ex{e.number}_", tests, re.M)) >= 1, f"exercise {e.number} has no tests of its own"
        assert e.points > 0 and e.functions[-1].split(".")[-1] in e.title


@pytest.mark.parametrize("fault", ["# --- end of exercise 2 ---", "# --- exercise 2: again (1 point) ---",
                                   "# --- exercise 9: other (1 point) ---"])
def test_between_refuses_repeated_and_nested_fences(fault):
    """A body taken from the wrong place of a submission, or from another exercise."""
    lines = ["x", "# --- exercise 2: f (1 point) ---", "def f():", "    pass", "    # --- end of exercise 2 ---", "y"]
    assert between(lines, 2) == (2, 4)
    with pytest.raises(ValueError, match="exercise 2"):
        between(lines[:3] + [fault] + lines[3:], 2)
    for left in (lines[:4] + lines[5:], lines[:1] + lines[2:], lines[:1] + [lines[4]] + lines[2:4] + [lines[1]], []):
        with pytest.raises(ValueError, match="once each"):
            between(left, 2)


def test_left_out_keeps_what_is_not_the_answer():
    """A copy without the docstring that states the task, with a comment that holds the answer, or with broken code around it."""
    answer = "        # the answer is 3\n        def g():\n            return 1\n        return 3\n"
    text = ('import os\n\n\nclass C:\n    # --- exercise 1: C.f (2 points) ---\n    def f(self, x,\n          y=1):  # (B,)\n'
            f'        """What.\n\n        More."""\n{answer}\n    def h(self):\n        "One line."\n        return 4\n'
            '    # --- end of exercise 1 ---\n\n    def other(self):\n        return 5\n')
    exercise = type(EXERCISES[0])(1, "C.f", 2, "c.py", ["C.f", "C.h"])
    found = left_out(text, [exercise])
    left = ('        raise NotImplementedError("exercise 1: write C.{}, between its two comment lines in c.py")\n')
    assert found == text.replace(answer, left.format("f")).replace("        return 4\n", left.format("h"))
    space = {}
    exec(found, space)
    assert space["C"]().other() == 5
    with pytest.raises(NotImplementedError, match="exercise 1: write C.h"):
        space["C"]().h()


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("course") / "copy")
    make_assignment_main([out])
    return out


def test_the_copy_asks_for_every_exercise(handed_out):
    """An exercise whose tests pass, or fail for another exercise's sake, before it is solved; other tests that fail with it."""
    files = [f"tests/test_{name}.py" for name in ("exercises", "data", "tokenizer", "vocabulary", "prm", "mah_dpo")]
    report = os.path.join(handed_out, "report.xml")
    printed = run("-m", "pytest", "-q", "--tb=native", "-p", "no:cacheprovider", f"--junitxml={report}", *files, cwd=handed_out)
    passed = []
    for case in ElementTree.parse(report).iter("testcase"):
        name, problem = case.get("name"), next((e for e in case if e.tag in ("failure", "error")), None)
        if case.get("classname") == "tests.test_exercises":
            assert problem is not None, f"{name} passes before anything is solved"
            number = re.match("test_ex([0-9]+)_", name)[1]
            message = problem.get("message")
            assert message.startswith(f"NotImplementedError: exercise {number}: write "), (name, message)
        elif problem is None:
            passed.append(name)
        else:
            assert re.search("NotImplementedError: exercise [0-9]+: write ", problem.text), (name, problem.text)
    assert len(passed) > 150, printed[-2000:]


def test_pasting_the_reference_back_restores_the_files(handed_out):
    """A copy in which something is missing beside the bodies: solved, it would still fail. Then the files are these files."""
    for file in FILES:
        lines, own = read(handed_out, file).split("\n"), read(HOME, file).split("\n")
        for e in (e for e in EXERCISES if e.file == file):
            a, b = between(lines, e.number)
            lines[a:b] = own[slice(*between(own, e.number))]
        assert lines == own
    for name in ("grade", "mutants", "make_assignment", "test_course"):
        assert not os.path.exists(os.path.join(handed_out, "tests", f"{name}.py"))            # they hold or show answers


def test_a_number_selects_its_exercise_alone():
    """`-k ex1` that also runs ex10 to ex15, or a test of another file."""
    names = [n for n in os.listdir(os.path.join(HOME, "tests")) if n.endswith(".py")]
    elsewhere = [n for n in names if re.search("def test_.*ex[0-9]+_", read(HOME, os.path.join("tests", n)))]
    assert elsewhere == ["test_exercises.py"]
    printed = run("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-k", "ex1 or ex3", "tests/test_exercises.py")
    names = re.findall(r"::(\w+)", printed)
    assert {re.match("test_ex([0-9]+)_|", name)[1] for name in names} == {"1", "3"}, printed[-2000:]


# -- the grader

def submission(directory, edits):
    """A directory with the seven files, the lines between the fences of exercise n replaced by edits[n] (text, or a function of
    the reference's)."""
    make_assignment(str(directory), {})
    files = {file: read(HOME, file).split("\n") for file in FILES}
    for n, edit in edits.items():
        lines = files[EXERCISES[n - 1].file]
        a, b = between(lines, n)
        lines[a:b] = (edit if isinstance(edit, str) else edit("\n".join(lines[a:b]))).split("\n")
    for file, lines in files.items():
        with open(os.path.join(directory, file), "w", encoding="utf-8", errors="surrogateescape") as f:
            f.write("\n".join(lines))
    return str(directory)


def test_submitted_takes_what_stands_between_the_fences(tmp_path):
    """A fault in one exercise that costs others of the same file; an edit elsewhere that counts; bytes that are no UTF-8."""
    edits = {2: "def dpo_loss(): return '\udcff'", 3: "# --- exercise 4: modpo_loss (2 points) ---", 6: "def ("}
    directory = submission(tmp_path / "s", edits)
    os.remove(os.path.join(directory, "decode.py"))
    with open(os.path.join(directory, "prm.py"), "a", encoding="utf-8") as f:
        f.write("\nraise SystemExit\n")
    os.mkfifo(os.path.join(directory, "decode.py")) if hasattr(os, "mkfifo") else None        # reading it would wait for ever
    problems = {}
    for e in EXERCISES:
        try:
            text = submitted(directory, e)
            assert (text == read(HOME, e.file)) == (e.number != 6)
        except ValueError as problem:
            problems[e.number] = str(problem)
    assert "not UTF-8" in problems.pop(2) and "inside exercise 3" in problems.pop(3) and "once each" in problems.pop(4)
    assert set(problems.values()) == {"decode.py is missing"} and sorted(problems) == [10, 12]


def test_a_submission_costs_its_own_exercise_only(tmp_path):
    """A grader that a submission ends, silences or persuades: by leaving, by patching pytest and torch, by tests of its own."""
    patched = ("import pytest, torch, builtins, sys\npytest.fail = lambda *a, **k: None\ntorch.allclose = lambda *a, **k: True\n"
               "sys.modules['test_exercises'] = pytest\ndef mah_dpo_loss(*a): return torch.tensor(0.0), {}\n"
               "def balanced_mean(*a): return torch.tensor(0.0)")
    broken = [5, *range(9, len(EXERCISES) + 1)]
    directory = submission(tmp_path / "s", {
        1: lambda right: right.replace("    row, t =", "    print('hello' * 9999)\n    row, t ="),
        2: "import os\nos._exit(0)", 3: patched,
        4: "import sys\nsys.exit(0)", 6: "def majority_labels(:", 7: lambda right: right.replace("_chosen - ", "_chosen + "),
        **{n: f"# --- exercise {n}: again (1 point) ---" for n in broken}})
    for name in ("conftest.py", "test_exercises.py"):
        with open(os.path.join(directory, "tests", name), "w") as f:
            f.write("raise SystemExit\n")
    out = str(tmp_path / "results.json")
    printed = run("-m", "tests.grade", directory, "--out", out, "--seed", "5")
    with open(out) as f:
        results = json.load(f)
    scores = {int(t["number"]): t["score"] for t in results["tests"]}
    assert scores == dict.fromkeys(range(1, len(EXERCISES) + 1), 0) | {1: 3, 8: 6} and results["score"] == 9, printed
    said = {int(t["number"]): t["output"] for t in results["tests"]}
    assert "ended without an answer" in said[2] and "balanced_mean is 0.0, expected" in said[3] and "SystemExit" in said[4]
    assert "SyntaxError" in said[6] and "bradley_terry_loss is" in said[7] and "once each" in said[9]
    assert "hello" not in printed and " 3 / 3   exercise  1: response_logps" in printed
    assert set(results["tests"][0]) == {"name", "number", "score", "max_score", "output", "status"}


def test_a_submission_that_kills_the_grader_has_no_points(tmp_path):
    """A submission without results, which a course's platform takes for a fault of the grader."""
    directory = submission(tmp_path / "s", {1: "import os\nos.kill(os.getppid(), 9)"})
    out = str(tmp_path / "results.json")
    run("-m", "tests.grade", directory, "--out", out)
    with open(out) as f:
        results = json.load(f)
    assert results["score"] == 0 and len(results["tests"]) == len(EXERCISES)
    assert all("was ended" in t["output"] and t["score"] == 0 for t in results["tests"])


def test_a_submission_that_hangs_is_stopped():
    """A grader that waits for ever."""
    e, files = EXERCISES[1], ["data.py", *(os.path.join("tests", n) for n in ("grade.py", "make_assignment.py"))]
    pupil = Pupil(e, {f: read(HOME, f) for f in files} | {e.file: "while True: pass"}, limit=0.2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not answer in time"):
            pupil.call("dpo_loss", (), {})
    assert pupil.process.returncode is not None and not os.path.exists(pupil.directory)


# -- planted bugs

def test_bugs_can_be_planted():
    """An edit of the code after which a bug cannot be planted any more, or whose test is gone (`--killers` runs them all)."""
    assert len(MUTANTS) >= 60 and {m.file for m in MUTANTS} == set(FILES)
    for m in MUTANTS:
        compile(mutated(m), m.file, "exec")              # raises where the old text does not stand there exactly once
        file, name = m.killer.split("::")
        assert re.search(rf"^def {name}\(", read(HOME, os.path.join("tests", file)), re.M), m.killer
        assert m.hint.endswith(".") and m.file not in m.hint


def test_a_planted_bug_is_not_told(tmp_path, capsys):
    """A copy that says where its bug is, or has none, or several."""
    for n in (1, len(MUTANTS)):
        mutants_main(["--plant", str(n), str(tmp_path / str(n))])
        differ = [f for f in FILES if read(tmp_path / str(n), f) != read(HOME, f)]
        assert differ == [MUTANTS[n - 1].file] and not os.path.exists(tmp_path / str(n) / "tests" / "mutants.py")
        assert MUTANTS[n - 1].hint in (printed := capsys.readouterr().out) and MUTANTS[n - 1].file not in printed


@pytest.mark.parametrize("argv", [["0"], ["--plant", "0", "OUT"], ["--plant", "x", "OUT"],
                                  ["--plant", str(len(MUTANTS) + 1), "OUT"]])
def test_a_number_without_a_bug(argv, tmp_path):
    """A traceback, or the last bug for number 0."""
    with pytest.raises(InputError, match=f"numbers from 1 to {len(MUTANTS)}"):
        mutants_main([str(tmp_path / "out") if a == "OUT" else a for a in argv])


def test_readme_hands_out_what_there_is():
    """A handout whose points, files or bugs are those of last year."""
    readme = read(HOME, "README.md")
    rows = re.findall(r"^\| ([0-9]+) \| `(.*?)` \| (.*?) \| .* \| `pytest -k ex([0-9]+)` \| ([0-9]+) \| [0-9]+ \|$", readme, re.M)
    assert [(int(n), file, re.findall("`(.*?)`", names), int(ex), int(points)) for n, file, names, ex, points in rows] == \
        [(e.number, e.file, e.functions, e.number, e.points) for e in EXERCISES]
    bugs = re.findall(r"^\| ([0-9]+) \| ([^|`]*\.) \|$", readme, re.M)
    assert len(bugs) >= 10 and all(MUTANTS[int(n) - 1].hint == hint for n, hint in bugs)
    assert f"There are {len(MUTANTS)};" in readme and f"they are {sum(e.points for e in EXERCISES)} points" in readme
