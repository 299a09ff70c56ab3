"""interop/score.py: real outputs scored. Every docstring states the bug that its test prevents."""
import json
import os
import re
import shutil
import zlib

import pytest
import torch

import evaluate
from data import DOMAINS, OBJECTIVES, RNG, InputError
from interop import score
from model import load_hf
from prm import PRM, load_prm, save_prm


def test_first_errors_by_hand():
    """Another F1 than ProcessBench's, an error found too late that counts, a right response that is
    blamed and passes."""
    errs = torch.tensor([True] * 4 + [False] * 10)
    hits = torch.tensor([True] + [False] * 8 + [True] * 5)
    assert score.first_error_f1(hits, errs) == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert score.first_error_f1(~errs, errs) == 0 == score.first_error_f1(errs, errs)
    assert score.first_error_f1(errs[:4], errs[:4]) == 0
    responses = [([0.9, 0.2, 0.1], 1, 0), ([0.9, 0.2, 0.1], 2, 0), ([0.9, 0.8], 1, 0),
                 ([0.9, 0.8], -1, 0), ([0.9, 0.5], -1, 0), ([0.9, 0.4], -1, 0)]
    assert score.hits_at(responses, 0.5).tolist() == [True, False, False, True, True, False]


RESPONSES = [([0.9, 0.2, 0.1], 1, 0), ([0.9, 0.3], 1, 1), ([0.8, 0.9], -1, 0),
             ([0.2, 0.9], -1, 1), ([0.9, 0.1], 0, 1), ([0.7, 0.8], -1, 1)]


def test_thresholds_come_from_the_other_fold():
    """A threshold chosen with the response's own help."""
    # Fold 1 is best cut at 0.7 (F1 1/2, finding row 1 and passing row 5), fold 0 at 0.8; each is
    # judged by the other's cut.
    assert score.localise(RESPONSES).tolist() == [True, True, True, False, False, False]
    shifted = [([s + 5 * fold for s in scores], label, fold) for scores, label, fold in RESPONSES]
    for (_, _, fold), hit in zip(shifted, score.localise(shifted)):
        assert fold == 1 or not hit                 # all are below the other fold's cut


def test_the_bootstrap_measures_the_spread():
    """An interval of F1 far from that of repeated experiments, or another one every time."""
    generator = torch.Generator().manual_seed(1)

    def experiment():
        errs = torch.rand(200, generator=generator) < 0.5
        return torch.rand(200, generator=generator) < 0.6, errs
    f1s = [score.first_error_f1(*experiment()) for _ in range(300)]
    hits, errs = experiment()
    found = score.bootstrap_f1(hits, errs)
    assert found["mean"] == score.first_error_f1(hits, errs)
    low, high = found["bounds"]
    assert low < found["mean"] < high
    assert (high - low) / 3.92 == pytest.approx(torch.tensor(f1s).std().item(), rel=0.2)
    assert found["n"] == 200 and score.bootstrap_f1(hits, errs) == found


class Judged:
    """A PRM's directory, and a place for files."""

    def __init__(self, gpt, path):
        self.path, self.prm = path, str(path / "prm")
        generator = torch.Generator().manual_seed(1)
        outputs = [OBJECTIVES[name] for name in ("math_accuracy", "honesty")]
        prm = PRM(gpt.with_heads(()), outputs, generator)
        save_prm(prm, self.prm)

    def write(self, name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.path / name).write_text(text, encoding="utf-8")
        return str(self.path / name)


@pytest.fixture
def judged(gpt, tmp_path):
    return Judged(gpt, tmp_path)


def cells(capsys):
    """The printed table's rows as lists of cells, and all that was printed."""
    out = capsys.readouterr().out
    lines = re.findall(r"^\|(.*)\|$", out, re.M)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in lines], out


