"""evaluate.py: conversations, means and intervals, rows, tables, the picture, the files of a run.
Every docstring states the bug that its test prevents. (`hypervolume` is exercise 15.)"""
import copy
import math
import os
import shutil
import types
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from pytest import approx

import decode
import evaluate
from conftest import NAMES
from data import (DOMAINS, OBJECTIVES, PROMPTS, RNG, InputError, Problem, read_json, read_jsonl,
                  write_json)
from decode import generate
from evaluate import (Conversation, Job, Together, Turn, converse, guided_responder, kl_to_sft,
                      plain_responder)
from mah_dpo import Pair
from model import GPTConfig
from prm import PRM

SVG = "{http://www.w3.org/2000/svg}"
SUM = Problem("4 + 5 - 2 = ?")


def ids_of(tokenizer, text, end=True):
    return tokenizer.encode(text) + ([tokenizer.eos_id] if end else [])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prm_of(gpt, tokenizer, *names):
    """A PRM with random weights on the tiny model."""
    prm = PRM(gpt.with_heads(()), [OBJECTIVES[name] for name in names], seeded())
    prm.backbone.tokenizer = tokenizer
    return prm


class OneSum(type(DOMAINS["math"])):
    """A world with a single problem."""
    def problems(self, split, n, rng):
        return [SUM]


# -- conversations

def test_seeds_depend_on_seed_and_purpose():
    """Stages that share a stream, so that one more draw in one changes all later ones."""
    assert evaluate.seed_of(0, "sft") == evaluate.seed_of(0, "sft")
    purposes = [("sft",), ("base",), ("test", "math"), ("test", "values")]
    seeds = {evaluate.seed_of(s, *what) for s in (0, 1) for what in purposes}
    assert len(seeds) == 8


def tutoring_problem():
    return DOMAINS["tutoring"].problem(RNG(4))


def test_conversation_ids_are_the_chat_of_its_messages(tokenizer):
    """Ids that drift from what training saw: a missing end of turn (also behind an answer that was
    cut off), a marker twice, the reply left out."""
    world = DOMAINS["tutoring"]
    c = Conversation(tutoring_problem(), tokenizer)
    assert c.ids == c.new_ids == tokenizer.encode_chat(c.messages)
    for text, end in (("yes . good try !", True), ("not quite .", False), ("ok .", True)):
        before, response = c.ids, ids_of(tokenizer, text, end)
        c.answer(response, world, tokenizer, RNG(0))
        assert c.turns[-1].before == before
        assert c.turns[-1].response == response
        if c.messages[-1]["role"] == "user":
            assert c.ids == tokenizer.encode_chat(c.messages)
            assert c.ids == before + response + c.new_ids
    assert [m["role"] for m in c.messages] == ["user", "assistant"] * 3
    assert [len(turn.messages) for turn in c.turns] == [1, 3, 5]


def test_conversation_scores_average_over_turns(tokenizer):
    """Later turns judged without what was said before, or only the last turn counted."""
    world, c = DOMAINS["tutoring"], Conversation(tutoring_problem(), tokenizer)
    for text in ("what comes next ?", "what comes next ?", "good try ! can you say why ?"):
        c.answer(ids_of(tokenizer, text), world, tokenizer, RNG(0))
    scores = c.scores(world, tokenizer)
    assert scores["tutor_engagement"] == approx((0.6 + 0.0 + 1.0) / 3)    # asked before: 0


def test_majority_vote_and_tokens_drawn(gpt, tokenizer, monkeypatch):
    """A vote over other prompts' samples, a minority's answer, rivals of guidance whose cost is not
    counted."""
    texts = ["answer 3", "4 + 5 = 9\nanswer 7", "answer 7", "answer 1", "answer 2", "answer 1"]
    answers = [ids_of(tokenizer, text) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda *args, **options: answers)
    talks = [types.SimpleNamespace(ids=[i], drawn=0) for i in range(2)]
    respond = plain_responder(gpt, OneSum(), 0, 0.7, None, samples=3)
    assert respond(talks) == [answers[1], answers[3]]
    lengths = [len(ids) for ids in answers]
    assert talks[0].drawn == sum(lengths[:3])
    assert talks[1].drawn == sum(lengths[3:])


