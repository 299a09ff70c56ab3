"""Write the students' copy of this project: python -m tests.make_assignment OUT

An exercise is one function of the seven files, or a few that belong together, between two comment lines:

    # --- exercise 3: mah_dpo_loss (3 points) ---
    # --- end of exercise 3 ---

In the copy every body there is a `raise NotImplementedError("exercise 3: ...")`; signatures and docstrings (what, shapes,
equation) stay. The instructor's tools stay behind: they hold the answers, or lead to them.
"""
import argparse
import ast
import os
import re
import shutil
from dataclasses import dataclass

from data import InputError, run_command

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = ("data.py", "model.py", "prm.py", "mah_dpo.py", "decode.py", "evaluate.py", "train.py")
BESIDE = ("README.md", "requirements.txt", "LICENSE", ".gitignore")
FOLDERS = ("interop", "experiments")
TOOLS = ("make_assignment.py", "grade.py", "mutants.py", "test_course.py")
FENCE = re.compile(r"\s*# --- (end of )?exercise ([0-9]{1,3})(?:: (.+) \(([0-9]{1,3}) points?\))? ---\s*")


@dataclass
class Exercise:
    number: int
    title: str
    points: int
    file: str
    functions: list          # "mah_dpo_loss", "KVCache.keep"


def between(lines, number):
    """-> (first, stop): lines[first:stop] stand between the exercise's fences. ValueError says what is wrong with them."""
    marks = [(i, m) for i, m in enumerate(map(FENCE.fullmatch, lines)) if m]
    mine = [(i, bool(m[1])) for i, m in marks if int(m[2]) == number]
    if [end for _, end in mine] != [False, True]:
        raise ValueError(f"the comment lines before and after exercise {number} must stand there once each, in this order; "
                         f"found {', '.join('the end' if end else 'the start' for _, end in mine) or 'none'}")
    first, stop = mine[0][0] + 1, mine[1][0]
    if any(first <= i < stop for i, _ in marks):
        raise ValueError(f"another exercise's comment line stands inside exercise {number}")
    return first, stop


def functions_of(text, first, stop):
    """-> [(name, node of the syntax tree)] of the functions and methods that start in lines[first:stop] of a file's text."""
    tree = ast.parse(text)
    places = [("", tree), *((f"{c.name}.", c) for c in tree.body if isinstance(c, ast.ClassDef))]
    return [(prefix + node.name, node) for prefix, place in places for node in place.body
            if isinstance(node, ast.FunctionDef) and first < node.lineno <= stop]


def read_exercises(home=HOME):
    """The exercises of the seven files in the order of their numbers. ValueError for a fence without its partner, a function
    without a docstring, a number that stands twice."""
    found = []
    for file in FILES:
        text = read(home, file)
        lines = text.split("\n")
        for m in filter(None, map(FENCE.fullmatch, lines)):
            first, stop = between(lines, int(m[2]))
            functions = functions_of(text, first, stop)
            if not functions or not all(ast.get_docstring(node) and len(node.body) > 1 for _, node in functions):
                raise ValueError(f"{file}: exercise {m[2]} needs functions with a docstring and a body")
            if m[3]:
                found.append(Exercise(int(m[2]), m[3], int(m[4]), file, [name for name, _ in functions]))
    found.sort(key=lambda e: e.number)
    if [e.number for e in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"exercises must be numbered from 1, not {[e.number for e in found]}")
    return found


def read(home, file):
    with open(os.path.join(home, file), encoding="utf-8") as f:
        return f.read()


def write(directory, texts):
    """{file: text} -> files of a new directory."""
    for file, text in texts.items():
        path = os.path.join(directory, file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)


def left_out(text, exercises):
    """A file's text -> the text that students get: the exercises' bodies replaced."""
    lines, bodies = text.split("\n"), []
    for e in exercises:
        for name, node in functions_of(text, *between(lines, e.number)):
            message = f"exercise {e.number}: write {name}, between its two comment lines in {e.file}"
            bodies.append((node.body[0].end_lineno, node.end_lineno, " " * node.body[0].col_offset, message))
    for start, stop, indent, message in sorted(bodies, reverse=True):                     # from below: line numbers stay true
        lines[start:stop] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def make_assignment(out, change=None):
    """Write the copy to a new directory `out`. change: {file: text} instead of the files with their exercises left out."""
    if os.path.exists(out):
        raise InputError(f"{out} exists; name a new directory")
    if change is None:
        exercises = read_exercises()
        change = {f: left_out(read(HOME, f), [e for e in exercises if e.file == f]) for f in FILES}
    tests = [os.path.join("tests", n) for n in sorted(os.listdir(os.path.join(HOME, "tests")))
             if n.endswith(".py") and n not in TOOLS]
    new = out.rstrip("/\\") + ".tmp"
    shutil.rmtree(new, ignore_errors=True)
    beside = [os.path.join(d, n) for d in FOLDERS for n in sorted(os.listdir(os.path.join(HOME, d))) if n.endswith(".py")]
    files = [f for f in (*FILES, *BESIDE, *beside, *tests) if os.path.exists(os.path.join(HOME, f))]
    write(new, {f: change.get(f) or read(HOME, f) for f in files})
    os.replace(new, out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a new directory for the students' copy")
    args = parser.parse_args(argv)
    make_assignment(args.out)
    exercises = read_exercises()
    print(f"{args.out}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; start there with pytest -k ex1")


if __name__ == "__main__":
    run_command(main)