def test_scoring_answers(judged, capsys):
    """Answers scored as text, or one model's under another's name, or left out in silence."""
    rows = []
    for i in range(4):
        said = {"a": {"solution": f"it is {i}.0"}, "b": {"solution": "A: 1"}}
        rows.append({"question": "q", "answer": f"#### {i}"} | said)
    score.main([judged.write("answers.jsonl", [*rows, rows[0] | {"answer": ""}])])
    found, out = cells(capsys)
    assert "; 1 left out: the answer is empty" in out
    # Wilson's interval of 4 of 4 is 4 / (4 + 1.96^2) to 1.
    assert found == [["a", "4", "1.000 [0.510, 1.000]"], ["b", "4", "0.250 [0.046, 0.699]"]]


def test_intervals_of_proportions():
    """An interval that leaves [0, 1], or that is a point when all of a few answers are right."""
    # Wilson's bounds are the shares p for which the mean lies 1.96 of p's standard errors away.
    for mean, n in [(0.5, 2), (0.0, 1), (1.0, 7), (0.3, 50), (0.25, 3)]:
        low, high = score.wilson(mean, n)
        assert 0 <= low <= mean <= high <= 1 and high - low > 0.1
        for p in {low, high} - {0.0, 1.0}:
            assert abs(mean - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5)
    assert score.written("accuracy", None) == "-"
    # Losses and margins keep Student's t; F1 its bootstrap.
    loss = {"mean": 2.0, "stderr": 0.1, "n": 2}
    assert score.written("loss", loss) == "2.000 [0.729, 3.271]"
    assert score.written("F1", {"mean": 0.5, "bounds": (0.4, 0.7), "n": 9}) == "0.500 [0.400, 0.700]"


def test_pass_at_k_by_hand():
    """The share of right samples taken for the chance that one of several is right."""
    assert score.pass_at(1, [True, False, False, False]) == 0.25
    # Of the 6 pairs of 4 samples 3 hold the right one.
    assert score.pass_at(2, [False, True, False, False]) == 0.5
    assert score.pass_at(2, [True, False]) == 1 and score.pass_at(2, [False] * 3) == 0
    assert score.pass_at(3, [True, True, False, False]) == 1 and score.pass_at(1, []) == 0


ASKED = {"question": "q", "answer": "#### 2"}


def test_several_samples_for_a_question(judged, capsys):
    """The first of several samples taken for all, a sample that is missing for one that is right,
    or pass@k for more samples than a question has."""
    rows = []
    for samples in (["2", "3", "A: 2", None], ["1", "2.0"], ["5", "4"], []):
        rows.append(ASKED | {"responses": samples})
    score.main([judged.write("answers.jsonl", rows)])
    found, out = cells(capsys)
    # Means 1/2, 1/2, 0, 0; of two samples one is right in 5 of 6 cases, 1, 0, 0.
    assert [text.split()[0] for text in found[0]] == ["response", "4", "0.250", "0.458"]
    assert "pass@2" in out and "response: 2 responses are missing or empty" in out


def test_missing_responses_are_wrong(judged, capsys):
    """A model that is scored on the questions that it answered alone."""
    rows = [ASKED | {"a": {"solution": "2"}, "b": {"solution": None}},
            ASKED | {"b": {"solution": "2"}}, ASKED | {"a": {"solution": ""}}]
    score.main([judged.write("answers.jsonl", rows)])
    found, out = cells(capsys)
    assert [line[:2] + line[2].split()[:1] for line in found] == [
        ["a", "3", "0.333"], ["b", "3", "0.333"]]
    assert "a: 2 responses are" in out and "b: 2 responses are" in out


@pytest.mark.parametrize("change", [
    {"label": "easy"}, {"label": 1}, {"labels": ["x"]}, {"label": {"steps": 2}}, {"completions": 3},
    {"label": "hard", "steps": 4}, {"input": "q", "question": None, "label": "l"}, {"chosen": 1}])
