"""data.py's readers: pairs, ratings, steps, questions, final answers. Every docstring states the bug that its test prevents.

The rows here are written by hand after the published formats. Tests of the published rows themselves find them through
the environment variable MAHALO_DATA and are skipped without it.
"""
import json
import os
import random
import time
import tracemalloc
from collections import Counter

import pytest

from data import OBJECTIVES, InputError, read_jsonl
from interop.answers import answer_parts, final_answer, majority, marked_answer, same_answer
from interop.datasets import (DATA_HELP, Preference, Question, Steps, holds_questions,
                              read_outputs, read_preferences, read_questions, read_steps)

USER, BOT = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
READERS = {"pairs": lambda p, s=None: read_preferences(p, "honesty", s), "steps": lambda p, s=None: read_steps(p),
           "questions": read_questions, "outputs": read_outputs}
READERS["ratings"] = READERS["pairs"]


@pytest.fixture
def read(tmp_path):
    """read(kind, *rows) -> (what the reader of that kind makes of a JSONL file of these rows, counts of skipped rows)."""
    def read(kind, *rows):
        path, skipped = tmp_path / "rows.jsonl", {}
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return READERS[kind](str(path), skipped), skipped
    return read


def slice_of(name):
    """The path of a real slice, or the test is skipped."""
    path = os.path.join(os.environ.get("MAHALO_DATA", ""), name)
    if "MAHALO_DATA" not in os.environ or not os.path.isfile(path):
        pytest.skip(f"MAHALO_DATA does not name a directory with {name}")
    return path


# -- files and faults

GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'


def with_fields(**changes):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"} | changes
    return json.dumps({k: v for k, v in row.items() if v is not ...}).encode()


@pytest.mark.parametrize("line, words", [
    (b'{"prompt": "p", "chosen"', "not JSON"), (b"[1, 2]", "list, not an object"), (b"null", "not an object"),
    (b'"text"', "not an object"), (b'{"prompt": "\xff"}', "not UTF-8"), (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    (with_fields(chosen=...), "'chosen' is missing"), (with_fields(prompt=...), "'prompt' is missing"),
    (b"{}", "no fields"), (with_fields(rejected=3), "'rejected' is int"), (with_fields(chosen=None), "'chosen' is NoneType"),
    (with_fields(prompt=[]), "'prompt' is list"), (with_fields(prompt=[{"role": "robot", "content": "x"}]), "'prompt' is list"),
    (with_fields(prompt=[{"role": "user", "content": 5}]), "'prompt' is list"),
    (with_fields(prompt=[{"role": ["user"], "content": "x"}]), "'prompt' is list"),
    (with_fields(chosen=" \n"), "'chosen' is empty"), (with_fields(prompt=""), "'prompt' is empty"),
    (with_fields(rejected=[{"role": "assistant", "content": ""}]), "'rejected' is empty"),
    (with_fields(prompt=[{"role": "assistant", "content": "x"}]), "ends with the assistant"),
    (with_fields(rejected="c"), "'chosen' equals 'rejected'"),
    (with_fields(chosen=[{"role": "assistant", "content": "r"}]), "'chosen' equals 'rejected'")])
def test_bad_preference_rows_name_file_and_line(tmp_path, line, words):
    """A bad row that is skipped, or a traceback that does not say which of ten thousand lines is broken."""
    path = tmp_path / "honesty.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(InputError) as e:
        read_preferences(str(path), "honesty")
    assert f"{path}:3: " in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("reader", [lambda p: read_preferences(p, "honesty"), read_steps])
def test_missing_and_empty_files(tmp_path, reader):
    """An empty file that trains on nothing."""
    with pytest.raises(InputError, match="no such file"):
        reader(str(tmp_path / "none.jsonl"))
    for content in (b"", b"\n \r\n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(InputError, match="empty.jsonl: no rows"):
            reader(str(tmp_path / "empty.jsonl"))


def test_good_preference_rows(tmp_path):
    """Message lists read as one string, other fields carried into the prompt, or spaces of a response stripped."""
    path = tmp_path / "x.jsonl"
    chat = [{"role": "system", "content": "s", "id": 1}, {"role": "user", "content": "é\n"}]
    path.write_bytes(GOOD + b"\n" + with_fields(prompt=chat, chosen=[chat[1], {"role": "assistant", "content": " yes "}],
                                               rejected=" no", extra=[1]))     # no newline at the end of the file
    assert read_preferences(str(path), "honesty") == [
        Preference("honesty", [{"role": "user", "content": "p"}], "c", "r"),
        Preference("honesty", [{"role": "system", "content": "s"}, {"role": "user", "content": "é\n"}], " yes ", " no")]


@pytest.mark.parametrize("row, words", [
    ({"steps": ["a"]}, "'labels'"), ({"labels": [1]}, "'steps'"), ({"steps": [], "labels": []}, "'steps'"),
    ({"steps": ["a", ""], "labels": [1, 1]}, "'steps'"), ({"steps": "ab", "labels": [1, 1]}, "'steps'"),
    ({"steps": ["a"], "labels": [1.5]}, "'labels'"), ({"steps": ["a"], "labels": [float("nan")]}, "'labels'"),
    ({"steps": ["a"], "labels": ["1"]}, "'labels'"), ({"steps": ["a", "b"], "labels": [1]}, "2 steps but 1 labels"),
    ({"steps": ["a"], "labels": [1], "prompt": 7}, "'prompt' is int")])
def test_bad_steps_rows(tmp_path, row, words):
    """Labels out of range, NaN, or shifted by one against their steps train a PRM on nonsense."""
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"prompt": "p", "steps": ["a"], "labels": [1]}) + "\n" + json.dumps({"prompt": "p"} | row))
    with pytest.raises(InputError) as e:
        read_steps(str(path))
    assert f"{path}:2: " in str(e.value) and words in str(e.value)


