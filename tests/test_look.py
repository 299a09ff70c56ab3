"""interop/look.py: a look at data before training. Every docstring states the bug that its test
prevents."""
import json
import os
import re
import subprocess
import sys

import pytest

from data import InputError
from interop import look
from test_datasets import judged, published, rated, user

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write(directory, **rows):
    """A directory of JSONL files; "." for "__" in their names."""
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / (name.replace("__", ".") + ".jsonl")).write_text(text, encoding="utf-8")
    return str(directory)


def looked(capsys, *args):
    """What the command prints."""
    look.main(list(args))
    return capsys.readouterr().out


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_look_by_hand(tmp_path, capsys):
    """Rows that vanish without a word, lengths of something else, steps taken for an objective."""
    steps = {"prompt": "pp", "steps": ["a b", "c"], "labels": [1, 0]}
    rows = [pair("p" * 10 * n, "c" * n, "r") for n in (1, 2, 3)]
    data = write(tmp_path, warmth=[*rows, pair("p", "x", "x")], warmth__steps=[steps] * 3,
                 math_accuracy=[{"question": "2 + 3?", "answer": "It is\n#### 5"}])
    out = looked(capsys, data)
    assert re.search(r"warmth.jsonl: 4 rows, 3 pairs on 3 prompts, (\d) to train on, (\d) to hold "
                     r"out; 1 left out: chosen equals rejected\n", out)
    assert "characters: prompts 10 to 30, median 20; chosen 1 to 3, median 2; rejected 1 to" in out
    assert "warmth.steps.jsonl: 3 rows, 3 responses of 6 steps, 3 of them right\n" in out
    assert "characters: prompts 2 to 2, median 2; steps 1 to 3, median 1\n" in out
    assert "math_accuracy.jsonl: 1 rows, 1 questions\n" in out
    assert "solutions 12 to 12" in out and "answers   5\n" in out
    assert "opposite" not in out


def test_lengths_in_tokens(tmp_path, capsys, checkpoint, gpt):
    """Characters called tokens; pairs that a run would leave out counted as kept."""
    long = "a pear . " * gpt.config.max_len
    rows = [pair("name a fruit .", "a pear .", "no ."), pair("q", long, "r")]
    data = write(tmp_path, warmth=rows, coldness=rows[1:])
    out = looked(capsys, data, "--init", checkpoint)
    n_prompt = len(gpt.tokenizer.encode_chat([user("name a fruit .")]))
    n = len(gpt.tokenizer.encode("a pear ."))
    assert f"tokens: prompts {n_prompt} to {n_prompt}, median {n_prompt}; chosen {n} to {n}," in out
    for counts in ("2 rows, 1 pairs on 1 prompts", "1 rows, 0 pairs on 0 prompts"):
        assert re.search(counts + ".*; 1 left out: pairs longer than the context of 128 tok", out)
    with pytest.raises(InputError, match="config.json"):
        look.main([data, "--init", data])


def conflicts(out):
    """What is said about two objectives: {their names: numbers}."""
    found = {}
    for line in out.splitlines():
        if "opposite" in line:
            one, _, other, *_ = line.split()
            found[one, other] = [int(number) for number in re.findall(r"\d+", line)]
    return found


def test_conflicts_by_hand(tmp_path, capsys):
    """Conflicts missed because the same answers stand in another order, in other rows or in another
    kind of row; agreement, or answers that only one objective ranks, taken for one."""
    alone = [pair("p", "a", "b"), pair("q", "c", "d"), pair("r", "e", "f"), pair("o", "g", "h")]
    verdicts = [judged(*row) for row in (("p", "b", "yes"), ("q", "c", "yes"), ("p", "a", "no"),
                                         ("q", "d", "no"), ("r", "e", "yes"), ("r", "x", "no"))]
    # Of ratings the order of all counts, not the best and the worst alone.
    both = [rated("p", honesty="123", helpfulness="213"), rated("s", honesty="123")]
    data = write(tmp_path, warmth=alone, true=verdicts, feedback=both, void=[pair("v", "a", "b")])
    # Prompts with a conflict, shared ones, their share in per cent; the same of pairs of answers.
    assert conflicts(looked(capsys, data)) == {
        ("helpfulness", "honesty"): [1, 1, 100, 1, 3], ("helpfulness", "true"): [1, 1, 100, 1, 1],
        ("helpfulness", "warmth"): [0, 1, 0, 0, 1], ("honesty", "true"): [0, 1, 0, 0, 1],
        ("honesty", "warmth"): [1, 1, 100, 1, 1], ("true", "warmth"): [1, 3, 33, 1, 2]}


def test_an_objective_that_contradicts_itself(tmp_path, capsys):
    """Opposite preferences, within a file or between two, of which nobody hears; the same one
    twice taken for such."""
    data = write(tmp_path, cold=[pair("p", "a", "b")] * 2 + [pair("q", "a", "b")],
                 warm=[pair(*row) for row in ("pab", "pba", "qab")],
                 feedback=[rated("q", warm="123"), rated("o", warm="123")])
    out = looked(capsys, data)
    assert "warm contradicts itself on 2 of 3 prompts\n" in out and "cold contradicts" not in out


def test_half_a_character(tmp_path):
    """An example that no terminal can print, and that ends the look."""
    data = write(tmp_path, warmth=[pair("a \ud83d kite", "a", "b")])
    done = subprocess.run([sys.executable, "-m", "interop.datasets", data], cwd=HOME,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "a ? kite" in done.stdout


def test_the_command(tmp_path):
    """A fault that ends in a traceback, or without the line where it is."""
    data = write(tmp_path, warmth=[pair("p", "a", "b"), pair("p", "a", 3)])
    ended = []
    for directory in (data, ""):
        done = subprocess.run([sys.executable, "-m", "interop.datasets", directory], cwd=HOME,
                              capture_output=True, text=True)
        ended.append((done.returncode, done.stderr))
    assert ended[0] == (2, f"error: {data}/warmth.jsonl:2: 'rejected' is int 3: the content of a "
                        'message holds \'int\': give text, or a list of {"type": "text", "text": '
                        '"..."}\n')
    assert ended[1][0] == 2 and "no directory with an objective" in ended[1][1]


def test_published_conflict(tmp_path, capsys):
    """TruthfulQA's answers: nearly every two answers that both verdicts tell apart are a conflict,
    because most false answers are informative."""
    for name, source in [("truthful", "truth"), ("informative", "info")]:
        os.symlink(published(f"truthfulqa_judge_{source}.jsonl"), tmp_path / f"{name}.jsonl")
    out = looked(capsys, str(tmp_path))
    assert "truthful.jsonl: 1985 rows, 646 pairs on 73 prompts" in out
    assert "informative.jsonl: 1985 rows, 356 pairs on 73 prompts" in out
    assert conflicts(out) == {("informative", "truthful"): [73, 73, 100, 4012, 4185]}
