"""The programs behind docs/questions.md, tests named by program. Every docstring states the bug
that its test prevents."""
import importlib
import math
import os
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import train
from data import InputError, Objective, read_json
from decode import generate
from evaluate import Bench, Job
from experiments import (backbone, budget, conflict, ensemble, front, gradients, many, noise, rules,
                         strengths, vary)
from interop.options import Config
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


def test_strengths_a_distance_that_falls_is_held():
    """Prevents: a curve whose kl falls between two strengths, on which np.interp finds no place."""
    rows = []
    for kl, score in [(0.0, 0.0), (0.1, 1.0), (0.4, 2.0), (0.2, 3.0), (0.3, 4.0)]:
        rows.append({"metrics": {"kl": {"mean": kl}, "honesty": {"mean": score}}})
    ours = strengths.curve(rows, "honesty")
    # The other one stops at kl .35: there the first has 5/6 of the way from 1 to 2 behind it.
    theirs = np.array([[0.0, 0.35], [0.0, 0.5]])
    assert strengths.at_equal_kl(ours, theirs) == (0.35, pytest.approx(1 + 5 / 6 - 0.5))


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
    policies, differences, *more = tables_of(capsys.readouterr().out)
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
    if program is backbone:
        assert not more
        return
    # rules.py also guides MAH-DPO: what that adds is counted from the first table's score.
    guided, = more
    assert len(guided) == len(used) * 3
    alone = {line["rate"]: line for line in policies if line["policy"] == "mah_dpo"}
    for line in guided:
        score = alone[line["rate"]]["mean" if line["guide"] == "unified" else line["guide"]]
        gain = float(line["both"].split()[0]) - float(score.split()[0])
        assert float(line["more than unguided"].split()[0]) == pytest.approx(gain, abs=2e-3)


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


# -- noise, conflict, front, many, ensemble

def pairs(n, name="a", split="train"):
    """n pairs of one objective, told apart by their prompts."""
    return [Pair(name, [i], [100 + i], [200 + i], split, [-1.0, -2.0]) for i in range(n)]


class Named:
    """What an edit of pairs asks of a run."""

    def __init__(self, *names, seed=3):
        self.names, self.config = names, Config(seed=seed)


def test_a_share_of_the_training_pairs_is_flipped():
    """Prevents: another share than was asked for, or one of all objectives together; held-out pairs
    flipped; references that stay where the answers were; other pairs flipped at more noise."""
    given = [*pairs(10), *pairs(20, "b"), *pairs(5, "a", "dev")]
    run, before = Named("a", "b"), set()
    for share, count in ((0, (0, 0)), (.1, (1, 2)), (.3, (3, 6)), (.5, (5, 10))):
        found = noise.flip(share, given, run)
        flipped = {i for i, pair in enumerate(found) if pair != given[i]}
        of_a = [i for i in flipped if i < 10]
        assert (len(of_a), len(flipped) - len(of_a)) == count
        assert max(flipped, default=0) < 30 and before <= flipped
        before = flipped
        for i in flipped:
            assert (found[i].chosen, found[i].rejected) == (given[i].rejected, given[i].chosen)
            assert found[i].reference == [-2.0, -1.0] and found[i].prompt == given[i].prompt
    assert given[0].chosen == [100]
    assert noise.flip(.5, given, Named("a", "b", seed=4)) != found


def test_conflict_is_exact():
    """Prevents: a dial that says another share than there is, that changes the first objective's
    pairs, or the answers that are compared."""
    given = [*pairs(8), *pairs(4, "b"), *pairs(2, "a", "dev")]
    for share in conflict.DIALS:
        found = conflict.dial(share, given, Named("a", "b"))
        own, other = found[:8], found[8:]
        assert own == pairs(8) and {pair.objective for pair in other} == {"b"}
        opposed = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(own, other)]
        agreed = [a == replace(b, objective="a") for a, b in zip(own, other)]
        assert len(other) == 8 and sum(opposed) == 8 * share and sum(agreed) == 8 - 8 * share


def test_gaps_of_a_front():
    """Prevents: the largest gap for the smallest, distances along one axis, a division by 0 where
    all points are one."""
    # Gaps 5, 10, 5 of mean 20 / 3.
    assert front.evenness([(0, 0), (3, 4), (9, 12), (12, 16)]) == pytest.approx(5 / (20 / 3))
    assert front.evenness([(0, 0), (1, 1), (2, 2)]) == pytest.approx(1)
    assert front.evenness([(1, 1), (1, 1), (1, 1)]) == 0