def test_good_steps_rows(tmp_path):
    """true/false labels kept as booleans break the loss's arithmetic."""
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"prompt": "p", "steps": ["a\n", "b"], "labels": [True, 0.25]}))
    rows = read_steps(str(path))
    assert rows == [Steps([{"role": "user", "content": "p"}], ["a\n", "b"], [1.0, 0.25])]
    assert [type(v) for v in rows[0].labels] == [float, float]


@pytest.mark.parametrize("kind, row, words", [
    ("pairs", {"prompt": "p", "chosen": [USER("x")], "rejected": "r"}, "'chosen' does not end with the assistant's turn"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "'prompt' is missing (question, instruction, problem would do)"),
    ("pairs", {"question": ["x"], "chosen": "a", "rejected": "b"}, "'question' is list"),
    ("pairs", {"chosen": "Human: x", "rejected": "Human: y"}, "'chosen' does not end"),
    ("ratings", {"prompt": "p", "completions": 5}, "'annotations'"),
    ("ratings", {"prompt": "p", "completions": ["x"]}, "'annotations'"),
    ("ratings", {"prompt": "p", "completions": [{"response": "x"}]}, "'annotations'"),
    *(("ratings", {"prompt": "p", "completions": [{"response": "x", "annotations": {"honesty": {"Rating": r}}}]}, "'annotations'")
      for r in (True, "five", float("nan"), "inf", [1], {"a": 1}, "9" * 400)),
    *(("steps", {"problem": "p", "steps": ["a", "b"], "label": v}, "'label' must be") for v in (2, -2, True, "1", None, 0.5)),
    ("steps", {"prompt": "p", "completions": "ab", "labels": [True, True]}, "'completions'"),
    ("questions", {"question": "q"}, "'answer' is missing (final_answer would do)"),
    ("questions", {"question": "q", "answer": True}, "'answer' is bool"),
    ("questions", {"question": "q", "answer": "  "}, "'answer' is empty"),
    ("questions", {"problem": "q", "solution": "so 1 + 1 = 2"}, "'solution' marks no final answer"),
    ("questions", {"answer": "5"}, "'prompt' is missing")])