def test_guidance_by_steps_and_by_whole_answers(gpt, tokenizer, monkeypatch):
    """A rival of guidance by steps that is guidance by steps, or that the PRM does not choose;
    guidance that looks as cheap as one answer."""
    prm, found, plain = prm_of(gpt, tokenizer, "math_accuracy"), [], evaluate.guided_decode

    def watch(*args, **options):
        found.extend(plain(*args, **options))
        return found[-1:]
    monkeypatch.setattr(evaluate, "guided_decode", watch)
    always = torch.ones(4, tokenizer.n_vocab + 1, dtype=torch.bool)
    masks = {"newline": always, "turn": tokenizer.boundary_masks("turn")}
    monkeypatch.setattr(tokenizer, "boundary_masks", masks.get)      # every token ends a line
    world = types.SimpleNamespace(boundary="newline", max_new_tokens=20, turns=1)
    for boundary in (None, "turn"):
        respond = guided_responder(gpt, prm, world, boundary, guide="math_accuracy", K=3,
                                   temperature=0.7, generator=seeded())
        c = Conversation(SUM, tokenizer)
        respond([c])
        drawn = [len(ids) for step in found[-1].steps for ids in step.candidates]
        assert c.drawn == sum(drawn) and len(drawn) == 3 * len(found[-1].steps)
    by_step, whole = found
    step, = whole.steps
    best = max(range(3), key=step.scores.__getitem__)
    assert len(by_step.steps) == 20
    assert whole.ids == step.candidates[best]


def test_guided_conversations_equal_re_encoding(gpt, tokenizer):
    """A carried state that differs from the conversation it stands for: three turns, ragged, some
    cut off."""
    model = copy.deepcopy(gpt).double()
    with torch.no_grad():
        for head in model.heads:
            head.weight[tokenizer.eos_id] *= 2                  # so that some answers do end
    prm = prm_of(gpt, tokenizer, "tutor_accuracy", "tutor_engagement").double()
    world = DOMAINS["tutoring"]
    problems = world.problems("test", 5, RNG(1))
    options = dict(weights=[0.5, 0.5], guide="unified", K=3, temperature=0.9)
    respond = guided_responder(model, prm, world, generator=seeded(2), **options)
    carried = converse(world, problems, tokenizer, respond, 7)
    generator = seeded(2)

    def again(conversations):
        results = decode.guided_decode(
            model, prm, [c.ids for c in conversations], boundary="turn",
            max_new_tokens=world.max_new_tokens, generator=generator, **options)
        return [result.ids for result in results]
    fresh = converse(world, problems, tokenizer, again, 7)
    assert [c.turns for c in carried] == [c.turns for c in fresh]
    ended = {turn.response[-1] == tokenizer.eos_id for c in carried for turn in c.turns}
    assert ended == {True, False}


def test_guided_conversations_in_batches(gpt, tokenizer):
    """A batch of conversations that goes on from another batch's state."""
    prm, world = prm_of(gpt, tokenizer, "tutor_accuracy"), DOMAINS["tutoring"]
    problems = world.problems("test", 5, RNG(1))
    played = []
    for size in (2, 256):
        respond = guided_responder(gpt, prm, world, batch=size, weights=[0.5, 0.5], temperature=0)
        talks = converse(world, problems, tokenizer, respond, 7)
        played.append([c.turns for c in talks])
    assert played[0] == played[1]


def test_longest_conversations_leave_room(tokenizer):
    """A run that dies in its last table because a talkative policy fills the context before the
    last turn."""
    limit, rng = GPTConfig(vocab_size=tokenizer.n_vocab).max_len, RNG(0)
    word = tokenizer.encode("ok")[0]
    for world in DOMAINS.values():
        for problem in world.problems("train", 200, rng):
            c = Conversation(problem, tokenizer)
            for _ in range(world.turns):
                assert len(c.ids) + 1 <= limit
                longest = min(world.max_new_tokens, limit - len(c.ids))
                c.answer([word] * longest, world, tokenizer, rng)


# -- means, intervals, distance

def test_summary_hand_values():
    """A population's standard deviation, or one not divided by sqrt(n)."""
    stderr = approx(math.sqrt(7 / 3))
    assert evaluate.summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "stderr": stderr, "n": 3}
    assert evaluate.summary([4.0]) == {"mean": 4.0, "stderr": 0.0, "n": 1}