def test_the_lowest_objective_and_what_worst_has_more():
    """Prevents: the lowest of all metrics (answers have lengths, too), the mean of the lowest for
    the lowest mean, and differences that are not paired."""
    row = {"guide": "unified", "each": {"a": [.2, .8], "b": [.6, .2], "tokens": [.0, .0]}}
    row = front.with_lowest(row, ["a", "b"])
    assert row["metrics"]["lowest mean"] == {"mean": pytest.approx(.4), "stderr": 0.0, "n": 1}
    assert row["metrics"]["mean of the lowest"]["mean"] == pytest.approx(.2)
    assert row["metrics"]["a"]["mean"] == pytest.approx(.5) and "tokens" not in row["metrics"]
    other = {"guide": "worst", "each": {"a": [.3, .9], "b": [.7, .3]}}
    other = front.with_lowest(other, ["a", "b"])
    found = front.difference(other, row)
    assert found["guide"] == "worst - unified"
    # Each prompt gains .1: the interval of the difference has no width.
    for metric in ("a", "b", "lowest mean", "mean of the lowest"):
        assert found["metrics"][metric]["mean"] == pytest.approx(.1)
        assert found["metrics"][metric]["stderr"] == pytest.approx(0)


def test_mean_of_scores_keeps_its_interval():
    """Prevents: a mean over another set of metrics, or one whose interval is not that of the mean:
    the scores of a prompt belong together."""
    rows = [{"each": {"a": [0, 1], "b": [1, 0], "kl": [9, 9]}, "metrics": {}}]
    noise.add_mean(rows, ["a", "b"])
    assert rows[0]["metrics"]["mean"] == {"mean": .5, "stderr": 0.0, "n": 2}
    assert rows[0]["each"]["mean"] == [.5, .5]


def test_objectives_and_their_copies_share_no_pair():
    """Prevents: a copy that learns from the same pairs, so that more objectives are not more data
    of other kinds; an objective whose own pairs depend on how many others there are."""
    whole = train.Run.__new__(train.Run)
    whole.objectives = [Objective(name, "values", "C", "sentence") for name in ("a", "b", "c")]
    whole.path, whole.config = "", Config(device="cpu")
    few = many.with_copies(whole, ["b", "c"], 4)
    assert few.names == ["b", "c", "a", "b_2", "c_2", "a_2"]
    given = [*pairs(5), *pairs(6, "b"), *pairs(6, "c"), *pairs(4, "b", "dev")]
    alone = many.deal(2, given, Named("b"))
    found = many.deal(2, given, Named("b", "c", "a", "b_2"))
    assert [pair for pair in found if pair.objective == "b"] == alone
    counts = {}
    for pair in found:
        counts.setdefault((pair.objective, pair.split), []).append(pair.prompt[0])
    assert counts == {("a", "train"): [0, 2, 4], ("b", "train"): [0, 2, 4],
                      ("c", "train"): [0, 2, 4], ("b_2", "train"): [1, 3, 5],
                      ("b", "dev"): [0, 2], ("b_2", "dev"): [1, 3]}


def test_distances_of_distributions():
    """Prevents: twice the total variation, a KL divergence in the other direction."""
    own = torch.tensor([[.5, .5], [.9, .1]]).log()
    other = torch.tensor([[.25, .75], [.9, .1]]).log()
    tv, kl = ensemble.distances(own, other)
    assert tv.tolist() == pytest.approx([.25, 0])
    assert kl.tolist() == pytest.approx([.5 * math.log(2) + .5 * math.log(2 / 3), 0], abs=1e-6)


