"""evaluate.py: statistics, findings, picture, timings. Every docstring states the bug that its test prevents. (Whole tables are
tested with train.py.)"""
import itertools
import json
import math
import os
import random
import re
import time
import xml.etree.ElementTree as ElementTree
import zlib

import pytest
import torch

import evaluate
from data import InputError, write_json
from model import GPT, GPTConfig, save_hf
from prm import PRM, load_prm, save_prm


def test_intervals_are_student_t():
    """Prevents: a normal quantile, or the wrong degrees of freedom, which make five trainings look twice as sure as they are."""
    for df, t in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423), (1000, 1.9623)):
        assert evaluate.student_t(df) == pytest.approx(t, rel=1e-3)
    assert evaluate.student_t(4, level=0.995) == pytest.approx(5.5976, rel=1e-3)
    assert evaluate.half_width(evaluate.summary([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-3)
    assert evaluate.half_width(evaluate.summary([1.0])) == math.inf
    assert evaluate.cell(evaluate.summary([1.0, 2.0, 3.0, 4.0, 5.0])) == "3.000 ±1.963"
    assert evaluate.cell(evaluate.summary([1.0])) == "1.000"


def test_jackknife():
    """Prevents: an interval for a ratio or an area that is not that of a mean where the statistic is a mean, or that is centred
    beside the statistic."""
    values = [1.0, 4.0, 2.0, 9.0]
    assert evaluate.jackknife(lambda m: m[0], [values]) == pytest.approx(values)
    ratio = evaluate.summary(evaluate.jackknife(lambda m: m[0] / m[1], [[1.0, 2.0, 3.0], [2.0, 2.0, 5.0]]))
    rest = [5 / 7, 4 / 7, 3 / 4]                              # each unit left out once
    spread = math.sqrt(2 / 3 * sum((r - sum(rest) / 3) ** 2 for r in rest))
    assert ratio == {"mean": pytest.approx(6 / 9), "stderr": pytest.approx(spread), "n": 3}
    assert evaluate.jackknife(lambda m: m[0] + 1, [[5.0]]) == [6.0]


# -- findings

def made(policy, each, guide=None, domain="math", weights=None, sweep=None):
    """A row as evaluate.load_rows gives them."""
    row = {"policy": policy, "guide": guide, "domain": domain, "weights": weights or {}, "seed": 0, "each": each,
           "metrics": {m: evaluate.summary(v) for m, v in each.items()}}
    return row | ({"sweep": list(sweep)} if sweep else {})


def test_verdicts():
    """Prevents: a difference within its noise that is called a finding, or a significant loss that is called noise."""
    spread = [-0.1, 0.0, 0.1, 0.0]                            # half the interval: 0.13
    about = lambda mean: evaluate.summary([mean + s for s in spread])
    assert [evaluate.verdict(about(m)) for m in (0.2, 0.1, -0.1, -0.2)] == \
        ["holds", "not significant", "not significant", "does not hold"]
    assert evaluate.verdict(about(0.12), 0.02) == "holds" and evaluate.verdict(about(-0.2), 0.02) == "does not hold"
    assert evaluate.verdict(evaluate.summary([0.5])) == "not significant" == evaluate.verdict(evaluate.summary([0.0] * 9))


def test_comparisons_are_paired():
    """Prevents: two rows compared as if they had met different prompts, which hides what one beats the other by on each; rows
    swapped; an objective left out of a mean; a row that is missing taken for a success."""
    rng = random.Random(0)
    luck, other = ([rng.random() for _ in range(30)] for _ in range(2))
    rows = {("sft", None): made("sft", {"a": luck, "b": other}),
            ("mah_dpo", "a"): made("mah_dpo", {"a": [v + 0.1 + 0.01 * rng.random() for v in luck], "b": other}, "a")}
    line = evaluate.compare("F4", "math", ["a"], ("mah_dpo", "a"), ("sft", None), 0, rows, rows)
    assert line["verdict"] == "holds" and line["compared"] == "mah_dpo + a - sft"
    assert 0.1 < line["metrics"]["difference"]["mean"] < 0.11 and evaluate.half_width(line["metrics"]["difference"]) < 0.005
    back = evaluate.compare("F4", "math", ["a"], ("sft", None), ("mah_dpo", "a"), 0, rows, rows)
    assert back["verdict"] == "does not hold"
    both = evaluate.compare("F6", "math", ["a", "b"], ("mah_dpo", "a"), ("sft", None), 0, rows, rows)
    assert both["metrics"]["difference"]["mean"] == pytest.approx(line["metrics"]["difference"]["mean"] / 2)
    assert evaluate.compare("F4", "math", ["a"], ("mah_dpo", "a"), ("modpo", None), 0, rows, rows)["verdict"] == "not run"


def test_claims_leave_no_rival_out():
    """Prevents: a scorecard that looks better because a baseline, a head or an objective is missing from it."""
    found = list(evaluate.claims(["math_accuracy", "math_engagement"]))
    of = lambda finding: {(*names, better, worse) for f, names, better, worse, _ in found if f == finding}
    baselines, none = ("sft", "single_head_dpo", "modpo", "soup"), None
    assert of("F1") == {(n, ("mah_dpo", none), (b, none)) for n in ("math_accuracy", "math_engagement") for b in baselines}
    rivals = lambda n: {("base", none), ("mah_dpo", none), *((b, none) for b in baselines), (f"mah_dpo:{n}", none)}
    assert {w for n, _, w in of("F2") if n == "math_accuracy"} == rivals("math_engagement")
    assert {w for n, _, w in of("F2") if n == "math_engagement"} == rivals("math_accuracy")
    assert {w for *_, w in of("F3")} == \
        rivals("math_accuracy") - {("base", none)} | {("mah_dpo:math_engagement", none), ("sft", "math_engagement")}
    means = [("math_accuracy", "math_engagement"), *((n,) for n in ("math_accuracy", "math_engagement"))]
    assert {m[:-2] for m in of("F4")} == set(means) and len(of("F4")) == 10
    assert {w[0] for *_, g, w in of("F4") if g == ("mah_dpo", "unified")} == {"sft", "mah_dpo"} and not of("F6")
    whole = {(p, (p, "math_accuracy"), (f"{p}_{rival}", guide)) for p in ("sft", "mah_dpo") for rival, guide in
             (("greedy", none), ("vote", none), ("rerank", "math_accuracy"))}
    assert {(b[0], b, w) for n, b, w in of("rivals") if n == "math_accuracy"} == whole
    assert {(b, w[0]) for n, b, w in of("rivals") if n == "math_engagement"} == \
        {((p, "math_engagement"), f"{p}_greedy") for p in ("sft", "mah_dpo")}
    slack = {(f, n): s for f, (n, *_), _, _, s in found if f in ("F1", "F2")}
    assert slack == {("F1", "math_accuracy"): evaluate.KEPT, ("F1", "math_engagement"): 0, ("F2", "math_accuracy"): 0,
                     ("F2", "math_engagement"): 0}


def swept(scores_a, scores_b, policy="mah_dpo"):
    """Rows of a sweep from a to b: score lists by weight, each the same for four prompts but for a little noise."""
    noise = [0.0, 0.001, 0.002, 0.003]
    weights = [{"a": 1 - i / (len(scores_a) - 1), "b": i / (len(scores_a) - 1)} for i in range(len(scores_a))]
    return [made(policy, {"a": [x + e for e in noise], "b": [y + e * e for e in noise]}, weights=w, sweep=("a", "b"))
            for x, y, w in zip(scores_a, scores_b, weights)]


def test_sweep_lines():
    """Prevents: a sweep called smooth although it turns back, or one in which the score falls with its own weight."""
    lines = list(evaluate.sweep_lines("math", ("a", "b"), swept([0.9, 0.6, 0.4, 0.1], [0.1, 0.5, 0.3, 0.8])))
    assert [x["objective"] for x in lines] == ["a", "a", "b", "b"]
    slope_a, worst_a, slope_b, worst_b = [x["metrics"]["difference"]["mean"] for x in lines]
    assert (worst_a, worst_b) == (pytest.approx(0.2), pytest.approx(-0.2))
    assert slope_a == pytest.approx((0.5 * 0.8 + 1 / 6 * 0.2) / (2 * (0.25 + 1 / 36)))           # least squares
    assert [x["verdict"] for x in lines] == ["holds", "holds", "holds", "does not hold"]
    assert lines[1]["metrics"]["difference"]["level"] == pytest.approx(1 - 0.05 / 3)
    flat = list(evaluate.sweep_lines("math", ("a", "b"), swept([0.9, 0.5, 0.5], [0.1, 0.2, 0.9])))
    assert flat[1]["verdict"] == "holds"                      # a step that leads nowhere does not lead back
    rows = swept([0.9, 0.5, 0.499], [0.1, 0.2, 0.9])
    rows[0]["each"]["a"] = [0.1, 0.5, 1.3, 1.7]               # the first step gains on the mean, but might as well lose
    worst = list(evaluate.sweep_lines("math", ("a", "b"), rows))[1]
    assert worst["verdict"] == "not significant" and worst["metrics"]["difference"]["mean"] == pytest.approx(0.4, abs=0.01)
    back = list(evaluate.sweep_lines("math", ("a", "b"), swept([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])))
    assert [x["verdict"] for x in back] == ["does not hold", "does not hold", "holds", "holds"]


def test_findings_cells():
    """Prevents: a finding that holds although one of its parts does not, or a part that was not run and is not said to be."""
    of = lambda *found: evaluate.verdicts([{"verdict": v} for v in found])
    assert of("holds", "holds") == "holds (2/2)" and of("holds", "not significant") == "not significant (1/2)"
    assert of("holds", "not significant", "does not hold", "holds") == "does not hold (2/4)"
    assert of("holds", "not run") == "holds (1/1), part not run" and of("not run") == "not run" and of() == "-"


# -- fronts and picture

def test_hypervolume_by_hand():
    """Prevents: areas counted twice, dominated or worthless points that count, a front that depends on their order."""
    assert evaluate.hypervolume([]) == 0 and evaluate.hypervolume([(0.5, 0.4)]) == pytest.approx(0.2)
    assert evaluate.hypervolume([(0.5, 0.4), (0.3, 0.3), (0.5, 0.2)]) == pytest.approx(0.2)       # dominated
    for points in itertools.permutations([(1.0, 0.2), (0.6, 0.5), (0.2, 0.9)]):
        assert evaluate.hypervolume(points) == pytest.approx(0.2 + 0.6 * 0.3 + 0.2 * 0.4)
    assert evaluate.hypervolume([(3.0, 4.0), (0.5, 9.0)], reference=(1.0, 2.0)) == pytest.approx(4.0)
    assert evaluate.hypervolume([(0.5, 3.0), (3.0, 1.0)], reference=(1.0, 2.0)) == 0


def test_areas_by_method():
    """Prevents: a method's area made of another's points, or of guided points where it has none."""
    plain = [made("sft", {"a": [0.2, 0.4], "b": [0.5, 0.5]}), made("sft", {"a": [0.1, 0.1], "b": [0.9, 0.7]}, guide="b"),
             made("modpo", {"a": [0.5, 0.5], "b": [0.5, 0.5]}), made("single_head_dpo", {"a": [0.1, 0.1], "b": [0.5, 0.5]}),
             made("mah_dpo", {"a": [0.7, 0.7], "b": [0.1, 0.1]})]
    found = evaluate.fronts(plain, swept([0.9, 0.1], [0.1, 0.9]) + swept([0.8, 0.2], [0.2, 0.8], "soup"))
    rows = {m: evaluate.area("a and b", m, rows, ("a", "b")) for m, rows in found.items()}
    assert {m: r["points"] for m, r in rows.items()} == {"sft": "1", "single_head_dpo": "1", "modpo": "1", "mah_dpo, swept": "2",
                                                         "soup, swept": "2", "sft, guided": "2", "mah_dpo, guided": "1"}
    volume = {m: r["metrics"]["hypervolume"]["mean"] for m, r in rows.items()}
    assert volume["sft"] == pytest.approx(0.15) and volume["sft, guided"] == pytest.approx(0.3 * 0.5 + 0.1 * 0.3)
    assert volume["mah_dpo, swept"] == pytest.approx(0.17, abs=0.01) and volume["soup, swept"] == pytest.approx(0.28, abs=0.01)


def label_boxes(group):
    """Boxes of the labels of a panel, as wide as evaluate.put_label takes them to be."""
    return [(float(t.get("x")), float(t.get("y")) - 8.5, float(t.get("x")) + 5.4 * len(t.text), float(t.get("y")) + 2.5)
            for t in group.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "label"]


def test_picture_has_room_for_its_labels():
    """Prevents: labels on top of each other, marks or labels outside the picture, a point without a name."""
    rng = random.Random(1)
    near = lambda c: [min(1.0, max(0.0, c + 0.02 * rng.random() + s)) for s in (-0.1, 0.0, 0.1)]
    crowd = [made(f"policy_number_{i}", {"a": near(i % 3 / 2), "b": near(i % 2)}, guide="b" if i % 2 else None) for i in range(24)]
    rows = crowd + swept([0.9, 0.5, 0.1], [0.1, 0.5, 0.9]) + swept([0.8, 0.5, 0.2], [0.2, 0.5, 0.8], "soup")
    root = ElementTree.fromstring(evaluate.pareto_svg(rows))
    width, height = map(float, root.get("viewBox").split()[2:])
    group, = root.iter("{http://www.w3.org/2000/svg}g")
    boxes = label_boxes(group)
    assert {t.text for t in group.iter() if t.get("class") == "label"} == {"mah_dpo, swept", "soup, swept"} | \
        {f"policy_number_{i}" + " + b" * (i % 2) for i in range(24)}
    for a, b in itertools.combinations(boxes, 2):
        assert a[0] >= b[2] - 0.2 or b[0] >= a[2] - 0.2 or a[1] >= b[3] - 0.2 or b[1] >= a[3] - 0.2
    assert all(0 <= b[0] and b[2] <= width and 0 <= b[1] and b[3] <= height for b in boxes)
    for c in group.iter("{http://www.w3.org/2000/svg}circle"):
        assert evaluate.LEFT <= float(c.get("cx")) <= evaluate.RIGHT and evaluate.TOP <= float(c.get("cy")) <= evaluate.BOTTOM
    for path in group.iter("{http://www.w3.org/2000/svg}path"):
        assert all(0 <= float(v) <= width for v in re.findall(r"[0-9.]+", path.get("d")))
    assert [len(p.get("points").split()) for p in group.iter("{http://www.w3.org/2000/svg}polyline")] == [3, 3]
    assert "prefers-color-scheme:dark" in root[0].text
    ElementTree.fromstring(evaluate.pareto_svg([]))


# -- real outputs

def test_first_errors_by_hand():
    """Prevents: another F1 than ProcessBench's, an error found too late that counts, a right response that is blamed and passes,
    a threshold chosen with the response's own help."""
    assert evaluate.first_error_f1([4, 1, 10, 5]) == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert evaluate.first_error_f1([4, 0, 10, 9]) == 0 == evaluate.first_error_f1([4, 4, 10, 0])
    scores = [[0.9, 0.2, 0.1], [0.9, 0.3], [0.8, 0.9], [0.2, 0.9], [0.9, 0.1], [0.7, 0.8]]
    labels, folds = [1, 1, -1, -1, 0, -1], [0, 1, 0, 1, 1, 1]
    errs, found, right, passed = evaluate.localise(scores, labels, folds)
    assert errs == [1, 1, 0, 0, 1, 0] and right == [0, 0, 1, 1, 0, 1]
    # Fold 1 is best cut at 0.7 (F1 1/2, finding row 1 and passing row 5), fold 0 at 0.8; each is judged by the other's cut.
    assert found == [1, 1, 0, 0, 0, 0] and passed == [0, 0, 1, 0, 0, 0]
    shifted = [[s + 5 for s in row] if f == 1 else row for row, f in zip(scores, folds)]
    columns = evaluate.localise(shifted, labels, folds)
    assert [columns[1][i] + columns[3][i] for i, f in enumerate(folds) if f == 0] == [0, 0]      # all below the other's cut


@pytest.fixture
def judged(gpt, tmp_path):
    """A PRM's directory, and a function that writes rows to a file in it."""
    save_prm(PRM(gpt.with_heads(()), ["math_accuracy", "honesty"], torch.Generator().manual_seed(1)), str(tmp_path / "prm"))

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
    evaluate.main(["--score", write("answers.jsonl", rows + [rows[0] | {"answer": ""}])])
    found, out = cells(capsys)
    assert "1 rows left out: the answer is empty." in out
    assert found == [["a", "4", "1.000 ±0.000"], ["b", "4", "0.250 ±0.796"]]


def test_scoring_first_errors(judged, capsys):
    """Prevents: steps scored at the wrong tokens, rows that do not fit left out in silence."""
    directory, write = judged
    steps = lambda i: [f"a {i} + 4 = 9", f"b 9 - {i} = 7", "answer 7"]
    rows = [{"problem": f"{i} + 4 ?", "steps": steps(i), "label": -1 if i % 8 < 4 else i % 3} for i in range(12)]
    path = write("steps.jsonl", rows + [{"problem": "4 " * 200, "steps": ["5"], "label": -1}])
    evaluate.main([directory, "--score", path])
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
    columns = evaluate.localise(scores, [r["label"] for r in rows], folds)
    assert f1.startswith(f"{evaluate.first_error_f1(list(map(sum, columns))):.3f} ±")


def test_scoring_pairs_by_a_prm(judged, capsys):
    """Prevents: chosen and rejected swapped, or scored by another output than the one named."""
    directory, write = judged
    pairs = [{"prompt": f"what of {i} ?", "chosen": "the color is red ." * (i % 3 + 1), "rejected": "no ."} for i in range(9)]
    path = write("pairs.jsonl", pairs + [{"prompt": "what ?", "chosen": "red " * 200, "rejected": "no"}])
    evaluate.main([directory, "--score", path, "--objective", "honesty"])
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
    evaluate.main([directory, "--score", write("rated.jsonl", [rated("1", "5"), rated("3", "3")]), "--objective", "honesty"])
    assert "1 rows left out: no two completions have different ratings of honesty." in capsys.readouterr().out


@pytest.mark.parametrize("argv, rows, message", [
    (["--score", "nowhere.jsonl"], None, "nowhere.jsonl: no such file"), ([], None, "name the run"),
    (["--score", "f.jsonl"], [{"prompt": "p", "chosen": "a", "rejected": "b"}], "name the run or the PRM"),
    (["prm", "--score", "f.jsonl", "--objective", "wit"], [{"prompt": "p", "chosen": "a", "rejected": "b"}], "accuracy, honesty"),
    (["prm", "--score", "f.jsonl"], [{"problem": "p", "steps": ["a"], "label": 0}], "1 responses are left"),
    (["prm", "--score", "f.jsonl"], [{"prompt": "p", "chosen": "a " * 300, "rejected": "b"}], "no pair is left"),
    (["--score", "f.jsonl"], [{"question": "q", "answer": "#### 2"}], "f.jsonl:1: no text of a response")])
def test_scoring_refuses(judged, argv, rows, message, tmp_path, monkeypatch):
    """Prevents: tracebacks for a file that cannot be scored, or without what is to be scored."""
    monkeypatch.chdir(tmp_path)
    if rows:
        judged[1]("f.jsonl", rows)
    with pytest.raises(InputError, match=message):
        evaluate.main(argv)


def test_scoring_by_a_prm_without_a_tokenizer(judged):
    """A traceback for a reward model that came without a tokenizer that is read here."""
    for name in os.listdir(judged[0]):
        if name.startswith("tokenizer"):
            os.remove(os.path.join(judged[0], name))
    path = judged[1]("f.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match="no tokenizer.json"):
        evaluate.main([judged[0], "--score", path])


def test_trainings_are_averaged_row_by_row(tmp_path):
    """Prevents: another objective's figures in a mean over trainings, because held-out pairs come in another order; a traceback
    because one training lacks a row."""
    row = lambda domain, value, **more: {"policy": "sft", "weights": {"policy": 1.0}, "guide": None, "domain": domain,
                                         "metrics": {"loss": {"mean": value, "stderr": 0.1, "n": 8}}} | more
    write_json(str(tmp_path / "config.json"), {"objectives": [], "temperature": 1, "seed": 3, "seeds": 2})
    guided, swept = {"guide": "honesty"}, {"sweep": ["honesty", "helpfulness"]}
    for seed, rows in ((3, [row("pairs:honesty", 1.0), row("pairs:helpfulness", 2.0), row("values", 3.0), row("values", 4.0, **guided),
                            row("values", 5.0, **swept)]),
                       (4, [row("pairs:helpfulness", 20.0), row("values", 50.0, **swept), row("values", 30.0),
                            row("values", 40.0, **guided)])):
        (tmp_path / f"seed={seed}").mkdir()
        write_json(str(tmp_path / f"seed={seed}" / "results.json"), [r | {"seed": seed} for r in rows])
    found = [(r["domain"], r["guide"], r["metrics"]["loss"]["mean"]) for r in evaluate.load_rows(str(tmp_path))]
    assert found == [("pairs:helpfulness", None, 11.0), ("values", None, 16.5), ("values", "honesty", 22.0), ("values", None, 27.5)]


# -- timings

def test_timing_counts_what_each_way_feeds(tmp_path, capsys):
    """A benchmark whose ways do unequal work, or that hides tokens fed twice: with prompt P, K candidates, S steps of N tokens
    the carried way feeds each model P + K S N tokens, published decoders the PRM K times the whole text in every step."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=170)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    evaluate.main([str(tmp_path), "--timing"])
    printed = capsys.readouterr().out
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in printed.splitlines() if line.startswith("| 128 ")]
    assert "a prefix of 512 does not fit the context of 170" in printed and "GB/s of a copy" in printed
    fed = {(int(r[1]), r[2]): (int(r[7]), int(r[8])) for r in rows}
    P, S, N = 128, 2, 16
    assert sorted(fed) == sorted((K, way) for K in (1, 2, 5, 10) for way in ("re-encoding", "cached, one by one", "carried (here)"))
    for K in (1, 2, 5, 10):
        assert fed[K, "carried (here)"] == (P + K * S * N, P + K * S * N)
        assert fed[K, "cached, one by one"] == (P + K * S * N, K * (P + N + P + 2 * N))
        assert fed[K, "re-encoding"] == (K * (P + N + P + 2 * N), K * (P + N + P + 2 * N))


def test_timing_of_a_short_context(tmp_path, capsys):
    """A traceback for a model that no prefix fits: it still has a speed of one token."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=40)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    evaluate.main([str(tmp_path), "--timing"])
    assert capsys.readouterr().out.count("does not fit the context of 40") == 3


def test_one_token_is_timed_by_the_tokens_drawn(tmp_path, capsys, monkeypatch):
    """A speed 64 times too good from a model that ends its answer at once."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=40)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **options: time.sleep(0.05) or [[0]])
    evaluate.main([str(tmp_path), "--timing"])
    assert float(re.search(r"one token: ([0-9.]+) ms", capsys.readouterr().out)[1]) >= 50


def test_timing_needs_a_checkpoint(tmp_path):
    """A traceback instead of the name of what is missing."""
    with pytest.raises(InputError, match="config.json: no such file"):
        evaluate.main([str(tmp_path), "--timing"])
