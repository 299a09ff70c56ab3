"""train.py: the parts of its stages by hand, and its training loop. Whole runs: test_runs.py."""
import collections
import copy
import errno
import itertools
import json
import math
import os
import signal
import statistics

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from conftest import NAMES
from data import DOMAINS, OBJECTIVES, RNG, InputError, Problem, World, judge
from evaluate import Turn
from interop.options import Config
from mah_dpo import Pair, combine, dpo_loss, pair_logps
from model import load_hf, load_safetensors, read_metadata, save_hf
from prm import PRM, SECOND, STEP, Labelled, load_prm, pair_scores
from test_templates import TALK, THINKING, chat
from train import Run, Source

pytestmark = pytest.mark.usefixtures("small_worlds")
SUM = Problem("4 + 5 - 2 = ?")
HELLO = [{"role": "user", "content": "4 + 5 - 2 = ?"}]
CHAT = [*HELLO, {"role": "assistant", "content": "4 + 5 = 9"}, {"role": "user", "content": "and ?"},
        {"role": "assistant", "content": "answer 7"}]


def ids_of(tokenizer, text):
    """The ids of an answer."""
    return tokenizer.encode(text) + [tokenizer.eos_id]


def rows_of(path):
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def logged(run):
    """The rows of log.jsonl."""
    return rows_of(run.file("log.jsonl"))


@pytest.fixture
def run(tmp_path):
    """A run directory without any stage, for calling the stages' parts."""
    return Run(str(tmp_path), Config(objective="math,honesty", device="cpu"))


# -- language models

def test_chat_example_masks_only_assistant_turns(tokenizer):
    """Prevents: SFT on the user's words or the role markers, or answers that never learn to end."""
    ids, mask = train.chat_example(tokenizer, CHAT)
    assert ids == tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    learnt = [i for i, m in zip(ids, mask) if m]
    assert learnt == ids_of(tokenizer, "4 + 5 = 9") + ids_of(tokenizer, "answer 7")
    assert len(mask) == len(ids)


def test_chat_example_only_grows(tmp_path):
    """Prevents: a mask that slips where a checkpoint's template would write an earlier answer
    otherwise than the model has said it, as Qwen3's drops thoughts."""
    tokenizer = chat(tmp_path, THINKING)
    talk = [*TALK, {"role": "assistant", "content": "<think>\nll\n</think>\n\n12"}]
    ids, mask = train.chat_example(tokenizer, talk)
    learnt = [i for i, m in zip(ids, mask) if m]
    assert learnt == ids_of(tokenizer, talk[1]["content"]) + ids_of(tokenizer, talk[3]["content"])
    prompt, turn = tokenizer.encode_chat(talk[:1]), tokenizer.encode_turn("2")
    assert ids[:len(prompt)] == prompt and len(prompt + turn + learnt) == len(ids)


def test_language_model_loss_is_the_masked_next_token_loss(run, gpt, tokenizer):
    """Prevents: a loss on masked tokens, on padding, or on the token itself instead of the next."""
    model = copy.deepcopy(gpt)
    examples = [train.Example(*train.chat_example(tokenizer, talk), "") for talk in (CHAT, CHAT[:2])]
    losses = []
    for e in examples:
        for t, token in enumerate(e.ids):
            if e.mask[t]:
                h = gpt(torch.tensor([e.ids[:t]]))[0, -1]
                losses.append(-F.log_softmax(gpt.logits(h), 0)[token].item())
    train.language_model(run, "sft", model, examples, 1, 1e-3, 64)
    row, = logged(run)
    assert row["step"] == 0 and row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not torch.equal(model.embed.weight, gpt.embed.weight)