def test_bad_rows_of_other_kinds(tmp_path, kind, row, words):
    """A first wrong step past the end, `true` read as a rating of 1, NaN, a guess where no answer is marked."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as e:
        READERS[kind](str(path))
    assert f"{path}:2: " in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize("dump", [lambda rows: json.dumps(rows), lambda rows: "\n\ufeff" + json.dumps(rows, indent=1),
                                  lambda rows: "\ufeff" + "\r\n".join(map(json.dumps, rows)),
                                  lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "]\n"])
def test_lists_and_byte_order_marks(tmp_path, dump):
    """A JSON list (indented or not) read as lines, or a byte order mark taken for broken JSON."""
    path = tmp_path / "x.json"
    path.write_text(dump([PAIR, PAIR]), encoding="utf-8")
    assert read_preferences(str(path), "honesty") == [Preference("honesty", [USER("p")], "c", "r")] * 2


@pytest.mark.parametrize("content, words", [
    ([PAIR, 5], "x.json: row 2: int, not an object"), ([PAIR, PAIR | {"chosen": ""}], "x.json: row 2: 'chosen' is empty"),
    ([], "x.json: no rows"), ('[{"prompt": 1},', "x.json:1: not JSON"), ("[" * 100_000, "x.json:1: nested too deeply")])
def test_bad_rows_of_a_list(tmp_path, content, words):
    """A row of a list reported as line 1: nobody finds it among thousands."""
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as e:
        read_preferences(str(path), "honesty")
    assert words in str(e.value)


def test_lines_are_read_one_at_a_time(tmp_path):
    """A file of gigabytes read into memory to get at its first row."""
    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps(PAIR | {"chosen": "c" * 100_000}) + "\n") * 100)
    tracemalloc.start()
    rows = sum(1 for _ in read_jsonl(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 100 and peak < 3_000_000          # the file has 10 MB


def rows_of_the_help():
    """(kind, row) for every example row of DATA_HELP."""
    kind, text = None, ""
    for line in DATA_HELP.splitlines()[1:]:
        if line[0] != " " and line.split()[0] in READERS:
            kind, line = line.split(maxsplit=1)
        text += line.strip() if line.strip()[0] == "{" or line.startswith(" ") else ""
        try:
            row, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            continue
        yield kind, row
        text = ""


@pytest.mark.parametrize("row, questions", [
    ({"question": "q", "answer": "2"}, True), ({"prompt": "p", "chosen": "a", "rejected": "b"}, False),
    ({"instruction": "p", "completions": []}, False), (None, False)])
def test_which_files_hold_questions(tmp_path, row, questions):
    """Rated completions of accuracy taken for questions without an answer."""
    (tmp_path / "x.jsonl").write_text(json.dumps(row) if row else "")
    assert holds_questions(str(tmp_path / "x.jsonl"), OBJECTIVES["math_accuracy"]) is questions
    assert not holds_questions(str(tmp_path / "x.jsonl"), OBJECTIVES["honesty"])


def test_the_rows_of_the_help_are_read(read):
    """Help that shows rows which the readers refuse."""
    rows = list(rows_of_the_help())
    assert Counter(kind for kind, _ in rows) == {"pairs": 3, "ratings": 1, "questions": 2, "steps": 2, "outputs": 1}
    assert all(len(read(kind, row)[0]) == 1 and not read(kind, row)[1] for kind, row in rows)


GOOD_ROWS = [
    ("pairs", PAIR), ("pairs", {"question": "Assistant: a\n\nStudent: b\n\nAssistant:", "chosen": "c", "rejected": "d"}),
    ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    ("pairs", {"prompt": "p", "chosen": [USER("p"), BOT("c")], "rejected": [USER("p"), BOT("d")]}),
    ("ratings", {"instruction": "p", "completions": [
        {"response": r, "annotations": {"honesty": {"Rating": v, "Rationale": "so"}}} for r, v in zip("abcd", ("4", "1", "N/A", 2))]}),
    ("steps", {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}),
    ("steps", {"id": "x-1", "problem": "p", "steps": ["a", "b"], "final_answer_correct": False, "label": 1}),
    ("questions", {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}),
    ("questions", {"problem": "q", "solution": "so $\\boxed{\\frac{1}{2}}$", "answer": "\\frac{1}{2}"})]


def mutate(value, rng):
    """One random fault somewhere in a row."""
    junk = [None, True, -1, 3, 1e400, float("nan"), "", " ", "N/A", "\n\nAssistant:", "\\boxed{", "\\frac{}{", "\ud800", "9" * 400,
            [], [[]], {}, {"role": "user"}, [USER("x")], [BOT("")], [USER("x"), BOT("y")], {"Rating": [1]}]
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = mutate(value[key], rng)
        return value
    if isinstance(value, str) and value and rng.random() < 0.4:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(("", "\n\nHuman:", "####", "{", "}", "\x00", "0/0", "\\")) + value[i + rng.randrange(3):]
    return rng.choice(junk)


def test_faulty_rows_raise_only_input_errors(tmp_path):
    """A field of an unexpected type that ends in a traceback, or goes through as a prompt that is no conversation."""
    rng, path, outcomes = random.Random(0), tmp_path / "x.jsonl", Counter()
    for _ in range(1500):
        kind, row = rng.choice(GOOD_ROWS)
        for _ in range(rng.randrange(1, 4)):
            row = mutate(row, rng)
        content = json.dumps(row).encode()
        if rng.random() < 0.1:
            i = rng.randrange(len(content) + 1)
            content = content[:i] + bytes([rng.randrange(256)]) + content[i + 1:]
        path.write_bytes(content)
        try:
            for found in READERS[kind](str(path)):
                assert found.prompt and all(type(m["content"]) is str for m in found.prompt)
                assert found.prompt[-1]["role"] != "assistant"
                if isinstance(found, Question):
                    assert same_answer(found.answer, found.answer)
            outcomes["read"] += 1
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 150


# -- pairs

def test_transcripts_split_at_the_last_assistant_turn(read):
    """HH-RLHF: the prompt taken for part of the response, cut at the first turn, or cut at a 'Human:' within a line."""
    start = "\n\nHuman: Hi. Human: is a word\nAssistant: too\n\nAssistant: Yes:\n\nno speaker: here\n\nHuman: And?\n\nAssistant:"
    found, skipped = read("pairs", {"chosen": start + " Well.\n\nSo: yes.", "rejected": start + " No. "})
    assert found == [Preference("honesty", [USER("Hi. Human: is a word\nAssistant: too"), BOT("Yes:\n\nno speaker: here"),
                                            USER("And?")], "Well.\n\nSo: yes.", "No.")] and skipped == {}


def test_transcripts_that_cannot_serve_are_counted(read):
    """One odd row in 160 000 that stops the run, or that is trained on as if both answered the same prompt."""
    talk = lambda *turns: "".join(f"\n\n{who}: {said}" for who, said in zip(("Human", "Assistant") * 9, turns))
    good = {"chosen": talk("a", "b"), "rejected": talk("a", "c")}
    found, skipped = read("pairs", good, {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "x")},
                          {"chosen": talk("a", "b"), "rejected": talk("a", "")}, good,
                          {"chosen": talk("a", "b") + "\n\nAssistant: c", "rejected": talk("a", "b") + "\n\nAssistant: d"},
                          {"chosen": "b", "rejected": talk("a", "c")}, {"chosen": talk("a", "c"), "rejected": "b"})
    assert len(found) == 2 and skipped == {"chosen and rejected answer different prompts": 3,
                                           "the transcript ends without a response": 1,
                                           "the responses do not answer the prompt": 1}
    with pytest.raises(InputError, match="no rows to use; 1 skipped: the transcript ends without"):
        read("pairs", {"chosen": talk("a", "b"), "rejected": talk("a", "")})


@pytest.mark.parametrize("prompt, messages", [
    ("Assistant: Hi. \n\nStudent:  What?\n\nAssistant: \nThat.\n\nMore: of it\n\nStudent: Oh\n\nAssistant:",
     [BOT("Hi."), USER("What?"), BOT("That.\n\nMore: of it"), USER("Oh")]),                      # sm_acc.json
    ("Tutor: a\r\n\r\nUser: b", [BOT("a"), USER("b")]),
    ("Fix it.  \n\nAssistant:  How?\n\nHuman:  Well.", [USER("Fix it."), BOT("How?"), USER("Well.")]),     # hhh_alignment
    ("Be kind.\n\nHuman: a\n\nAssistant:", [{"role": "system", "content": "Be kind."}, USER("a")]),
    ("Human: alone", [USER("alone")]),
    ("A play:\n\nStudent: to be", [USER("A play:\n\nStudent: to be")]),                          # nobody answers
    ("Human: a\n\nAssistant: b", [USER("Human: a\n\nAssistant: b")]),                            # nothing is asked
    (" say 'Assistant:'\nUser: b", [USER(" say 'Assistant:'\nUser: b")])])
def test_prompts_that_are_transcripts(read, prompt, messages):
    """A tutoring dialogue as one user message: the model learns to answer a script instead of a student."""
    found, _ = read("pairs", {"question": prompt, "chosen": "Human: c\n\nAssistant: x", "rejected": "d"})
    assert found[0].prompt == messages and found[0].chosen == "Human: c\n\nAssistant: x"


def test_conversations_in_chosen_and_rejected(read):
    """UltraFeedback binarised: the prompt lost, doubled, or only the first of its messages kept."""
    ask, more = [USER("p")], [USER("p"), BOT("a"), USER("q")]
    both = lambda before, **prompt: prompt | {"chosen": before + [BOT("c")], "rejected": before + [BOT("r")]}
    system = {"role": "system", "content": "s"}
    rows = [both(ask), both(ask, prompt="p"), both(ask, prompt=[system] + ask), both([], prompt="p"), both(more, prompt="p"),
            both(more), {"prompt": more, "chosen": ask + [BOT("c")], "rejected": "r"}]
    found, skipped = read("pairs", *rows)
    assert [p.prompt for p in found] == [ask, ask, [system] + ask, ask, more, more]
    assert all((p.chosen, p.rejected) == ("c", "r") for p in found)
    assert skipped == {"the responses do not answer the prompt": 1}


def test_ratings_give_pairs_of_every_objective(tmp_path):
    """UltraFeedback: one pair list for all objectives, ratings compared as text ('10' < '9'), ties as preferences."""
    rated = lambda **values: [{"response": r, "model": "m", "annotations": {
        aspect: {"Rating": v[i], "Rationale": "..."} for aspect, v in values.items()}} for i, r in enumerate("abc")]
    rows = [{"instruction": "i", "completions": rated(honesty=("9", "10", "1"), helpfulness=("5", "N/A", "3"))},
            {"instruction": "j", "completions": rated(honesty=("2", "2", "2"), helpfulness=("N/A", "N/A", "3"))},
            {"instruction": "k", "completions": rated(honesty=(1, None, 2.5)) + [{"response": "d", "annotations": {}}]}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    skipped = {}
    pair = lambda objective, *said: Preference(objective, [USER(said[0])], *said[1:])
    assert read_preferences(str(path), "honesty", skipped) == [pair("honesty", "i", "b", "c"), pair("honesty", "k", "c", "a")]
    assert skipped == {"no two completions have different ratings of honesty": 1}
    assert read_preferences(str(path), "helpfulness", skipped) == [pair("helpfulness", "i", "a", "c")]
    with pytest.raises(InputError, match="3 skipped: no two completions have different ratings of truthfulness"):
        read_preferences(str(path), "truthfulness")


# -- steps

def test_spellings_of_steps(read):
    """ProcessBench's first wrong step read as 1-based, -1 as the last step, or steps after an error as right."""
    ask, steps = [USER("p")], ["a", "b", "c"]
    found, _ = read("steps", {"prompt": "p", "completions": steps, "labels": [True, False, True]},
                    {"question": "p", "steps": steps, "labels": [1, 0.5, 0]},
                    *({"problem": "p", "steps": steps, "label": v} for v in (-1, 0, 1, 2)))
    assert found == [Steps(ask, steps, labels) for labels in (
        [1, 0, 1], [1, 0.5, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0])]


