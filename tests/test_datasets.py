"""interop/datasets.py: rows of pairs, ratings, steps, questions and outputs. Every docstring states
the bug that its test prevents.

The rows here are written by hand after the published formats. Tests of published rows find them
through the environment variable MAHALO_DATA and are skipped without it.
"""
import json
import os
import random
import re
import tracemalloc
from collections import Counter

import pytest

from data import OBJECTIVES, InputError, read_jsonl
from interop.answers import final_answer, marked_answer, same_answer
from interop.datasets import (DATA_HELP, KINDS, Preference, Question, Steps, best_and_worst,
                              kind_of, objectives_in, read_outputs, read_preferences,
                              read_questions, read_steps)
from interop.real_data import holds_questions
from interop.rows import Row


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def read_file(kind, path, skipped=None):
    """What the reader of this kind of rows makes of a file."""
    readers = {"questions": read_questions, "outputs": read_outputs, "steps": read_steps}
    if kind in readers:
        return readers[kind](str(path), skipped)
    objective = {"labels": "safer", "attributes": "helpfulness"}.get(kind, "honesty")
    return read_preferences(str(path), objective, skipped)


@pytest.fixture
def read(tmp_path):
    """read(kind, *rows) -> (what is read from a file of these rows, counts of skipped ones)."""
    def read(kind, *rows):
        path, skipped = tmp_path / "rows.jsonl", {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_file(kind, path, skipped), skipped
    return read


def published(name):
    """The path of a published file, or the test is skipped."""
    path = os.path.join(os.environ.get("MAHALO_DATA", ""), name)
    if "MAHALO_DATA" not in os.environ or not os.path.isfile(path):
        pytest.skip(f"MAHALO_DATA does not name a directory with {name}")
    return path


# -- files and faults

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
RATED = {"prompt": "p", "completions": [{"response": "x", "annotations": {}}]}
STEPS = {"prompt": "p", "steps": ["a"], "labels": [1]}
LABEL = {"problem": "p", "steps": ["a", "b"], "label": 1}
ASKED = {"question": "q", "answer": "2"}
SIGNED = {"context": [{"role": "user", "content": "p"}], "response1": "a", "response2": "b",
          "overall_preference": -2}
LABELS = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1,
          "safer_response_id": 0}