def test_endless_draws_each_item_once_per_epoch():
    """Prevents: items drawn twice before others are drawn at all, also where a batch spans two
    epochs."""
    stream = train.endless("abcde", torch.Generator().manual_seed(0))
    batches = train.mixed_batches([stream], [5 * 5])
    taken = next(batches)
    epochs = [taken[i:i + 5] for i in range(0, 25, 5)]
    assert len(taken) == 25 and all(sorted(epoch) == list("abcde") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    with pytest.raises(AssertionError):
        next(train.endless([], torch.Generator()))


# -- pairs and labels

class OneSum(World):
    """A world of one problem with a verifier and a judge that can be checked by eye."""
    name, max_new_tokens, boundary = "math", 60, "newline"

    def problems(self, split, n, rng):
        return [SUM]

    def verify(self, problem, steps):
        right = [float(step in ("4 + 5 = 9\n", "9 - 2 = 7\n")) for step in steps]
        return float(steps[-1] == "answer 7"), right

    def scores(self, problem, messages, response):
        return {"math_engagement": response.count("!") / 2}


@pytest.fixture
def source(run, gpt):
    """The SFT policy in the world of one problem."""
    return Source(run, "sft", gpt, OneSum(), "train")


def turn_of(tokenizer, text):
    """A policy's answer to that problem."""
    return Turn(SUM, tokenizer.encode_chat(HELLO), HELLO, ids_of(tokenizer, text))


def test_hindsight_by_hand(source, tokenizer):
    """Prevents: z or n of the response instead of each rollout's own, prefixes out of line, EOS
    counted as a step."""
    turn = turn_of(tokenizer, "4 + 5 = 9\n9 - 2 = 8\nanswer 8")
    short = ids_of(tokenizer, "4 + 5 = 9\n9 - 2 = 7\nanswer 7")
    long = ids_of(tokenizer, "4 + 5 = 9\n9 - 2 = 8\n8 - 1 = 7\n7 + 0 = 7\nanswer 7")
    same = turn.response
    found = train.hindsight(source, turn, [same, short, same, long, same, same], 2)
    assert found == pytest.approx([1 + 0.9 ** 2 / 2, 0 + 0.9 ** 3 / 2, 0.0], abs=1e-6)
    found = train.labels_of(source, turn, [same] * 3, 1, ["math_accuracy"], ())
    assert found[STEP] == [1.0, 0.0]


def test_a_question_has_no_verdicts_on_its_steps(source, tokenizer, monkeypatch):
    """Prevents: a traceback, or an auxiliary output that is taught nothing but zeros, where only
    the final answer of a real question is known."""
    monkeypatch.setattr(OneSum, "verify", lambda self, problem, steps: (1.0, [None] * len(steps)))
    turn = turn_of(tokenizer, "4 + 5 = 9\nanswer 7")
    rollouts = [turn.response] * 2
    assert train.hindsight(source, turn, rollouts, 1) == pytest.approx([0.9, 1.0])
    assert train.labels_of(source, turn, rollouts, 1, ["math_accuracy"], ())[STEP] == []


@pytest.mark.parametrize("rule, expected", [
    ("graded", [0.5, 0.5, 0.0]),
    ("majority", [0.0, 0.0, 0.0]),              # a tie
    ("majority of 1", [0.0, 1.0, 0.0])])
def test_judged_labels_by_hand(rule, expected, source, tokenizer, monkeypatch):
    """Prevents: a judge that reads the prefix instead of the rollout, a tie called positive, a score
    of just 1/2 too, one rule of labels in place of the other."""
    monkeypatch.setattr(train, "judge", lambda score, rng: score)
    texts = ["4 + 5 = 9\nanswer 7", "4 + 5 = 9 . now it gets fun !\nanswer 7",
             "4 + 5 = 9 . now it gets fun !\n9 - 2 = 7 . you can do this !\nanswer 7"]
    none, half, full = (ids_of(tokenizer, text) for text in texts)       # scores 0, 0.5, 1
    turn, sets, M = turn_of(tokenizer, texts[0]), [half, half, full, none, none, none], 2
    if rule == "majority of 1":
        sets, M = [half, full, none], 1
    source.run.config.judge_labels = rule.split()[0]
    found = train.labels_of(source, turn, sets, M, ["math_engagement"], (RNG(0), RNG(1)))
    assert found["math_engagement"] == found["math_engagement" + SECOND] == expected


def test_an_answer_gets_one_rating(source, tokenizer):
    """Prevents: an answer that is rated anew for each of its prefixes, or M times at its end: where
    the answer is its own only rollout, labels that differ by the judge's noise alone; a label
    without noise; one that is no probability; a second judge who repeats the first, or whose
    ratings change the first's."""
    turn = turn_of(tokenizer, "4 + 5 = 9 . now it gets fun !\n9 - 2 = 7\nanswer 7")
    worst = turn_of(tokenizer, "4 + 5 = 9\nanswer 7")
    judges, alone, ratings = (RNG(0), RNG(1)), RNG(0), []
    for M in [1, 2] * 20:
        rollouts = [turn.response] * 3 * M
        found = train.labels_of(source, turn, rollouts, M, ["math_engagement"], judges)
        steps = set(zip(found["math_engagement"], found["math_engagement" + SECOND]))
        ratings += steps
        assert len(steps) == 1 and ratings[-1][0] == pytest.approx(judge(0.5, alone))
        low = train.labels_of(source, worst, [worst.response] * 2, 1, ["math_engagement"], judges)
        assert all(0 <= label < 0.5 for label in low["math_engagement"])
        judge(0.0, alone)
    first, second = zip(*ratings)
    assert 0.05 < statistics.stdev(first) < 0.15 and 0.05 < statistics.stdev(second) < 0.15
    assert abs(statistics.correlation(first, second)) < 0.4


def test_label_steps_by_hand(source, run, tokenizer, monkeypatch):
    """Prevents: rollouts that do not start from the prefix, overrun the budget or are filed under
    another prefix; labels of steps behind the first wrong one."""
    text = ["4 + 5 = 9\n", "9 - 2 = 8\n", "answer 8"]
    response, calls = ids_of(tokenizer, "".join(text)), []
    tails = ["9 - 2 = 7\nanswer 7", "9 - 2 = 6\nanswer 6", "answer 7", "8 - 1 = 7\nanswer 7"]

    def scripted(model, prompts, *, max_new_tokens, samples=1, **options):
        calls.append((prompts, max_new_tokens, samples))
        return [response] if len(calls) == 1 else [ids_of(tokenizer, tail) for tail in tails]
    monkeypatch.setattr(train, "generate", scripted)
    monkeypatch.setattr(evaluate, "generate", scripted)
    row, = train.label_steps(source, ["math_accuracy"], "rollouts", 8, 3)
    prompt = tokenizer.encode_chat(HELLO)
    first, second = (len(tokenizer.encode("".join(text[:n]))) for n in (1, 2))
    prefixes = [prompt + response[:first], prompt + response[:second]]
    room = [60 - first, 60 - second]
    assert calls[1] == (prefixes, room, 2)
    assert row.ids == prompt + response and row.split == "train"
    assert row.ends == [len(prompt) + first - 1, len(prompt) + second - 1, len(row.ids) - 1]
    # M = 3, the response itself first.
    values = [1 + 0.9 ** 2 / 3, (0.9 + 0.9 ** 2) / 3, 0.0]
    assert [t.pop("math_accuracy") for t in row.targets] == pytest.approx(values, abs=1e-6)
    assert row.targets == [{STEP: 1.0}, {STEP: 0.0}, {}]


def test_pairs_prefer_the_better_rated(run, gpt, tokenizer, monkeypatch):
    """Prevents: chosen and rejected swapped, pairs of equal responses, pairs of another prompt's
    responses."""
    texts = ["the color is red . the size is tall . the job is baker .",
             "the color remains unknown .", "ok", "the home is lake ."]

    def answers(model, prompts, samples=1, **options):
        return [ids_of(tokenizer, texts[i % 4]) for i in range(len(prompts) * samples)]
    monkeypatch.setattr(train, "generate", answers)
    monkeypatch.setattr(evaluate, "generate", answers)
    monkeypatch.setattr(train, "judge", lambda score, rng: score)
    run.config.n_prompts, run.config.n_samples = 10, 4
    run.objectives = [OBJECTIVES[name] for name in ("helpfulness", "honesty")]
    world = DOMAINS["values"]
    source = Source(run, "sft", gpt, world, "train")
    pairs = train.sample_pairs(source)
    rng = run.rng("samples", "sft", "values", "train")
    problems = {tuple(tokenizer.encode_chat(p.messages())): p
                for p in world.problems("train", 10, rng)}
    assert {p.objective for p in pairs} == {"helpfulness", "honesty"}
    assert len(train.choose(pairs, ["helpfulness"], "train")) == 10
    for pair in pairs:
        problem = problems[tuple(pair.prompt)]
        all_scores = [world.scores(problem, [], text)[pair.objective] for text in texts]
        good, bad = (world.scores(problem, [], tokenizer.decode(ids))[pair.objective]
                     for ids in (pair.chosen, pair.rejected))
        assert good == max(all_scores) > bad == min(all_scores)


def test_both_guided_policies_make_the_labels(whole, monkeypatch, tmp_path):
    """Prevents: a PRM that has never seen what MAH-DPO says, or a mix of heads other than the one
    that is guided."""
    run = Run(str(tmp_path), Config(objective=",".join(NAMES), device="cpu"))
    for name in ("sft", "mah_dpo"):
        os.symlink(os.path.join(whole, name), run.file(name))
    seen = []

    def label(source, names, purpose, *_):
        if names and source.split == "dev":
            seen.append((purpose, source.policy, source.mix, names))
        return []

    def pairs(source, cases):
        return label(source, source.objectives(*cases), "pairs")
    monkeypatch.setattr(train, "label_steps", label)
    monkeypatch.setattr(train, "sample_pairs", pairs)
    train.make_labels(run, "labels.jsonl")
    assert seen == [("turns", "sft", [1.0], NAMES[2:]),
                    ("pairs", "mah_dpo", [1.0, 1.0, 0.0], NAMES[:2]),
                    ("turns", "mah_dpo", [0.0, 0.0, 1.0], NAMES[2:])]
    assert train.read_rows(run.file("labels.jsonl"), Labelled) == []


def test_objectives_that_cannot_be_trained_are_refused(run, gpt, monkeypatch):
    """Prevents: an endless loop over an objective whose only pairs were held out."""
    held_out = Pair("honesty", [1], [2], [3], "dev")
    source = Source(run, "sft", gpt, DOMAINS["values"], "dev")
    monkeypatch.setattr(train, "sources_of", lambda *args: (gpt, [source]))
    monkeypatch.setattr(train, "sample_pairs", lambda *args: [held_out])
    with pytest.raises(InputError, match="no preference pair for .*honesty: .*all wrong, or all r"):
        train.make_pairs(run, "pairs.jsonl")


def test_rows_of_another_kind_are_refused(tmp_path):
    """Prevents: a traceback for a pairs.jsonl that somebody has written by hand."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"objective": "honesty", "prompt": [1], "chosen": [2], "rejected": [3]}\n')
    with pytest.raises(InputError, match="pairs.jsonl:1: not a row that this run has written"):
        train.read_rows(str(path), Pair)


# -- the PRM

def prm_run(run, gpt, labels, pairs=(), **settings):
    """Give `run` its models, labels and pairs, no world to draw candidates in, and change its
    configuration."""
    save_hf(gpt, run.file("sft"), weights=0)
    save_hf(gpt, run.file("mah_dpo"))
    run.worlds = lambda model: []
    train.write_rows(run.file("labels.jsonl"), labels)
    train.write_rows(run.file("pairs.jsonl"), pairs)
    train.write_rows(run.file("mah_dpo_pairs.jsonl"), [])
    vars(run.config).update({"prm_steps": 1} | settings)


def test_train_prm_adds_up_the_parts_of_a_batch(run, gpt, monkeypatch):
    """Prevents: a part whose loss is the mean of its own labels, which then weigh more where few
    share a part."""
    rows = []
    for i in range(6):
        first = {"math_accuracy": 0.5 * i} | ({"math_engagement": 1.0} if i >= 3 else {})
        targets = [first, {"math_accuracy": 2.0, "math_engagement": 0.0, STEP: i % 2}]
        for split in ("train", "dev"):
            rows.append(Labelled(list(range(5, 8 + 3 * i)), [1, 2 + 3 * i], targets, split))
    prm_run(run, gpt, rows, prm_batch=6)
    plain, found, parts = train.dealt_batches, [], []
    for tokens in (1000, 12):
        def dealt(lengths):
            parts.append(plain(lengths, tokens))
            return parts[-1]
        monkeypatch.setattr(train, "dealt_batches", dealt)
        train.train_prm(run, "prm")
        found.append(logged(run)[0])
    assert [len(p) for p in parts] == [1, 5]
    names = ["math_accuracy", "math_engagement", STEP]
    assert [found[0][o]["labels"] for o in names] == [12, 9, 6]
    one, many = ([row["gradient_norm"], *[row[o]["loss"] for o in names]] for row in found)
    assert one == pytest.approx(many, rel=1e-4) and min(one) > 0


def test_train_prm_leaves_no_source_without_its_share(run, gpt):
    """Prevents: a domain with few labels of which a batch by number of labels holds one in a
    hundred, and hardly learns."""
    maths, honesty = {"math_accuracy": 0.5, "math_engagement": 1.0}, {"honesty": 1.0}
    rows = [Labelled(list(range(5, 15)), [2, 4, 6, 9], [maths] * 4, "train") for _ in range(40)]
    for split in ("train", "train", "train", "dev"):
        rows.append(Labelled(list(range(6, 12)), [5], [honesty], split))
    prm_run(run, gpt, rows, prm_batch=20, prm_pairs=3)
    train.train_prm(run, "prm")
    many = 4 * (20 * 160 // 163)
    assert [logged(run)[0][o]["labels"] for o in run.names] == [many, many, 3]


def test_train_prm_adds_step_correctness_and_drops_it(run, gpt):
    """Prevents: a --prm-step-weight that is read but not used, or a PRM that is saved with an
    output for training alone."""
    targets = [{"math_accuracy": 1.0, STEP: 0.0}, {"math_engagement": 1.0, STEP: 1.0}]
    rows = []
    for split in ("train", "dev"):
        rows += [Labelled(list(range(5, 15)), [4, 9], targets, split) for _ in range(8)]
    saved = []
    for weight in (0.0, 60.0):
        prm_run(run, gpt, rows, prm_batch=4, prm_step_weight=weight)
        train.train_prm(run, "prm_math_accuracy")
        saved.append(load_prm(run.file("prm_math_accuracy")))
        assert logged(run)[0][STEP] == {"loss": pytest.approx(0.69, abs=0.3), "labels": 8}
        assert saved[-1].names == ["math_accuracy"] and len(saved[-1].scale) == 1
    assert not torch.equal(*(prm.backbone.embed.weight for prm in saved))
    # Without a value model there is nothing to be taught.
    train.train_prm(run, "prm_math_engagement")
    assert STEP not in logged(run)[-4] and "math_engagement" in logged(run)[-4]


def test_train_prm_gives_every_objective_the_loss_of_its_own_pairs(run, gpt, tokenizer):
    """Prevents: pairs of several objectives, which share a forward pass, under one output or with
    one mean."""
    pairs = make_pairs(tokenizer, 4)
    prm_run(run, gpt, [], pairs, prm_pairs=4)
    untrained = PRM(run.load("sft").with_heads(()), run.objectives, run.generator("prm", "weights"))
    train.train_prm(run, "prm")
    first, counts = logged(run)[0], set()
    for name in run.names:
        chosen, rejected, _ = pair_scores(untrained, train.choose(pairs, [name], "train"))
        loss = -F.logsigmoid(chosen - rejected).mean().item()
        assert first[name] == {"loss": pytest.approx(loss, rel=1e-4), "labels": len(chosen)}
        counts.add(len(chosen))
    assert len(counts) > 1


def test_measure_prm_by_hand(gpt, monkeypatch):
    """Prevents: R^2 on targets of another output, a scale that is not the spread of the scores."""
    prm = PRM(gpt.with_heads(()), [OBJECTIVES["honesty"], OBJECTIVES["math_accuracy"]])
    scores = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [3.0, 5.0]])
    targets = torch.tensor([[1.0, 1.0], [0.0, math.nan], [0.0, 3.0]])
    monkeypatch.setattr(train, "step_scores", lambda prm, rows: (scores, targets))
    found = train.measure_prm(prm, [[Labelled([0], [0], [{}], "dev")]])["held_out"]
    assert found["math_accuracy"] == {"r2": pytest.approx(1 - 2.5 / 1.0), "n": 2}
    # A judged output's score is a logit.
    error = sum((1 / (1 + math.exp(-z)) - y) ** 2 for z, y in [(1, 1), (-1, 0), (3, 0)]) / 3
    assert found["honesty"] == {"r2": pytest.approx(1 - error / (2 / 9)), "n": 3}
    assert prm.scale.tolist() == pytest.approx([2.0, math.sqrt(4.5)])


def test_held_out_figures_of_each_policy(run, gpt):
    """Prevents: a pooled figure that hides a policy about whose answers an output says nothing; one
    without the ceiling that the judge's noise leaves; a second judge's labels learnt; an R^2 of
    -100,000,000 where all labels are alike."""
    rows = []
    for split in ("train", "dev"):
        for policy, label, n in (("sft", 0.0, 6), ("mah_dpo", 1.0, 2)):
            for i in range(n):
                # Of SFT's first two answers the judges think otherwise: (1, 0) and (0, 1).
                first, second = (label + (i == k and policy == "sft") for k in (0, 1))
                labels = {"math_engagement": first, "math_engagement" + SECOND: second}
                rows.append(Labelled([5, 6 + i, 7], [2], [labels], split, policy))
    prm_run(run, gpt, rows)
    train.train_prm(run, "prm")
    size, = train.step_sizes([rows[:8]], run.config)
    assert logged(run)[0]["math_engagement"]["labels"] == size
    measured = logged(run)[-3:]
    assert [row["policies"] for row in measured] == [["sft"], ["mah_dpo"], ["sft", "mah_dpo"]]
    sft, mah_dpo, pooled = (row["held_out"].get("math_engagement") for row in measured)
    assert (sft["n"], mah_dpo, pooled["n"]) == (6, None, 8)
    # Covariance over variance: each judge says 1 of 1/6, both of none; each of 3/8, both of 2/8.
    assert sft["ceiling"] == pytest.approx((0 - 1 / 36) / (5 / 36))
    assert pooled["ceiling"] == pytest.approx((2 / 8 - 9 / 64) / (15 / 64))


def test_units_are_the_spread_among_candidates_of_a_step(run, gpt, monkeypatch):
    """Prevents: a unit by what steps differ in, which guidance never compares: an output that is
    sure of a step's fate hardly counts beside one that tells its candidates apart. Candidates of
    training prompts, which the PRM knows; units for outputs of other domains."""
    prm = PRM(gpt.with_heads(()), [OBJECTIVES[name] for name in (*run.names, "tutor_accuracy")])
    sources = [Source(run, "mah_dpo", gpt, OneSum(), split) for split in ("train", "dev")]
    monkeypatch.setattr(train, "sources_of", lambda run, policy: (policy, sources))
    # Two steps of two candidates each: the first output differs by step, the second by candidate.
    scores = {5: [0.0, 8.0, 0, 0, 0], 6: [0.2, 4.0, 1, 0, 0],
              7: [9.0, 8.0, 0, 0, 0], 8: [9.2, 2.0, 1, 0, 0]}
    steps = {"dev": [[[1, 5], [1, 6]], [[1, 7], [1, 8]]], "train": [[[1, 5], [1, 8]]]}
    monkeypatch.setattr(train, "draw_candidates", lambda source: steps[source.split])
    monkeypatch.setattr(train, "scores_at", lambda prm, texts: torch.tensor(
        [scores[ids[at]] for ids, (at,) in texts])[:, :len(prm.names)])
    train.set_units(prm, run)
    spreads = [math.sqrt(0.02), math.sqrt((8 + 18) / 2)]
    assert prm.scale.tolist() == pytest.approx(spreads + [1.0] * (len(prm.names) - 2), rel=1e-3)


def test_candidates_are_ways_to_take_one_step(source, tokenizer, monkeypatch):
    """Prevents: candidates that go on behind their step, whose spread is that of whole answers; of
    different prefixes; a step that has none."""
    turn, asked = turn_of(tokenizer, "4 + 5 = 9\n9 - 2 = 7\nanswer 7"), []
    drawn = [ids_of(tokenizer, text) for text in ("4 + 5 = 8\n", "answer 6")]

    def scripted(model, prompts, samples, boundary, **options):
        asked.extend(prompts)
        assert boundary == "newline"
        return [drawn[i % 2] for i in range(len(prompts) * samples)]
    monkeypatch.setattr(train, "generate", scripted)
    monkeypatch.setattr(train, "roll_out", lambda *args: ([turn], None, None))
    found = train.draw_candidates(source, 4)
    ends = tokenizer.step_ends(turn.response, "newline")
    starts = [turn.before + turn.response[:end + 1] for end in (-1, *ends[:-1])]
    assert asked == starts and len(starts) == 3
    assert found == [[start + drawn[0], start + drawn[1]] * 2 for start in starts]


def test_a_prm_of_several_outputs_is_saved_with_its_units(run, gpt, tokenizer, monkeypatch):
    """Prevents: units that are measured and then lost, or for a PRM that has no use for them."""
    monkeypatch.setattr(train, "set_units", lambda prm, run: prm.scale.fill_(7.0))
    prm_run(run, gpt, [], make_pairs(tokenizer, 4))
    for name, expected in (("prm", True), ("prm_honesty", False)):
        train.train_prm(run, name)
        assert (load_prm(run.file(name)).scale.tolist()[0] == 7.0) == expected


# -- the policies

def make_pairs(tokenizer, n=6):
    """n pairs of each of three objectives, of which exact copies of the SFT policy do not know."""
    texts = ["the color is red .", "the size remains unknown .", "the job may be pilot . ok .",
             "4 + 5 = 9\nanswer 9"]
    pairs = []
    for i in range(n):
        prompt = tokenizer.encode_chat([{"role": "user", "content": f"{i} + {i} = ?"}])
        chosen, rejected = (ids_of(tokenizer, texts[(i + k) % 4]) for k in (0, 1))
        for o in ("math_accuracy", "math_engagement", "honesty"):
            pairs.append(Pair(o, prompt, chosen, rejected, "train"))
    return pairs


def policy_run(run, gpt, tokenizer, held_out=6, **settings):
    """Give `run` an SFT model and pairs of its three objectives, the last ones held out, and change
    its configuration -> the pairs."""
    save_hf(gpt, run.file("sft"), weights=0)
    pairs = make_pairs(tokenizer)
    reference = pair_logps(run.load("sft"), pairs)
    for i, pair in enumerate(pairs):
        pair.split = "dev" if i >= 18 - held_out else "train"
        pair.reference = reference[i].tolist()
    train.write_rows(run.file("pairs.jsonl"), pairs)
    vars(run.config).update({"dpo_steps": 3, "dpo_pairs": 2, "conflict_every": 0} | settings)
    return pairs


def test_pair_logps_keep_the_pairs_order(gpt, tokenizer):
    """Prevents: log-probabilities in the order of length, chosen and rejected swapped, another
    objective's head."""
    pairs = [p for p in make_pairs(tokenizer) if p.objective != "honesty"]
    found = pair_logps(gpt, pairs, tokens=200)
    for pair, row in zip(pairs, found.tolist()):
        W = gpt.heads[gpt.config.objectives.index(pair.objective)].weight.detach()
        for response, value in zip((pair.chosen, pair.rejected), row):
            h = gpt(torch.tensor([pair.prompt + response])).detach()[0, len(pair.prompt) - 1:-1]
            logps = F.log_softmax(h @ W.T, -1)
            expected = sum(logps[t, token] for t, token in enumerate(response))
            assert value == pytest.approx(float(expected), abs=1e-3)


def test_train_policy_sends_each_pair_through_its_own_head(run, gpt, tokenizer, monkeypatch):
    """Prevents: pairs trained on another objective's head, an unbalanced batch, a reference of
    other pairs: before the first step exact copies lose ln 2 each."""
    policy_run(run, gpt, tokenizer, held_out=0, dpo_steps=2, dpo_pairs=3, perturbation=0.0)
    plain, batches, counts, calls = train.policy_logps, train.dealt_batches, [], []

    def policy_logps(model, pairs, head):
        assert [run.names[i] for i in head] == [pair.objective for pair in pairs]
        counts.extend(pair.objective for pair in pairs)
        calls.append(head)
        return plain(model, pairs, head)
    monkeypatch.setattr(train, "policy_logps", policy_logps)
    monkeypatch.setattr(train, "dealt_batches", lambda lengths: batches(lengths, 150))
    train.train_policy(run, "mah_dpo")
    assert len(calls) > 2 and collections.Counter(counts) == {o: 2 * 3 for o in run.names}
    for o in run.names:
        assert logged(run)[0][o]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(logged(run)[0][o]["margin"]) < 1e-4
    trained, sft = load_hf(run.file("mah_dpo")), load_hf(run.file("sft")).heads[0].weight
    assert trained.config.objectives == tuple(run.names)
    assert not any(torch.equal(head.weight, sft) for head in trained.heads)


def test_train_policy_weighs_the_objectives(run, gpt, tokenizer):
    """Prevents: an --alpha that is read but not used: an objective of weight 0 must leave its head
    alone."""
    policy_run(run, gpt, tokenizer, held_out=0, dpo_steps=1, perturbation=0.0,
               alpha="math_engagement=0")
    train.train_policy(run, "mah_dpo")
    trained, sft = load_hf(run.file("mah_dpo")), load_hf(run.file("sft")).heads[0].weight
    assert [torch.equal(head.weight, sft) for head in trained.heads] == [False, True, False]


def conflict_run(run, gpt, tokenizer, **settings):
    """policy_run with all pairs in a batch, but honesty prefers what accuracy rejects, and so does
    engagement, which weighs more, half of the time."""
    pairs = policy_run(run, gpt, tokenizer, held_out=0, alpha="math_engagement=2", dpo_pairs=6,
                       **settings)
    for i, pair in enumerate(pairs):
        if pair.objective == "honesty" or i % 6 == 1:
            pair.chosen, pair.rejected = pair.rejected, pair.chosen
            pair.reference = pair.reference[::-1]
    train.write_rows(run.file("pairs.jsonl"), pairs)


def gradients_alone(run, batch):
    """Before the first step: {objective: its own loss's gradients by name}, by a model of its own
    for each."""
    found = {}
    for name in run.names:
        noise = run.generator("mah_dpo", "heads")
        model = run.load("sft").with_heads(run.names, run.config.perturbation, noise)
        pairs = [pair for pair in batch if pair.objective == name]
        logps = train.policy_logps(model, pairs, train.own_heads(model, pairs))
        reference = torch.tensor([pair.reference for pair in pairs]).T
        dpo_loss(*logps, *reference, run.config.beta).mean().backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("rule", ["raco", "cagrad", "mgda"])
def test_a_rule_combines_what_objectives_ask_of_the_backbone(rule, run, gpt, tokenizer,
                                                             monkeypatch):
    """Prevents: a rule of the weighted losses' gradients, which counts the weights twice; gradients
    of a part of the batch; heads that a rule weighs too; a rule that is chosen and not used."""
    conflict_run(run, gpt, tokenizer, combine=rule, dpo_steps=1)
    plain, batches, calls = train.gradient, train.dealt_batches, []

    def gradient(optimizer, *args, **options):
        found = plain(optimizer, *args, **options)
        grads = [p.grad.clone() for p in train.parameters_of(optimizer)]
        calls.append((args[-1], grads, float(found[1])))
        return found
    monkeypatch.setattr(train, "gradient", gradient)
    monkeypatch.setattr(train, "dealt_batches", lambda lengths: batches(lengths, 60))
    train.train_policy(run, "mah_dpo")
    (batch, grads, norm), = calls
    alone = gradients_alone(run, batch)
    names = [name for name in alone["honesty"] if not name.startswith("heads.")]
    flat = []
    for o in run.names:
        own = [alone[o][n].flatten() for n in names]
        flat.append(torch.cat(own))
    flat = torch.stack(flat).double()
    assert float(flat[0] @ flat[2]) < 0
    alpha = torch.tensor([1.0, 2.0, 1.0]).double()
    shares = combine(flat @ flat.T, alpha, rule, 0.4)
    assert (shares - alpha).abs().max() > 0.05
    clipped = min(1.0, 10 / norm)
    found = torch.cat([g.flatten() for g in grads[:-3]]).double()
    torch.testing.assert_close(found, clipped * shares @ flat, atol=1e-5, rtol=1e-3)
    for i, o in enumerate(run.names):
        expected = clipped * alpha[i].float() * alone[o][f"heads.{i}.weight"]
        torch.testing.assert_close(grads[i - 3], expected, atol=1e-5, rtol=1e-4)


def test_a_look_at_the_conflict_changes_nothing(run, gpt, tokenizer):
    """Prevents: a training that is another one because it was looked at; cosines of other gradients
    than the losses' own on the backbone."""
    conflict_run(run, gpt, tokenizer)
    found = []
    for every in (0, 2):
        run.config.conflict_every = every
        train.train_policy(run, "mah_dpo")
        found.append(load_safetensors(run.file("mah_dpo/model.safetensors")))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
    rows = logged(run)
    assert ["backbone_norm" in row["honesty"] for row in rows] == [True, True]
    batch = []
    for o in run.names:
        pairs = train.read_rows(run.file("pairs.jsonl"), Pair)
        own = train.endless(train.choose(pairs, [o], "train"), run.generator("pairs", o))
        batch += itertools.islice(own, 6)
    alone = gradients_alone(run, batch)
    for o, weight in zip(run.names, (1, 2, 1)):
        grads = {n: g for n, g in alone[o].items() if not n.startswith("heads.")}
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in grads.values()))
        assert rows[0][o]["backbone_norm"] == pytest.approx(weight * norm, rel=1e-3)
        assert f"cosine {o}" not in rows[0][o]
    assert rows[0]["honesty"]["cosine math_accuracy"] < -0.9
    assert abs(rows[0]["math_accuracy"]["cosine math_engagement"]) < 0.9
    train.train_policy(run, "dpo_honesty")
    assert not any("backbone_norm" in row["honesty"] for row in logged(run)[2:])