def test_probabilities_mixed(whole):
    """Prevents: mixed logits by another name, a mix at another temperature, weights that do not
    reach it, heads of other domains in it; another distribution compared than is sampled from."""
    bench = ensemble.Mixed(whole)
    model, T = bench.model("mah_dpo"), bench.config["temperature"]
    generator = torch.Generator().manual_seed(0)
    # Heads of a tiny run hardly part by themselves.
    with torch.no_grad():
        for head in model.heads:
            head.weight.add_(torch.randn(head.weight.shape, generator=generator))
    job = next(job for job in bench.jobs("values") if job.policy == "mah_dpo")
    job = job._replace(weights={"helpfulness": .75, "honesty": .25, "tutor_engagement": 0})
    prompt, answer = [428, 51, 283], [286, 257]
    with torch.inference_mode():
        h = model(torch.tensor([prompt + answer]))[0, 2:4]
        one, two = [(h @ model.heads[i].weight.T / T).softmax(-1) for i in (0, 1)]
    found = ensemble.log_probs(bench, job, prompt, answer)
    assert torch.allclose(found.exp(), .75 * one + .25 * two, atol=1e-5)
    # Sampled is what was compared: often the likeliest token, and greedily always.
    mixed, weights = bench.policy(job)
    said, = generate(mixed, [prompt], weights=weights, max_new_tokens=1, temperature=0)
    assert said == [int(found[0].argmax())]
    many_said = generate(mixed, [prompt], weights=weights, max_new_tokens=1, samples=2000,
                         temperature=T, top_k=0, generator=generator)
    counts = torch.tensor(many_said).flatten().bincount(minlength=len(found[0])) / 2000
    top = found[0].exp().topk(3)
    assert torch.allclose(counts[top.indices], top.values, atol=.04)


# -- all of them, as a user runs them

NAMES = ["front", "noise", "conflict", "many", "ensemble", "prm_quality"]


def table_of(name, run, out, capsys):
    """Run a program for a trial -> the lines of its tables as lists of texts, all that it said."""
    program = importlib.import_module(f"experiments.{name}")
    program.main([run, "--domain", "values", "--fast", "--out", out])
    said = capsys.readouterr().out
    lines = re.findall(r"^\| (.*) \|$", said, re.M)
    return [re.split(r" +\| ", line) for line in lines], said


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A directory for what all programs train."""
    return str(tmp_path_factory.mktemp("questions"))


@pytest.mark.parametrize("name", NAMES)
def test_every_program_prints_a_table_and_draws(name, whole, where, capsys):
    """Prevents: a program that fails on a finished run, a table without its rows, a picture that is
    no XML or shows nothing, and what such a program is for: one head cannot want both of two
    opposites, two heads can; a head more for every objective; a PRM of the steps asked for."""
    out = f"{where}/{name}"
    lines, said = table_of(name, whole, out, capsys)
    assert len(lines) >= 4 and "nan" not in said
    assert curves_of(f"{out}/{name}.svg") >= 2
    titles, _, *rows = lines
    found = [dict(zip(titles, row)) for row in rows]
    if name == "conflict":
        for row in found:
            dial, a, b = [float(row[title].split()[0]) for title in (
                "in conflict", "helpfulness fitted", "honesty fitted")]
            if not row["policy"].startswith("mah_dpo"):
                assert a == b if dial == 0 else a + b == pytest.approx(1, abs=.002)
            if row["first cosine"] != "-":
                assert (float(row["first cosine"]) > 0) == (dial == 0)
    if name == "many":
        heads = {int(row["objectives"]): float(row["M in heads"]) for row in found}
        assert list(heads) == [1, 2, 4]
        assert heads[4] == pytest.approx(4 * heads[1], abs=.003)
    if name == "prm_quality":
        assert [row["policy"] for row in found] == ["1 steps"] * 2 + ["2 steps"] * 2
        assert read_json(f"{out}/seed=0/prm_steps=1/config.json")["prm_steps"] == 1
        assert not os.path.exists(f"{out}/seed=0/prm_steps=2")


@pytest.mark.parametrize("name", ["noise", "prm_quality"])
def test_nothing_is_trained_again(name, whole, where, capsys):
    """Prevents: hours spent twice, or other figures at the second time."""
    out = f"{where}/{name}"
    first, _ = table_of(name, whole, out, capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", lambda *args, **options: pytest.fail("trained again"))
        again, said = table_of(name, whole, out, capsys)
    assert again == first and f"{out}/seed" not in said


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_named(name, whole, tmp_path):
    """Prevents: a traceback for a domain of one objective, or for a directory that is no run."""
    program = importlib.import_module(f"experiments.{name}")
    with pytest.raises(InputError, match="fewer than two objectives of the domain 'tutoring'"):
        program.main([whole, "--domain", "tutoring"])
    with pytest.raises(InputError, match="config.json"):
        program.main([str(tmp_path)])
    assert not os.listdir(tmp_path)