GRADED = {"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 0}
UNPAIRED = {"prompt": "p", "completion": "a", "label": True}
JUDGED = {"prompt": "Q: p\nA: a\nTrue:", "completion": " yes"}
WITHOUT = object()


def refusal(path, kind, *lines):
    """The message with which a file is refused: rows, or lines as bytes."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as e:
        read_file(kind, path)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("line, words", [
    (b'{"prompt": "p", "chosen"', "not JSON"),
    (b"[1, 2]", "list, not an object"),
    (b"null", "not an object"),
    (b'"text"', "not an object"),
    (b'{"prompt": "\xff"}', "utf-8"),
    (b"[" * 100_000, "recursion"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON")])
def test_broken_lines_are_named(tmp_path, line, words):
    """A broken line that is skipped, or a traceback that does not say which of thousands it is."""
    path = tmp_path / "honesty.jsonl"
    message = refusal(path, "pairs", PAIR, b"", line, PAIR)
    assert f"{path}:3: " in message and words in message


@pytest.mark.parametrize("good, change, words", [
    # pairs
    (PAIR, {"chosen": WITHOUT}, "'chosen' is missing"),
    (PAIR, {"prompt": WITHOUT}, "missing (question, instruction, problem, input, "),
    (PAIR, {key: WITHOUT for key in PAIR}, "no fields"),
    (PAIR, {"rejected": 3}, "'rejected' is int 3"),
    (PAIR, {"rejected": {"text": "r"}}, "'rejected' is dict {\"text\": \"r\"}"),
    (PAIR, {"chosen": [bot("x"), 7]}, "message 2 of 'chosen' is int 7"),
    (PAIR, {"prompt": [user("x") | {"role": ["user"]}]}, "message 1 of 'prompt' is dict"),
    (PAIR, {"prompt": [user("x"), user(5)]}, "message 2 of 'prompt' is int 5"),
    (PAIR, {"prompt": WITHOUT, "question": ["x"]}, "'question' is list [\"x\"]"),
    (PAIR, {"prompt": [user([{"type": "image_url", "image_url": "x"}])]}, "'image_url'"),
    # ratings
    *((RATED, {"completions": value}, "'annotations'") for value in (
        5, ["x"], [{"response": "x"}], [{"response": "x", "annotations": {"honesty": 5}}])),
    # labels, a signed preference, attributes, verdicts
    *((LABELS, {"safer_response_id": value}, "'safer_response_id' is ") for value in (
        2, 0.5, True, "b", [0])),
    (LABELS, {"safer_response_id": WITHOUT, "better_response_id": WITHOUT}, "is missing"),
    *((SIGNED, {"overall_preference": value}, "'overall_preference' is ") for value in (
        True, "first", [1], float("nan"))),
    (SIGNED, {"context": WITHOUT}, "'prompt' is missing"),
    (SIGNED, {"prompt": "another"}, "'prompt' and 'context' could each be the prompt"),
    (GRADED, {"helpfulness": [3, 4]}, "'helpfulness' is list [3, 4]: give a number"),
    (GRADED, {"helpfulness": WITHOUT, "verbosity": WITHOUT}, "(helpfulness, correctness, "),
    (UNPAIRED, {"label": 1}, "'label' is int 1: give true or false"),
    *((JUDGED, change, "must read 'Q: ...\\nA: ...\\nTrue:', not str ") for change in (
        {"completion": "a"}, {"prompt": "Q: p\nA: a"}, {"prompt": "p"})),
    # steps
    (STEPS, {"labels": WITHOUT}, "'labels'"),
    (STEPS, {"steps": WITHOUT}, "'steps'"),
    *((STEPS, {"steps": steps}, "'steps' must be a list of texts") for steps in ("a", ["a", 3])),
    (STEPS, {"steps": WITHOUT, "completions": "ab"}, "'completions' must be"),
    *((STEPS, {"labels": [label]}, "'labels'") for label in (1.5, float("nan"), "1")),
    (STEPS, {"steps": ["a", "b"]}, "2 steps but 1 labels"),
    (STEPS, {"prompt": 7}, "'prompt' is int 7"),
    (STEPS, {"labels": WITHOUT, "input": "p", "steps": WITHOUT, "label": 3}, "not be int 3"),
    *((LABEL, {"label": v}, "(0 to 1) or -1, not ") for v in (2, -2, True, "1", None, 0.5)),
    # questions
    ({}, {"question": "q"}, "'answer' is missing (final_answer, solution, ground_truth would do)"),
    ({}, {"question": "q", "answer": True}, "'answer' is bool"),
    ({}, {"answer": "5"}, "'prompt' is missing")])
def test_faulty_rows_are_named(tmp_path, good, change, words):
    """Labels out of range or shifted against their steps, `true` as a rating, a guess where no
    answer is marked; or a traceback that does not say in which line."""
    row = {key: v for key, v in (good | change).items() if v is not WITHOUT}
    kind = "steps" if good in (STEPS, LABEL) else "pairs" if good else "questions"
    path = tmp_path / "x.jsonl"
    message = refusal(path, kind, b"", row)
    assert f"{path}:2: " in message and words in message


UNUSABLE = [
    *((PAIR, {"chosen": blank}, "'chosen' is empty") for blank in (None, "", " \n", [], [bot("")])),
    (PAIR, {"rejected": bot(None)}, "'rejected' is empty"),
    (PAIR, {"prompt": ""}, "'prompt' is empty"),
    (PAIR, {"prompt": [bot("x")]}, "the prompt ends with the assistant's turn"),
    (PAIR, {"rejected": "c"}, "chosen equals rejected"),
    (PAIR, {"chosen": [bot("r")]}, "chosen equals rejected"),
    (PAIR, {"chosen": [user("x")]}, "'chosen' does not end with the assistant's turn"),
    (PAIR, {"prompt": WITHOUT, "chosen": "Human: x"}, "'chosen' does not end with the assistant's "
     "turn"),
    *((SIGNED, {"overall_preference": v}, "neither response is preferred") for v in (0, None)),
    (SIGNED, {"response2": "a"}, "response1 equals response2"),
    (LABELS, {"response_1": "a"}, "response_0 equals response_1"),
    *((STEPS, {"steps": steps}, "no steps, or an empty one") for steps in (None, [], ["a", " "])),
    *((STEPS, {"labels": labels}, "a step has no label") for labels in ([None], [None, 1])),
    (LABEL, {"steps": []}, "no steps, or an empty one"),
    *((ASKED, {"answer": blank}, "the answer is empty") for blank in (None, "  ", float("nan"))),
    (ASKED, {"answer": WITHOUT, "solution": "so 1 + 1 = 2"},
     "'solution' marks no final answer, as '#### 18' or '\\boxed{18}' do")]


@pytest.mark.parametrize("good, change, reason", UNUSABLE)
def test_rows_that_cannot_serve_are_left_out(read, good, change, reason):
    """A file of thousands of good rows that stops at the first null, or one that is no answer
    trained on as if it were one."""
    row = {key: v for key, v in (good | change).items() if v is not WITHOUT}
    kind = "steps" if good in (STEPS, LABEL) else "questions" if good is ASKED else "pairs"
    kind = "labels" if good is LABELS else kind
    found, skipped = read(kind, good, row, good, row)
    assert len(found) == 2 and skipped == {reason: 2}
    with pytest.raises(InputError, match="no rows to use; 1 left out: "):
        read(kind, row)


@pytest.mark.parametrize("rating", [
    True, "five", float("nan"), "inf", [1], {"a": 1}, "9" * 400])
def test_faulty_ratings(tmp_path, rating):
    """`true` read as a rating of 1, or a NaN that is the best of all."""
    row = {"prompt": "p", "completions": [
        {"response": "x", "annotations": {"honesty": {"Rating": rating}}}]}
    message = refusal(tmp_path / "x.jsonl", "ratings", row)
    assert "x.jsonl:1: the rating of 'honesty' is " in message


@pytest.mark.parametrize("kind", ["pairs", "steps"])
def test_missing_and_empty_files(tmp_path, kind):
    """An empty file that trains on nothing."""
    with pytest.raises(InputError, match="no such file"):
        read_file(kind, tmp_path / "none.jsonl")
    for content in (b"", b"\n \r\n"):
        assert "empty.jsonl: no rows" in refusal(tmp_path / "empty.jsonl", kind, content)


@pytest.mark.parametrize("before, between, after", [
    ("[", ", ", "]"), ("\n\ufeff[\n ", ",\n ", "\n]"), ("[\n", ",\n", "]\n"),
    ("\ufeff", "\r\n", "")])
def test_lists_and_byte_order_marks(tmp_path, before, between, after):
    """A JSON list (indented or not) read as lines, or a byte order mark taken for broken JSON."""
    path = tmp_path / "x.json"
    row = json.dumps(PAIR)
    path.write_text(before + row + between + row + after, encoding="utf-8")
    assert read_file("pairs", path) == [Preference("honesty", [user("p")], "c", "r")] * 2


@pytest.mark.parametrize("content, words", [
    ([PAIR, 5], "x.json: row 2: int, not an object"),
    ([PAIR, PAIR | {"chosen": 3}], "x.json: row 2: 'chosen' is int 3"),
    ([], "x.json: no rows"),
    (b'[{"prompt": 1},', "x.json:1: not JSON"),
    (b"[" * 100_000, "x.json:1: not JSON")])
def test_bad_rows_of_a_list(tmp_path, content, words):
    """A row of a list reported as line 1: nobody finds it among thousands."""
    assert words in refusal(tmp_path / "x.json", "pairs", content)


def test_lines_are_read_one_at_a_time(tmp_path):
    """A file of gigabytes read into memory to get at its first row."""
    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps(PAIR | {"chosen": "c" * 100_000}) + "\n") * 100)
    tracemalloc.start()
    rows = sum(1 for _ in read_jsonl(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 100 and peak < 3_000_000          # the file has 10 MB


@pytest.mark.parametrize("row, questions", [
    ({"question": "q", "answer": "2"}, True),
    (PAIR, False),
    ({"instruction": "p", "completions": []}, False),
    (None, False)])
def test_which_files_hold_questions(tmp_path, row, questions):
    """Rated completions of accuracy taken for questions without an answer."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) if row else "")
    assert holds_questions(str(path), OBJECTIVES["math_accuracy"]) is questions
    if questions:
        with pytest.raises(InputError, match="x.jsonl: questions with answers are verified: give"):
            holds_questions(str(path), OBJECTIVES["honesty"])
    else:
        assert not holds_questions(str(path), OBJECTIVES["honesty"])


@pytest.mark.parametrize("row", [STEPS, LABEL, {"prompt": "p", "completions": "ab", "labels": [1]},
                                 {"input": "p", "label": "p"}, {"label": {"steps": []}}])
def test_labelled_steps_have_files_of_their_own(tmp_path, row):
    """Labelled steps refused as faulty ratings or verdicts, which they were not meant to be."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="x.jsonl: labelled steps; they belong into honesty.st"):
        holds_questions(str(path), OBJECTIVES["honesty"])


def rows_of_the_help():
    """(kind, row) for every example row of DATA_HELP."""
    kinds = ("pairs", "labels", "ratings", "verdicts", "questions", "steps", "outputs")
    kind, text = None, ""
    for line in DATA_HELP.splitlines():
        if line.startswith(kinds):
            kind, line = line.split(maxsplit=1)
        text += line.strip() if kind else ""
        # A row may go on in the next line. Behind it there may be a remark.
        try:
            row, _ = json.JSONDecoder().raw_decode(text)
        except ValueError:
            continue
        yield kind, row
        text = ""


def test_the_rows_of_the_help_are_read(read):
    """Help that shows rows which the readers refuse, or that compare nothing."""
    rows, counts = {}, {}
    for kind, row in rows_of_the_help():
        rows.setdefault(kind, []).append(row)
    for kind in rows:
        found, skipped = read(kind, *rows[kind])
        counts[kind] = len(found)
        # Of the ratings two are of another objective.
        assert sum(skipped.values()) == (2 if kind == "ratings" else 0)
    assert counts == {"pairs": 4, "labels": 1, "ratings": 1, "verdicts": 1, "questions": 2,
                      "steps": 4, "outputs": 1}


def parsers(rows):
    """The parsers of these rows, all of which they can read; none is a row of outputs."""
    found = set()
    for row in rows:
        kind = kind_of(Row(row), ["pairs", "steps", "questions"])
        assert kind.parse(Row(row))
        found.add(kind.parse)
    return found


def test_an_example_of_every_kind():
    """A kind of rows that nobody learns of; an example in the documentation that is refused."""
    every = {kind.parse for kind in KINDS if kind.use != "outputs"}
    assert parsers(row for kind, row in rows_of_the_help() if kind != "outputs") == every
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "docs", "real_models.md")
    if os.path.exists(path):                          # an assignment has no such file
        with open(path, encoding="utf-8") as f:
            rows = re.findall(r"^\| .+ \| `(\{.*\})` \|$", f.read(), re.M)
        assert len(rows) == 13 and parsers(json.loads(row) for row in rows) == every


# -- random faults

RATINGS = [{"response": r, "annotations": {"honesty": {"Rating": v, "Rationale": "so"}}}
           for r, v in zip("abcd", ("4", "1", "N/A", 2))]
GOOD_ROWS = [
    ("pairs", PAIR),
    ("pairs", {"question": "Assistant: a\n\nStudent: b\n\nAssistant:", "chosen": "c",
               "rejected": "d"}),
    ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b",
               "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    ("pairs", {"prompt": "p", "chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("d")]}),
    ("ratings", {"instruction": "p", "completions": RATINGS}),
    ("pairs", SIGNED),
    ("labels", LABELS),
    ("attributes", GRADED),
    ("verdicts", UNPAIRED),
    ("verdicts", JUDGED),
    ("pairs", {"conversations": [{"from": "human", "value": "p"}], "chosen": "c",
               "rejected": {"from": "gpt", "value": "r"}}),
    ("steps", {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}),
    ("steps", {"id": "x-1", "problem": "p", "steps": ["a", "b"], "label": 1}),
    ("questions", {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}),
    ("questions", {"problem": "q", "solution": "so $\\boxed{\\frac{1}{2}}$",
                   "answer": "\\frac{1}{2}"})]
JUNK = [None, True, -1, 3, 1e400, float("nan"), "", " ", "N/A", "\n\nAssistant:", "\\boxed{",
        "\\frac{}{", "\ud800", "9" * 400, [], [[]], {}, {"role": "user"}, [user("x")], [bot("")],
        [user("x"), bot("y")], {"Rating": [1]}]
PARTNERS = {"attributes": b'\n{"prompt": "p", "response": "b", "helpfulness": 1}',
            "verdicts": b'\n{"prompt": "p", "completion": "b", "label": false}'}
SPLINTERS = ("", "\n\nHuman:", "####", "{", "}", "\x00", "0/0", "\\")


def with_a_fault(value, rng):
    """A row with one random fault somewhere in it."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = with_a_fault(value[key], rng)
        return value
    if isinstance(value, str) and value and rng.random() < 0.4:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(SPLINTERS) + value[i + rng.randrange(3):]
    return rng.choice(JUNK)


def check_found(found):
    """What was read is a conversation that the user ends, or a question with a sound answer."""
    assert found.prompt and found.prompt[-1]["role"] != "assistant"
    assert all(type(m["content"]) is str for m in found.prompt)
    if isinstance(found, Question):
        assert same_answer(found.answer, found.answer)


def test_faulty_rows_raise_only_input_errors(tmp_path):
    """A field of an unexpected type that ends in a traceback, or is read as a conversation."""
    rng, path, outcomes = random.Random(0), tmp_path / "x.jsonl", Counter()
    for _ in range(1500):
        kind, row = rng.choice(GOOD_ROWS)
        for _ in range(rng.randrange(1, 4)):
            row = with_a_fault(row, rng)
        content = json.dumps(row).encode()
        if rng.random() < 0.1:
            i = rng.randrange(len(content) + 1)
            content = content[:i] + bytes([rng.randrange(256)]) + content[i + 1:]
        # What answers the prompt alone is compared with another row.
        path.write_bytes(content + PARTNERS.get(kind, b""))
        try:
            for found in read_file(kind, path):
                check_found(found)
            outcomes["read"] += 1
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 150


# -- pairs

def test_good_pairs(read):
    """Message lists read as one string, other fields carried into the prompt, or spaces of a
    response stripped."""
    system = {"role": "system", "content": "s"}
    chat = [system | {"id": 1}, user("é\n")]
    row = {"prompt": chat, "chosen": [chat[1], bot(" yes ")], "rejected": " no", "extra": [1]}
    found, _ = read("pairs", PAIR, row)
    assert found == [Preference("honesty", [user("p")], "c", "r"),
                     Preference("honesty", [system, user("é\n")], " yes ", " no")]


def test_transcripts_split_at_the_last_assistant_turn(read):
    """HH-RLHF: the prompt taken for part of the response, cut at the first turn, or cut at a
    'Human:' within a line."""
    start = ("\n\nHuman: Hi. Human: is a word\nAssistant: too\n\nAssistant: Yes:\n\nno speaker: "
             "here\n\nHuman: And?\n\nAssistant:")
    found, skipped = read("pairs", {"chosen": start + " Well.\n\nSo: yes.",
                                    "rejected": start + " No. "})
    prompt = [user("Hi. Human: is a word\nAssistant: too"), bot("Yes:\n\nno speaker: here"),
              user("And?")]
    assert found == [Preference("honesty", prompt, "Well.\n\nSo: yes.", "No.")] and skipped == {}


def talk(*turns):
    """A transcript of Human and Assistant by turns."""
    speakers = ("Human", "Assistant") * 9
    return "".join(f"\n\n{who}: {said}" for who, said in zip(speakers, turns))


@pytest.mark.parametrize("chosen, rejected, reason", [
    (talk("a", "b", "c", "d"), talk("a", "x"), "chosen and rejected answer different prompts"),
    (talk("a", "b"), talk("a", ""), "the transcript ends without a response"),
    (talk("a", "b") + "\n\nAssistant: c", talk("a", "b") + "\n\nAssistant: d",
     "the responses do not answer the prompt"),
    ("b", talk("a", "c"), "chosen and rejected answer different prompts"),
    (talk("a", "c"), "b", "chosen and rejected answer different prompts")])
def test_transcripts_that_cannot_serve_are_counted(read, chosen, rejected, reason):
    """One odd row in 160 000 that stops the run, or that is trained on as if both answered the same
    prompt."""
    odd = {"chosen": chosen, "rejected": rejected}
    found, skipped = read("pairs", {"chosen": talk("a", "b"), "rejected": talk("a", "c")}, odd, odd)
    assert len(found) == 1 and skipped == {reason: 2}
    with pytest.raises(InputError, match=f"no rows to use; 1 left out: {reason}"):
        read("pairs", odd)


@pytest.mark.parametrize("prompt, messages", [
    # as in sm_acc.json
    ("Assistant: Hi. \n\nStudent:  What?\n\nAssistant: \nThat.\n\nMore: of it\n\nStudent: Oh"
     "\n\nAssistant:", [bot("Hi."), user("What?"), bot("That.\n\nMore: of it"), user("Oh")]),
    ("Tutor: a\r\n\r\nUser: b", [bot("a"), user("b")]),
    # as in hhh_alignment.json
    ("Fix it.  \n\nAssistant:  How?\n\nHuman:  Well.",
     [user("Fix it."), bot("How?"), user("Well.")]),
    ("Be kind.\n\nHuman: a\n\nAssistant:", [{"role": "system", "content": "Be kind."}, user("a")]),
    ("Human: alone", [user("alone")]),
    # no transcripts: nobody answers, nothing is asked, no paragraph starts with a speaker
    ("A play:\n\nStudent: to be", [user("A play:\n\nStudent: to be")]),
    ("Human: a\n\nAssistant: b", [user("Human: a\n\nAssistant: b")]),
    (" say 'Assistant:'\nUser: b", [user(" say 'Assistant:'\nUser: b")])])
def test_prompts_that_are_transcripts(read, prompt, messages):
    """A tutoring dialogue as one message: the model learns to answer a script, not a student."""
    chosen = "Human: c\n\nAssistant: x"
    found, _ = read("pairs", {"question": prompt, "chosen": chosen, "rejected": "d"})
    assert found[0].prompt == messages and found[0].chosen == chosen


ASK, MORE = [user("p")], [user("p"), bot("a"), user("q")]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize("prompt, before, whole", [
    (None, ASK, ASK), ("p", ASK, ASK), ([SYSTEM] + ASK, ASK, [SYSTEM] + ASK),
    ("p", [], ASK), ("p", MORE, MORE), (None, MORE, MORE), (MORE, ASK, None)])
def test_conversations_in_chosen_and_rejected(read, prompt, before, whole):
    """UltraFeedback binarised: the prompt lost, doubled, or only the first of its messages kept."""
    row = {"chosen": before + [bot("c")], "rejected": before + [bot("r")]}
    found, skipped = read("pairs", PAIR, row | ({"prompt": prompt} if prompt else {}))
    if whole:
        assert found[1] == Preference("honesty", whole, "c", "r")
    else:
        assert skipped == {"the responses do not answer the prompt": 1}


# -- what bears on a prompt

CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"what": "p"}}}]
CALLS = [user("p"), bot(None) | {"tool_calls": CALL}, {"role": "tool", "content": "d"}]
CALLED = [user("p"), bot("") | {"tool_calls": CALL}, {"role": "tool", "content": "d"}]
PARTS = [{"type": "text", "text": "p"}, {"type": "text", "text": " q"}]
ALPACA = {"instruction": "Say it twice.", "input": "p", "prompt": WITHOUT}