@pytest.mark.parametrize("method", ["mah_dpo", "single_head_dpo", "modpo", "dpo_honesty"])
def test_policies_see_the_same_pairs(method, run, gpt, tokenizer, monkeypatch):
    """Prevents: baselines that train on other pairs, or another order of them, than MAH-DPO: an
    unpaired comparison; MODPO's margins in another method's loss."""
    policy_run(run, gpt, tokenizer, held_out=0)
    monkeypatch.setattr(train, "set_margins", lambda run, pairs: [
        setattr(pair, "margin", 0.5) for pair in pairs])
    seen = []

    def fit(run, stage, model, optimizer, steps, epoch, batches, loss_of, *args, **options):
        batch = next(batches)
        loss = loss_of(batch, batch)[1]["loss"]
        kept = loss[~loss.isnan()].tolist()          # of objectives that have pairs here
        seen.append(((steps, epoch), [(p.objective, p.prompt) for p in batch], kept))
    monkeypatch.setattr(train, "fit", fit)
    train.train_policy(run, "mah_dpo")
    train.train_policy(run, method)
    (steps, pairs, _), (other_steps, others, loss) = seen
    own = [p for p in pairs if method != "dpo_honesty" or p[0] == "honesty"]
    assert steps == other_steps and others == own
    # Policy = reference: -log sigmoid(0), or with w_k = 1/2 in maths and 1 for honesty.
    modpo = [math.log1p(math.exp(0.5 / w)) for w in (0.5, 0.5, 1.0)]
    plain = [math.log(2)] * len(loss)
    assert loss == pytest.approx(modpo if method == "modpo" else plain, abs=0.02)


