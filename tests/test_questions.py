"""The programs behind docs/questions.md, tests named by program. Every docstring states the bug that
its test prevents."""
import os
import re
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import train
from data import InputError, read_json
from evaluate import Bench, Job
from experiments import backbone, budget, gradients, rules, strengths, vary
from interop.resume import log_rows, read_rows
from mah_dpo import Pair

pytestmark = pytest.mark.usefixtures("small_worlds")


def curves_of(path):
    """How many curves a picture has."""
    return len(ElementTree.parse(path).findall(".//{http://www.w3.org/2000/svg}polyline"))


def tables_of(text):
    """Markdown tables as lists of {column: text}."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        grid = []
        for line in block.splitlines():
            grid.append([cell.strip() for cell in line.strip("|").split("|")])
        tables.append([dict(zip(grid[0], texts)) for texts in grid[2:]])
    return tables


def arguments(whole, out):
    """What the programs read from their command line."""
    return vary.read_arguments("", [whole, "--out", str(out)])


# -- vary

def test_vary_a_variant_goes_on_and_is_not_mixed_up(whole, tmp_path, monkeypatch):
    """Prevents: a second command that trains or measures again; half a policy taken for a whole
    one; figures of --fast, or of other options, that are taken for those of the variant; pairs of
    other domains among those that it learns from."""
    args = arguments(whole, tmp_path)
    origin, = args.trainings
    again = partial(vary.retrain, args, origin, "short", ["dpo_honesty"])
    # Half a policy, as a kill leaves it.
    bench = again(dpo_steps=1)
    os.remove(f"{bench.run}/dpo_honesty/config.json")
    bench = again(dpo_steps=1)
    assert os.path.exists(f"{bench.run}/dpo_honesty/config.json")
    assert {p.objective for p in read_rows(f"{bench.run}/pairs.jsonl", Pair)} == {
        "helpfulness", "honesty"}
    rows = vary.measured([bench], ["sft", "sft + honesty"], "values")
    monkeypatch.setattr(train, "train_policy", lambda *args: pytest.fail("trained again"))
    bench = again(dpo_steps=1)
    monkeypatch.setattr(bench, "measure", lambda job: pytest.fail("measured again"))
    assert vary.measured([bench], ["sft", "sft + honesty"], "values") == rows
    with pytest.raises(InputError, match="short: made under other options; give another --out"):
        again(dpo_steps=2)


def test_vary_edited_pairs_and_options(whole, tmp_path):
    """Prevents: a policy that learns from the run's pairs instead of the edited ones."""
    args = arguments(whole, tmp_path)

    def first_two(pairs, run):
        assert run.config.beta == 0.5
        return pairs[:2]
    bench = vary.retrain(args, args.trainings[0], "few", [], first_two, beta=0.5)
    assert len(read_rows(f"{bench.run}/pairs.jsonl", Pair)) == 2
    assert read_json(f"{bench.run}/config.json")["beta"] == 0.5


def test_vary_fast_has_a_directory_of_its_own(whole, tmp_path):
    """Prevents: an experiment that goes on from the few steps of a trial."""
    small = vary.read_arguments("", [whole, "--fast"])
    assert small.out == f"{vary.read_arguments('', [whole]).out}-fast"
    assert small.trainings[0].config.dpo_steps == vary.FAST["dpo_steps"]
    more = vary.read_arguments("", [whole, "--n-test", "7"]).trainings[0].config
    assert (more.n_test, more.dpo_steps) == (7, train.open_run(whole).config.dpo_steps)
    assert vary.read_arguments("", [whole], rates=("1,2", "a line")).rates == "1,2"


@pytest.mark.parametrize("argv, message", [
    (["--domain", "tutoring"], "fewer than two objectives of the domain 'tutoring'"),
    (["--domain", "nowhere"], "'nowhere'; its domains: values, tutoring"),
    (["--n-test", "0"], "--n-test 0 is out of range")])
def test_vary_names_mistakes(whole, tmp_path, argv, message):
    """Prevents: a traceback, or a comparison of one objective with itself."""
    with pytest.raises(InputError, match=message):
        gradients.main([whole, "--out", str(tmp_path), *argv])


def test_vary_needs_a_run_with_pairs(whole, tmp_path):
    """Prevents: variants without an SFT policy, which would stay broken when the run has one."""
    os.makedirs(tmp_path / "run")
    origin = train.open_run(whole)
    unfinished = train.Run(str(tmp_path / "run"), origin.config, origin.objectives)
    train.save_config(unfinished, unfinished.path)
    with pytest.raises(InputError, match="no pairs.jsonl to train on; finish the run with"):
        vary.read_arguments("", [unfinished.path])


