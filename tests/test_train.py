"""train.py and evaluate.py: the stages' parts by hand, a tiny whole run from the command line, mistakes of the user."""
import collections
import contextlib
import copy
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

import data
import decode
import evaluate
import interop.score
import train
from conftest import NAMES, TINY
from data import DOMAINS, OBJECTIVES, RNG, InputError, Problem, World, read_json, run_command, write_json
from evaluate import (Conversation, converse, guided_responder, kl_to_sft, plain_responder,
                      seed_of, summary)
from mah_dpo import Pair, pair_logps
from model import GPTConfig, load_hf, load_safetensors, save_hf
from prm import Labelled, PRM, STEP, load_prm, pair_scores, step_scores
from train import Config, Cycle, Run, chat_example, read_command

pytestmark = pytest.mark.usefixtures("small_worlds")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SUM = Problem("4 + 5 - 2 = ?")
HELLO = [{"role": "user", "content": "4 + 5 - 2 = ?"}]


def ids_of(tokenizer, text, end=True):
    return tokenizer.encode(text) + ([tokenizer.eos_id] if end else [])


@pytest.fixture
def run(tmp_path):
    """A run directory without any stage, for calling the stages' parts."""
    return Run(str(tmp_path), Config(objective="math,honesty", device="cpu"))


# -- examples

CHAT = [*HELLO, {"role": "assistant", "content": "4 + 5 = 9"}, {"role": "user", "content": "and ?"},
        {"role": "assistant", "content": "answer 7"}]


def test_chat_example_masks_only_assistant_turns(tokenizer):
    """Prevents: SFT on the user's words or the role markers, or answers that never learn to end."""
    ids, mask = chat_example(tokenizer, CHAT)
    assert ids == tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    learnt = [i for i, m in zip(ids, mask) if m]
    assert learnt == ids_of(tokenizer, "4 + 5 = 9") + ids_of(tokenizer, "answer 7")
    assert len(mask) == len(ids)