def test_what_else_a_row_of_answers_has_redirects_nothing(judged, change, capsys):
    """Answers taken for labelled steps, because of a column of that name."""
    rows = [ASKED | change | {"response": text} for text in ("2", "3")]
    score.main([judged.write("answers.jsonl", rows)])
    assert cells(capsys)[0][0][:2] == ["response", "2"]
    models = [ASKED | {"label": "easy"} | {"a": {"solution": text}} for text in ("2", "3")]
    score.main([judged.write("answers.jsonl", models)])
    assert cells(capsys)[0][0][:2] == ["a", "2"]


def message(text):
    return [{"role": "user", "content": text}]


def test_scoring_first_errors(judged, capsys):
    """Steps scored at the wrong tokens, rows that do not fit left out in silence."""
    rows = []
    for i in range(12):
        steps = [f"a {i} + 4 = 9", f"b 9 - {i} = 7", "answer 7"]
        label = -1 if i % 8 < 4 else i % 3
        rows.append({"problem": f"{i} + 4 ?", "steps": steps, "label": label})
    long = {"problem": "4 " * 200, "steps": ["5"], "label": -1}
    odd = {"problem": "4 ?", "steps": [], "label": -1}
    score.main([judged.prm, judged.write("steps.jsonl", [*rows, long, odd])])
    ((name, n, *_, f1),), out = cells(capsys)
    assert (name, n) == ("PRM math_accuracy", "12") and "; 1 left out: too long\n" in out
    assert "; 1 left out: no steps, or an empty one" in out
    prm, responses = load_prm(judged.prm), []
    tokenizer = prm.backbone.tokenizer
    for row in rows:
        ids, ends = tokenizer.encode_chat(message(row["problem"])), []
        for text in row["steps"]:
            if text == row["steps"][-1]:
                ids += [*tokenizer.encode(text), tokenizer.eos_id]
            else:
                ids += tokenizer.encode(text + "\n")
            ends.append(len(ids) - 1)
        scores = prm(torch.tensor([ids]))[0, ends, 0].tolist()
        fold = zlib.crc32(json.dumps(message(row["problem"])).encode()) % 2
        responses.append((scores, row["label"], fold))
    errs = torch.tensor([row["label"] >= 0 for row in rows])
    expected = score.first_error_f1(score.localise(responses), errs)
    assert f1.startswith(f"{expected:.3f} [")


def test_scoring_pairs_by_a_prm(judged, capsys):
    """Chosen and rejected swapped, or scored by another output than the one named."""
    pairs = []
    for i in range(9):
        chosen = "the color is red ." * (i % 3 + 1)
        pairs.append({"prompt": f"what of {i} ?", "chosen": chosen, "rejected": "no ."})
    long = {"prompt": "what ?", "chosen": "red " * 200, "rejected": "no"}
    path = judged.write("pairs.jsonl", [*pairs, long])
    score.main([judged.prm, path, "--objective", "honesty"])
    found, out = cells(capsys)
    prm, right = load_prm(judged.prm), []
    tokenizer = prm.backbone.tokenizer
    for pair in pairs:
        values = []
        for which in ("chosen", "rejected"):
            ids = tokenizer.encode_chat(message(pair["prompt"])) + tokenizer.encode(pair[which])
            values.append(prm(torch.tensor([[*ids, tokenizer.eos_id]]))[0, -1, 1].item())
        right.append(float(values[0] > values[1]))
    share = score.written("reward_accuracy", evaluate.summary(right))
    assert found == [["PRM honesty", "9", share]]
    assert "; 1 left out: too long or alike" in out


def test_scoring_ratings(judged, capsys):
    """Ties that are scored as a preference for one of two."""
    rows = []
    for ratings in (("1", "5"), ("3", "3")):
        completions = []
        for text, rating in zip(("yes .", "no ."), ratings):
            about = {"honesty": {"Rating": rating}}
            completions.append({"response": text, "annotations": about})
        rows.append({"instruction": "what ?", "completions": completions})
    score.main([judged.prm, judged.write("rated.jsonl", rows), "--objective", "honesty"])
    left = "; 1 left out: no two responses to the prompt have different ratings of honesty"
    assert left in capsys.readouterr().out