def test_modpo_pulls_alike_in_every_domain(run, tokenizer):
    """Prevents: a MODPO that learns twice as much from maths' pairs as from honesty's, because it
    divides by w_k = 1/2 there: without margins its first step must be DPO's."""
    pairs, gradients = make_pairs(tokenizer, 2), []
    for margin in (None, 0.0):
        for pair in pairs:
            pair.reference, pair.margin = [-3.0, -2.0], margin
        logps = torch.tensor([pair.reference for pair in pairs]).T.requires_grad_()
        loss, _ = train.preference_loss(run, pairs, logps)
        gradients += torch.autograd.grad(loss, logps)
    assert gradients[0].abs().min() > 0
    assert torch.allclose(*gradients)


def test_margins_by_hand(run, tokenizer, monkeypatch):
    """Prevents: a margin of the wrong sign, with the pair's own reward in it, without beta, or
    across domains."""
    pairs = make_pairs(tokenizer, 1)             # one each: accuracy, engagement, honesty
    for pair, reference in zip(pairs, ([-5.0, -4.0], [-3.0, -7.0], [-2.0, -2.0])):
        pair.reference = reference
    values = {"dpo_math_accuracy": {"math_engagement": [-2.0, -9.0]},
              "dpo_math_engagement": {"math_accuracy": [-4.0, -6.0]}}
    monkeypatch.setattr(run, "load", lambda name: name)
    monkeypatch.setattr(train, "score_pairs", lambda run, model, part, name: torch.tensor(
        [values[model][pair.objective] for pair in part]))
    train.set_margins(run, pairs)
    # w = 1/2 and beta = 0.1 times (log-ratio of chosen - log-ratio of rejected).
    accuracy = 0.05 * ((-4 + 5) - (-6 + 4))
    engagement = 0.05 * ((-2 + 3) - (-9 + 7))
    expected = [accuracy, engagement, 0.0]
    assert [pair.margin for pair in pairs] == pytest.approx(expected, abs=1e-6)
    # With w = 3/4 for accuracy the other's pairs hear more of it, and its own less of the other.
    run.config.alpha = "math_accuracy=3"
    train.set_margins(run, pairs)
    expected = [accuracy / 2, engagement * 1.5, 0.0]
    assert [pair.margin for pair in pairs] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha, w", [
    ("", [0.5, 0.5, 1.0]), ("math_accuracy=3", [0.75, 0.25, 1.0]),
    ("math_accuracy=0", [0.1, 1.0, 1.0]), ("honesty=0", [0.5, 0.5, 0.1])])