def test_language_model_loss_is_the_masked_next_token_loss(run, gpt, tokenizer):
    """Prevents: a loss on masked tokens, on padding, or on the token itself instead of the next."""
    model = copy.deepcopy(gpt)
    examples = [chat_example(tokenizer, CHAT), chat_example(tokenizer, CHAT[:2])]
    losses = [-F.log_softmax(gpt.logits(gpt(torch.tensor([ids[:t]])))[0, -1], 0)[ids[t]].item()
              for ids, mask in examples for t in range(len(ids)) if mask[t]]
    logged, = train.language_model(run, "sft", model, examples, 1, 1e-3)
    assert logged["step"] == 0 and logged["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not torch.equal(model.embed.weight, gpt.embed.weight)


def test_cycle_draws_each_item_once_per_epoch():
    """Prevents: items drawn twice before others are drawn at all, also where a batch spans two epochs."""
    cycle = Cycle(list("abcde"), torch.Generator().manual_seed(0))
    taken = [item for n in (3, 4, 3, 15) for item in cycle.take(n)]
    assert len(taken) == 25
    assert all(sorted(taken[i:i + 5]) == list("abcde") for i in range(0, 25, 5))
    assert len({tuple(taken[i:i + 5]) for i in range(0, 25, 5)}) > 1
    assert Cycle(["x"], torch.Generator()).take(3) == ["x", "x", "x"]


# -- labels by hand

class OneSum(World):
    """A world of one problem with a verifier and a judge that can be checked by eye."""
    name, max_new_tokens, boundary = "math", 60, "newline"

    def problems(self, split, n, rng):
        return [SUM]

    def verify(self, problem, steps):
        return float(steps[-1] == "answer 7"), [float(s in ("4 + 5 = 9\n", "9 - 2 = 7\n")) for s in steps]

    def scores(self, problem, messages, response):
        return {"math_engagement": response.count("!") / 2}


def test_hindsight_by_hand(tokenizer):
    """Prevents: z or n of the response instead of each rollout's own, prefixes out of line, EOS counted as a step."""
    response = ids_of(tokenizer, "4 + 5 = 9\n9 - 2 = 8\nanswer 8")
    short, long = (ids_of(tokenizer, t) for t in ("4 + 5 = 9\n9 - 2 = 7\nanswer 7",
                                                  "4 + 5 = 9\n9 - 2 = 8\n8 - 1 = 7\n7 + 0 = 7\nanswer 7"))
    sets = [[response, short], [response, long], [response, response]]
    found = train.hindsight(OneSum(), SUM, tokenizer, [1.0, 0.0, None], sets, 0.9)
    assert found.tolist() == pytest.approx([1 + 0.9 ** 2 / 2, 0 + 0.9 ** 3 / 2, 0.0], abs=1e-6)


def test_verdicts_by_hand(tokenizer, monkeypatch):
    """Prevents: a judge that reads the prefix instead of the rollout, its threshold ignored, a tie called positive."""
    monkeypatch.setattr(train, "judge", lambda score, rng: score)
    chat = [ids_of(tokenizer, t) for t in ("4 + 5 = 9\nanswer 7", "4 + 5 = 9 . now it gets fun !\nanswer 7",
                                           "4 + 5 = 9 . now it gets fun !\n9 - 2 = 7 . you can do this !\nanswer 7")]
    sets = [[chat[1], chat[1]], [chat[2], chat[0]], [chat[0], chat[0]]]              # chat: scores 0, 0.5, 1
    find = lambda cut: train.verdicts(OneSum(), SUM, tokenizer, "math_engagement", sets, cut, RNG(0)).tolist()
    assert find(0.4) == [1.0, 0.0, 0.0]
    assert find(0.6) == [0.0, 0.0, 0.0]
    assert find(-0.1) == [1.0, 1.0, 1.0]


def test_label_rollouts_by_hand(run, gpt, tokenizer, monkeypatch):
    """Prevents: rollouts that do not start from the prefix, overrun the budget or are filed under another prefix."""
    text = ["4 + 5 = 9\n", "9 - 2 = 8\n", "answer 8"]
    response, calls = ids_of(tokenizer, "".join(text)), []
    tails = ["9 - 2 = 7\nanswer 7", "9 - 2 = 6\nanswer 6", "answer 7", "8 - 1 = 7\nanswer 7"]

    def scripted(model, prompts, *, max_new_tokens, samples=1, **options):
        calls.append((prompts, max_new_tokens, samples))
        return [response] if len(calls) == 1 else [ids_of(tokenizer, t) for t in tails]
    monkeypatch.setattr(train, "generate", scripted)
    monkeypatch.setattr(evaluate, "generate", scripted)
    run.config.rollouts = 3
    row, = train.label_rollouts(run, "sft", gpt, 0, OneSum(), "train", ["math_accuracy"], {})
    prompt, first, second = tokenizer.encode_chat(HELLO), len(tokenizer.encode(text[0])), len(tokenizer.encode(text[0] + text[1]))
    assert calls[1] == ([prompt + response[:first], prompt + response[:second]], [60 - first, 60 - second], 2)
    assert row.ids == prompt + response and row.split == "train"
    assert row.ends == [len(prompt) + first - 1, len(prompt) + second - 1, len(row.ids) - 1]
    values = [1 + 0.9 ** 2 / 3, (0.9 + 0.9 ** 2) / 3, 0.0]                           # M = 3, the response itself first
    assert row.targets == [{"math_accuracy": pytest.approx(v, abs=1e-6), **r} for v, r in zip(values, ({STEP: 1.0}, {STEP: 0.0}, {}))]


def test_pairs_prefer_the_better_rated(run, gpt, tokenizer, monkeypatch):
    """Prevents: chosen and rejected swapped, pairs of equal responses, pairs of another prompt's responses."""
    run.objectives = ["helpfulness", "honesty"]
    texts = ["the color is red . the size is tall . the job is baker .", "the color remains unknown .", "ok", "the home is lake ."]
    answer = lambda model, prompts, samples=1, **options: [ids_of(tokenizer, texts[i % 4]) for i in range(len(prompts) * samples)]
    monkeypatch.setattr(train, "generate", answer)
    monkeypatch.setattr(evaluate, "generate", answer)
    monkeypatch.setattr(train, "judge", lambda score, rng: score)
    run.config.n_prompts, run.config.n_samples = 10, 4
    pairs = train.sample_pairs(run, "sft", gpt, 0, DOMAINS["values"], "train", run.objectives)
    world, rng = DOMAINS["values"], run.rng("samples", "sft", "values", "train")
    problems = {tuple(tokenizer.encode_chat([{"role": "user", "content": p.prompt}])): p for p in world.problems("train", 10, rng)}
    assert {p.objective for p in pairs} == {"helpfulness", "honesty"}
    assert sum(p.objective == "helpfulness" for p in pairs) == 10 and all(p.split == "train" for p in pairs)
    for p in pairs:
        good, bad = (world.scores(problems[tuple(p.prompt)], [], tokenizer.decode(r))[p.objective] for r in (p.chosen, p.rejected))
        others = [world.scores(problems[tuple(p.prompt)], [], t)[p.objective] for t in texts]
        assert good == max(others) and bad == min(others) and good > bad


def test_both_guided_policies_make_the_labels(whole, tmp_path, monkeypatch):
    """Prevents: a PRM that has never seen what MAH-DPO says, or a mix of heads other than the one that is guided."""
    run, seen = Run(str(tmp_path), Config(objective=",".join(NAMES), device="cpu")), []
    for name in ("sft", "mah_dpo"):
        train.link(os.path.join(whole, name), run.file(name))
    for made in ("judge_turns", "sample_pairs", "label_rollouts"):
        monkeypatch.setattr(train, made, lambda run, name, model, mix, world, split, names, *cuts, made=made: seen.append(
            (made, name, len(model.heads), mix, split, names)) or [])
    train.make_labels(run)
    values, tutoring = NAMES[:2], NAMES[2:]
    assert [s for s in seen if s[4] == "dev"] == [
        ("judge_turns", "sft", 1, [1.0], "dev", tutoring),
        ("sample_pairs", "mah_dpo", 3, [1.0, 1.0, 0.0], "dev", values), ("judge_turns", "mah_dpo", 3, [0.0, 0.0, 1.0], "dev", tutoring)]
    assert len(seen) == 6 and train.read_rows(run.file("labels.jsonl"), Labelled) == []


# -- PRM training

@pytest.fixture
def prm(gpt):
    """A PRM on the tiny model whose outputs are a subset of the run's objectives, in another order."""
    return PRM(gpt.with_heads(()), [OBJECTIVES[o] for o in ("honesty", "math_accuracy")], torch.Generator().manual_seed(0))


def test_step_scores_read_the_labelled_tokens(run, prm):
    """Prevents: a score read one token early, from a neighbour's row, or a target under another objective's output."""
    rows = [Labelled([5, 6, 7, 8, 9], [1, 4], [{"math_accuracy": 0.5, "honesty": 1.0}, {"math_engagement": 1.0}], "train"),
            Labelled([50, 60, 70], [2], [{"math_accuracy": 2.0, "math_engagement": 0.0}], "train")]
    scores, targets = step_scores(prm, rows)
    expected = [prm(torch.tensor([r.ids[:e + 1]]))[0, -1] for r in rows for e in r.ends]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert str(targets.tolist()) == str([[1.0, 0.5], [math.nan, math.nan], [math.nan, 2.0]])


@torch.no_grad()
def test_pair_scores_compare_matching_steps(run, prm, tokenizer):
    """Prevents: Case C comparisons at the wrong tokens or between different pairs, or full responses left out."""
    prompt = tokenizer.encode_chat(HELLO)
    texts = [("the color is red . the size is tall .", "the color is red . the size remains unknown . ok ."),
             ("no idea .", "the job is pilot . the food is rice .")]
    pairs = [Pair("honesty", prompt[i:], ids_of(tokenizer, c), ids_of(tokenizer, r), "train") for i, (c, r) in enumerate(texts)]
    chosen, rejected, owner = pair_scores(prm, pairs)
    assert owner.tolist() == [0] * 6
    read = lambda pair, response, n: prm(torch.tensor([pair.prompt + response[:n]]))[0, -1, 0]
    ends = [[e + 1 for e in tokenizer.step_ends(r, "sentence")] for p in pairs for r in (p.chosen, p.rejected)]
    assert ends == [[5, 10, 11], [5, 10, 12, 13], [3, 4], [5, 10, 11]]
    # Pair 0: step 1 is equal and skipped, steps 2 and 3, then full. Pair 1: steps 1 and 2, then full.
    steps = [(0, 10, 10), (0, 11, 12), (0, 11, 13), (1, 3, 5), (1, 4, 10), (1, 4, 11)]
    expected = [[read(pairs[i], pairs[i].chosen, c), read(pairs[i], pairs[i].rejected, r)] for i, c, r in steps]
    torch.testing.assert_close(torch.stack([chosen, rejected], 1), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_train_prm_adds_up_the_parts_of_a_batch(run, gpt, monkeypatch):
    """Prevents: a part whose loss is the mean of its own labels, which then weigh more where few share a part."""
    save_hf(gpt, run.file("sft"), weights=0)
    targets = lambda i: [{"math_accuracy": 0.5 * i} | ({"math_engagement": 1.0} if i >= 3 else {}),
                         {"math_accuracy": 2.0, "math_engagement": 0.0, STEP: i % 2}]
    rows = [Labelled(list(range(5, 8 + 3 * i)), [1, 2 + 3 * i], targets(i), split) for split in ("train", "dev") for i in range(6)]
    train.write_rows(run.file("labels.jsonl"), rows)
    for name in train.PAIR_FILES:
        train.write_rows(run.file(name), [])
    vars(run.config).update(prm_steps=1, prm_batch=6)
    batches, parts, found = train.dealt_batches, [], []
    for tokens in (1000, 12):
        monkeypatch.setattr(train, "dealt_batches", lambda lengths, _: parts.append(batches(lengths, tokens)) or parts[-1])
        log = []
        monkeypatch.setattr(run, "log", lambda name, rows, file=None, log=log: log.extend(rows if file is None else []))
        train.train_prm(run, "prm", run.objectives[:2])
        found.append(log[0])
    assert [len(p) for p in parts] == [1, 5]
    names = [*run.objectives[:2], STEP]
    assert [found[0][o]["labels"] for o in names] == [12, 9, 6]
    for one, many in zip(*((row["gradient_norm"], *(row[o]["loss"] for o in names)) for row in found)):
        assert one == pytest.approx(many, rel=1e-4) and one > 0


def test_train_prm_leaves_no_source_without_its_share(run, gpt):
    """Prevents: a domain with few labels of which a batch by number of labels holds one in a hundred, and hardly learns."""
    save_hf(gpt, run.file("sft"), weights=0)
    accuracy, honesty = {"math_accuracy": 0.5, "math_engagement": 1.0}, {"honesty": 1.0}
    rows = [Labelled(list(range(5, 15)), [2, 4, 6, 9], [accuracy] * 4, "train") for _ in range(40)]
    rows += [Labelled(list(range(6, 12)), [5], [honesty], split) for split in ("train", "train", "train", "dev")]
    train.write_rows(run.file("labels.jsonl"), rows)
    for name in train.PAIR_FILES:
        train.write_rows(run.file(name), [])
    vars(run.config).update(prm_steps=1, prm_batch=20, prm_pairs=3)
    train.train_prm(run, "prm", run.objectives)
    first = json.loads(open(run.file("log.jsonl"), encoding="utf-8").readline())
    assert [first[o]["labels"] for o in run.objectives] == [4 * (20 * 160 // 163), 4 * (20 * 160 // 163), 3]


def test_train_prm_adds_step_correctness_and_drops_it(run, gpt):
    """Prevents: a --prm-step-weight that is read but not used, or a PRM that is saved with an output for training alone."""
    save_hf(gpt, run.file("sft"), weights=0)
    rows = [Labelled(list(range(5, 15)), [4, 9], [{"math_accuracy": 1.0, STEP: 0.0}, {"math_engagement": 1.0, STEP: 1.0}], split)
            for split in ("train", "dev") for _ in range(8)]
    train.write_rows(run.file("labels.jsonl"), rows)
    for name in train.PAIR_FILES:
        train.write_rows(run.file(name), [])
    saved = []
    for weight in (0.0, 60.0):
        vars(run.config).update(prm_steps=1, prm_batch=4, prm_step_weight=weight)
        train.train_prm(run, "prm", ["math_accuracy"])
        saved.append(load_prm(run.file("prm")))
        assert logged(run)[0][STEP] == {"loss": pytest.approx(0.69, abs=0.3), "labels": 8}
    assert [prm.names for prm in saved] == [["math_accuracy"]] * 2 and [len(prm.scale) for prm in saved] == [1, 1]
    assert not torch.equal(*(prm.backbone.embed.weight for prm in saved))
    train.train_prm(run, "prm_math_engagement", ["math_engagement"])        # no value model: nothing to be taught
    assert STEP not in logged(run)[-2]


def test_train_prm_gives_every_objective_the_loss_of_its_own_pairs(run, gpt, tokenizer):
    """Prevents: pairs of several objectives, which share a forward pass, under one output or with one mean."""
    save_hf(gpt, run.file("sft"), weights=0)
    pairs, outputs = [p for p in make_pairs(tokenizer, 4) if p.objective != "math_accuracy"], ["honesty", "math_engagement"]
    for name, rows in zip(["labels.jsonl", *train.PAIR_FILES], ([], pairs, [])):
        train.write_rows(run.file(name), rows)
    vars(run.config).update(prm_steps=1, prm_pairs=4)
    prm = PRM(run.load("sft").with_heads(()), [OBJECTIVES[o] for o in outputs], run.generator("prm", "weights"))
    train.train_prm(run, "prm", outputs)
    first = json.loads(open(run.file("log.jsonl"), encoding="utf-8").readline())
    for o in outputs:
        chosen, rejected, _ = pair_scores(prm, [p for p in pairs if p.objective == o])
        assert first[o] == {"loss": pytest.approx(-F.logsigmoid(chosen - rejected).mean().item(), rel=1e-4), "labels": len(chosen)}
    assert first["honesty"]["labels"] != first["math_engagement"]["labels"]


def test_measure_prm_by_hand(run, prm, monkeypatch, capsys):
    """Prevents: R^2 on targets of another output, a scale that is not the spread of the scores."""
    scores = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [3.0, 5.0]])
    targets = torch.tensor([[1.0, 1.0], [0.0, math.nan], [0.0, 3.0]])
    monkeypatch.setattr(train, "step_scores", lambda prm, rows: (scores, targets))
    held_out = train.measure_prm(prm, ([[Labelled([0], [0], [{}], "dev")]], []))["held_out"]
    assert held_out["math_accuracy"] == {"r2": pytest.approx(1 - 2.5 / 1.0), "n": 2}
    assert held_out["honesty"] == {"accuracy": pytest.approx(2 / 3), "commoner_label": pytest.approx(2 / 3), "n": 3}
    assert prm.scale.tolist() == pytest.approx([2.0, math.sqrt(4.5)])


# -- policy training

def make_pairs(tokenizer, n=6):
    texts = ["the color is red .", "the size remains unknown .", "the job may be pilot . ok .", "4 + 5 = 9\nanswer 9"]
    return [Pair(o, tokenizer.encode_chat([{"role": "user", "content": f"{i} + {i} = ?"}]), ids_of(tokenizer, texts[i % 4]),
                 ids_of(tokenizer, texts[(i + 1) % 4]), "train") for i in range(n) for o in ("math_accuracy", "math_engagement", "honesty")]


def test_pair_logps_keep_the_pairs_order(gpt, tokenizer):
    """Prevents: log-probabilities in the order of length, chosen and rejected swapped, another objective's head."""
    pairs = [p for p in make_pairs(tokenizer) if p.objective != "honesty"]
    found = pair_logps(gpt, pairs, gpt.config.objectives.index, tokenizer.pad_id, tokens=200)
    with torch.no_grad():
        for p, row in zip(pairs, found):
            head = gpt.heads[gpt.config.objectives.index(p.objective)].weight
            for response, value in zip((p.chosen, p.rejected), row):
                logps = F.log_softmax(gpt(torch.tensor([p.prompt + response]))[0, :-1] @ head.T, -1)
                expected = sum(logps[len(p.prompt) + t - 1, token] for t, token in enumerate(response))
                assert float(value) == pytest.approx(float(expected), abs=1e-3)


def test_train_policy_sends_each_pair_through_its_own_head(run, gpt, tokenizer, monkeypatch):
    """Prevents: pairs trained on another objective's head, an unbalanced batch, a reference of other pairs: before the
    first step exact copies lose ln 2 each."""
    save_hf(gpt, run.file("sft"), weights=0)
    pairs = make_pairs(tokenizer)
    for i, p in enumerate(pairs):
        p.chosen = ids_of(tokenizer, f"answer {i}")                      # each pair can be told by its chosen ids
    train.write_rows(run.file("pairs.jsonl"), pairs)
    run.config.dpo_steps, run.config.dpo_pairs, run.config.perturbation, seen = 2, 3, 0.0, []
    plain = train.policy_logps
    monkeypatch.setattr(train, "policy_logps", lambda model, packed, head: seen.append((packed, head)) or plain(model, packed, head))
    batches = train.dealt_batches
    monkeypatch.setattr(train, "dealt_batches", lambda lengths: batches(lengths, tokens=150))         # several parts a step
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    owner = {tuple(p.chosen): p.objective for p in pairs}
    counts = collections.Counter()
    for packed, head in seen:
        chosen = zip(packed.responses[:len(head)], packed.scored[:len(head)])
        names = [owner[tuple(ids[mask].tolist())] for ids, mask in chosen]
        assert head.tolist() == [run.objectives.index(n) for n in names]
        counts.update(names)
    assert len(seen) > 2 and counts == {o: 2 * 3 for o in run.objectives}       # two steps
    first = json.loads(open(run.file("log.jsonl"), encoding="utf-8").readline())
    assert all(first[o]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(first[o]["margin"]) < 1e-4 for o in run.objectives)
    trained, sft = load_hf(run.file("mah_dpo")), load_hf(run.file("sft"))
    assert trained.config.objectives == tuple(run.objectives)
    assert all(not torch.equal(h.weight, sft.heads[0].weight) for h in trained.heads)


def test_train_policy_weighs_the_objectives(run, gpt, tokenizer):
    """Prevents: an --alpha that is read but not used: an objective of weight 0 must leave its head alone."""
    save_hf(gpt, run.file("sft"), weights=0)
    train.write_rows(run.file("pairs.jsonl"), make_pairs(tokenizer))
    run.config.dpo_steps, run.config.dpo_pairs, run.config.perturbation, run.config.alpha = 1, 2, 0.0, "math_engagement=0"
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    trained, sft = load_hf(run.file("mah_dpo")), load_hf(run.file("sft")).heads[0].weight
    assert [torch.equal(h.weight, sft) for h in trained.heads] == [False, True, False]


def policy_run(run, gpt, tokenizer, **settings):
    """Give `run` an SFT model and pairs of its three objectives, two of each held out, and change its configuration."""
    save_hf(gpt, run.file("sft"), weights=0)
    pairs = make_pairs(tokenizer)
    for i, p in enumerate(pairs):
        p.split = "dev" if i >= 12 else "train"
    train.write_rows(run.file("pairs.jsonl"), pairs)
    vars(run.config).update({"dpo_steps": 3, "dpo_pairs": 2} | settings)
    return pairs


def logged(run):
    return rows_of(run.file("log.jsonl"))


def test_the_log_shows_every_objective_in_training_and_development(run, gpt, tokenizer):
    """Prevents: a run that goes wrong for one objective and looks fine on average, or on the pairs that it trains on."""
    pairs = policy_run(run, gpt, tokenizer)
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    metrics = {"loss", "margin", "accuracy", "chosen", "rejected", "kl"}
    steps, dev = ([r for r in logged(run) if r.get("split") == split] for split in (None, "dev"))
    assert [r["step"] for r in steps] == [0, 2] and [r["step"] for r in dev] == [0, 1, 2, 3]
    assert all(set(r[o]) == metrics | {"gradient_norm"} for r in steps for o in run.objectives)
    assert all(set(r[o]) == metrics for r in dev for o in run.objectives)
    for r in steps:         # a head's gradient is a part of the whole
        assert 0 < sum(r[o]["gradient_norm"] ** 2 for o in run.objectives) < r["gradient_norm"] ** 2
    model, held_out = load_hf(run.file("mah_dpo")), [p for p in pairs if p.split == "dev"]
    moved = pair_logps(model, held_out, model.config.objectives.index, tokenizer.pad_id) - train.reference_logps(run, pairs)[12:]
    for i, o in enumerate(run.objectives):
        assert dev[-1][o]["chosen"] == pytest.approx(float(moved[i::3, 0].mean()), abs=1e-5)
        assert dev[-1][o]["kl"] == pytest.approx(float((moved[i::3] ** 2).mean() / 2), abs=1e-5)


def test_an_objective_without_development_pairs_is_left_out_of_their_log(run, gpt, tokenizer):
    """Prevents: NaN in log.jsonl, which is no JSON, or a zero that looks like a measurement."""
    pairs = policy_run(run, gpt, tokenizer)
    train.write_rows(run.file("pairs.jsonl"), [p for p in pairs if (p.objective, p.split) != ("honesty", "dev")])
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    dev = [r for r in logged(run) if r.get("split") == "dev"]
    assert dev and all(set(r) == {"stage", "step", "split", "math_accuracy", "math_engagement"} for r in dev)


@pytest.mark.parametrize("what, name", [("loss", "dpo_honesty"), ("gradient", "dpo_honesty"), ("loss", "mah_dpo")])
def test_training_that_diverges_names_its_examples(what, name, run, gpt, tokenizer, monkeypatch):
    """Prevents: NaN weights that are saved and found out in the tables; a stop that does not say which example to look at; a
    good checkpoint lost to it."""
    pairs = policy_run(run, gpt, tokenizer, checkpoint_every=1, dpo_steps=5)
    plain, save, saved = train.policy_logps, train.save_checkpoint, []
    line = next(i for i, p in enumerate(pairs) if p.objective == "honesty") + 1
    prompt = torch.tensor(pairs[line - 1].prompt)
    broken = {"loss": lambda pi: pi * math.nan, "gradient": lambda pi: pi + (pi * 0).sqrt()}[what]    # 0 * infinity

    def policy_logps(model, packed, head):
        pi = plain(model, packed, head)
        bad = (packed.ids[:, :len(prompt)] == prompt).all(1) & (len(saved) > 0)
        return torch.stack([broken(p) if b else p for p, b in zip(pi.T, bad)], 1)
    monkeypatch.setattr(train, "policy_logps", policy_logps)
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: saved.append(args[4]) or save(*args))
    with pytest.raises(InputError) as refused:
        train.train_policy(run, name, *{"dpo_honesty": (["policy"], ["honesty"]), "mah_dpo": (run.objectives, run.objectives)}[name])
    where = f"{run.file('pairs.jsonl')}:{line} (honesty)"
    assert f"{name}, step {saved[-1]}: the loss or its gradient is not finite for {where}; this step was not" in str(refused.value)
    kept = load_safetensors(run.file("checkpoint.safetensors"))
    assert not os.path.exists(run.file(name)) and all(bool(t.isfinite().all()) for t in kept.values())


def test_modpo_margins_by_hand(run, gpt, tokenizer, monkeypatch):
    """Prevents: a margin of the wrong sign, with the pair's own reward in it, without beta, or across domains."""
    pairs = make_pairs(tokenizer, 1)                                     # one pair each: accuracy, engagement, honesty
    reference = torch.tensor([[-5.0, -4.0], [-3.0, -7.0], [-2.0, -2.0]])
    values = {"math_accuracy": {"math_engagement": [-2.0, -9.0]}, "math_engagement": {"math_accuracy": [-4.0, -6.0]}}
    monkeypatch.setattr(train, "reference_logps", lambda *args: reference)
    monkeypatch.setattr(run, "load", lambda name: types.SimpleNamespace(name=name.removeprefix("dpo_"), tokenizer=tokenizer))
    monkeypatch.setattr(train, "pair_logps", lambda model, rows, *args: torch.tensor([values[model.name][p.objective] for p in rows]))
    # w = 1/2 and beta = 0.1 times (log-ratio of chosen - log-ratio of rejected) under the other objective's policy.
    expected = [0.05 * ((-4 + 5) - (-6 + 4)), 0.05 * ((-2 + 3) - (-9 + 7)), 0.0]
    assert train.modpo_margins(run, pairs).tolist() == pytest.approx(expected, abs=1e-6)


# -- measures

def test_summary_hand_values():
    """Prevents: a population's standard deviation, or one not divided by sqrt(n)."""
    assert summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "stderr": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert summary([4.0]) == {"mean": 4.0, "stderr": 0.0, "n": 1}


def test_seeds_depend_on_seed_and_purpose():
    """Prevents: stages that share a stream, so that one more draw in one changes all later ones."""
    assert seed_of(0, "sft") == seed_of(0, "sft")
    assert len({seed_of(s, *what) for s in (0, 1) for what in (("sft",), ("base",), ("test", "math"), ("test", "values"))}) == 8


def talk(*turns):
    return types.SimpleNamespace(turns=[(before, [], response) for before, response in turns])


def test_kl_to_sft(gpt, tokenizer, monkeypatch):
    """Prevents: a KL over prompt or padding, of the wrong direction, or estimated from the samples: exact, per token and per
    answer, turns averaged before conversations; another one where the logits do not fit at once."""
    talks = [talk(([400, 5, 6], [7, 8, 9, 10]), ([400, 5, 6, 7], [8])), talk(([400, 50], [60]), ([9], [8, 7]))]
    assert kl_to_sft(gpt, gpt.heads[0].weight, gpt, talks, tokenizer.pad_id) == [[pytest.approx(0.0, abs=1e-6)] * 2] * 2
    other, expected = gpt.heads[1].weight, ([], [])
    with torch.no_grad():
        for c in talks:
            sums = []
            for before, _, response in c.turns:
                values = []
                for t in range(len(response)):
                    h = gpt(torch.tensor([before + response[:t]]))[0, -1]
                    log_pi, log_ref = F.log_softmax(other @ h, 0), F.log_softmax(gpt.heads[0].weight @ h, 0)
                    values.append(float((log_pi.exp() * (log_pi - log_ref)).sum()))
                sums.append((sum(values) / len(values), sum(values)))
            for kind, values in zip(expected, zip(*sums)):
                kind.append(sum(values) / 2)
    found = kl_to_sft(gpt, other, gpt, talks, tokenizer.pad_id)
    assert found == [pytest.approx(e, rel=1e-4) for e in expected] and min(found[0]) > 0.01
    monkeypatch.setattr(evaluate, "LOGITS", 3 * len(other))
    assert kl_to_sft(gpt, other, gpt, talks, tokenizer.pad_id) == [pytest.approx(f) for f in found]


def test_majority_vote_and_tokens_drawn(gpt, tokenizer, monkeypatch):
    """Prevents: a vote over other prompts' samples, a minority's answer, rivals of guidance whose cost is not counted."""
    texts = ["answer 3", "4 + 5 = 9\nanswer 7", "answer 7", "answer 1", "answer 2", "answer 1"]
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, samples, **options: [ids_of(tokenizer, t) for t in texts])
    talks = [types.SimpleNamespace(ids=[1], drawn=0), types.SimpleNamespace(ids=[2], drawn=0)]
    chosen = plain_responder(gpt, OneSum(), 0, 0.7, None, samples=3)(talks)
    assert [tokenizer.decode(r[:-1]) for r in chosen] == [texts[1], texts[3]] and all(r[-1] == tokenizer.eos_id for r in chosen)
    assert [c.drawn for c in talks] == [sum(len(ids_of(tokenizer, t)) for t in part) for part in (texts[:3], texts[3:])]
    monkeypatch.undo()
    prm = PRM(gpt.with_heads(()), [OBJECTIVES["math_accuracy"]], torch.Generator().manual_seed(0))
    prm.backbone.tokenizer = tokenizer
    c = Conversation(SUM, tokenizer)
    steps, plain = [], evaluate.guided_decode
    monkeypatch.setattr(evaluate, "guided_decode", lambda *a, **k: [steps.extend(r.steps) or r for r in plain(*a, **k)])
    guided_responder(gpt, prm, OneSum(), [1.0, 0.0], "math_accuracy", 0.7, torch.Generator().manual_seed(0), K=3)([c])
    assert c.drawn == sum(len(ids) for s in steps for ids in s.candidates) and all(len(s.candidates) == 3 for s in steps)