# -- questions and final answers

def test_spellings_of_questions(read):
    """GSM8K's whole solution kept as the answer, or an answer that nobody could extract (an empty field) as one."""
    gsm = "It is 500 + 500 = <<500+500=1000>>1,000.\n#### 1,000"
    math = "As $\\boxed{1}$ is not, $\\boxed{\\frac{\\sqrt{3}}{2}}$."
    found, skipped = read("questions", {"question": "q", "answer": gsm}, {"problem": "q", "solution": math},
                          {"problem": "q", "solution": math, "answer": "\\frac{\\sqrt{3}}{2}"},
                          {"problem": "q", "final_answer": "x = 5 "}, {"question": "q", "answer": 7},
                          {"problem": "q", "final_answer": ""}, {"question": "q", "answer": float("nan")},
                          {"prompt": "q", "ground_truth": "Two.\nA: 2"})
    root = "\\frac{\\sqrt{3}}{2}"
    assert found == [Question([USER("q")], *rest) for rest in (
        ("1,000", gsm), (root, math), (root, math), ("x = 5", ""), ("7", ""), ("2", "Two.\nA: 2"))]
    assert skipped == {"the answer is empty": 2}


@pytest.mark.parametrize("text, answer", [
    ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"), ("\\boxed{1} or \\boxed {\\{1,\\{2\\}\\}} .", "\\{1,\\{2\\}\\}"),
    ("\\boxed{\\boxed{5}}", "5"), ("\\fbox{3}\n#### 4", "3"), ("\\boxed{x\\}y}", "x\\}y"), ("as 2 is \\boxed{5", "5"),
    ("2 + 3\n#### 1,000\n", "1,000"), ("2\nA: 18", "18"), ("The answer is 3.14.", "3.14"), ("the answer is: $18. Hope 5", "$18"),
    ("Answer: 18 because 3 + 15 = 18", "18"), ("**Answer:** 18 cm", "18 cm"), ("The answer is\n(C)", "(C)"),
    ("Final Answer: The final answer is $24$. I hope it is correct.", "$24$"), ("#### The answer is 18", "18"),
    ("#### Step 1\nadd 3\n#### Step 2\nThe answer is 7.", "7"), ("a 1 + 2 = 3\nanswer 3", "3"),
    ("it cost -$1,234.50.", "-$1,234.50"), ("from 5-3", "3"), ("it is -5, or so", "-5"), ("Thus 1/2 remains", "1/2"),
    ("\\frac{1}{2}.", "\\frac{1}{2}"), ("none", None), ("", None), ("\\boxed{}", None), ("####", None)])