def test_intervals_are_student_t():
    """A normal quantile, or the wrong degrees of freedom, which make five trainings look twice as
    sure as they are."""
    published = {1: 12.7062, 2: 4.3027, 4: 2.7764, 10: 2.2281, 11: 2.2010, 15: 2.1314, 30: 2.0423,
                 199: 1.9720, 1000: 1.9623}
    for df, t in published.items():
        assert evaluate.student_t(df) == approx(t, rel=1e-4)
    five = evaluate.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert evaluate.half_width(five) == approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert evaluate.half_width(evaluate.summary([1.0])) == math.inf
    assert evaluate.cell(five) == "3.000 ±1.963"
    assert evaluate.cell(evaluate.summary([1.0])) == "1.000"


def talk(*turns):
    return types.SimpleNamespace(turns=[Turn(None, before, [], response)
                                        for before, response in turns])


def token_kls(gpt, head, before, response, temperature):
    """The KL at every token of a response, each from a forward of its own."""
    found = []
    for t in range(len(response)):
        h = gpt(torch.tensor([before + response[:t]]))[0, -1]
        log_pi = F.log_softmax(head @ h / temperature, 0)
        log_ref = F.log_softmax(gpt.heads[0].weight @ h / temperature, 0)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum()
        found.append(float(kl))
    return found


@torch.no_grad()
def test_kl_to_sft(gpt, monkeypatch):
    """A KL over prompt or padding, of the wrong direction, or estimated from the samples: exact,
    per token and per answer, turns averaged before conversations; another one where the logits do
    not fit at once; samples of temperature .7 measured as if they had been drawn at 1."""
    talks = [talk(([400, 5, 6], [7, 8, 9, 10]),
                  ([400, 5, 6, 7], [8])),
             talk(([400, 50], [60]),
                  ([9], [8, 7]))]
    none = kl_to_sft(gpt, gpt.heads[0].weight, gpt, talks, 0.7)
    assert list(none.values()) == [[approx(0.0, abs=1e-6)] * 2] * 3
    other, per_token, per_answer = gpt.heads[1].weight, {}, {}
    for T in (0.7, 1.0):
        for c in talks:
            first, second = [token_kls(gpt, other, turn.before, turn.response, T)
                             for turn in c.turns]
            mean = (sum(first) / len(first) + sum(second) / len(second)) / 2
            per_token.setdefault(T, []).append(mean)
            per_answer.setdefault(T, []).append((sum(first) + sum(second)) / 2)
    found = kl_to_sft(gpt, other, gpt, talks, 0.7)
    assert found == {"kl": approx(per_token[0.7], rel=1e-4),
                     "kl/answer": approx(per_answer[0.7], rel=1e-4),
                     evaluate.KL_AT_1: approx(per_token[1.0], rel=1e-4)}
    assert min(found["kl"]) > 0.01 and found["kl"] != approx(found[evaluate.KL_AT_1], rel=0.01)
    monkeypatch.setattr(evaluate, "LOGITS", 3 * len(other))
    again = kl_to_sft(gpt, other, gpt, talks, 0.7)
    assert again == {metric: approx(f) for metric, f in found.items()}


def test_pair_metrics_rows_by_hand():
    """Pairs of all objectives in each one's row, a margin without beta, an accuracy that counts
    ties, or compares with the reference where it should not."""
    names = ("honesty", "helpfulness", "honesty", "honesty")
    pairs = [Pair(name, [0], [1], [2], "dev") for name in names]
    chosen, rejected = [-3.0, -1.0, -4.0, -2.0], [-5.0, -2.0, -2.0, -6.0]
    logps = torch.tensor([chosen, rejected]).T
    chosen, rejected = [-4.0, -1.0, -6.0, -2.0], [-7.5, -2.0, -3.0, -6.0]
    reference = torch.tensor([chosen, rejected]).T              # Delta = -1.5, 0, 1, 0
    honesty, helpfulness = evaluate.pair_metrics_rows("p", logps, reference, pairs, 0.1, 7)
    for row, name in ((honesty, "honesty"), (helpfulness, "helpfulness")):
        assert row["domain"] == f"pairs:{name}" and row["weights"] == {name: 1.0}
        assert (row["policy"], row["seed"]) == ("p", 7)
    loss = sum(math.log1p(math.exp(-x)) for x in (-0.15, 0.1, 0.0)) / 3
    expected = {"loss": loss, "margin": -0.05 / 3, "logp_accuracy": 2 / 3,
                "reward_accuracy": 1 / 3}
    assert means(honesty) == approx(expected, abs=1e-6)
    expected = {"loss": math.log(2), "margin": 0, "logp_accuracy": 1}
    assert means(helpfulness) == approx(expected, abs=1e-6)


