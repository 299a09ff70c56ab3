"""experiments/front.py, noise.py, conflict.py, prm_quality.py, many.py and ensemble.py. Every
docstring states the bug that its test prevents."""
import importlib
import math
import os
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

import train
from data import InputError, Objective, read_json
from decode import generate
from experiments import conflict, ensemble, front, many, noise
from interop.options import Config
from mah_dpo import Pair

pytestmark = pytest.mark.usefixtures("small_worlds")


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
    root = ElementTree.parse(f"{out}/{name}.svg").getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) >= 2
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