def test_vary_plots_by_hand():
    """Prevents: axes turned round, curves that a missing colour leaves out, a division by 0 where
    all values are equal."""
    drawn = "".join(vary.plot("up", "right", {"a": [(1, 2), (3, 6)], "b": [(2, 4)]}, 40))
    assert "up: 2 to 6" in drawn and "right: 1 to 3" in drawn
    assert 'points="0,360 360,0"' in drawn and 'points="180,180"' in drawn
    many = {f"curve {i}": [(0, 1), (1, 1)] for i in range(9)}
    assert len(re.findall("<polyline", "".join(vary.plot("", "", many, 0)))) == 9


# -- gradients

def test_gradients_main(whole, tmp_path, capsys, monkeypatch):
    """Prevents: a look at the wrong step; differences turned round; a method without a curve."""
    monkeypatch.setattr(gradients, "SHARES", (0, 1))
    gradients.main([whole, "--out", str(tmp_path)])
    values, changes = tables_of(capsys.readouterr().out)
    assert [line["method"] for line in values] == list(gradients.METHODS)
    for line, change in zip(values, changes):
        start, end, single = [float(text) for text in
                              (line["step 0"], line["step 2"], values[-1]["step 2"])]
        assert float(change["after - before"]) == pytest.approx(end - start, abs=1.1e-3)
        assert float(change["after - single head's"]) == pytest.approx(end - single, abs=1.1e-3)
    assert curves_of(tmp_path / "gradients.svg") == len(gradients.METHODS)


def test_gradients_short_training_is_the_beginning(whole, tmp_path):
    """Prevents: curves of trainings that have nothing to do with each other."""
    args = arguments(whole, tmp_path)
    logs = []
    for steps in (3, 4):
        bench = vary.retrain(args, args.trainings[0], f"{steps}", ["mah_dpo"], dpo_steps=steps,
                             conflict_every=1)
        rows = [row for row in log_rows(f"{bench.run}/log.jsonl") if "gradient_norm" in row]
        logs.append(rows)
    assert logs[0] == logs[1][:3] and len(logs[1]) == 4


def test_gradients_cosines_are_those_of_the_log(whole, tmp_path, monkeypatch):
    """Prevents: cosines of the heads' gradients, or of other pairs than the objectives' own."""
    args = arguments(whole, tmp_path)
    monkeypatch.setattr(gradients, "PAIRS", 10 ** 6)
    origin, = args.trainings
    pairs = read_rows(origin.file("pairs.jsonl"), Pair)
    sizes = {len(train.choose(pairs, [name], "train")) for name in args.names}
    # In a step that takes all pairs of both the log has the same angle: as many of each will do.
    n = min(sizes)

    def alike(pairs, run):
        return [p for name in run.names for p in train.choose(pairs, [name], "train")[:n]]
    bench = vary.retrain(args, origin, "all", ["single_head_dpo"], alike, dpo_pairs=n,
                         dpo_steps=1)
    found = gradients.cosines(train.open_run(bench.run), "sft")
    row = next(row for row in log_rows(f"{bench.run}/log.jsonl") if "honesty" in row)
    assert list(found) == [("helpfulness", "honesty")]
    assert found["helpfulness", "honesty"] == pytest.approx(
        row["helpfulness"]["cosine honesty"], abs=1e-4)


# -- strengths, backbone, rules

def test_strengths_at_equal_kl_by_hand():
    """Prevents: scores compared where one policy has moved further; the sign of the difference."""
    ours = np.array([[0.0, 1.0, 4.0], [0.5, 0.6, 0.9]])
    theirs = np.array([[0.0, 0.5, 2.0], [0.5, 0.7, 0.8]])
    # At kl 2 the first has a third of the way from .6 to .9 behind it.
    assert strengths.at_equal_kl(ours, theirs) == (2.0, pytest.approx(0.7 - 0.8))
    assert strengths.at_equal_kl(theirs, ours) == (2.0, pytest.approx(0.8 - 0.7))
    columns = strengths.contest([ours, theirs], [theirs, theirs])
    assert columns["at equal kl"].split()[0] == "-0.050"
    assert columns["at full strength"].split()[0] == "0.050"
    assert columns["kl"].split()[0] == "2.000"