def means(row):
    return {name: metric["mean"] for name, metric in row["metrics"].items()}


# -- fronts, tables, picture

def cells_of(line):
    """A line of a Markdown table -> its texts."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def made(policy, each, guide=None, weights=None, sweep=None, seed=0):
    """A row as evaluate.load_rows gives them."""
    row = {"policy": policy, "guide": guide, "domain": "math", "weights": weights or {}, "n": 9,
           "seed": seed, "each": each,
           "metrics": {name: evaluate.summary(values) for name, values in each.items()}}
    return row | ({"sweep": list(sweep)} if sweep else {})


def swept(scores_a, scores_b, policy="mah_dpo"):
    """Rows of a sweep from a to b."""
    rows, steps = [], len(scores_a) - 1
    for i, (x, y) in enumerate(zip(scores_a, scores_b)):
        weights = {"a": 1 - i / steps, "b": i / steps}
        rows.append(made(policy, {"a": [x, x], "b": [y, y]}, weights=weights, sweep=("a", "b")))
    return rows


def test_areas_by_method():
    """A method's area made of another's points, or of guided points where it has none."""
    plain = [made("sft", {"a": [0.2, 0.4], "b": [0.5, 0.5]}),
             made("sft", {"a": [0.1, 0.1], "b": [0.9, 0.7]}, guide="b"),
             made("modpo", {"a": [0.5, 0.5], "b": [0.5, 0.5]}),
             made("single_head_dpo", {"a": [0.1, 0.1], "b": [0.5, 0.5]}),
             made("mah_dpo", {"a": [0.7, 0.7], "b": [0.1, 0.1]})]
    mixes = swept([0.9, 0.1], [0.1, 0.9]) + swept([0.8, 0.2], [0.2, 0.8], "soup")
    lines = evaluate.area_lines(plain, mixes, ("a", "b"))
    found = {line["method"]: (line["points"], line["hypervolume"]) for line in lines}
    assert found == {
        "sft": ("1", "0.150"), "single_head_dpo": ("1", "0.050"), "modpo": ("1", "0.250"),
        "mah_dpo, swept": ("2", "0.170"), "soup, swept": ("2", "0.280"),
        "sft, guided": ("2", "0.180"), "mah_dpo, guided": ("1", "0.070")}


def test_areas_have_intervals_over_trainings():
    """An area's interval made of prompts, or an area of the mean of trainings where the mean of
    their areas is meant."""
    rows = [made("modpo", {"a": [0.5, 0.25], "b": [0.5, 1.0]}, seed=[3, 4])]
    assert evaluate.front_area(rows, ("a", "b")) == {"mean": 0.25, "stderr": 0.0, "n": 2}
    rows[0]["seed"] = 3
    assert evaluate.front_area(rows, ("a", "b")) == {"mean": 0.375 * 0.75, "stderr": 0.0, "n": 1}


def test_tables_are_aligned_markdown():
    """A cell under another column's title."""
    row = made("sft", {"b": [1.0, 2.0, 3.0]}, guide="x")
    other = made("base", {"a": [1.0]})
    lines = [evaluate.cells(r, ["a", "b"]) for r in (other, row)]
    title, _, *drawn = evaluate.table("t", lines).splitlines()
    assert title == "### t"
    assert len(set(map(len, drawn))) == 1
    head, _, first, second = map(cells_of, drawn)
    assert head == ["policy", "guide", "a", "b"]
    assert first == ["base", "-", "1.000", "-"]
    assert second == ["sft", "x", "-", "2.000 ±2.484"]


