"""experiments/findings.py: comparisons and verdicts. Every docstring states the bug that its test
prevents."""
import os
import random
import re
import shutil

import pytest

from data import OBJECTIVES, InputError, read_json, write_json
from evaluate import half_width, summary
from experiments import claims, findings
from experiments.claims import differences
from experiments.findings import line, sweep_lines

MATHS = [OBJECTIVES["math_accuracy"], OBJECTIVES["math_engagement"]]
ACCURACY, ENGAGEMENT = "math_accuracy", "math_engagement"


def made(each, weights=None, policy="mah_dpo"):
    """What a comparison reads of a row of evaluate.load_rows."""
    return {"policy": policy, "each": each, "weights": weights or {}}


def verdict(values, slack=0.0):
    return line("F1", "math", "a", "x - y", values, slack)["verdict"]


def test_verdicts():
    """A difference within its noise that is called a finding, or a significant loss that is called
    noise; a row that is missing taken for a success."""
    spread = [-0.1, 0.0, 0.1, 0.0]                            # half the interval: 0.13
    found = []
    for mean in (0.2, 0.1, -0.1, -0.2):
        found.append(verdict([mean + s for s in spread]))
    assert found == ["holds", "not significant", "not significant", "does not hold"]
    assert verdict([0.12 + s for s in spread], 0.02) == "holds"
    assert verdict([-0.2 + s for s in spread], 0.02) == "does not hold"
    assert verdict([0.5]) == "not significant" == verdict([0.0] * 9)
    gone = line("F4", "math", "a", "x - y", None)
    assert (gone["verdict"], gone["difference"]) == ("not run", "-")


@pytest.mark.parametrize("slack", [0.0, 0.02])
def test_verdicts_at_their_borders(slack):
    """What may lose a little "does not hold" although it loses less than that: a loss is certain
    where the whole interval lies below what may be lost, and a success where it lies above."""
    spread = [-0.01, 0.0, 0.01, 0.0]
    half = half_width(summary(spread))
    found = []
    for border in (half - slack, -half - slack):
        for side in (1e-6, -1e-6):
            found.append(verdict([border + side + s for s in spread], slack))
    assert found == ["holds", "not significant", "not significant", "does not hold"]


def test_comparisons_are_paired():
    """Two rows compared as if they had met different prompts, which hides what one beats the other
    by on each; rows swapped; an objective left out of a mean."""
    rng = random.Random(0)
    luck = [rng.random() for _ in range(30)]
    same = [rng.random() for _ in range(30)]
    better = [v + 0.1 + 0.01 * rng.random() for v in luck]
    rows = {"sft": made({"a": luck, "b": same}), "mah_dpo + a": made({"a": better, "b": same})}
    gaps = pytest.approx([x - y for x, y in zip(better, luck)])
    assert differences(("a",), "mah_dpo + a", "sft", rows) == gaps
    assert differences(("a",), "sft", "mah_dpo + a", rows) == pytest.approx(
        [y - x for x, y in zip(better, luck)])
    half = pytest.approx([(x - y) / 2 for x, y in zip(better, luck)])
    assert differences(("a", "b"), "mah_dpo + a", "sft", rows) == half
    assert differences(("a",), "mah_dpo + a", "modpo", rows) is None


def of(finding, objectives=MATHS):
    """{(objective or objectives, better): set of worse rows} of a finding in maths."""
    found = {}
    for name, counted, better, worse, _ in claims.comparisons(objectives):
        if name == finding:
            rows = found.setdefault((" + ".join(counted), better), set())
            assert worse not in rows                          # nothing counts twice
            rows.add(worse)
    return found


def test_no_rival_is_left_out():
    """A scorecard that looks better because a baseline, a head or an objective is missing."""
    baselines = {"sft", "single_head_dpo", "modpo", "soup"}
    head, other = f"mah_dpo:{ACCURACY}", f"mah_dpo:{ENGAGEMENT}"
    everyone = baselines | {"base", "mah_dpo"}
    assert of("F1") == {(ACCURACY, "mah_dpo"): baselines, (ENGAGEMENT, "mah_dpo"): baselines}
    assert of("F2") == {(ACCURACY, head): everyone | {other},
                        (ENGAGEMENT, other): everyone | {head}}
    guided = everyone - {"base"} | {head, other, f"sft + {ENGAGEMENT}"}
    assert of("F3") == {(ACCURACY, f"sft + {ACCURACY}"): guided}