@pytest.mark.parametrize("change, prompt", [
    (ALPACA, [user("Say it twice.\np")]),
    (ALPACA | {"input": ""}, [user("Say it twice.")]),
    (ALPACA | {"instruction": None}, [user("p")]),
    ({"input": "q", "prompt": [bot("a"), user("p")]}, [bot("a"), user("p\nq")]),
    ({"system": "s"}, [SYSTEM, user("p")]),
    ({"system_prompt": "s", "prompt": [SYSTEM, user("p")]}, [SYSTEM, user("p")]),
    ({"system": None, "input": "", "tools": [], "images": []}, [user("p")]),
    ({"tools": CALL}, [user("p") | {"tools": CALL}]),
    ({"tools": CALL, "system": "s"}, [SYSTEM | {"tools": CALL}, user("p")]),
    ({"prompt": CALLS}, CALLED),
    ({"prompt": [user("p"), bot("a") | {"reasoning_content": "t", "tool_calls": []}, user("q")]},
     [user("p"), bot("a") | {"reasoning_content": "t"}, user("q")]),
    ({"prompt": user("p") | {"name": "Ann", "id": 7}}, [user("p") | {"name": "Ann"}]),
    ({"prompt": [user(PARTS)]}, [user("p q")]),
    ({"prompt": PARTS, "question": None}, [user("p q")]),
    ({"question": "p", "problem": "p"}, [user("p")])])