def test_modpo_weights_are_shares_of_a_domain(run, alpha, w):
    """Prevents: MODPO as if alpha were 1, weights across domains, and a division by 0."""
    run.config.alpha = alpha
    assert train.modpo_weights(run) == pytest.approx(w)


def test_the_log_shows_every_objective_in_training_and_development(run, gpt, tokenizer):
    """Prevents: a run that goes wrong for one objective and looks fine on average, or on the pairs
    that it trains on."""
    pairs = policy_run(run, gpt, tokenizer)
    train.train_policy(run, "mah_dpo")
    metrics = {"loss", "margin", "accuracy", "chosen", "rejected", "kl"}
    steps, dev = ([r for r in logged(run) if r.get("split") == split] for split in (None, "dev"))
    assert [r["step"] for r in steps] == [0, 2] and [r["step"] for r in dev] == [0, 1, 2, 3]
    for row in steps:       # a head's gradient is a part of the whole
        assert all(set(row[o]) == metrics | {"gradient_norm"} for o in run.names)
        squares = [row[o]["gradient_norm"] ** 2 for o in run.names]
        assert 0 < sum(squares) < row["gradient_norm"] ** 2
    model = load_hf(run.file("mah_dpo"))
    for row in dev:
        assert all(set(row[o]) == metrics for o in run.names)
    for o in run.names:
        held_out = train.choose(pairs, [o], "dev")
        logps = pair_logps(model, held_out)
        reference = torch.tensor([pair.reference for pair in held_out])
        moved = logps - reference
        assert dev[-1][o]["chosen"] == pytest.approx(float(moved[:, 0].mean()), abs=1e-5)
        assert dev[-1][o]["kl"] == pytest.approx(float((moved ** 2).mean() / 2), abs=1e-5)