def test_picture():
    """A point outside the plot, upside down, without a name or in another method's colour; an SVG
    that no browser opens."""
    rows = [made("sft_greedy", {"a": [0.0], "b": [1.0]}),
            made("mah_dpo:a", {"a": [1.0], "b": [0.25]}, guide="b"),
            *swept([0.9, 0.5, 0.1], [0.1, 0.5, 0.9]),
            *swept([0.8, 0.5, 0.2], [0.2, 0.5, 0.8], "soup")]
    root = ElementTree.fromstring(evaluate.pareto_svg(rows))
    assert root.get("viewBox") == "0 0 880 490"
    plain, guided = root.iter(SVG + "circle")
    side, colours = evaluate.SIDE, evaluate.COLOURS
    circle = {"cx": "0.0", "cy": "0.0", "r": "4", "stroke": colours["sft"], "fill": colours["sft"]}
    assert plain.attrib == circle
    assert plain[0].text == "sft_greedy"
    circle = {"cx": f"{side}.0", "cy": f"{0.75 * side}", "r": "4", "stroke": colours["mah_dpo"],
              "fill": "none"}
    assert guided.attrib == circle
    assert guided[0].text == "mah_dpo:a + b"
    mixes, soups = root.iter(SVG + "polyline")
    assert mixes.get("stroke") == colours["mah_dpo"]
    assert soups.get("stroke") == colours["soup"]
    assert mixes.get("points").split()[0] == f"{0.9 * side},{0.9 * side}"
    legend = "".join(root[1].itertext())
    for method in colours:
        assert method in legend
    assert "prefers-color-scheme:dark" in root[0].text
    ElementTree.fromstring(evaluate.pareto_svg([]))


# -- the files of a run

def measured(domain, value, **more):
    row = {"policy": "sft", "weights": {"policy": 1.0}, "guide": None, "domain": domain,
           "metrics": {"loss": {"mean": value, "stderr": 0.1, "n": 8}}}
    return row | more


def test_trainings_are_averaged_row_by_row(tmp_path):
    """Another objective's figures in a mean over trainings, because held-out pairs come in another
    order; a traceback because one training lacks a row."""
    objectives = [vars(OBJECTIVES["honesty"])]
    config = {"objectives": objectives, "temperature": 1, "seed": 3, "seeds": 2}
    write_json(str(tmp_path / "config.json"), config)
    guided, mixed = {"guide": "honesty"}, {"sweep": ["honesty", "helpfulness"]}
    results = {3: [measured("pairs:honesty", 1.0), measured("pairs:helpfulness", 2.0),
                   measured("values", 3.0), measured("values", 4.0, **guided),
                   measured("values", 5.0, **mixed)],
               4: [measured("pairs:helpfulness", 20.0), measured("values", 50.0, **mixed),
                   measured("values", 30.0), measured("values", 40.0, **guided)]}
    for seed, rows in results.items():
        (tmp_path / f"seed={seed}").mkdir()
        rows = [row | {"seed": seed} for row in rows]
        write_json(str(tmp_path / f"seed={seed}" / "results.json"), rows)
    rows = evaluate.load_rows(str(tmp_path))
    found = [(r["domain"], r["guide"], r["metrics"]["loss"]["mean"]) for r in rows]
    assert found == [("pairs:helpfulness", None, 11.0), ("values", None, 16.5),
                     ("values", "honesty", 22.0), ("values", None, 27.5)]
    assert all(row["seed"] == [3, 4] and row["n"] == 8 for row in rows)


def results_of(run):
    return read_json(os.path.join(run, "results.json"))


def domain_rows(run, domain):
    return [row for row in results_of(run) if row["domain"] == domain]


def test_results_have_the_promised_fields(whole):
    """A number without its error, weights that do not sum to one, a policy without its cost."""
    keys = {"policy", "weights", "guide", "domain", "metrics", "seed"}
    for row in results_of(whole):
        assert set(row) - {"sweep"} == keys
        assert row["seed"] == 0
        assert sum(row["weights"].values()) == approx(1.0)
        for metric in row["metrics"].values():
            assert set(metric) == {"mean", "stderr", "n"}
            assert math.isfinite(metric["mean"])
            assert metric["stderr"] >= 0
        if "tokens" in row["metrics"]:
            drawn, tokens = row["metrics"]["drawn"], row["metrics"]["tokens"]
            assert drawn["mean"] > tokens["mean"] + 1 if row["guide"] else drawn == tokens