def test_final_answers(text, answer):
    """Braces cut at the first '}', the first of several answers, a heading or an explanation taken for the answer."""
    assert final_answer(text) == answer


SAME = [("1,000", "1000", "1000.0", "$1000", "\\$1,000.00", "1{,}000", "1,\\!000", "1000.", "+1000", "1000 dollars"),
        ("\\frac{1}{2}", "1/2", "\\dfrac12", "0.5", ".5", "$\\frac12$", "\\( \\tfrac{1}{2} \\)", "2/4", "0.5\\%"),
        ("1\\frac12", "1.5", "1 1/2", "3/2", "1 \\frac{1}{2}"), ("-\\frac{3}{4}", "-0.75", "\\frac{-3}{4}", "\u22123/4"),
        ("-1\\frac12", "-1.5"), ("50%", "50", "50\\%", "50 percent", "50^\\circ", "50^{\\circ}", "50°", "50 degrees"),
        ("18", "18 cm", "18\\text{ cm}", "18\\text{ m}", "18 \\mbox{ inches}^2", "18 apples per day", "18 km/h", "**18**", "x=18",
         "x = 18.0"), ("\\sqrt3", "\\sqrt{3}", "sqrt(3)", "\\sqrt 3"), ("\\frac{\\sqrt{3}}{3}", "sqrt(3)/3", "\\sqrt3/3"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)", "(3.0, \\frac{\\pi}2)"), ("(\\frac32, 1)", "(1.5,1)"),
        ("x \\in [1,2]", "[1, 2]"), ("52_8", "52_{8}"), ("x^2", "x^{2}", "x ^ 2"), ("\\text{Evelyn}", "evelyn"),
        ("\\text{(C)}", "C", "(C)"), ("0", "-0", "0.00"), ("12\\pi", "12\\pi\\text{ cm}", "12 \\pi"),
        ("\\frac{11+9a}{20}", "(11+9a)/20"), ("-2, 1", "-2,1"), ("3\\sqrt{2}", "3 \\sqrt2"), ("32\\sqrt{2}",), ("2^{10}", "2^10"),
        ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}\\frac{-1}{3}\\\\2.0\\end{pmatrix}"),
        ("10,\\! 111,\\! 100", "10111100"), ("5 million", "5\\text{ million}"), ("2xy", "2 xy"),
        ("3\\times x", "3 \\cdot x", "3*x"), ("2\\pi", "2pi", "2 \\pi"), ("(1,200)", "(1, 200)"), ("(1200)",),
        *((x,) for x in ("1200", "1, 200", "1,-2", "528", "5", "2", "2k",
                         "2 sin x", "12", "12 pi i", "[1,2)", "(1,2)", "1/0", "1 2", "2/1/2", "x=1,y=2", "y=1,x=2", "1.0.0", "1e3",
                         "2\\frac{1}{x}", "\\frac{21}{x}", "5\\text{ or }7", "57", "2^{1}0", "\\infty", "-\\infty", "i", "10x",
                         "5:30", "3^2", "\\frac{}{3}", "\\frac", "(1,200]", "x+1", "x-1", ""))]