def test_an_objective_without_development_pairs_is_left_out_of_their_log(run, gpt, tokenizer):
    """Prevents: NaN in log.jsonl, which is no JSON, or a zero that looks like a measurement."""
    pairs = policy_run(run, gpt, tokenizer)
    kept = [p for p in pairs if (p.objective, p.split) != ("honesty", "dev")]
    train.write_rows(run.file("pairs.jsonl"), kept)
    train.train_policy(run, "mah_dpo")
    dev = [row for row in logged(run) if row.get("split") == "dev"]
    names = {"stage", "step", "split", "math_accuracy", "math_engagement"}
    assert dev and all(set(row) == names for row in dev)


@pytest.mark.parametrize("what, name", [("loss", "dpo_honesty"), ("gradient", "dpo_honesty"),
                                        ("loss", "mah_dpo")])
def test_training_that_diverges_names_its_examples(what, name, run, gpt, tokenizer, monkeypatch):
    """Prevents: NaN weights that are saved and found out in the tables; a stop that does not say
    which example to look at; a good checkpoint lost to it."""
    pairs = policy_run(run, gpt, tokenizer, checkpoint_every=1, dpo_steps=5)
    bad = next(i for i, pair in enumerate(pairs) if pair.objective == "honesty")
    plain, save, saved = train.policy_logps, train.save_checkpoint, []

    def policy_logps(model, part, head):
        columns = list(plain(model, part, head).T)
        for i, pair in enumerate(part):
            if saved and pair == pairs[bad]:
                broken = math.nan if what == "loss" else (columns[i] * 0).sqrt()    # 0 * infinity
                columns[i] = columns[i] + broken
        return torch.stack(columns, 1)

    def save_checkpoint(run, stage, model, optimizer, step, log):
        saved.append(step)
        save(run, stage, model, optimizer, step, log)
    monkeypatch.setattr(train, "policy_logps", policy_logps)
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)
    with pytest.raises(InputError) as refused:
        train.train_policy(run, name)
    where = f"{run.file('pairs.jsonl')}:{bad + 1}"
    assert f"{name}, step {saved[-1]}: the loss or its gradient is not finite for {where}; this " \
        "step was not" in str(refused.value)
    kept = load_safetensors(run.file("checkpoint.safetensors"))
    assert not os.path.exists(run.file(name))
    assert all(bool(t.isfinite().all()) for t in kept.values())