def test_reranking_chooses_among_whole_answers(gpt, tokenizer, monkeypatch):
    """Prevents: a rival of guidance by steps that is guidance by steps, or that the PRM does not choose."""
    prm = PRM(gpt.with_heads(()), [OBJECTIVES["math_accuracy"]], torch.Generator().manual_seed(0))
    prm.backbone.tokenizer, found, plain = tokenizer, [], evaluate.guided_decode
    monkeypatch.setattr(evaluate, "guided_decode", lambda *a, **k: found.append(plain(*a, **k)) or found[-1])
    world = types.SimpleNamespace(boundary=tokenizer.boundary_masks("newline"), max_new_tokens=20, turns=1)
    world.boundary[0][:] = True                           # every token ends a step
    for boundary in (None, "turn"):
        guided_responder(gpt, prm, world, [1.0, 0.0], "math_accuracy", 0.7, torch.Generator().manual_seed(0), K=3,
                         boundary=boundary)([Conversation(SUM, tokenizer)])
    (by_step,), (whole,) = found
    step, = whole.steps
    assert len(by_step.steps) == 20 and whole.ids == step.candidates[max(range(3), key=step.scores.__getitem__)]


def tutoring_problem():
    return DOMAINS["tutoring"].problem(RNG(4))


def test_conversation_ids_are_the_chat_of_its_messages(tokenizer):
    """Prevents: ids that drift from what training saw: a missing end of turn (also behind an answer that was cut off),
    a marker twice, the reply left out."""
    world, problem = DOMAINS["tutoring"], tutoring_problem()
    c, pieces = Conversation(problem, tokenizer), None
    assert c.ids == c.new_ids == tokenizer.encode_chat(c.messages)
    for text, end in (("yes . good try !", True), ("not quite .", False), ("ok .", True)):
        before = c.ids
        c.answer(ids_of(tokenizer, text, end), world, tokenizer, RNG(0))
        pieces = c.turns[-1]
        assert pieces[0] == before and pieces[2] == ids_of(tokenizer, text, end)
        if c.messages[-1]["role"] == "user":
            assert c.ids == tokenizer.encode_chat(c.messages) == before + pieces[2] + c.new_ids
    assert len(c.turns) == 3 and [m["role"] for m in c.messages] == ["user", "assistant"] * 3
    assert [len(m) for _, m, _ in c.turns] == [1, 3, 5]