def test_what_bears_on_a_prompt_is_in_it(read, change, prompt):
    """Half of a prompt that vanishes: the model learns to answer what nobody asked."""
    row = {key: v for key, v in (PAIR | change).items() if v is not WITHOUT}
    assert read("pairs", row)[0] == [Preference("honesty", prompt, "c", "r")]
    steps = row | {"steps": ["a"], "label": -1}
    assert read("steps", steps)[0] == [Steps(prompt, ["a"], [1.0])]
    assert read("questions", row | {"answer": "2"})[0] == [Question(prompt, "2", "")]


def test_context_beside_transcripts(read):
    """HH rows with a system column: the column is lost, because the prompt is found elsewhere."""
    row = {"chosen": talk("a", "b", "p", "c"), "rejected": talk("a", "b", "p", "r"), "system": "s"}
    found, _ = read("pairs", row)
    assert found[0].prompt == [SYSTEM, user("a"), bot("b"), user("p")]


@pytest.mark.parametrize("change, words", [
    *(({name: ["x"]}, f"'{name}' would be lost (list [\"x\"])") for name in (
        "history", "query", "documents", "choices", "images", "tool_calls",
        "reasoning_content", "chat_template_kwargs")),
    ({"tools": "[]"}, "'tools' is str \"[]\""),
    ({"system": 3}, "'system' is int 3"),
    ({"question": "another"}, "'prompt' and 'question' could each be the prompt"),
    ({"context": ["x"]}, "'prompt' and 'context' could each be the prompt"),
    ({"chosen": bot(None) | {"tool_calls": CALL}}, "'chosen' has 'tool_calls'"),
    ({"rejected": [bot("r") | {"reasoning_content": "t"}]}, "'rejected' has 'reasoning_content'")])