@pytest.mark.parametrize("texts, index", [
    (["#### 7", "so 8\n#### 1,000", "\\boxed{1000.0}"], 1), (["it is 3", "#### 4"], 1), (["perhaps 3 or 4", "5", "maybe 4"], 0),
    (["no", "none"], 0), (["", "#### 2", "#### 3"], 1)])
def test_majority(texts, index):
    """Prevents: a vote split by spelling, guesses that outvote a marked answer, a crash where nobody answers."""
    assert majority(texts) == index


def test_same_answers_and_no_others():
    """A right answer marked wrong for its spelling, or a wrong one marked right: (1,200) is not 1200, 2xy is not 2."""
    keys = [(answer_parts(a), i, a) for i, group in enumerate(SAME) for a in group]
    for parts, i, a in keys:
        for other, j, b in keys:
            assert (parts == other) == (i == j), (a, b)
    assert not same_answer(None, None) and not same_answer("1", None) and same_answer("1,000", "1000")
    assert not same_answer("50%", "0.5")              # the sign is dropped as a unit is


@pytest.mark.parametrize("text", [
    "9" * 10**6, "1e999999999", "9" * 299 + "." + "9" * 299, "\\boxed{" * 10**5, "\\boxed{" + "{" * 10**6, "answer is " * 10**5,
    "\n" * 10**6, "answer" + " " * 10**6, "1," * 10**6, "-" * 10**6, "\\frac{" * 10**5, "0." + "0" * 290 + "1/0." + "0" * 290,
    "####" * 10**5, "\\frac" * 50 + "1" * 50, " " * 10**6 + "A", "\\text{" * 50, "1/" * 140], ids=lambda t: t[:12].strip() or "blank")
