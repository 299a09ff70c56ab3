"""evaluate.py: statistics, findings, picture, timings. Every docstring states the bug that its test prevents. (Whole tables are
tested with train.py.)"""
import itertools
import math
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

import evaluate
from data import write_json


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