def test_strengths_policies_are_drawn_back(whole):
    """Prevents: a strength that counts from the policy instead of from SFT; a head that is mixed
    with another head; a soup that is not drawn back."""
    bench = Bench(whole)
    bench.model = partial(strengths.drawn_back, bench)
    full, sft = bench.load("mah_dpo").state_dict(), bench.sft.state_dict()
    model, _ = bench.policy(Job("values", "mah_dpo", "mah_dpo@0.25", bench.mix({"honesty": 1})))
    for name, tensor in model.state_dict().items():
        start = sft["heads.0.weight" if name.startswith("heads.") else name]
        torch.testing.assert_close(tensor, start + 0.25 * (full[name] - start))
    uniform = {"helpfulness": 0.5, "honesty": 0.5}
    job = strengths.at_strength(Job("values", "soup", "soup", uniform), 0.5)
    state = bench.policy(job)[0].state_dict()
    parts = [bench.load(f"dpo_{name}").state_dict() for name in uniform]
    for name, tensor in state.items():
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(tensor, (sft[name] + mean) / 2)
    # At full strength a policy is itself, bit for bit.
    exact = strengths.drawn_back(bench, "mah_dpo@1.0").state_dict()
    assert all(torch.equal(exact[name], full[name]) for name in full)


@pytest.mark.parametrize("program, rates", [(backbone, (0.0, 1e-3)), (rules, (0.0,))])
def test_backbone_and_rules_main(program, rates, whole, tmp_path, capsys, monkeypatch):
    """Prevents: a rate or rule that no policy is trained with; a soup for every rule; a mean that
    is not that of the scores; a comparison or curve that is missing."""
    monkeypatch.setattr(program, "RATES", rates)
    monkeypatch.setattr(strengths, "STRENGTHS", (1.0,))
    monkeypatch.setattr(rules, "RULES", ["sum", "mgda"])
    program.main([whole, "--out", str(tmp_path)])
    used = ["sum"] if program is backbone else rules.RULES
    policies, differences = tables_of(capsys.readouterr().out)
    assert len(policies) == len(rates) * (3 + 3 * len(used))
    assert len(differences) == len(rates) * 3 * len(used)
    for line in policies:
        scores = [float(line[name].split()[0]) for name in ("helpfulness", "honesty")]
        assert float(line["mean"].split()[0]) == pytest.approx(sum(scores) / 2, abs=1e-3)
    for rate in rates:
        for rule in used:
            config = read_json(f"{tmp_path}/seed=0/rate={rate:g},{rule}/config.json")
            assert (config["dpo_lr_backbone"], config["combine"]) == (rate, rule)
    name = program.__name__.split(".")[-1]
    assert curves_of(tmp_path / f"{name}.svg") == len(rates) * (1 + len(used))


# -- budget

def test_budget_main(whole, tmp_path, capsys, monkeypatch):
    """Prevents: steps or pairs that a method's training takes and the table leaves out; an area of
    other points; a weight of scalarisation that the training does not have."""
    monkeypatch.setattr(budget, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(budget, "GRIDS", ([1.0], [0.0, 0.75, 1.0]))
    monkeypatch.setattr(budget, "MIXES", 2)
    budget.main([whole, "--out", str(tmp_path), "--domain", "values"])
    lines, = tables_of(capsys.readouterr().out)
    # Whole trainings of 2 steps; a step has 2 pairs of each objective.
    found = {}
    for line in lines:
        costs = [int(line[name]) for name in ("trainings", "steps", "pairs", "points")]
        found.setdefault(line["method"], []).append(costs)
    assert found == {"mah_dpo, sum": [[1, 1, 4, 3], [1, 2, 8, 3]],
                     "mah_dpo, raco": [[1, 1, 4, 3], [1, 2, 8, 3]],
                     "soup": [[2, 2, 4, 3], [2, 4, 8, 3]],
                     "scalarised": [[1, 2, 8, 1], [3, 6, 24, 3]],
                     "modpo": [[3, 6, 16, 3]]}
    config = read_json(f"{tmp_path}/seed=0/w=0.75/config.json")
    assert config["alpha"] == "helpfulness=0.25,honesty=0.75"
    assert curves_of(tmp_path / "budget.svg") == len(found)


def test_budget_needs_two_objectives(monkeypatch):
    """Prevents: a front of two objectives of three."""
    args = SimpleNamespace(names=["a", "b", "c"], domain="values")
    monkeypatch.setattr(budget, "read_arguments", lambda doc, argv, **more: args)
    with pytest.raises(InputError, match="--domain values: a front has two objectives, not 3"):
        budget.main([])