@pytest.mark.parametrize("domain, names", [("values", NAMES[:2]), ("tutoring", NAMES[2:])])
def test_results_have_the_promised_rows(whole, domain, names):
    """A policy or a guide that the tables lack, or a weight that does not belong to the row."""
    rows = [row for row in domain_rows(whole, domain) if "sweep" not in row]
    assert all(row["metrics"][name]["n"] == 2 for row in rows for name in names)
    alone = [f"mah_dpo:{name}" for name in names]
    assert [row["policy"] for row in rows if row["guide"] is None] == [
        "base", "sft", "sft_greedy", "single_head_dpo", "modpo", "soup", "mod", "mah_dpo",
        "mah_dpo_greedy", *alone]
    guided = [(row["policy"], row["guide"]) for row in rows if row["guide"]]
    guides = [*names, "unified"]
    assert guided == [(policy, guide) for policy in ("sft", "mah_dpo") for guide in guides]
    weights = {evaluate.row_name(row): row["weights"] for row in rows}
    assert weights["mah_dpo"] == {n: float(n in names) / len(names) for n in NAMES}
    assert weights[alone[0]] == {n: float(n == names[0]) for n in NAMES}
    assert weights["soup"] == weights["mod"] == dict.fromkeys(names, 1 / len(names))
    for row in rows:
        plain = not row["guide"] and "greedy" not in row["policy"]
        assert ("kl" in row["metrics"]) == plain == (evaluate.KL_AT_1 in row["metrics"])
    sft = next(row for row in rows if row["policy"] == "sft")
    assert sft["metrics"]["kl"]["mean"] == approx(0, abs=1e-6)


def test_a_distance_is_that_of_what_was_sampled(whole, small_worlds, monkeypatch):
    """A distance at another temperature than the samples'."""
    bench, seen = evaluate.Bench(whole), []
    bench.config["temperature"] = 0.3
    monkeypatch.setattr(evaluate, "kl_to_sft", lambda *args: seen.append(args[-1]) or {})
    bench.measure(Job("values", "sft", "sft", {"policy": 1.0}))
    assert seen == [0.3]


def test_results_have_the_promised_sweep(whole):
    """Mixes that do not go from one head to the other, or a soup of other policies."""
    rows = [row for row in domain_rows(whole, "values") if row.get("sweep") == NAMES[:2]]
    mixes = [row["weights"]["helpfulness"] for row in rows if row["policy"] == "mah_dpo"]
    assert mixes == [1.0, 0.5, 0.0]
    soups = [row["weights"] for row in rows if row["policy"] == "soup"]
    assert soups == [{"helpfulness": 1.0}, {"helpfulness": 0.5, "honesty": 0.5}, {"honesty": 1.0}]
    honest = next(row for row in rows if row["weights"].get("honesty") == 1.0)
    alone = [row for row in domain_rows(whole, "values") if row["policy"] == "mah_dpo:honesty"]
    assert honest["metrics"] == alone[0]["metrics"]


BENT = [(0, 0), (0.3, 0), (0.4, 0), (0.4, 0.2)]


@pytest.mark.parametrize("points, weights", [
    (BENT, [0, 2 / 9, 2 / 3, 1]),
    ([(0.5, 0.5)] * 3, [0, 0.5, 1]),
    ([(1, 0), (0.5, 0.5), (0, 1)], [0, 0.5, 1]),
    ([(0, 0), (3, 4)], [0, 1])])
def test_equal_arcs(points, weights):
    """Distances of one objective alone, weights that do not begin at 0 and end at 1, a front of no
    length. The first curve is .6 long: .2 lies on its first piece of three, .4 at its third point.
    """
    assert evaluate.equal_arcs(points) == approx(weights, abs=1e-6)