def test_what_would_be_lost_is_refused_by_name(tmp_path, change, words):
    """A column, or a message's field, that no prompt and no response can hold."""
    assert words in refusal(tmp_path / "x.jsonl", "pairs", PAIR | change)


def test_columns_that_mean_nothing_are_named_once(read, capsys):
    """A score or an id that somebody believes to be used; or a line about it for every row."""
    chat = [user("p") | {"id": 1}]
    rows = [PAIR | {"prompt": chat, "score": 1}, PAIR | {"source": "s"}, PAIR | {"source": "s"}]
    read("pairs", *rows)
    read("pairs", *rows)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith(": ignored columns: prompt.id, score, source\n")
    read("pairs", PAIR | {"system": "s"})
    read("questions", ASKED | {"input": ""})
    assert capsys.readouterr().out == ""


# -- ratings

def rated(prompt, **ratings):
    """A row of three completions a, b, c with ratings of several objectives."""
    completions = []
    for i, response in enumerate("abc"):
        notes = {name: {"Rating": given[i], "Rationale": "..."} for name, given in ratings.items()}
        completions.append({"response": response, "model": "m", "annotations": notes})
    return {"instruction": prompt, "completions": completions}


def test_ratings_give_pairs_of_every_objective(tmp_path):
    """UltraFeedback: one pair list for all objectives, ratings compared as text ('10' < '9'), ties
    as preferences."""
    rows = [rated("i", honesty=("9", "10", "1"), helpfulness=("5", "N/A", "3")),
            rated("j", honesty=("2", "2", "2"), helpfulness=("N/A", "N/A", "3")),
            rated("k", honesty=(1, None, 2.5))]
    rows[2]["completions"].append({"response": "d", "annotations": {}})
    rows[2]["completions"].append({"response": None, "annotations": {"honesty": {"Rating": 9}}})
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    skipped, absent = {}, {}
    assert read_preferences(str(path), "honesty", skipped) == [
        Preference("honesty", [user("i")], "b", "c"),
        Preference("honesty", [user("k")], "c", "a")]
    assert skipped == {"no two responses to the prompt have different ratings of honesty": 1}
    assert read_preferences(str(path), "helpfulness") == [
        Preference("helpfulness", [user("i")], "a", "c")]
    assert not read_preferences(str(path), "truthfulness", absent)
    assert absent == {"no rating of truthfulness": 3}