# -- stops and checkpoints

def stopped_in_training(run, gpt, tokenizer, monkeypatch, step=2):
    """A policy's training that gets SIGTERM in its second step of three, or another: it takes that
    step, saves and stops -> the checkpoint."""
    policy_run(run, gpt, tokenizer)
    plain, calls = train.gradient, []

    def gradient(*args, **options):
        calls.append(args)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "gradient", gradient)
        train.train_policy(run, "mah_dpo")
    return run.file("checkpoint.safetensors")


@pytest.mark.parametrize("step", [2, 3])
def test_a_stop_in_training_is_saved(step, run, gpt, tokenizer, monkeypatch):
    """Prevents: Ctrl-C that loses the steps since the last checkpoint, or stops between the weights
    and the optimiser's state."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch, step)
    assert read_metadata(path)["step"] == str(step)
    results = []
    for _ in ("resumed", "from the start"):
        train.train_policy(run, "mah_dpo")
        weights = load_safetensors(run.file("mah_dpo/model.safetensors"))
        results.append((logged(run), {name: t.tolist() for name, t in weights.items()}))
        os.path.exists(path) and os.remove(path)
    assert results[0] == results[1]


def test_a_foreign_checkpoint_is_refused(run, gpt, tokenizer, monkeypatch):
    """Prevents: training that goes on with an optimiser's state of other settings or other data."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch)
    with open(path, "rb") as f:
        before = f.read()
    run.config.beta = 0.2
    other = Run(run.path, run.config)
    with pytest.raises(InputError, match="checkpoint.safetensors: saved with another configur"):
        train.train_policy(other, "mah_dpo")
    with open(path, "rb") as f:
        assert f.read() == before
    os.truncate(path, len(before) // 2)
    with pytest.raises(InputError, match="remove this file to start mah_dpo again"):
        train.train_policy(run, "mah_dpo")


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left on device"),
                                           (errno.EROFS, "Read-only file system")])