def test_guidance_meets_its_parts_and_its_rivals():
    """Guidance of a trained policy that is not compared with guidance alone or training alone, or
    not with what costs as much."""
    mean, together = f"{ACCURACY} + {ENGAGEMENT}", {}
    for guide in (ACCURACY, ENGAGEMENT, "unified"):
        parts = {f"sft + {guide}", "mah_dpo"}
        together[mean, f"mah_dpo + {guide}"] = parts
        if guide != "unified":
            together[guide, f"mah_dpo + {guide}"] = parts
    assert of("F4") == together
    rivals, own = {}, {}
    for policy in ("sft", "mah_dpo"):
        whole = {f"{policy}_greedy", f"{policy}_vote", f"{policy}_rerank + {ACCURACY}"}
        rivals[ACCURACY, f"{policy} + {ACCURACY}"] = whole
        rivals[ENGAGEMENT, f"{policy} + {ENGAGEMENT}"] = {f"{policy}_greedy"}
        for name in (ACCURACY, ENGAGEMENT):
            own[name, f"{policy} + {name}"] = {f"{policy} + {name}, its own PRM"}
    assert of("rivals") == rivals and of("F6+") == own


def test_the_unified_prm_meets_no_guide_in_every_domain():
    """F6 as the paper has it, which a comparison with separate PRMs says nothing about: left out
    for a policy or a domain, or made on one objective alone; a single objective's guide, which is
    the unified one, forgotten."""
    for objectives in (MATHS, MATHS[:1], list(OBJECTIVES.values())[2:5]):
        names = [o.name for o in objectives]
        guide, mean = "unified" if len(names) > 1 else ACCURACY, " + ".join(names)
        expected = {(mean, f"{policy} + {guide}"): {policy} for policy in ("sft", "mah_dpo")}
        assert of("F6", objectives) == expected


def test_a_single_objective_is_its_own_ensemble():
    """The only head compared with the ensemble, which is itself, or its guide counted again as the
    unified one, and as the mean of its domain."""
    baselines, accuracy = {"sft", "single_head_dpo", "modpo", "soup"}, MATHS[:1]
    assert of("F1", accuracy) == {(ACCURACY, "mah_dpo"): baselines}
    assert of("F2", accuracy) == {(ACCURACY, "mah_dpo"): baselines | {"base"}}
    assert of("F3", accuracy) == {(ACCURACY, f"sft + {ACCURACY}"): baselines | {"mah_dpo"}}
    parts = {f"sft + {ACCURACY}", "mah_dpo"}
    assert of("F4", accuracy) == {(ACCURACY, f"mah_dpo + {ACCURACY}"): parts}


def test_what_may_lose_a_little():
    """A baseline beaten although the ensemble is worse, or an accuracy that must gain."""
    slack = {(name, *counted): may for name, counted, *_, may in claims.comparisons(MATHS)}
    kept = {key for key, value in slack.items() if value == claims.KEPT}
    assert kept == {("F1", ACCURACY), ("F6+", ACCURACY), ("F6+", ENGAGEMENT)}
    assert set(slack.values()) == {0.0, claims.KEPT}


def swept(scores_a, scores_b):
    """Rows of a sweep from a to b, a little noise over four prompts; and one of a soup."""
    rows, steps = [made({"a": [9.0] * 4, "b": [9.0] * 4}, {"a": 0.5, "b": 0.5}, "soup")], 0
    for i, (x, y) in enumerate(zip(scores_a, scores_b)):
        steps = len(scores_a) - 1
        noise = [0.0, 0.001, 0.002, 0.003]
        each = {"a": [x + e for e in noise], "b": [y + e * e for e in noise]}
        rows.append(made(each, {"a": 1 - i / steps, "b": i / steps}))
    return rows


def verdicts(*sweep):
    return [line["verdict"] for line in sweep_lines("math", ("a", "b"), swept(*sweep))]


def test_sweep_lines():
    """A sweep called smooth although it turns back, or one in which the score falls with its own
    weight; another step named as the worst."""
    lines = sweep_lines("math", ("a", "b"), swept([0.9, 0.6, 0.4, 0.1], [0.1, 0.5, 0.3, 0.8]))
    assert [line["objective"] for line in lines] == ["a", "a", "a", "b", "b", "b"]
    largest = ["half the way - largest step, 0.0 to 0.3", "half the way - largest step, 0.7 to 1.0"]
    assert [line["compared"] for line in lines] == [
        "slope along its weight, against b", "worst step, 0.3 to 0.7, against b",
        f"{largest[0]}, against b", "slope along its weight, against a",
        "worst step, 0.3 to 0.7, against a", f"{largest[1]}, against a"]
    slope = (0.5 * 0.8 + 1 / 6 * 0.2) / (2 * (0.25 + 1 / 36))                  # least squares
    means = [float(line["difference"].split()[0]) for line in lines]
    assert means[:3] == pytest.approx([slope, 0.2, 0.8 / 2 - 0.3], abs=6e-4)
    assert means[4:] == pytest.approx([-0.2, 0.7 / 2 - 0.5], abs=6e-4)
    assert [line["verdict"] for line in lines] == ["holds"] * 4 + ["does not hold"] * 2