def test_hostile_answers_cost_no_time(text):
    """A sampled answer of a million digits, or an exponent, on which exact arithmetic or a regular expression hangs."""
    start = time.time()
    same_answer(final_answer(text) or text, text)
    same_answer(text[:300], text[:299])
    assert time.time() - start < 5


# -- the published rows

@pytest.mark.parametrize("name, n, skipped", [
    ("hh_rlhf_harmless.jsonl", 237, {"the transcript ends without a response": 1, "chosen and rejected answer different prompts": 2}),
    ("hhh_alignment.json", 157, {}), ("sm_acc.json", 260, {}), ("ultrafeedback_binarized.jsonl", 160, {}),
    ("pairs/helpfulness.jsonl", 187, {}), ("pairs/honesty.jsonl", 46, {}), ("pairs/truthfulness.jsonl", 145, {})])
def test_published_pairs(name, n, skipped):
    """A published file that stops at one odd row, or dialogues that come as one message."""
    counts = {}
    found = read_preferences(slice_of(name), "honesty", counts)
    assert len(found) == n and counts == skipped
    assert all(p.prompt[-1]["role"] == "user" for p in found)
    turns = Counter(len(p.prompt) > 1 for p in found)
    assert turns[True] == {"hh_rlhf_harmless.jsonl": 143, "hhh_alignment.json": 34, "sm_acc.json": 260,
                           "pairs/helpfulness.jsonl": 9, "pairs/honesty.jsonl": 15}.get(name, 0)