def test_scoring_pairs_by_a_run(whole, judged, capsys):
    """A policy left out, rewards against another reference, pairs that count although the run was
    trained on them."""
    with open(os.path.join(whole, "pairs.jsonl"), encoding="utf-8") as f:
        pairs = [json.loads(line) for line in f]
    trained = [pair["prompt"] for pair in pairs if pair["split"] == "train"]
    tokenizer = load_hf(os.path.join(whole, "sft")).tokenizer
    rng = RNG(evaluate.seed_of(0, "samples", "sft", "values", "train"))
    asked = [problem.messages() for problem in DOMAINS["values"].problems("train", 8, rng)]
    known = next(messages for messages in asked if tokenizer.encode_chat(messages) in trained)
    rows = []
    for prompt in (message("what is new ?"), message("who are you ?"), known):
        rows.append({"prompt": prompt, "chosen": "the color is red .", "rejected": "no ."})
    score.main([whole, judged.write("honesty.jsonl", rows)])
    found, out = cells(capsys)
    assert [line[0] for line in found] == ["sft", "base", "single_head_dpo", "modpo", "dpo_honesty",
                                           "mah_dpo", "PRM honesty"]
    assert {line[1] for line in found} == {"2"} and "; 1 left out: seen in training" in out
    assert found[0][2].startswith("0.693") and found[-1][2:5] == ["-"] * 3


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("argv, row, words", [
    (["nowhere.jsonl"], None, "nowhere.jsonl: no such file"),
    (["f.jsonl"], PAIR, "name the run or the PRM"),
    (["prm", "f.jsonl", "--objective", "wit"], PAIR, "accuracy, honesty"),
    (["prm", "f.jsonl"], {"problem": "p", "steps": ["a"], "label": 0}, "1 responses are left"),
    (["prm", "f.jsonl"], PAIR | {"chosen": "a " * 300}, "no pair is left"),
    (["f.jsonl"], ASKED, "f.jsonl: no row has a response"),
    (["f.jsonl"], ASKED | {"response": 2}, "f.jsonl:1: 'response' is int 2"),
    (["f.jsonl"], {"prompt": "p", "output": "c"}, "'answer' is missing .*; the row has output, p")])
def test_scoring_refuses(judged, argv, row, words, tmp_path, monkeypatch):
    """Tracebacks for a file that cannot be scored, or without what is to be scored."""
    monkeypatch.chdir(tmp_path)
    if row:
        judged.write("f.jsonl", [row])
    with pytest.raises(InputError, match=words):
        score.main(argv)


def test_a_run_is_asked_about_what_is_named(whole, judged):
    """Pairs of nobody knows what, scored by whatever objective comes first."""
    path = judged.write("pairs.jsonl", [PAIR])
    with pytest.raises(InputError, match="say with --objective what it is about: helpfulness, "):
        score.main([whole, path])


def test_a_run_that_is_not_finished(whole, judged, tmp_path):
    """A message about some model's file that does not say what is wrong: the run has not ended."""
    run = str(tmp_path / "run")
    os.makedirs(run)
    shutil.copy(os.path.join(whole, "config.json"), run)
    with pytest.raises(InputError, match="not a finished run .*train.py --resume"):
        score.main([run, judged.write("honesty.jsonl", [PAIR])])


def test_scoring_by_a_prm_without_a_tokenizer(judged):
    """A traceback for a reward model that came without a tokenizer that is read here."""
    for name in os.listdir(judged.prm):
        if name.startswith("tokenizer"):
            os.remove(os.path.join(judged.prm, name))
    with pytest.raises(InputError, match="no tokenizer.json"):
        score.main([judged.prm, judged.write("f.jsonl", [PAIR])])