def test_a_jump_is_not_smooth():
    """A step function called smooth because it rises and never turns back."""
    straight = [0.9, 0.7, 0.5, 0.3, 0.1]
    assert verdicts(straight, straight[::-1]) == ["holds"] * 6
    jump = verdicts([0.9, 0.9, 0.1, 0.1, 0.1], straight[::-1])
    assert jump == ["holds", "holds", "does not hold"] + ["holds"] * 3


def test_sweeps_that_stand_still_or_turn_back():
    """A step that leads nowhere taken for one that leads back, or a fall for a rise."""
    assert verdicts([0.9, 0.5, 0.5], [0.1, 0.2, 0.9])[1] == "holds"
    backwards = verdicts([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert backwards[:2] == ["does not hold"] * 2 and backwards[3:5] == ["holds"] * 2


def test_the_worst_step_may_gain_on_the_mean():
    """The step of the smallest mean named, where another one's interval reaches further down."""
    rows = swept([0.9, 0.5, 0.499], [0.1, 0.2, 0.9])
    rows[1]["each"]["a"] = [0.1, 0.5, 1.3, 1.7]
    worst = sweep_lines("math", ("a", "b"), rows)[1]
    assert worst["compared"] == "worst step, 0.5 to 1.0, against b"
    assert worst["verdict"] == "not significant" and worst["difference"].startswith("0.39")


def test_a_finding_is_as_good_as_its_worst_part():
    """A finding that holds although one of its parts does not, or a part that was not run and is
    not said to be."""
    expected = {("holds", "holds"): "holds (2/2)",
                ("holds", "not significant"): "not significant (1/2)",
                ("holds", "not significant", "does not hold", "holds"): "does not hold (2/4)",
                ("holds", "not run"): "holds (1/1), part not run",
                ("not run",): "not run", (): "-"}
    for parts, whole in expected.items():
        assert findings.verdict_of_all(parts) == whole


def test_findings_of_a_run(whole, capsys):
    """A finished run that is not understood, a domain or a finding without its cell."""
    findings.main([whole])
    out = capsys.readouterr().out
    cells = {}
    for row in re.findall(r"^\|.*", out, re.M):
        parts = [part.strip() for part in row.strip("|").split("|")]
        cells.setdefault(parts[0], parts)
    assert cells[""][2:] == ["values", "tutoring"]
    assert set(findings.FINDINGS) < set(cells) and cells["F3"][2:] == ["-", "-"]
    assert cells["F6+"][2:] == ["not run", "not run"] and "not run" not in cells["F6"][2:]
    assert "| mah_dpo:honesty - modpo " in out and "worst step, " in out


def test_findings_of_other_figures_are_refused(whole, tmp_path):
    """Findings of a table that the run has not measured."""
    copied = shutil.copytree(whole, str(tmp_path / "copied"))
    path = os.path.join(copied, "scores.jsonl")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace("[0.", "[1.", 1))
    for argv in ([copied], [whole, copied]):
        with pytest.raises(InputError, match="scores.jsonl: not what the run has written"):
            findings.main(argv)


def test_findings_of_two_runs(whole, tmp_path, capsys):
    """F6+ between runs that cannot be compared, or from one run alone; rows of the wrong run."""
    other = str(tmp_path / "each")
    os.mkdir(other)
    for name in ("config.json", "results.json", "scores.jsonl"):
        shutil.copy(os.path.join(whole, name), other)
    with pytest.raises(InputError, match="--prm each"):
        findings.main([whole, other])
    path = os.path.join(other, "config.json")
    config = read_json(path) | {"prm": "each"}
    write_json(path, config)
    findings.main([whole, other])
    out = capsys.readouterr().out
    shown = next(row for row in out.splitlines() if "honesty, its own PRM" in row)
    assert "| holds " in shown and "| 0.000 ±0.000 " in shown       # the same figures
    write_json(path, config | {"n_test": 3})
    with pytest.raises(InputError, match="--n-test is 2 and 3"):
        findings.main([whole, other])