def test_ratings_of_the_same_text(read):
    """A text preferred to itself: two completions that are alike, with different ratings."""
    row = rated("i", honesty=("1", "2", "N/A"))
    row["completions"][1]["response"] = "a"
    found, skipped = read("ratings", row)
    assert not found and skipped == {
        "no two responses to the prompt have different ratings of honesty": 1}


@pytest.mark.parametrize("kind, rows, reason", [
    ("labels", [LABELS, LABELS | {"safer_response_id": None}], "no rating of safer"),
    ("attributes", [GRADED, GRADED | {"response": "b", "helpfulness": 1},
                    GRADED | {"response": "c", "helpfulness": None}], "no rating of helpfulness"),
    ("verdicts", [UNPAIRED, UNPAIRED | {"completion": "b", "label": False},
                  UNPAIRED | {"completion": "c", "label": None}], "no rating of honesty"),
    *(("ratings", [rated("p", honesty="123"), row], "no rating of honesty") for row in (
        RATED, RATED | {"completions": None}, RATED | {"completions": []},
        rated("p", honesty=("N/A", None, "")), rated("p", brevity="123")))])
def test_rows_without_a_rating_are_counted(read, kind, rows, reason):
    """A null that stops the run, or that vanishes without a word because other rows answer the same
    prompt."""
    found, skipped = read(kind, *rows)
    assert len(found) == 1 and skipped == {reason: 1}


def test_attributes_of_single_responses(read):
    """HelpSteer2: responses to different prompts compared, or only neighbours in the file; a null
    taken for the worst."""
    rows = []
    for prompt, response, number in [("p", "a", 4), ("q", "b", 0), ("p", "c", 2), ("q", "d", "3"),
                                     ("o", "e", 1), ("p", "f", None)]:
        rows.append({"prompt": prompt, "response": response, "helpfulness": number, "coherence": 1})
    expected = [Preference("helpfulness", [user("p")], "a", "c"),
                Preference("helpfulness", [user("q")], "d", "b")]
    reasons = {"no two responses to the prompt have different ratings of helpfulness": 1,
               "no rating of helpfulness": 1}
    rng = random.Random(0)
    for _ in range(8):
        found, skipped = read("attributes", *rows)
        assert sorted(found, key=str) == expected and skipped == reasons
        rng.shuffle(rows)


def test_turns_of_helpsteer2(read):
    """A conversation of several turns taken for one long message."""
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nName a fruit.\nNow."
    rows = [GRADED | {"prompt": prompt}, GRADED | {"prompt": prompt, "response": "b",
                                                   "helpfulness": 5}]
    (found,), _ = read("attributes", *rows)
    assert found.prompt == [user("Hi"), bot("Hello!"), user("Name a fruit.\nNow.")]


def test_every_response_once(tmp_path):
    """Hundreds of verdicts on a prompt that give one pair; a response that stands in many; a tie as
    a preference; pairs that depend on the order of the rows, or on the alphabet."""
    assert best_and_worst({"a": 1, "b": 3, "c": 2, "d": 2, "e": 0, "f": 9}) == [("f", "e"),
                                                                                ("b", "a")]
    rng = random.Random(0)
    for _ in range(30):
        scores = {f"answer {i}": rng.randrange(3) for i in range(rng.randrange(40))}
        pairs = best_and_worst(scores)
        used = [text for pair in pairs for text in pair]
        assert len(set(used)) == len(used) and all(scores[a] > scores[b] for a, b in pairs)
        # What is left over is all alike.
        assert len({scores[text] for text in scores.keys() - used}) <= 1
        shuffled = rng.sample(sorted(scores), len(scores))
        assert best_and_worst({text: scores[text] for text in shuffled}) == pairs
    # Of a hundred equals not the first ten of the alphabet are taken.
    rejected = [b for _, b in best_and_worst({f"{i:03}": int(i >= 100) for i in range(110)})]
    assert len(rejected) == 10 and max(rejected) > "050"


# -- two labels, signed preferences, verdicts

def test_two_labels_on_one_pair(read, tmp_path):
    """PKU-SafeRLHF: the rejected response chosen, one label for both objectives, or responses of
    different rows compared because their prompts are equal."""
    other = LABELS | {"response_0": "c", "response_1": "d", "better_response_id": 0}
    found, _ = read("labels", LABELS, other)
    assert found == [Preference("safer", [user("p")], "a", "b"),
                     Preference("safer", [user("p")], "c", "d")]
    better = read_preferences(str(tmp_path / "rows.jsonl"), "better")
    assert better == [Preference("better", [user("p")], "b", "a"),
                      Preference("better", [user("p")], "c", "d")]


def test_signed_preferences(read):
    """HelpSteer3 read upside down: its first response is preferred where the number is negative."""
    second = {"prompt": "p", "response_1": "b", "response_2": "a", "preference_strength": 3}
    for row in (SIGNED, second, SIGNED | {"overall_preference": "-1"}):
        assert read("pairs", row)[0] == [Preference("honesty", [user("p")], "a", "b")]
    for strength in (1, 2, 3):
        flipped = SIGNED | {"overall_preference": strength}
        assert read("pairs", flipped)[0] == [Preference("honesty", [user("p")], "b", "a")]
    chat = [user("o"), bot("x"), user("p")]
    assert read("pairs", SIGNED | {"context": chat})[0][0].prompt == chat


def judged(question, answer, verdict):
    """A row as TruthfulQA's judges were taught."""
    return {"prompt": f"Q: {question}\nA: {answer}\nTrue:", "completion": f" {verdict}"}


def test_verdicts_on_answers(read):
    """TruthfulQA: the marks left in the text, answers to different questions compared, an empty
    answer preferred, the last of contradictory verdicts taken for all."""
    rows = [judged("p?", "a\nA: b", "yes"), judged("q?", "c", "no"), judged("p?", "d", "no"),
            judged("p?", " ", "no"), judged("q?", "e", "yes"), judged("q?", "c", "no")]
    found, skipped = read("verdicts", *rows)
    assert found == [Preference("honesty", [user("p?")], "a\nA: b", "d"),
                     Preference("honesty", [user("q?")], "e", "c")]
    assert skipped == {"the answer is empty": 1}
    # One in three is for c: better than the worst, worse than the best.
    more = [judged("q?", "c", verdict) for verdict in ("no", "yes")]
    best, worst = judged("q?", "f", "yes"), judged("q?", "g", "no")
    assert read("verdicts", rows[1], *more, best)[0][0].rejected == "c"
    assert read("verdicts", rows[1], *more, worst)[0][0].chosen == "c"
    unpaired = [UNPAIRED, UNPAIRED | {"completion": [bot("b")], "label": False}]
    assert read("verdicts", *unpaired)[0] == [Preference("honesty", [user("p")], "a", "b")]


