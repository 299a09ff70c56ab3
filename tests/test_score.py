"""interop/score.py: real outputs scored. Every docstring states the bug that its test prevents."""
import json
import os
import zlib

import pytest
import torch

import evaluate
from data import InputError, OBJECTIVES
from interop import score
from prm import PRM, load_prm, save_prm


# -- real outputs

def test_first_errors_by_hand():
    """Prevents: another F1 than ProcessBench's, an error found too late that counts, a right response that is blamed and passes,
    a threshold chosen with the response's own help."""
    assert score.first_error_f1([4, 1, 10, 5]) == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert score.first_error_f1([4, 0, 10, 9]) == 0 == score.first_error_f1([4, 4, 10, 0])
    scores = [[0.9, 0.2, 0.1], [0.9, 0.3], [0.8, 0.9], [0.2, 0.9], [0.9, 0.1], [0.7, 0.8]]
    labels, folds = [1, 1, -1, -1, 0, -1], [0, 1, 0, 1, 1, 1]
    errs, found, right, passed = score.localise(scores, labels, folds)
    assert errs == [1, 1, 0, 0, 1, 0] and right == [0, 0, 1, 1, 0, 1]
    # Fold 1 is best cut at 0.7 (F1 1/2, finding row 1 and passing row 5), fold 0 at 0.8; each is judged by the other's cut.
    assert found == [1, 1, 0, 0, 0, 0] and passed == [0, 0, 1, 0, 0, 0]
    shifted = [[s + 5 for s in row] if f == 1 else row for row, f in zip(scores, folds)]
    columns = score.localise(shifted, labels, folds)
    assert [columns[1][i] + columns[3][i] for i, f in enumerate(folds) if f == 0] == [0, 0]      # all below the other's cut


@pytest.fixture
def judged(gpt, tmp_path):
    """A PRM's directory, and a function that writes rows to a file in it."""
    save_prm(PRM(gpt.with_heads(()), [OBJECTIVES[o] for o in ("math_accuracy", "honesty")], torch.Generator().manual_seed(1)), str(tmp_path / "prm"))

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return str(tmp_path / name)
    return str(tmp_path / "prm"), write


def cells(capsys):
    """The printed table's rows as lists of cells, and the rest."""
    out = capsys.readouterr().out
    return [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")][2:], out


def test_scoring_answers(judged, capsys):
    """Prevents: answers scored as text, or one model's under another's name, or left out in silence."""
    _, write = judged
    rows = [{"question": "q", "answer": f"#### {i}", "a": {"solution": f"it is {i}.0"}, "b": {"solution": "A: 1"}} for i in range(4)]
    score.main([write("answers.jsonl", rows + [rows[0] | {"answer": ""}])])
    found, out = cells(capsys)
    assert "1 rows left out: the answer is empty." in out
    assert found == [["a", "4", "1.000 ±0.000"], ["b", "4", "0.250 ±0.796"]]


def test_scoring_first_errors(judged, capsys):
    """Prevents: steps scored at the wrong tokens, rows that do not fit left out in silence."""
    directory, write = judged
    steps = lambda i: [f"a {i} + 4 = 9", f"b 9 - {i} = 7", "answer 7"]
    rows = [{"problem": f"{i} + 4 ?", "steps": steps(i), "label": -1 if i % 8 < 4 else i % 3} for i in range(12)]
    path = write("steps.jsonl", rows + [{"problem": "4 " * 200, "steps": ["5"], "label": -1}])
    score.main([directory, path])
    ((name, n, *_, f1),), out = cells(capsys)
    assert (name, n) == ("PRM math_accuracy", "12") and "1 rows left out: too long." in out
    prm, scores = load_prm(directory), []
    tokenizer = prm.backbone.tokenizer
    for r in rows:
        ids, ends = tokenizer.encode_chat([{"role": "user", "content": r["problem"]}]), []
        for text in (*(s + "\n" for s in r["steps"][:-1]), r["steps"][-1]):
            ids = ids + tokenizer.encode(text) + ([] if text.endswith("\n") else [tokenizer.eos_id])
            ends.append(len(ids) - 1)
        scores.append(prm(torch.tensor([ids]))[0, ends, 0].tolist())
    folds = [zlib.crc32(json.dumps([{"role": "user", "content": r["problem"]}]).encode()) % 2 for r in rows]
    columns = score.localise(scores, [r["label"] for r in rows], folds)
    assert f1.startswith(f"{score.first_error_f1(list(map(sum, columns))):.3f} ±")


def test_scoring_pairs_by_a_prm(judged, capsys):
    """Prevents: chosen and rejected swapped, or scored by another output than the one named."""
    directory, write = judged
    pairs = [{"prompt": f"what of {i} ?", "chosen": "the color is red ." * (i % 3 + 1), "rejected": "no ."} for i in range(9)]
    path = write("pairs.jsonl", pairs + [{"prompt": "what ?", "chosen": "red " * 200, "rejected": "no"}])
    score.main([directory, path, "--objective", "honesty"])
    found, out = cells(capsys)
    prm = load_prm(directory)
    tokenizer = prm.backbone.tokenizer
    prompt = lambda p: tokenizer.encode_chat([{"role": "user", "content": p["prompt"]}])
    ids = lambda p, key: prompt(p) + tokenizer.encode(p[key]) + [tokenizer.eos_id]
    value = lambda p, key: prm(torch.tensor([ids(p, key)]))[0, -1, 1].item()
    right = [float(value(p, "chosen") > value(p, "rejected")) for p in pairs]
    assert found == [["PRM honesty", "9", "-", "-", evaluate.cell(evaluate.summary(right)), "-"]]
    assert "1 rows left out: too long or alike." in out
    rated = lambda a, b: {"instruction": "what ?", "completions": [
        {"response": text, "annotations": {"honesty": {"Rating": rating}}} for text, rating in (("yes .", a), ("no .", b))]}
    score.main([directory, write("rated.jsonl", [rated("1", "5"), rated("3", "3")]), "--objective", "honesty"])
    assert "1 rows left out: no two completions have different ratings of honesty." in capsys.readouterr().out


@pytest.mark.parametrize("argv, rows, message", [
    (["nowhere.jsonl"], None, "nowhere.jsonl: no such file"), 
    (["f.jsonl"], [{"prompt": "p", "chosen": "a", "rejected": "b"}], "name the run or the PRM"),
    (["prm", "f.jsonl", "--objective", "wit"], [{"prompt": "p", "chosen": "a", "rejected": "b"}], "accuracy, honesty"),
    (["prm", "f.jsonl"], [{"problem": "p", "steps": ["a"], "label": 0}], "1 responses are left"),
    (["prm", "f.jsonl"], [{"prompt": "p", "chosen": "a " * 300, "rejected": "b"}], "no pair is left"),
    (["f.jsonl"], [{"question": "q", "answer": "#### 2"}], "f.jsonl:1: no text of a response")])
def test_scoring_refuses(judged, argv, rows, message, tmp_path, monkeypatch):
    """Prevents: tracebacks for a file that cannot be scored, or without what is to be scored."""
    monkeypatch.chdir(tmp_path)
    if rows:
        judged[1]("f.jsonl", rows)
    with pytest.raises(InputError, match=message):
        score.main(argv)


def test_scoring_by_a_prm_without_a_tokenizer(judged):
    """A traceback for a reward model that came without a tokenizer that is read here."""
    for name in os.listdir(judged[0]):
        if name.startswith("tokenizer"):
            os.remove(os.path.join(judged[0], name))
    path = judged[1]("f.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match="no tokenizer.json"):
        score.main([judged[0], path])