def test_conversation_scores_average_over_turns(tokenizer):
    """Prevents: later turns judged without what was said before, or only the last turn counted."""
    world, c = DOMAINS["tutoring"], Conversation(tutoring_problem(), tokenizer)
    for text in ("what comes next ?", "what comes next ?", "good try ! can you say why ?"):
        c.answer(ids_of(tokenizer, text), world, tokenizer, RNG(0))
    assert c.scores(world, tokenizer)["tutor_engagement"] == pytest.approx((0.6 + 0.0 + 1.0) / 3)     # asked before: 0


def test_guided_conversations_equal_re_encoding(gpt, tokenizer):
    """Prevents: a carried state that differs from the conversation it stands for: three turns, ragged, some cut off."""
    model = copy.deepcopy(gpt).double()
    with torch.no_grad():
        for head in model.heads:
            head.weight[tokenizer.eos_id] *= 2                           # so that some answers do end
    prm = PRM(gpt.with_heads(()), [OBJECTIVES[o] for o in ("tutor_accuracy", "tutor_engagement")], torch.Generator().manual_seed(0)).double()
    prm.backbone.tokenizer = tokenizer
    world, problems = DOMAINS["tutoring"], DOMAINS["tutoring"].problems("test", 5, RNG(1))
    seeded = lambda: torch.Generator().manual_seed(2)
    carried = converse(world, problems, tokenizer, guided_responder(model, prm, world, [0.5, 0.5], "unified", 0.9, seeded(), K=3), 7)
    generator = seeded()
    fresh = converse(world, problems, tokenizer, lambda cs: [g.ids for g in decode.guided_decode(
        model, prm, [c.ids for c in cs], boundary="turn", K=3, weights=[0.5, 0.5], guide="unified",
        max_new_tokens=world.max_new_tokens, temperature=0.9, generator=generator)], 7)
    assert [c.turns for c in carried] == [c.turns for c in fresh]
    ended = {r[-1] == tokenizer.eos_id for c in carried for *_, r in c.turns}
    assert ended == {True, False}


def test_guided_conversations_in_batches(gpt, tokenizer):
    """Prevents: a batch of conversations that goes on from another batch's state."""
    prm = PRM(gpt.with_heads(()), [OBJECTIVES["tutor_accuracy"]], torch.Generator().manual_seed(0))
    prm.backbone.tokenizer = tokenizer
    world, problems = DOMAINS["tutoring"], DOMAINS["tutoring"].problems("test", 5, RNG(1))
    play = lambda size: [c.turns for c in converse(world, problems, tokenizer, guided_responder(
        gpt, prm, world, [0.5, 0.5], "unified", 0.0, None, K=1, batch=size), 7)]
    assert play(2) == play(256)


def test_pair_metrics_rows_by_hand():
    """Prevents: pairs of all objectives in each one's row, a margin without beta, an accuracy that counts ties, or compares
    with the reference where it should not."""
    pairs = [Pair(o, [0], [1], [2], "dev") for o in ("honesty", "helpfulness", "honesty", "honesty")]
    logps = torch.tensor([[-3.0, -5.0], [-1.0, -2.0], [-4.0, -2.0], [-2.0, -6.0]])
    reference = torch.tensor([[-4.0, -7.5], [-1.0, -2.0], [-6.0, -3.0], [-2.0, -6.0]])     # Delta = -1.5, 0, 1, 0
    rows = evaluate.pair_metrics_rows("p", logps, reference, pairs, 0.1, 7)
    assert [(r["policy"], r["domain"], r["weights"], r["seed"]) for r in rows] == [
        ("p", "pairs:honesty", {"honesty": 1.0}, 7), ("p", "pairs:helpfulness", {"helpfulness": 1.0}, 7)]
    mean = {k: v["mean"] for k, v in rows[0]["metrics"].items()}
    loss = sum(math.log1p(math.exp(-x)) for x in (-0.15, 0.1, 0.0)) / 3
    assert mean == pytest.approx({"loss": loss, "margin": -0.05 / 3, "logp_accuracy": 2 / 3, "reward_accuracy": 1 / 3}, abs=1e-6)
    assert {k: v["mean"] for k, v in rows[1]["metrics"].items()} == pytest.approx({"loss": math.log(2), "margin": 0, "logp_accuracy": 1})


def test_too_many_prompts_are_a_users_mistake():
    """Prevents: a traceback for --n-test or --n-prompts beyond what a small world holds."""
    small = OneSum()
    small.problem = lambda rng: SUM
    with pytest.raises(InputError, match="fewer than 3 distinct .* prompts; ask for less"):
        World.problems(small, data.split_of(SUM.prompt), 3, RNG(0))


def test_no_more_prompts_are_asked_of_a_world_than_it_must_give(tmp_path, monkeypatch):
    """Prevents: tutoring that must hold as many problems as have rollouts in maths, or three where one dialogue has three turns."""
    asked = []
    monkeypatch.setattr(World, "problems", lambda self, split, n, rng: asked.append((self.name, split, n)))
    train.check_inputs(Run(str(tmp_path), Config(objective="math_engagement,tutoring", n_prompts=90, n_rollout_prompts=7000, n_test=5)))
    assert asked == [("math", "test", 5), ("math", "train", 7000), ("tutoring", "test", 5), ("tutoring", "train", 30)]


def test_longest_conversations_leave_room(tokenizer):
    """Prevents: a run that dies in its last table because a talkative policy fills the context before the last turn."""
    limit, rng = GPTConfig(vocab_size=tokenizer.n_vocab).max_len, RNG(0)
    for world in DOMAINS.values():
        for problem in world.problems("train", 200, rng):
            c = Conversation(problem, tokenizer)
            for _ in range(world.turns):
                assert len(c.ids) + 1 <= limit
                c.answer([tokenizer.encode("ok")[0]] * min(world.max_new_tokens, limit - len(c.ids)), world, tokenizer, rng)


# -- a whole run