def test_a_sweep_along_the_front(whole, small_worlds, monkeypatch):
    """Weights of another pair or policy, a first sweep that stays in the tables, evaluations of
    what has been measured."""
    plain, measured, found = evaluate.read_run, [], []

    def measure(self, job):
        measured.append(repr(job._replace(policy="", sweep=None)))
        w = job.weights.get("honesty", 0.0)
        # Half of the way is done at a weight of .5 by the soup, of .8 by the heads.
        if job.model == "mah_dpo":
            w = max(0.25 * w, 1 - 5 * (1 - w))
        return {"honesty": [w],
                "helpfulness": [1 - w],
                "tutor_engagement": [0.0]}
    monkeypatch.setattr(evaluate.Bench, "measure", measure)
    monkeypatch.setattr(evaluate, "publish", lambda run, rows: found.extend(rows))
    monkeypatch.setattr(evaluate, "write_text", lambda path, text: None)
    monkeypatch.setattr(evaluate, "forget_files", lambda run, files: None)
    monkeypatch.setattr(evaluate, "read_run", lambda run: plain(run) | {"spacing": "front"})
    evaluate.evaluate(whole, [])
    mixes, soups = [], []
    for row in found:
        if row.get("sweep") == NAMES[:2]:
            seen = mixes if row["policy"] == "mah_dpo" else soups
            weights = row["weights"]
            seen.append((weights.get("helpfulness", 0), weights.get("honesty", 0)))
    # The first sweep sees .125 at .5: of 1 the piece behind it is .875 long.
    assert mixes == [(1, 0), (0.286, 0.714), (0, 1)] and soups == [(1, 0), (0.5, 0.5), (0, 1)]
    assert len(measured) == len(set(measured))


def test_scores_are_what_the_means_are_made_of(whole):
    """Values prompt by prompt that belong to another row."""
    rows = [row for row in results_of(whole) if ":" not in row["domain"]]
    lines = [line for _, line in read_jsonl(os.path.join(whole, "scores.jsonl"))]
    for line, row in zip(lines, rows, strict=True):
        each = line.pop("each")
        assert line == {key: row[key] for key in ("domain", "policy", "guide", "weights")}
        assert {name: evaluate.summary(values) for name, values in each.items()} == row["metrics"]


def test_held_out_pairs_have_their_rows(whole):
    """A policy or an objective without held-out figures; a reference that differs from itself."""
    policies = {"base", "sft", "single_head_dpo", "modpo", "mah_dpo", "soup"}
    for name in NAMES:
        rows = domain_rows(whole, f"pairs:{name}")
        found = {row["policy"]: means(row) for row in rows}
        assert set(found) == policies
        assert found["sft"]["loss"] == approx(math.log(2), abs=1e-6)
        assert found["sft"]["margin"] == approx(0, abs=1e-6)


def test_report_and_picture(whole):
    """Tables without their rows, an SVG without its lines and points."""
    with open(os.path.join(whole, "results.md"), encoding="utf-8") as f:
        text = f.read()
    for part in ("### values, 2 test prompts", "### tutoring, 2 test prompts", "| sft_greedy",
                 "### values, a sweep of weights", "| w helpfulness", "soup, swept",
                 "| soup", "| mah_dpo:honesty", "| unified", "| pairs:honesty ", "±"):
        assert part in text
    # Of the two distances one, and it says of what.
    assert evaluate.KL_AT_1 not in text and "kl: nats from SFT, both at temperature 0.7" in text
    root = ElementTree.parse(os.path.join(whole, "pareto.svg")).getroot()
    for line in root.iter(SVG + "polyline"):
        assert len(line.get("points").split()) == 3
    circles = list(root.iter(SVG + "circle"))
    assert len(circles) == 9 + 2 + 2 * 3


def test_evaluate_command_measures_again(whole, small_worlds, tmp_path, capsys):
    """An evaluate.py that disagrees with the run's own tables, or loses the held-out pairs."""
    copied = str(tmp_path / "copied")
    shutil.copytree(whole, copied)
    evaluate.main([copied])
    assert "### values" in capsys.readouterr().out
    assert results_of(copied) == results_of(whole)
    with pytest.raises(InputError, match="not a finished run"):
        evaluate.main([str(tmp_path)])


def table_rows(text, title):
    """The cells of a table's rows."""
    body = text.split(f"### {title}\n\n")[1]
    lines = body.split("\n\n")[0].splitlines()
    return [cells_of(line) for line in lines[2:]]