def test_a_write_that_fails_keeps_what_was_there(number, words, run, gpt, tokenizer, monkeypatch):
    """Prevents: a full disk that ends in a traceback, or in half a checkpoint where a whole one
    stood."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch)
    with open(path, "rb") as f:
        before = f.read()

    def fsync(file):
        raise OSError(number, words)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) as refused:
        train.save_checkpoint(run, "x", gpt, torch.optim.AdamW(gpt.parameters()), 1, [])
    assert f"{path}: cannot be written ({words}); what stood there is intact" in str(refused.value)
    with open(path, "rb") as f:
        assert f.read() == before and not os.path.exists(path + ".tmp")


def test_no_more_prompts_are_asked_of_a_world_than_it_must_give(monkeypatch):
    """Prevents: tutoring that must hold as many problems as have rollouts in maths, or three where
    one dialogue has three turns."""
    asked = []
    monkeypatch.setattr(World, "problems",
                        lambda self, split, n, rng: asked.append((self.name, split, n)))
    train.check_new(Config(objective="math_engagement,tutoring", n_prompts=90,
                              n_rollout_prompts=7000, n_test=5))
    assert asked == [("math", "test", 5), ("math", "train", 7000),
                     ("tutoring", "test", 5), ("tutoring", "train", 30)]