def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_run_writes_what_is_promised(whole):
    """Prevents: a result that the documentation promises and no file holds."""
    config = read_json(os.path.join(whole, "config.json"))
    assert [o["name"] for o in config["objectives"]] == NAMES and config["temperature"] == 0.7 and config["dpo_steps"] == 2 and config["seed"] == 0
    for name in ("base", "sft", "mah_dpo", "single_head_dpo", "modpo", *(f"dpo_{n}" for n in NAMES), "prm"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert os.path.getsize(os.path.join(whole, name, file)) > 0
    trained = {"base", "sft", "prm", "mah_dpo", "single_head_dpo", "modpo", *(f"dpo_{n}" for n in NAMES)}
    assert {r["stage"] for r in rows_of(os.path.join(whole, "log.jsonl"))} >= trained
    timings = rows_of(os.path.join(whole, "timings.jsonl"))
    assert len(timings) == 7 + len(trained) and all(r["seconds"] >= 0 for r in timings)
    assert {r["stage"] for r in timings if "tokens_per_second" in r} == trained
    assert not [f for _, _, files in os.walk(whole) for f in files if f.endswith(".tmp")]


def test_results_have_the_promised_rows(whole):
    """Prevents: a policy, a guide or a number that the tables lack, or a weight that does not belong to the row."""
    results = read_json(os.path.join(whole, "results.json"))
    for row in results:
        assert set(row) - {"sweep"} == {"policy", "weights", "guide", "domain", "metrics", "seed"} and row["seed"] == 0
        assert sum(row["weights"].values()) == pytest.approx(1.0)
        for m in row["metrics"].values():
            assert set(m) == {"mean", "stderr", "n"} and math.isfinite(m["mean"]) and m["stderr"] >= 0
    plain = ["base", "sft", "sft_greedy", "single_head_dpo", "modpo", "soup", "mah_dpo", "mah_dpo_greedy"]
    for domain, names in (("values", NAMES[:2]), ("tutoring", NAMES[2:])):
        rows = [r for r in results if r["domain"] == domain]
        assert all(r["metrics"][n]["n"] == 2 for r in rows for n in names)
        free = [r["policy"] for r in rows if r["guide"] is None]
        assert free[:8 + len(names)] == plain + [f"mah_dpo:{n}" for n in names]
        assert {(r["policy"], r["guide"]) for r in rows if r["guide"]} == \
            {(p, g) for p in ("sft", "mah_dpo") for g in (*names, "unified")}
        mix = next(r["weights"] for r in rows if r["policy"] == "mah_dpo")
        assert mix == {n: float(n in names) / len(names) for n in NAMES}
        assert next(r["weights"] for r in rows if r["policy"] == f"mah_dpo:{names[0]}") == {n: float(n == names[0]) for n in NAMES}
        assert all("kl" in r["metrics"] for r in rows if r["guide"] is None and "greedy" not in r["policy"])
        assert next(r for r in rows if r["policy"] == "sft")["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    sweep = [r["weights"]["helpfulness"] for r in results if r["domain"] == "values" and r["policy"] == "mah_dpo" and not r["guide"]]
    assert sweep == [0.5, 1.0, 0.5, 0.0]
    soups = [r["weights"] for r in results if r["domain"] == "values" and r["policy"] == "soup" and r.get("sweep") == NAMES[:2]]
    assert soups == [{"helpfulness": 1.0}, {"helpfulness": 0.5, "honesty": 0.5}, {"honesty": 1.0}]
    scores = rows_of(os.path.join(whole, "scores.jsonl"))
    for line, row in zip(scores, results):                 # what the means are made of, prompt by prompt
        assert all(line[k] == row[k] for k in ("policy", "guide", "domain", "weights"))
        assert {n: summary(v) for n, v in line["each"].items()} == row["metrics"]
    assert len(scores) == sum(not r["domain"].startswith("pairs:") for r in results)
    for m, guided in ((r["metrics"], r["guide"]) for r in results if "tokens" in r["metrics"]):
        assert (m["drawn"]["mean"] > m["tokens"]["mean"] + 1) if guided else m["drawn"] == m["tokens"]
    alone = next(r for r in results if r["policy"] == "mah_dpo:honesty")["metrics"]
    assert next(r for r in results if r.get("sweep") and r["weights"].get("honesty") == 1.0)["metrics"] == alone
    held_out = {(r["policy"], r["domain"]): r["metrics"] for r in results if r["domain"].startswith("pairs:")}
    assert set(held_out) == {(p, f"pairs:{n}") for p in ("base", "sft", "single_head_dpo", "modpo", "mah_dpo", "soup") for n in NAMES}
    for n in NAMES:
        assert held_out["sft", f"pairs:{n}"]["loss"]["mean"] == pytest.approx(math.log(2), abs=1e-6)
        assert held_out["sft", f"pairs:{n}"]["margin"]["mean"] == pytest.approx(0, abs=1e-6)


def test_preference_training_starts_at_ln2(whole):
    """Prevents: a reference scored differently from the policy anywhere between samples, files and the first step."""
    log = rows_of(os.path.join(whole, "log.jsonl"))
    for stage in ("single_head_dpo", *(f"dpo_{n}" for n in NAMES), "mah_dpo"):
        first = next(r for r in log if r["stage"] == stage)
        losses = [v["loss"] for v in first.values() if isinstance(v, dict)]
        # Heads of MAH-DPO carry a perturbation of 1e-3; all others are exact copies.
        assert losses == pytest.approx([math.log(2)] * len(losses), abs=0.05 if stage == "mah_dpo" else 1e-5)


def test_pairs_and_labels_are_well_formed(whole):
    """Prevents: train and held-out prompts mixed up, empty responses, labels outside the sequence."""
    pairs, labels = (rows_of(os.path.join(whole, f)) for f in ("pairs.jsonl", "labels.jsonl"))
    assert {p["objective"] for p in pairs} == set(NAMES) and {p["split"] for p in pairs} == {"train", "dev"}
    assert all(p["chosen"] and p["rejected"] and p["chosen"] != p["rejected"] for p in pairs)
    prompts = {s: {tuple(p["prompt"]) for p in pairs if p["split"] == s} for s in ("train", "dev")}
    assert not prompts["train"] & prompts["dev"]
    for row in labels:
        assert len(row["ends"]) == len(row["targets"]) and row["ends"][-1] == len(row["ids"]) - 1
        assert row["targets"] in [[{NAMES[2]: 0.0}], [{NAMES[2]: 1.0}]]


def test_report_and_picture(whole):
    """Prevents: tables without their rows, an SVG that no browser opens."""
    text = open(os.path.join(whole, "results.md"), encoding="utf-8").read()
    for part in ("### values, 2 test prompts", "### tutoring, 2 test prompts", "### values, a sweep of weights", "### findings (",
                 "### every comparison", "mah_dpo:honesty - modpo", "soup, swept", "| sft_greedy", "| soup",
                 "| mah_dpo:honesty", "| unified", "| honesty (", "±"):
        assert part in text
    root = ElementTree.parse(os.path.join(whole, "pareto.svg")).getroot()
    tag = lambda name: root.findall(".//{http://www.w3.org/2000/svg}" + name)
    assert [len(line.get("points").split()) for line in tag("polyline")] == [3, 3]
    assert len(tag("circle")) == 8 + 2 + 2 * 3 + 2 * 3


def weights_of(run):
    return {os.path.relpath(os.path.join(d, f), run): open(os.path.join(d, f), "rb").read()
            for d, _, files in os.walk(run) for f in files if f.endswith(".safetensors")}


def test_same_seed_same_bits(whole, tmp_path):
    """Prevents: a draw outside the run's generators: results and every weight repeat exactly."""
    again = str(tmp_path / "again")
    torch.manual_seed(12345)
    train.main(["--objective", ",".join(reversed(NAMES)), "--out", again, *TINY])
    assert read_json(os.path.join(again, "results.json")) == read_json(os.path.join(whole, "results.json"))
    assert weights_of(again) == weights_of(whole)


def test_resume_repeats_only_what_is_missing(whole, tmp_path, capsys):
    """Prevents: a resumed run that starts over, or whose later stages depend on what ran in the same process."""
    copied = str(tmp_path / "copied")
    shutil.copytree(whole, copied)
    for name in ("results.json", "results.md", "pareto.svg", "pair_metrics.json"):
        os.remove(os.path.join(copied, name))
    for name in ("mah_dpo", "prm", "dpo_honesty"):
        shutil.rmtree(os.path.join(copied, name))
    torch.manual_seed(777)
    train.main(["--resume", copied])
    assert capsys.readouterr().out.count("finished before") == 4        # base, sft, pairs, labels
    assert read_json(os.path.join(copied, "results.json")) == read_json(os.path.join(whole, "results.json"))
    assert weights_of(copied) == weights_of(whole)
    by_stage = lambda run: sorted(json.dumps(r) for r in rows_of(os.path.join(run, "log.jsonl")))
    assert by_stage(copied) == by_stage(whole)                          # nothing twice, nothing lost


def test_the_log_is_written_before_the_file_that_says_finished(whole, tmp_path, monkeypatch):
    """Prevents: a kill -9 right after a stage's last file, whose rows of log.jsonl then never come."""
    copied, late, plain = str(tmp_path / "copied"), [], Run.log
    shutil.copytree(whole, copied)
    last = {"base": "base/config.json", "sft": "sft/config.json", "judge": "labels.jsonl", "prm": "prm/config.json"}
    for name in last.values():
        os.remove(os.path.join(copied, name))

    def watch(run, stage, rows, *name):
        if not name and os.path.exists(run.file(last.pop(stage))):
            late.append(stage)
        plain(run, stage, rows, *name)
    monkeypatch.setattr(Run, "log", watch)
    train.main(["--resume", copied])
    assert not last and not late


def test_resume_of_nothing_starts_nothing(capsys, tmp_path, monkeypatch):
    """Prevents: --resume "$RUN" with an empty variable, which trains a new run with default options for minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_run", lambda *args: pytest.fail("a run was opened"))
    assert "--resume needs the directory of a run" in refused(["--resume", ""], capsys)


@pytest.mark.parametrize("content", ["[]", "null", "{}", "[{}]"])
def test_a_foreign_config_is_no_run(content, capsys, tmp_path):
    """Prevents: tracebacks of all three commands for a directory whose config.json is valid JSON but no run's."""
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "results.json").write_text("[]")
    for argv, main in ((["--resume", str(tmp_path)], train.main), ([str(tmp_path)], evaluate.main), ([str(tmp_path)], decode.main)):
        assert "config.json: not the configuration of a run" in refused(argv, capsys, main)


def test_resume_starts_an_empty_directory(tmp_path, monkeypatch, capsys):
    """Prevents: a command that was killed before it wrote anything and cannot be taken up by its own --resume."""
    monkeypatch.setattr(train, "run_stages", lambda run: None)
    empty = tmp_path / "empty"
    empty.mkdir()
    train.main(["--objective", "honesty", "--resume", str(empty), *TINY])
    claimed = train.claim(["--objective", "honesty", "--out", str(tmp_path / "claimed"), *TINY])       # killed while torch was imported
    train.main(["--resume", claimed])
    first, second = (read_json(os.path.join(d, "config.json")) for d in (empty, claimed))
    assert first | {"out": claimed} == second and [o["name"] for o in second["objectives"]] == ["honesty"] and second["dpo_steps"] == 2
    assert "no option with it but --device" in refused(["--resume", train.claim(["--out", claimed]), "--seed", "1"], capsys)


def files_of(run):
    """The names of all files in a directory."""
    return sorted(os.path.relpath(os.path.join(d, f), run) for d, _, names in os.walk(run) for f in names)


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the test forks")


def train_in_child(argv, renames=None, seconds=None):
    """train.main in a forked process which is killed, as by kill -9, at its renames-th rename (at an odd number before it, at an
    even one after it) or after that many seconds. -> its exit code, -9 if it was killed"""
    left, plain = [renames], os.replace

    def replace(a, b):
        left[0] -= 1
        if left[0] != 0 or renames % 2 == 0:
            plain(a, b)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        os.replace = replace if renames else plain
        run_command(lambda: train.main(argv))
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@needs_fork
def test_kill_9_loses_nothing(tmp_path):
    """Prevents: a kill at any moment after which --resume ends elsewhere than a run that nobody stopped: a draw that is
    repeated or left out, an optimiser without its past, half a file, a row of the log twice."""
    options = ["--objective", "honesty", *TINY, "--checkpoint-every", "1", "--base-steps", "5", "--prm-steps", "4"]
    calm, killed, rng, codes = str(tmp_path / "calm"), str(tmp_path / "killed"), random.Random(0), []
    train.main([*options, "--out", calm])
    while codes[-1:] != [0]:
        how = {"renames": rng.randint(1, 10)} if len(codes) % 3 else {"seconds": rng.uniform(0.1, 0.3)}
        codes.append(train_in_child(["--resume", killed] if os.path.exists(killed) else [*options, "--out", killed], **how))
    assert len(codes) > 10 and set(codes) == {0, -signal.SIGKILL}
    assert files_of(killed) == files_of(calm)
    for name in set(files_of(calm)) - {"config.json", "command.json", "timings.jsonl"}:     # these name the directory, or tell the time
        assert open(os.path.join(killed, name), "rb").read() == open(os.path.join(calm, name), "rb").read(), name


def stopped_in_training(run, gpt, tokenizer, monkeypatch, step=2):
    """A policy's training that gets SIGTERM in its second step of three, or another: it takes that step, saves and stops."""
    policy_run(run, gpt, tokenizer)
    plain, calls = train.gradient, []

    def gradient(*args):
        calls.append(args)
        if len(calls) == step:
            run.stop()
        return plain(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "gradient", gradient)
        train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    run.training = run.stopping = False
    return run.file("checkpoint.safetensors")


@pytest.mark.parametrize("step", [2, 3])
def test_a_stop_in_training_is_saved(step, run, gpt, tokenizer, monkeypatch):
    """Prevents: Ctrl-C that loses the steps since the last checkpoint, or stops between the weights and the optimiser's state."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch, step)
    assert train.read_metadata(path)["step"] == str(step)
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    resumed = open(run.file("mah_dpo/model.safetensors"), "rb").read(), open(run.file("log.jsonl")).read()
    os.remove(path)
    train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    assert resumed == (open(run.file("mah_dpo/model.safetensors"), "rb").read(), open(run.file("log.jsonl")).read())


@pytest.mark.parametrize("change", ["configuration", "data"])
def test_a_foreign_checkpoint_is_refused(change, run, gpt, tokenizer, monkeypatch):
    """Prevents: training that goes on with an optimiser's state, or a reference, of other settings or other pairs."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch)
    before = open(path, "rb").read()
    if change == "data":
        train.write_rows(run.file("pairs.jsonl"), make_pairs(tokenizer, 7))
        with pytest.raises(InputError, match="sft_logps.safetensors: computed for another pairs.jsonl, or in another --dtype"):
            train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
        os.remove(run.file("sft_logps.safetensors"))
    else:
        run.config.beta = 0.2
    with pytest.raises(InputError, match="checkpoint.safetensors: saved with another configuration or other data"):
        train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)
    assert open(path, "rb").read() == before
    os.truncate(path, len(before) // 2)
    with pytest.raises(InputError, match="remove this file to start mah_dpo again"):
        train.train_policy(run, "mah_dpo", list(run.objectives), run.objectives)


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")])
def test_a_write_that_fails_keeps_what_was_there(number, words, run, gpt, tokenizer, monkeypatch, capsys):
    """Prevents: a full disk that ends in a traceback, or in half a checkpoint where a whole one stood."""
    path = stopped_in_training(run, gpt, tokenizer, monkeypatch)
    before = open(path, "rb").read()
    run.config.checkpoint_every = 1

    def fsync(file):
        raise OSError(number, words)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(train, "read_command", lambda argv: (run.config, run.path, None))
        patch.setattr(train, "check_config", lambda config: None)
        patch.setattr(train, "open_run", lambda config, path: run)
        patch.setattr(train, "carry_out", lambda run: train.save_checkpoint(run, "x", gpt, torch.optim.AdamW(gpt.parameters()), 1, [], ""))
        assert f"{path}: cannot be written ({words}); what stood there is intact" in refused(["--resume", run.path], capsys)
    assert open(path, "rb").read() == before and not os.path.exists(path + ".tmp")


def test_a_stop_says_how_to_go_on(whole, tmp_path, capsys, monkeypatch):
    """Prevents: Ctrl-C or SIGTERM that end in a traceback, or leave a run which --resume cannot finish."""
    copied = str(tmp_path / "copied")
    shutil.copytree(whole, copied)
    for name in ("results.json", "pair_metrics.json", "modpo/config.json"):
        os.remove(os.path.join(copied, name))
    plain = train.train_policy

    def stop(run, name, *args):
        run.log(name, [{"half": "done"}])
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
    monkeypatch.setattr(train, "train_policy", stop)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", copied])
    assert stopped.value.code == 130 and f"python train.py --resume {copied}" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_policy", plain)
    open(os.path.join(copied, "labels.jsonl.tmp"), "w").close()         # as a kill may leave it
    train.main(["--resume", copied])
    assert weights_of(copied) == weights_of(whole) and files_of(copied) == files_of(whole)
    lines = lambda run: sorted(open(os.path.join(run, "log.jsonl")))
    assert lines(copied) == lines(whole)


@contextlib.contextmanager
def short_answers():
    """For what is about files, not about answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Math, "max_new_tokens", 12)
        patch.setattr(data.Values, "max_new_tokens", 12)
        yield


@pytest.fixture(scope="module")
def together(small_worlds, checkpoint, tmp_path_factory):
    """Two trainings, stopped in the second and resumed with two sweeps -> (directory, common options, output)."""
    common = ["--objective", "math_engagement,helpfulness,honesty", "--init", checkpoint, *TINY, "--k", "2"]
    out = str(tmp_path_factory.mktemp("seeds") / "run")
    with short_answers():
        with pytest.MonkeyPatch.context() as stop, pytest.raises(SystemExit):
            stop.setattr(train, "train_sft", stop_at(train.train_sft, 2))
            train.main([*common, "--seed", "3", "--seeds", "2", "--out", out])
        assert os.path.exists(os.path.join(out, "seed=4", "base")) and not os.path.exists(os.path.join(out, "results.json"))
        first, printed = weights_of(os.path.join(out, "seed=3")), io.StringIO()
        train.main(["--resume", out, "--sweep", "perturbation=0.001,0.5"])
        with contextlib.redirect_stdout(printed):
            train.main(["--resume", out, "--sweep", "n-rollout-prompts=9"])
        assert weights_of(os.path.join(out, "seed=3")) == first
        return out, common, printed.getvalue()


def test_seeds_are_trained_apart_and_reported_together(together):
    """Prevents: seeds that share weights or test prompts, tables that are not the means over the trainings."""
    out, _, printed = together
    assert "2 trainings, seeds 3, 4" in printed and "trainings.\n" in printed
    assert weights_of(os.path.join(out, "seed=3")) != weights_of(os.path.join(out, "seed=4"))
    mean, *each = (read_json(os.path.join(out, d, "results.json")) for d in ("", "seed=3", "seed=4"))
    for row, *same in zip(mean, *each, strict=True):
        assert row["seed"] == [3, 4] and all(row["policy"] == r["policy"] and row["domain"] == r["domain"] for r in same)
        for name, m in row["metrics"].items():
            a, b = (r["metrics"][name]["mean"] for r in same)
            assert m == {"mean": pytest.approx((a + b) / 2), "stderr": pytest.approx(abs(a - b) / 2), "n": 2}
    with short_answers():
        evaluate.main([out])
    assert read_json(os.path.join(out, "results.json")) == mean


def test_a_sweep_equals_runs_from_scratch(together, tmp_path):
    """Prevents: a variant that takes over what depends on the swept field, or trains with the run's own value or another seed's
    files; rows under the wrong value."""
    out, common, printed = together
    assert not os.path.exists(os.path.join(out, "perturbation=0.001"))        # the run itself has that value
    by_stage = lambda run: sorted(json.dumps(r) for r in rows_of(os.path.join(run, "log.jsonl")))
    for name, value in (("perturbation", "0.5"), ("n_rollout_prompts", "9")):
        scratch, variant = str(tmp_path / f"scratch-{name}"), os.path.join(out, f"{name}={value}", "seed=4")
        with short_answers():
            train.main([*common, "--out", scratch, "--seed", "4", "--" + name.replace("_", "-"), value, "--weight-steps", "0"])
        assert os.path.islink(os.path.join(variant, "sft")) and not os.path.islink(os.path.join(variant, "results.json"))
        for file in (*weights_of(scratch), "labels.jsonl"):
            assert open(os.path.join(variant, file), "rb").read() == open(os.path.join(scratch, file), "rb").read(), file
        assert read_json(os.path.join(variant, "results.json")) == read_json(os.path.join(scratch, "results.json"))
        assert by_stage(variant) == by_stage(scratch)
    lines = printed.split("### math, by perturbation")[1].split("###")[0].splitlines()
    rows = [re.split(r" *\| *", line)[1:5] for line in lines if line[:1] == "|"]
    values = lambda policy: [r[0] for r in rows if r[1:3] == [policy, "-"]]
    assert values("sft") == ["any"] and values("mah_dpo") == ["0.001", "0.5"]
    found = read_json(os.path.join(out, "perturbation=0.5", "results.json"))
    row = next(r for r in found if r["policy"] == "mah_dpo" and r["guide"] is None)["metrics"]["math_engagement"]
    assert next(r[3] for r in rows if r[:2] == ["0.5", "mah_dpo"]) == evaluate.cell(row)


@pytest.mark.parametrize("sweep, message", [
    ("gamma", "write FIELD=a,b,c"), ("seed=1,2", "with one of the fields dtype"), ("gamma=a,b", "'a' is no float"),
    ("alpha=math_accuracy=2;honesty=1", "no 'honesty' here"), ("k=0", "--k 0 is out of range"), ("n_test=9999999", "ask for less")])
def test_sweeps_that_cannot_work_leave_nothing_behind(sweep, message, capsys, tmp_path, monkeypatch):
    """Prevents: a sweep whose mistake shows after the first values have been trained."""
    monkeypatch.chdir(tmp_path)

    def problems(self, split, n, rng):
        if n > 10**6:
            raise InputError("ask for less")
    monkeypatch.setattr(World, "problems", problems)
    assert message in refused(["--objective", "math", "--sweep", sweep], capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_other_variants_are_not_taken_over(tmp_path, monkeypatch, links):
    """Prevents: a variant of the PRM's learning rate that is taken for a PRM, and linked into the next variant; a copy, where
    there are no links, that a kill has left half made."""
    source, run = (Run(str(tmp_path / d), Config(objective="honesty", device="cpu")) for d in ("a", "b"))
    for name in ("sft", "prm", "dpo_honesty", "mah_dpo", "prm_steps=3", "dpo_pairs=3"):
        os.makedirs(source.file(name))
        write_lines(source.file(f"{name}/config.json"), [{"of": name}])
    os.makedirs(run.file("sft.tmp"))
    write_lines(source.file("log.jsonl"), [{"stage": s} for s in ("base", "prm", "mah_dpo")])
    if not links:
        monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "a privilege is not held")))
    train.take_over(run, source, "k")
    assert sorted(set(os.listdir(run.path)) - {"sft.tmp"}) == ["dpo_honesty", "log.jsonl", "mah_dpo", "prm", "sft"]
    assert links or "sft.tmp" not in os.listdir(run.path)
    for name in ("sft", "prm", "dpo_honesty", "mah_dpo"):
        assert os.path.islink(run.file(name)) == links and rows_of(run.file(f"{name}/config.json")) == [{"of": name}]
    assert [r["stage"] for r in rows_of(run.file("log.jsonl"))] == ["base", "prm", "mah_dpo"]


def test_every_option_is_swept_or_cannot_be():
    """Prevents: a new option that --sweep does not know, or takes over files for that depend on it."""
    fixed = {"objective", "out", "init", "data", "seed", "seeds", "device", "grad_checkpoint", "weight_steps",
             "checkpoint_every"}
    assert set(train.UNTOUCHED) | fixed == {f.name for f in fields(Config)}
    assert sum(len(names.split()) for names in train.WRITTEN.values()) == len(train.UNTOUCHED)


def stop_at(work, n):
    """The n-th call of a stage's work is a Ctrl-C."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return work(*args)
    return interrupted


def test_evaluate_command_measures_again(whole, tmp_path, capsys):
    """Prevents: an evaluate.py that disagrees with the run's own tables, or loses the held-out pairs."""
    copied = str(tmp_path / "copied")
    shutil.copytree(whole, copied)
    evaluate.main([copied])
    assert "### values" in capsys.readouterr().out
    assert read_json(os.path.join(copied, "results.json")) == read_json(os.path.join(whole, "results.json"))
    assert "not a finished run" in refused([str(tmp_path)], capsys, evaluate.main)
    assert "config.json: no such file" in refused([str(tmp_path)], capsys, decode.main)


@pytest.mark.parametrize("seed", ["-1", "1" + "0" * 30])
def test_decode_refuses_a_seed_out_of_range(whole, seed, capsys):
    """Prevents: torch's traceback for a seed that overflows."""
    assert f"--seed {seed} is out of range" in refused([whole, "--prompt", "hi", "--seed", seed], capsys, decode.main)


def test_standard_input_in_another_encoding(whole, monkeypatch, capsys):
    """Prevents: a traceback for a conversation that is piped in as Latin-1 where the locale says UTF-8."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "can't decode byte 0xe9" in refused([whole], capsys, decode.main)


def test_samples_side_by_side(whole, capsys):
    """Prevents: a policy whose responses are not shown, scores beside another's response, lines too long to read."""
    evaluate.main([whole, "--samples", "2"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("=== values, test prompt") == 2 == out.count("=== tutoring, test prompt")
    for name in ("base", "sft_greedy", "soup", "mah_dpo:honesty", "sft + helpfulness", "mah_dpo + unified"):
        assert len(re.findall(rf"^{re.escape(name)} +helpfulness \d.\d\d  honesty", out, re.M)) == 2
    bench, job = evaluate.Bench(whole), evaluate.Job("sft", {"sft": 1.0})
    talks, _ = bench.rollout("tutoring", job, bench.problems("tutoring", 2))
    block = out.split("=== tutoring, test prompt 2")[1].split("\nsft ")[1].split("\nsft_greedy")[0]
    assert f"tutor_engagement {talks[1].scores(bench.worlds['tutoring'], bench.tokenizer)['tutor_engagement']:.2f}" in block
    assert block.count("  > ") == 2 and "[cut off]" in block


def test_scoring_pairs_by_a_run(whole, tmp_path, capsys):
    """Prevents: a policy left out, rewards against another reference, pairs that count although the run was trained on them."""
    trained = [r["prompt"] for r in rows_of(os.path.join(whole, "pairs.jsonl")) if r["split"] == "train"]
    tokenizer, rng = load_hf(os.path.join(whole, "sft")).tokenizer, RNG(seed_of(0, "samples", "sft", "values", "train"))
    known = next(p for p in DOMAINS["values"].problems("train", 8, rng) if tokenizer.encode_chat(p.messages()) in trained)
    write_lines(tmp_path / "honesty.jsonl", [preference(1), preference(2), preference(3) | {"prompt": known.prompt}])
    interop.score.main([whole, str(tmp_path / "honesty.jsonl")])
    out = capsys.readouterr().out
    found = {c[1]: c[2:] for c in (re.split(r" *\| *", line) for line in out.splitlines() if line.startswith("|"))}
    assert list(found)[2:] == ["sft", "base", "single_head_dpo", "modpo", "dpo_honesty", "mah_dpo", "PRM honesty"]
    assert found["sft"][0] == "2" and found["sft"][1].startswith("0.693") and "1 rows left out: seen in training." in out
    assert found["mah_dpo"][3] != "-" and found["PRM honesty"][1] == "-"


def test_tables_measure_the_split_that_is_named(whole):
    """Prevents: tuning that looks at test prompts although --split dev was said."""
    bench = evaluate.Bench(whole)
    for split in ("test", "dev"):
        bench.config["split"] = split
        assert {data.split_of(p.prompt) for domain in bench.worlds for p in bench.problems(domain, 9)} == {split}


def test_soup_is_the_average_of_the_single_policies(whole):
    """Prevents: a soup with SFT, or with policies of other domains in it."""
    bench = evaluate.Bench(whole)
    models = [bench.model(f"dpo_{n}") for n in NAMES[:2]]
    mixed, parts = evaluate.average(models).state_dict(), [m.state_dict() for m in models]
    for k, v in mixed.items():
        torch.testing.assert_close(v, (parts[0][k] + parts[1][k]) / 2, atol=1e-6, rtol=0)
    assert not torch.equal(mixed["heads.0.weight"], parts[0]["heads.0.weight"])


def test_decode_talks_to_a_finished_run(whole, capsys):
    """Prevents: a run directory that the third command cannot read."""
    decode.main([whole, "--prompt", "seen the color is red . what do you know ?", "--max-new-tokens", "8", "--k", "2"])
    assert "step 1" in capsys.readouterr().out


# -- real data

@pytest.fixture(scope="module")
def checkpoint(gpt, tmp_path_factory):
    """A tiny Hugging Face directory that serves as --init."""
    directory = str(tmp_path_factory.mktemp("init"))
    save_hf(gpt, directory, weights=0)
    return directory


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        f.write("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def preference(i, chosen="the color is red .", rejected="no idea ."):
    return {"prompt": f"what is the color of {i} ?", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def pairs_dir(tmp_path):
    """--data for two objectives, one row too long for the context of 128 tokens, one objective with step labels."""
    directory = tmp_path / "pairs"
    directory.mkdir()
    for name in ("helpfulness", "honesty"):
        write_lines(directory / f"{name}.jsonl", [preference(i) for i in range(24)])
    with open(directory / "honesty.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(preference(99, chosen="the color is red . " * 40)) + "\n")
    write_lines(directory / "honesty.steps.jsonl",
                [{"prompt": f"what of {i} ?", "steps": ["the color is red .", " no idea ."], "labels": [1, 0]} for i in range(24)])
    return str(directory)


def test_real_data_run(pairs_dir, checkpoint, tmp_path, capsys):
    """Prevents: a run on someone's own files that misses a stage, hides dropped rows, or reports on training pairs."""
    out = str(tmp_path / "run")
    train.main(["--objective", "helpfulness,honesty", "--init", checkpoint, "--data", pairs_dir, "--out", out, "--prm", "each", *TINY])
    printed = capsys.readouterr()
    assert "; 1 left out: longer than the context of 128 tokens" in printed.out
    rows = read_json(os.path.join(out, "results.json"))
    pairs = [Pair(**r) for r in rows_of(os.path.join(out, "pairs.jsonl"))]
    assert len(pairs) == 48
    dev = {o: sum(p.objective == o and p.split == "dev" for p in pairs) for o in ("helpfulness", "honesty")}
    assert {(r["policy"], r["domain"], r["metrics"]["loss"]["n"]) for r in rows} == \
        {(p, f"pairs:{o}", n) for p in ("base", "sft", "single_head_dpo", "modpo", "mah_dpo", "soup") for o, n in dev.items()}
    always = {"loss", "margin", "logp_accuracy"}              # the reference has no margin to be right or wrong about
    assert all(set(r["metrics"]) == always | ({"reward_accuracy"} if r["policy"] == "mah_dpo" else set())
               for r in rows if r["policy"] in ("sft", "mah_dpo"))
    assert load_prm(os.path.join(out, "prm_honesty")).names == ["honesty"]
    assert load_prm(os.path.join(out, "prm_helpfulness")).names == ["helpfulness"]
    assert not os.path.exists(os.path.join(out, "prm"))
    base, given = (load_safetensors(os.path.join(d, "model.safetensors")) for d in (os.path.join(out, "base"), checkpoint))
    assert all(torch.equal(base[k], given[k]) for k in given)
    labels = [Labelled(**r) for r in rows_of(os.path.join(out, "labels.jsonl"))]
    assert len(labels) == 24 and all(r.targets == [{"honesty": 1.0}, {"honesty": 0.0}] for r in labels)
    quality = {k: v for r in rows_of(os.path.join(out, "log.jsonl")) for k, v in r.get("held_out", {}).items()}
    assert "accuracy" in quality["honesty"] and "pair_accuracy" in quality["helpfulness"]
    decode.main([out, "--prompt", "what is the color ?", "--guide", "honesty", "--weights", "helpfulness=1,honesty=3",
                 "--max-new-tokens", "6", "--k", "2"])
    assert "->" in capsys.readouterr().out


def test_one_objective_run(checkpoint, tmp_path, capsys):
    """Prevents: a run that needs several objectives, or rollouts (Case A) that only work beside a verifier: one head, one
    PRM output, no sweep, and the third command answers."""
    out = str(tmp_path / "run")
    train.main(["--objective", "math_engagement", "--init", checkpoint, "--out", out, *TINY])
    rows = [r for r in read_json(os.path.join(out, "results.json")) if r["domain"] == "math"]
    assert [r["policy"] for r in rows if r["guide"] is None] == \
        ["base", "sft", "sft_greedy", "single_head_dpo", "modpo", "soup", "mah_dpo", "mah_dpo_greedy", "mah_dpo:math_engagement"]
    assert {r["guide"] for r in rows} == {None, "math_engagement", "unified"}
    judged, = [r for r in rows_of(os.path.join(out, "log.jsonl")) if r["stage"] == "judge" and r["objective"] == "math_engagement"][:1]
    assert 0.5 <= judged["agreement"] <= 1 and 0 <= judged["positive"] <= 1
    labels = rows_of(os.path.join(out, "labels.jsonl"))
    assert labels and all(t in ({"math_engagement": 0.0}, {"math_engagement": 1.0}) for r in labels for t in r["targets"])
    ElementTree.parse(os.path.join(out, "pareto.svg"))
    assert rows[-1]["weights"] == {"math_engagement": 1.0} and load_hf(os.path.join(out, "modpo")).config.objectives == ("policy",)
    decode.main([out, "--prompt", SUM.prompt, "--max-new-tokens", "6", "--weights", "math_engagement=1"])
    assert "step 1" in capsys.readouterr().out


# -- the command line

def test_one_flag_per_field():
    """Prevents: a setting that the command line cannot reach, or that is read as text."""
    for f in fields(Config):
        value = {"objective": "math", "prm": "each"}.get(f.name, type(f.default)(3))
        config, *rest = read_command(["--" + f.name.replace("_", "-"), *([] if type(f.default) is bool else [str(value)])])
        assert getattr(config, f.name) == value and type(getattr(config, f.name)) is type(f.default) and rest == [None, None]
        assert all(getattr(config, g.name) == g.default for g in fields(Config) if g is not f)


def test_fast_derives_the_rest():
    """Prevents: --fast that is slow because a setting was forgotten, or that overrules what was asked for."""
    config, *_ = read_command(["--fast", "--dpo-steps", "77"])
    assert config.dpo_steps == 77 and config.temperature == 0.7
    assert (config.base_steps, config.sft_steps, config.n_prompts, config.n_test) == \
        tuple(f.metadata["fast"] for n in ("base_steps", "sft_steps", "n_prompts", "n_test") for f in fields(Config) if f.name == n)
    assert all(f.metadata["fast"] < f.default for f in fields(Config) if f.metadata["fast"] is not None)


@pytest.mark.parametrize("module", [train, evaluate, decode])
def test_help_tells_every_option(module, capsys):
    """Prevents: a --help that crashes on a per cent sign or leaves an option unexplained."""
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and module.__doc__.splitlines()[0][:40] in text
    for f in fields(Config) if module is train else ():
        assert "--" + f.name.replace("_", "-") in text and " ".join(f.metadata["help"].split()[:2]) in " ".join(text.split())


def refused(argv, capsys, main=train.main):
    """Run a command that must end in exit code 2 with one line on stderr -> that line."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(argv))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize("argv, message", [
    (["--objective", "cleverness"], "unknown objective 'cleverness'"), (["--objective", "math,cleverness"], "cleverness"),
    (["--objective", ","], "unknown objective"), (["--temperature", "0"], "--temperature 0.0 is out of range"),
    (["--temperature", "nan"], "--temperature nan"), (["--n-samples", "1"], "--n-samples 1"), (["--dpo-steps", "0"], "--dpo-steps 0"),
    (["--beta", "-1"], "--beta -1.0"), (["--seed", "-1"], "--seed -1"), (["--dpo-lr-heads", "inf"], "--dpo-lr-heads inf"),
    (["--prm", "both"], "choose unified or each"), (["--data", "."], "--data needs --init"),
    (["--init", "nowhere"], "nowhere: no such directory"), (["--device", "abacus"], "--device abacus: not available"), (["--device", "meta"], "--device meta: not available"),
    (["--resume", "nowhere"], "nowhere/config.json: no such file"), (["--dtype", "fp8"], "choose fp32 or bf16")])
def test_bad_options_are_refused(argv, message, capsys, tmp_path, monkeypatch):
    """Prevents: tracebacks, and half-written run directories, for values that cannot work."""
    monkeypatch.chdir(tmp_path)
    extra = [] if "--objective" in argv or "--resume" in argv else ["--objective", "math"]
    assert message in refused([*argv, *extra], capsys)
    assert os.listdir(tmp_path) == []


def test_resume_refuses_what_is_no_run(capsys, checkpoint, tmp_path):
    """Prevents: --resume on a model's directory, which has a config.json too; or with options that it would ignore."""
    assert "not the configuration of a run" in refused(["--resume", checkpoint], capsys)
    for option in (["--seed", "1"], ["--fast"]):
        assert "no option with it but --device" in refused(["--resume", checkpoint, *option], capsys)


def test_a_run_at_work_is_refused(whole, capsys):
    """Prevents: two commands that write the same files: --resume while the processes of a killed torchrun still go on."""
    with train.alone(whole):
        assert "a train.py is at work there already" in refused(["--resume", whole], capsys)
    train.main(["--resume", whole])


@pytest.mark.parametrize("edit, message", [
    ({"sft_steps": "four"}, "--sft-steps 'four' is no int"), ({"objective": "valuez"}, "unknown objective 'valuez'"),
    ({"prm": "both"}, "choose unified or each"), ({"beta": -1}, "--beta -1 is out of range"), ({}, "--sft-batch 64: 3 processes"),
    ({"prm_step_weight": None}, "not the configuration of a run of this version (prm_step_weight)")])
def test_resume_checks_the_saved_configuration(edit, message, capsys, monkeypatch, tmp_path):
    """Prevents: a traceback, or training with a batch that the processes share unevenly, when a run is resumed with an edited
    or older config.json or with other processes; and a run that is refused for the default options, which are not its own."""
    monkeypatch.setattr(train, "ranks", lambda: 3)
    monkeypatch.setattr(train, "carry_out", lambda run: print("goes on"))
    saved = vars(Config(objective="honesty", init="moved", beta=1)) | {"objectives": [vars(OBJECTIVES["honesty"])]}
    path = str(tmp_path / "config.json")
    write_json(path, {k: v for k, v in (saved | edit).items() if v is not None})
    assert message in refused(["--resume", str(tmp_path)], capsys)
    write_json(path, saved | {"sft_batch": 6, "dpo_pairs": 6})
    train.main(["--resume", str(tmp_path)])
    assert capsys.readouterr().out == "goes on\n"


@pytest.mark.parametrize("rows, message", [
    ([preference(1), "{not json"], "honesty.jsonl:2: not JSON"), ([preference(1), {"prompt": "a", "chosen": "b"}], "honesty.jsonl:2"),
    ([preference(1, "same", "same")], "honesty.jsonl:1: 'chosen' equals 'rejected'"), ([], "no rows"), (None, "no such file"),
    ([preference(i, "red " * 200) for i in range(20)], "0 fit the context of 128"), ([preference(1)], "1 fit the context")])
def test_broken_data_leaves_nothing_behind(rows, message, capsys, checkpoint, tmp_path):
    """Prevents: a run directory that has to be deleted by hand after a mistake in the data; the message names the line."""
    if rows is not None:
        write_lines(tmp_path / "honesty.jsonl", rows)
    out = str(tmp_path / "out")
    assert message in refused(["--objective", "honesty", "--init", checkpoint, "--data", str(tmp_path), "--out", out], capsys)
    assert not os.path.exists(out)


def test_broken_step_labels_leave_nothing_behind(capsys, checkpoint, pairs_dir, tmp_path):
    """Prevents: step labels that are read for the first time after minutes of training."""
    write_lines(os.path.join(pairs_dir, "honesty.steps.jsonl"), [{"prompt": "a", "steps": ["x"], "labels": [1, 0]}])
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit):
        run_command(lambda: train.main(["--objective", "honesty", "--init", checkpoint, "--data", pairs_dir, "--out", out]))
    assert "honesty.steps.jsonl:1: 1 steps but 2 labels" in capsys.readouterr().err
    assert not os.path.exists(out)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("with_data", [True, False])
def test_incomplete_checkpoints_leave_nothing_behind(missing, with_data, capsys, checkpoint, pairs_dir, tmp_path):
    """Prevents: a traceback, or a run directory, for an --init that lacks a file; the message names the file."""
    broken, out = str(tmp_path / "broken"), str(tmp_path / "out")
    shutil.copytree(checkpoint, broken)
    os.remove(os.path.join(broken, missing))
    options = ["--data", pairs_dir] if with_data else []
    assert missing in refused(["--objective", "honesty", "--init", broken, *options, "--out", out], capsys)
    assert not os.path.exists(out)


@pytest.mark.parametrize("name, change, words", [
    ("config.json", {"max_position_embeddings": 40}, "a context of 40 tokens is too short"),
    ("tokenizer_config.json", {"chat_template": "{{ odd }}"}, "chat_template '{{ odd }}'")])
def test_unfit_checkpoints_leave_nothing_behind(name, change, words, capsys, checkpoint, tmp_path):
    """Prevents: an --init without --data that is refused in stage 2, with a run directory left that never can go on."""
    unfit, out = str(tmp_path / "unfit"), str(tmp_path / "out")
    shutil.copytree(checkpoint, unfit)
    path = os.path.join(unfit, name)
    data.write_json(path, read_json(path) | change)
    assert words in refused(["--objective", "honesty", "--init", unfit, "--fast", "--out", out], capsys)
    assert not os.path.exists(out)


def test_a_taken_name_gets_the_next_number(tmp_path):
    """Prevents: a new run that overwrites an old one."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("old")
    (tmp_path / "run-2").write_text("a file is taken, too")
    assert train.claim(["--fast", "--out", str(out)]) == f"{out}-3"
    assert read_json(f"{out}-3/command.json") == ["--fast", "--out", str(out)]
    assert (out / "config.json").read_text() == "old" and os.listdir(out) == ["config.json"]


def test_default_names_follow_the_objective(tmp_path, monkeypatch):
    """Prevents: a comma or an empty string in a directory's name; a directory for a command that starts no run."""
    monkeypatch.chdir(tmp_path)
    assert train.claim(["--objective", "honesty,math"]) == os.path.join("runs", "honesty+math")
    assert train.claim(["--obj=math", "--seed", "3"]) == os.path.join("runs", "math") and train.claim([]) == os.path.join("runs", "all")
    assert [train.claim(argv) for argv in (["--resume", "runs/math"], ["-h"], ["--fast", "--help"], ["--out"])] == [None] * 4
    assert sorted(os.listdir("runs")) == ["all", "honesty+math", "math"]


def test_commands_end_with_one_line_and_code_2(checkpoint, tmp_path):
    """Prevents: a real shell that sees a traceback, or exit code 0 or 1, for a user's mistake."""
    write_lines(tmp_path / "honesty.jsonl", [preference(1), preference(2), "{\"prompt\": "])
    commands = [(["train.py", "--objective", "cleverness"], "unknown objective 'cleverness'"),
                (["train.py", "--objective", "honesty", "--data", str(tmp_path)], "--data needs --init"),
                (["train.py", "--objective", "honesty", "--init", checkpoint, "--data", str(tmp_path)], "honesty.jsonl:3: not JSON")]
    started = [subprocess.Popen([sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for argv, _ in commands]
    for process, (_, message) in zip(started, commands):
        out, err = process.communicate()
        assert process.returncode == 2 and message in err
        assert err.count("\n") == 1 and err.startswith("error: ") and out == ""
    assert os.listdir(tmp_path) == ["honesty.jsonl"]


def test_objectives_that_cannot_be_trained_are_refused(run, gpt, monkeypatch):
    """Prevents: an endless loop over an objective whose only pairs were held out."""
    run.objectives, run.domains = ["helpfulness"], ["values"]
    held_out = Pair("helpfulness", [1], [2], [3], "dev")
    monkeypatch.setattr(train, "load_hf", lambda *args, **options: gpt)
    monkeypatch.setattr(train, "sample_pairs", lambda *args: [held_out])
    with pytest.raises(InputError, match="no preference pair for helpfulness: .*all wrong, or all right"):
        train.make_pairs(run)
    with pytest.raises(AssertionError):
        Cycle([], torch.Generator())


def test_alpha_weighs_objectives():
    """Prevents: an --alpha that is accepted and changes nothing, or names an objective that the run does not have."""
    config, *_ = read_command(["--objective", "values", "--alpha", "honesty=2"])
    train.check_config(config)
    with pytest.raises(InputError, match="--alpha: no 'math_accuracy'"):
        train.check_config(read_command(["--objective", "values", "--alpha", "math_accuracy=2"])[0])


def test_rows_of_another_kind_are_refused(tmp_path):
    """Prevents: a traceback for a pairs.jsonl that somebody has written by hand."""
    write_lines(tmp_path / "pairs.jsonl", [{"objective": "honesty", "prompt": [1], "chosen": [2], "rejected": [3]}])
    with pytest.raises(InputError, match="pairs.jsonl:1: not a row that this run has written, which has the fields .*split"):
        train.read_rows(str(tmp_path / "pairs.jsonl"), Pair)


def test_readmes_commands_are_accepted(capsys):
    """Prevents: a command of README that has an option of an earlier version, or a value that is refused."""
    text = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read().replace("\\\n", " ")
    found = re.findall(r"(?:^|[` ])(?:python|torchrun --nproc_per_node \d+) ((?:train|decode|evaluate)\.py [^`\n]*)", text, re.M)
    known = {}
    for name, command in (("decode.py", decode.main), ("evaluate.py", evaluate.main)):
        with pytest.raises(SystemExit):
            command(["--help"])
        known[name] = capsys.readouterr().out
    for name, *argv in (shlex.split(line.replace("...", ""), comments=True) for line in found):
        if name != "train.py":
            assert all(f"{a} " in known[name] for a in argv if a.startswith("--")), argv
        elif "--help" not in argv:
            config, resume, sweep = read_command(argv)
            train.check_config(config)
            assert not sweep or train.read_sweep(sweep, config)
    assert len(found) > 15


def test_policies_see_the_same_pairs(whole):
    """Prevents: baselines that train on other pairs, or another order of them, than MAH-DPO: an unpaired comparison."""
    run = Run(whole, Config(**{k: v for k, v in read_json(os.path.join(whole, "config.json")).items() if k != "objectives"}))
    draws = [Cycle(list(range(20)), run.generator("pairs", o)).take(30) for o in ("honesty", "honesty", "helpfulness")]
    assert draws[0] == draws[1] != draws[2]


# -- real questions

def test_questions_go_through_the_whole_pipeline(gpt, tokenizer, tmp_path, capsys):
    """Prevents: questions that are sampled but never verified, a value model without rollouts, tables of training questions,
    a row left out in silence."""
    base, rows_dir = str(tmp_path / "base"), tmp_path / "data"
    save_hf(gpt.with_heads(["policy"]), base, weights=0)
    rows_dir.mkdir()
    rows = [{"question": f"{a} + {b} = ?", "answer": f"a {a} + {b} = {a + b}\n#### {a + b if a % 2 else 7}"} for a in range(9) for b in range(9)]
    write_lines(rows_dir / "math_accuracy.jsonl", rows + [{"question": "4 " * 200, "answer": "#### 1"}, {"question": "?", "answer": ""},
                                                          *rows[:3]])
    write_lines(rows_dir / "math_engagement.jsonl", [{"prompt": f"go {i}", "chosen": "nice work so far !", "rejected": "no"} for i in range(30)])
    out = str(tmp_path / "run")
    train.main(["--objective", "math", "--init", base, "--data", str(rows_dir), "--out", out, "--max-new-tokens", "24", *TINY,
                "--sft-steps", "150", "--sft-lr", "3e-3", "--n-prompts", "40", "--n-samples", "4", "--epochs", "200"])
    printed = capsys.readouterr().out
    assert "pairs: " in printed and "train, " in printed
    assert "; 1 left out: the answer is empty; 1 left out: too long for the context with an answer; 3 left out: asked before\n" in printed
    seen = evaluate.seen_in_training(evaluate.Bench(out))
    for question in (r["question"] for r in rows):
        message = {"role": "user", "content": question}
        assert seen(tokenizer.encode_chat([message])) == (data.split_of(json.dumps([message])) == "train")
    pairs, labels = train.read_rows(f"{out}/pairs.jsonl", Pair), train.read_rows(f"{out}/labels.jsonl", Labelled)
    answers = {tuple(tokenizer.encode_chat([{"role": "user", "content": r["question"]}])): r["answer"].split()[-1] for r in rows}
    mine = [p for p in pairs if p.objective == "math_accuracy"]
    right = lambda p, ids: data.same_answer(data.final_answer(tokenizer.decode(ids)), answers[tuple(p.prompt)])
    assert mine and all(right(p, p.chosen) and not right(p, p.rejected) for p in mine)
    assert {r.split for r in labels} == {"train", "dev"}
    assert all([*t] == ["math_accuracy"] and 0 <= t["math_accuracy"] <= 1 for r in labels for t in r.targets)
    results = json.loads(open(f"{out}/results.json", encoding="utf-8").read())
    tables = [r for r in results if r["domain"] == "math"]
    assert {(r["policy"], r["guide"]) for r in tables} >= \
        {("sft", None), ("sft_vote", None), ("mah_dpo_vote", None), ("sft", "math_accuracy"), ("mah_dpo", "math_accuracy"),
         ("mah_dpo_greedy", None), ("sft_rerank", "math_accuracy"), ("mah_dpo_rerank", "math_accuracy")}
    assert all(set(r["metrics"]) <= {"math_accuracy", "tokens", "drawn", "kl", "kl/answer"} for r in tables)
    assert all(0 <= r["metrics"]["math_accuracy"]["mean"] <= 1 for r in tables)
    assert {r["metrics"]["math_accuracy"]["n"] for r in tables} == {2}


def test_bf16_starts_at_ln2(whole, tmp_path):
    """Prevents: a reference in another precision than the policy's, whose rounding looks like a margin before training."""
    copied = str(tmp_path / "copied")
    shutil.copytree(whole, copied)
    for name in ("results.json", "pair_metrics.json", "sft_logps.safetensors"):
        os.remove(os.path.join(copied, name))
    for name in ("mah_dpo", "single_head_dpo", "modpo"):
        shutil.rmtree(os.path.join(copied, name))
    config = read_json(os.path.join(copied, "config.json"))
    json.dump(config | {"dtype": "bf16", "perturbation": 0.0}, open(os.path.join(copied, "config.json"), "w"))
    train.main(["--resume", copied])
    first = next(r for r in rows_of(os.path.join(copied, "log.jsonl")) if r["stage"] == "mah_dpo")
    assert all(abs(first[o][side]) < 1e-4 for o in NAMES for side in ("margin", "chosen", "rejected"))
    assert all(first[o]["loss"] == pytest.approx(math.log(2), abs=1e-5) for o in NAMES)