def test_runs_side_by_side(whole, tmp_path, capsys):
    """Figures under another run's name, rows that differ shown once, or measured again."""
    other = str(tmp_path / "other")
    os.mkdir(other)
    for name in ("config.json", "results.json", "scores.jsonl"):
        shutil.copy(os.path.join(whole, name), other)
    rows = results_of(other)
    assert (rows[0]["policy"], rows[4]["policy"], rows[4]["domain"]) == ("base", "modpo", "values")
    rows[4]["metrics"]["honesty"]["mean"] = 0.123
    write_json(os.path.join(other, "results.json"), rows[1:])
    evaluate.main([whole, other])
    found = table_rows(capsys.readouterr().out, "values, by run")
    named = [line[:2] for line in found[:3]]
    assert named == [[whole, "base"], ["all", "sft"], ["all", "sft_greedy"]]
    modpo = {line[0]: line[4] for line in found if line[1] == "modpo"}
    assert list(modpo) == [whole, other]
    assert modpo[other].startswith("0.123 ±")


def test_tables_measure_the_split_that_is_named(whole):
    """Tuning that looks at test prompts although --split dev was said, or at those that gave the PRM
    its scale and its held-out figures."""
    assert not set(PROMPTS.values()) & {"train", "dev"}
    for split in ("test", "dev"):
        bench = evaluate.Bench(whole)
        bench.config["split"] = split
        for domain in bench.worlds:
            talks = bench.rollout(Job(domain, "sft", "sft", {"policy": 1.0}))[0]
            assert {talk.problem.split for talk in talks} == {PROMPTS[split]}


def test_soup_is_the_average_of_the_single_policies(whole):
    """A soup with SFT, or with policies of other domains in it, or with other weights."""
    bench = evaluate.Bench(whole)
    job = Job("values", "soup", "soup", {"helpfulness": 0.75, "honesty": 0.25})
    mixed = bench.policy(job)[0].state_dict()
    first = bench.model("dpo_helpfulness").state_dict()
    second = bench.model("dpo_honesty").state_dict()
    for name, value in mixed.items():
        expected = 0.75 * first[name] + 0.25 * second[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    assert not torch.equal(mixed["heads.0.weight"], first["heads.0.weight"])


def test_mod_of_heads_of_one_backbone_is_their_fold(gpt, tokenizer):
    """Weights that are forgotten, or go to another policy; caches that are not kept together."""
    heads = []
    for i in range(2):
        model = gpt.with_heads(["policy"])
        model.heads[0].weight.data = gpt.heads[i].weight.data
        heads.append(model)
    texts = ("4 + 5 = 9", "the color is red . ok .", "2")
    prompts = [ids_of(tokenizer, text) for text in texts]
    options = {"weights": [0.8, 0.2], "max_new_tokens": 12, "samples": 3, "temperature": 0.7}
    found = generate(Together(heads), prompts, generator=seeded(), **options)
    folded = generate(gpt, prompts, generator=seeded(), **options)
    options["weights"] = [0.2, 0.8]
    other = generate(Together(heads), prompts, generator=seeded(), **options)
    assert found == folded and found != other


def test_mod_mixes_the_log_probabilities_of_policies(whole):
    """A mix of probabilities, of policies' weights, or of policies of other domains."""
    bench = evaluate.Bench(whole)
    weights = {"helpfulness": 0.75, "honesty": 0.25}
    together, shares = bench.policy(Job("values", "mod", "mod", weights))
    ids = torch.arange(5, 17).view(2, 6)
    h = together(ids)
    logits = F.linear(h, together.fold(shares))
    expected = 0
    for name, w in weights.items():
        model = bench.load(f"dpo_{name}")
        logps = model.logits(model(ids)).log_softmax(-1)
        expected = expected + w * logps
    logps = expected.log_softmax(-1)
    torch.testing.assert_close(logits.log_softmax(-1), logps)


def test_tables_show_what_was_scored(whole):
    """Columns of objectives that nobody scores, as those of real pairs beside real questions."""
    rows = [made("sft", {"a": [1.0, 0.0], "tokens": [3.0, 4.0]})]
    text, details = evaluate.report(rows, decode.read_run(whole))
    head = text.split("\n\n")[2].splitlines()[0]
    assert cells_of(head) == ["policy", "guide", "a", "tokens"]
    assert details == ""