def test_messages_of_sharegpt(read):
    """A conversation in ShareGPT's spelling that is refused as if it had no prompt."""
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "p", "weight": 1}]
    answers = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    found, _ = read("pairs", {"conversations": said} | answers)
    assert found == [Preference("honesty", [SYSTEM, user("p")], "chosen", "rejected")]


@pytest.mark.parametrize("rows, names", [
    ([LABELS], ["better", "safer"]), ([GRADED], ["helpfulness", "verbosity"]),
    ([rated("p", honesty="123", brevity="N1N")], ["honesty", "brevity"]),
    ([GRADED | {"helpfulness": None, "response": ""}], ["verbosity", "helpfulness"]),
    ([PAIR | {"verbosity": 2}], []), ([], []), ([PAIR, LABELS], []),
    ([RATED | {"completions": []}, rated("p", honesty="123"), rated("p", brevity="123")],
     ["honesty", "brevity"]),
    ([GRADED, LABELS, PAIR, rated("p", honesty="123")], ["helpfulness", "verbosity", "better",
                                                         "safer"]),
    *(([row], []) for row in (PAIR, SIGNED, UNPAIRED, JUDGED, ASKED, STEPS, LABEL, {},
                              {"completions": [5]}, {"completions": [{"annotations": 5}]}))])
def test_objectives_that_rows_name(tmp_path, rows, names):
    """A file that rates several objectives taken for one that is named after it; an objective that
    only later rows rate lost; an id taken for an objective; a traceback at a broken row."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row | {"id": 7, "model": "m"}) + "\n" for row in rows))
    assert objectives_in(str(path)) == names


@pytest.mark.parametrize("first, second", [(PAIR, LABELS), (GRADED, JUDGED), (RATED, SIGNED)])
def test_rows_that_contradict_each_other(tmp_path, first, second):
    """A file whose pairs count for every objective that its other rows rate."""
    for rows in ((first, second), (second, first)):
        message = refusal(tmp_path / "x.jsonl", "labels", *rows)
        assert "x.jsonl:2: some rows name their objectives, others leave that" in message


# -- steps

@pytest.mark.parametrize("fields, labels", [
    ({"prompt": "p", "completions": "abc", "labels": [True, False, True]}, [1, 0, 1]),
    ({"question": "p", "steps": "abc", "labels": [1, 0.25, 0]}, [1, 0.25, 0]),
    ({"problem": "p", "steps": "abc", "label": -1}, [1, 1, 1]),
    ({"problem": "p", "steps": "abc", "label": 0}, [0, 0, 0]),
    ({"problem": "p", "steps": "abc", "label": 1}, [1, 0, 0]),
    ({"problem": "p", "steps": "abc", "label": 2}, [1, 1, 0])])
def test_spellings_of_steps(read, fields, labels):
    """ProcessBench's first wrong step read as 1-based, -1 as the last step, steps after an error as
    right; or true and false kept as booleans, which break the loss's arithmetic."""
    key = "steps" if "steps" in fields else "completions"
    found, _ = read("steps", fields | {key: ["a\n", "b", "c"]})
    assert found == [Steps([user("p")], ["a\n", "b", "c"], labels)]
    assert {type(label) for label in found[0].labels} == {float}


def test_steps_of_math_shepherd(read):
    """A sign of the text taken for a label, the question taken for a step, or steps and labels that
    are shifted against each other."""
    text = "2 + 3 - 1? Step 1: 2 + 3 = 5 ки\nStep 2: 5 -\n1 = 3 ки\nStep 3: The answer is: 3 ки"
    signs = "2 + 3 - 1? Step 1: 2 + 3 = 5 +\nStep 2: 5 -\n1 = 3 -\nStep 3: The answer is: 3 -"
    good = {"input": text.replace(" -\n", " - "), "label": signs.replace("5 -\n", "5 - ")}
    steps = ["Step 1: 2 + 3 = 5", "Step 2: 5 - 1 = 3", "Step 3: The answer is: 3"]
    expected = Steps([user("2 + 3 - 1?")], steps, [1, 0, 0])
    # In the second row there is a sign too many at the end of a line, in the third no step.
    odd = {"input": text, "label": signs}
    found, skipped = read("steps", good, odd, {"input": "q", "label": "q"})
    assert found == [expected] and list(skipped.values()) == [2]


def test_steps_of_prm800k(read):
    """Alternatives that nobody chose taken for steps of the solution; a person's step for wrong."""
    def step(chosen, human, *ratings):
        options = [{"text": f" {r} ", "rating": r, "flagged": False} for r in ratings]
        human = human and {"text": human, "rating": None}
        return {"completions": options, "chosen_completion": chosen, "human_completion": human}
    steps = [step(1, None, -1, 1), step(None, "h", -1, -1), step(0, None, 0)]
    steps.append(step(None, None, 1, -1))
    row = {"question": {"problem": "p"}, "label": {"steps": steps, "finish_reason": "found_error"}}
    assert read("steps", row)[0] == [Steps([user("p")], ["1", "h", "0", "-1"], [1, 1, 0.5, 0])]
    bad = row | {"label": {"steps": [step(None, None)]}}
    assert read("steps", row, bad)[1] == {"'label.steps' lack a text or a rating": 1}


# -- questions and outputs

GSM = "It is 500 + 500 = <<500+500=1000>>1,000.\n#### 1,000"
MATH, ROOT = "As $\\boxed{1}$ is not, $\\boxed{\\frac{\\sqrt{3}}{2}}$.", "\\frac{\\sqrt{3}}{2}"