@pytest.mark.parametrize("name, n, right", [("processbench_gsm8k.json", 344, 165), ("processbench_math.json", 300, 129)])
def test_published_steps(name, n, right):
    """Labels shifted against the published first wrong step."""
    found = read_steps(slice_of(name))
    assert len(found) == n and sum(0 not in s.labels for s in found) == right
    assert [s.labels.index(0) if 0 in s.labels else -1 for s in found] == [r["label"] for _, r in read_jsonl(slice_of(name))]


@pytest.mark.parametrize("name, n", [("gsm8k_train.jsonl", 1500), ("gsm8k_test.jsonl", 1144), ("gsm8k_test_socratic.jsonl", 300),
                                     ("math500.jsonl", 435)])
def test_published_solutions_end_in_their_answers(name, n):
    """A right response that the verifier calls wrong: the published solution itself is the easiest case."""
    found = read_questions(slice_of(name))
    assert len(found) == n
    assert [q.prompt for q in found if marked_answer(q.solution) != q.answer or not same_answer(q.answer, q.answer)] == []


def test_outputs_of_models(read):
    """Prevents: a response taken for the gold answer, one of several models left out, a row without any read as one."""
    row = {"question": "q", "answer": "so\n#### 2"}
    assert read("outputs", row | {"output": "2"})[0] == [(Question([USER("q")], "2", "so\n#### 2"), {"output": "2"})]
    two = {"a": {"is_correct": True, "solution": "A: 2"}, "b": {"solution": "3"}}
    assert read("outputs", {"question": "q", "ground_truth": "A: 2"} | two)[0][0][1] == {"a": "A: 2", "b": "3"}
    for bad in ({}, {"response": 2}, {"a": {"text": "2"}}):
        with pytest.raises(InputError, match="rows.jsonl:1: no text of a response"):
            read("outputs", row | bad)


def test_published_verdicts_on_model_solutions():
    """A verifier that disagrees with the published one on 1200 real solutions, 444 of them right."""
    counts = Counter()
    for _, row in read_jsonl(slice_of("gsm8k_model_solutions.jsonl")):
        truth = final_answer(row["ground_truth"])
        counts.update((same_answer(final_answer(s["solution"]), truth), s["is_correct"])
                      for s in row.values() if isinstance(s, dict))
    assert counts == {(True, True): 444, (False, False): 756}