@pytest.mark.parametrize("fields, answer, solution", [
    ({"answer": GSM}, "1,000", GSM),
    ({"solution": MATH}, ROOT, MATH),
    ({"solution": MATH, "answer": ROOT}, ROOT, MATH),
    ({"final_answer": "x = 5 "}, "x = 5", ""),
    ({"answer": 7}, "7", ""),
    ({"ground_truth": "Two.\nA: 2"}, "2", "Two.\nA: 2")])
def test_spellings_of_questions(read, fields, answer, solution):
    """GSM8K's whole solution kept as the answer, or the first box of several taken for it."""
    for key in ("question", "problem", "prompt"):
        found, _ = read("questions", {key: "q"} | fields)
        assert found == [Question([user("q")], answer, solution)]


def test_outputs_of_models(read):
    """A response taken for the gold answer, one of several models or samples left out, a response
    that is missing taken for a faulty row."""
    row = {"question": "q", "answer": "so\n#### 2"}
    question = Question([user("q")], "2", "so\n#### 2")
    assert read("outputs", row | {"output": "2"})[0] == [(question, {"response": ["2"]})]
    two = {"a": {"is_correct": True, "solution": "A: 2"}, "b": {"solution": None}, "c": {"id": 1}}
    found, _ = read("outputs", {"question": "q", "ground_truth": "A: 2"} | two)
    assert found[0][1] == {"a": ["A: 2"], "b": []}
    for response, texts in [(["2", None, "3"], ["2", "", "3"]), (None, []), ("", []), ([], []),
                            ([user("q"), bot("2")], ["2"]), (bot("3"), ["3"]),
                            ([[bot("1")], [bot("2")]], ["1", "2"])]:
        found, _ = read("outputs", row | {"responses": response})
        assert found == [(question, {"response": texts})]
    assert read("outputs", row)[0] == [(question, {})]
    with pytest.raises(InputError, match="rows.jsonl:1: 'response' is int 2"):
        read("outputs", row | {"response": 2})


# -- published rows

HARMLESS_SKIPPED = {"the transcript ends without a response": 1,
                    "chosen and rejected answer different prompts": 2}


@pytest.mark.parametrize("name, n, n_dialogues, skipped", [
    ("hh_rlhf_harmless.jsonl", 237, 143, HARMLESS_SKIPPED),
    ("hhh_alignment.json", 157, 34, {}),
    ("sm_acc.json", 260, 260, {}),
    ("ultrafeedback_binarized.jsonl", 160, 0, {}),
    ("pairs/helpfulness.jsonl", 187, 9, {}),
    ("pairs/honesty.jsonl", 46, 15, {}),
    ("pairs/truthfulness.jsonl", 145, 0, {})])
def test_published_pairs(name, n, n_dialogues, skipped):
    """A published file that stops at one odd row, or dialogues that come as one message."""
    counts = Counter()
    found = read_preferences(published(name), "honesty", counts)
    assert len(found) == n and counts == skipped
    assert all(p.prompt[-1]["role"] == "user" for p in found)
    assert sum(len(p.prompt) > 1 for p in found) == n_dialogues


@pytest.mark.parametrize("name, n, right", [
    ("processbench_gsm8k.json", 344, 165), ("processbench_math.json", 300, 129)])
def test_published_steps(name, n, right):
    """Labels shifted against the published first wrong step."""
    found = read_steps(published(name))
    firsts = [s.labels.index(0) if 0 in s.labels else -1 for s in found]
    assert len(found) == n and firsts.count(-1) == right
    assert firsts == [row["label"] for _, row in read_jsonl(published(name))]


@pytest.mark.parametrize("name, n", [
    ("sample_math-shepherd.jsonl", 7), ("sample_prm800k.jsonl", 5)])
def test_published_steps_as_they_come(name, n):
    """A layout of our own taken for the published one."""
    found = read_steps(published(name))
    assert len(found) == n
    for row in found:
        assert len(row.steps) == len(row.labels) and not any("ки" in step for step in row.steps)


@pytest.mark.parametrize("name, n", [
    ("gsm8k_train.jsonl", 1500), ("gsm8k_test.jsonl", 1144),
    ("gsm8k_test_socratic.jsonl", 300), ("math500.jsonl", 435)])
def test_published_solutions_end_in_their_answers(name, n):
    """A right response that the verifier calls wrong: a published solution is the easiest case."""
    found = read_questions(published(name))
    assert len(found) == n
    for question in found:
        assert marked_answer(question.solution) == question.answer
        assert same_answer(question.answer, question.answer)


def test_published_verdicts_on_model_solutions():
    """A verifier that disagrees with the published one on 1200 real solutions, 444 right ones."""
    counts = Counter()
    for _, row in read_jsonl(published("gsm8k_model_solutions.jsonl")):
        truth = final_answer(row["ground_truth"])
        for said in [v for v in row.values() if isinstance(v, dict)]:
            right = same_answer(final_answer(said["solution"]), truth)
            counts[right, said["is_correct"]] += 1
    assert counts == {(True, True): 444, (False, False): 756}


def test_published_verdicts_on_answers():
    """The published verdicts lost on the way: an answer that was judged false is chosen."""
    verdicts = {}
    for _, row in read_jsonl(published("truthfulqa_judge_truth.jsonl")):
        question, answer = re.fullmatch(r"Q: (.*)\nA:(.*)\nTrue:", row["prompt"], re.S).groups()
        verdicts[question, answer.strip()] = row["completion"]
    skipped = Counter()
    found = read_preferences(published("truthfulqa_judge_truth.jsonl"), "truthful", skipped)
    assert len(found) == 646 and skipped == {"the answer is empty": 4}
    assert len({p.prompt[0]["content"] for p in found}) == 73
    for p in found:
        question = p.prompt[0]["content"]
        assert verdicts[question, p.chosen] == " yes" and verdicts[question, p.rejected] == " no"
