"""interop/score.py: score real outputs.

    python -m interop.score FILE                  models' answers to questions, verified
    python -m interop.score RUN|PRM_DIR FILE      labelled steps: ProcessBench's F1 of a PRM's output
                                                  preference pairs: accuracy of a PRM's output, and
                                                  of the implicit rewards of a run's policies

What a file holds shows in its rows. A run is asked only about prompts it was not trained on.
"""
import argparse
import json
import os
import statistics
import zlib
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from data import RNG, InputError, read_json, read_jsonl, run_command
from evaluate import Bench, cells, own_logps, pair_metrics_rows, seed_runs, summary, table
from interop.answers import final_answer, same_answer
from interop.datasets import DATA_HELP, read_outputs, read_preferences, read_steps
from interop.parallel import join_processes
from mah_dpo import encode_pair
from model import pick_device
from prm import encode_steps, load_prm, score_sequences


def score_answers(path):
    """Models' answers to questions, verified -> a row per model, {why rows were left out: n}."""
    found, left = {}, {}
    for question, said in read_outputs(path, left):
        for name, text in said.items():
            right = same_answer(final_answer(text), question.answer)
            found.setdefault(name, []).append(float(right))
    return [{"policy": m, "metrics": {"accuracy": summary(v)}} for m, v in found.items()], left


# -- first errors

def first_error_f1(sums):
    """ProcessBench's F1 (arXiv 2412.06559): the harmonic mean of two accuracies, on responses that
    err and on right ones. sums: of `outcome` over responses."""
    errs, found, right, passed = sums
    a = found / errs if errs else 0.0
    b = passed / right if right else 0.0
    return 2 * a * b / (a + b) if a + b else 0.0


def outcome(scores, label, cut):
    """A response's first step that scores below `cut` is taken for its first error. label: the
    first wrong step, or -1 -> four times 0 or 1: it errs, and that is found; it is right, and
    passes."""
    guess = next((t for t, score in enumerate(scores) if score < cut), -1)
    errs, hit = label >= 0, guess == label
    return float(errs), float(errs and hit), float(not errs), float(not errs and hit)


def f1_at(responses, cut):
    """F1 of responses, (step scores, label, fold) each, at a threshold."""
    rows = [outcome(scores, label, cut) for scores, label, _ in responses]
    return first_error_f1(map(sum, zip(*rows)))


def localise(responses):
    """`outcome` of every response. Its threshold is that of the largest F1, among some 200 step
    scores, on the other fold (0 or 1): no response has a say in its own."""
    cuts = []
    for fold in (0, 1):
        others = [response for response in responses if response[2] != fold]
        steps = sorted(chain.from_iterable(scores for scores, _, _ in others))
        cuts.append(max(steps[::max(1, len(steps) // 200)], key=partial(f1_at, others)))
    return [outcome(scores, label, cuts[fold]) for scores, label, fold in responses]


def bootstrap_f1(rows, times=1000):
    """A summary of all rows' F1. Its standard error is its spread over samples of as many rows,
    drawn with replacement: the bootstrap."""
    values, n = torch.tensor(rows, dtype=torch.float64), len(rows)             # (n, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(times):
        index = torch.randint(n, (n,), generator=generator)
        drawn.append(first_error_f1(values[index].sum(0).tolist()))
    f1 = first_error_f1(values.sum(0).tolist())
    return {"mean": f1, "stderr": statistics.stdev(drawn), "n": n}


def score_first_errors(scorer, path):
    """ProcessBench's measure of a PRM's output on labelled steps -> a row, what was left out."""
    prm, tokenizer = scorer.prm, scorer.prm.backbone.tokenizer
    boundary = prm.outputs[prm.names.index(scorer.output)].boundary
    kept, left = [], {"seen in training": 0, "too long": 0}
    for row in read_steps(path):
        encoded = encode_steps(tokenizer, row.prompt, row.steps, boundary, prm.marker)
        label = next((t for t, right in enumerate(row.labels) if right < 0.5), -1)
        fold = zlib.crc32(json.dumps(row.prompt).encode()) % 2
        if scorer.seen(tokenizer.encode_chat(row.prompt)):
            left["seen in training"] += 1
        elif not encoded or len(encoded[0]) > prm.backbone.config.max_len:
            left["too long"] += 1
        else:
            kept.append((encoded, label, fold))
    if len({(fold, label >= 0) for _, label, fold in kept}) < 4:
        raise InputError(f"{path}: {len(kept)} responses are left ({left}); each half of them, "
                         "by hash of the prompt, must hold right and wrong ones")
    scores = score_sequences(prm, scorer.output, [encoded for encoded, _, _ in kept])
    rows = localise([(s, label, fold) for s, (_, label, fold) in zip(scores, kept)])
    metrics = {"errors found": summary([found for errs, found, _, _ in rows if errs]),
               "right ones passed": summary([passed for _, _, right, passed in rows if right]),
               "F1": bootstrap_f1(rows)}
    return [{"policy": f"PRM {scorer.output}", "metrics": metrics}], left


# -- preference pairs

def score_preferences(scorer, path):
    """Accuracy on real pairs: of the implicit rewards of a run's policies, and of a PRM's output
    on whole responses -> rows, what was left out."""
    bench, prm, output, seen = scorer
    reader, left = bench.sft if bench else prm.backbone, {}
    both = [(p, encode_pair(p, reader)) for p in read_preferences(path, output, left)]
    fit = [(p, pair) for p, pair in both if pair]
    fresh = [(p, pair) for p, pair in fit if not seen(pair.prompt)]
    left["seen in training"] = len(fit) - len(fresh)
    left["too long or alike"] = len(both) - len(fit)
    if not fresh:
        raise InputError(f"{path}: no pair is left ({left})")
    rows = []
    if bench:
        pairs = [pair for _, pair in fresh]
        reference, beta = own_logps(bench.sft, pairs), bench.config["beta"]
        for name in ("sft", "base", "single_head_dpo", "modpo", f"dpo_{output}", "mah_dpo"):
            logps = own_logps(bench.model(name), pairs)
            rows += pair_metrics_rows(name, logps, reference, pairs, beta, bench.seed)
    scores = []
    for which in ("chosen", "rejected"):       # each as a single step
        steps = [encode_steps(reader.tokenizer, p.prompt, [getattr(p, which)], "turn", prm.marker)
                 for p, _ in fresh]
        scores.append(score_sequences(prm, output, steps))
    right = summary([float(chosen > rejected) for chosen, rejected in zip(*scores)])
    return rows + [{"policy": f"PRM {output}", "metrics": {"reward_accuracy": right}}], left


# -- command

class Scorer(NamedTuple):
    """What is scored on a file."""
    bench: Bench           # of a run, or None
    prm: object
    output: str            # one of the PRM's
    seen: partial          # was_seen in the run's training


def was_seen(prompts, labelled, ids):
    """Are a prompt's ids among these, or the beginning of a labelled sequence?"""
    return tuple(ids) in prompts or any(row[:len(ids)] == ids for row in labelled)


def seen_in_training(bench):
    """A function of a prompt's ids: did the run train on a response to it? (On any of the training
    questions in --data, it may have.)"""
    trained = []
    for name in ("pairs.jsonl", "mah_dpo_pairs.jsonl", "labels.jsonl"):
        found = [row for _, row in read_jsonl(os.path.join(bench.run, name))]
        trained += [row for row in found if row["split"] == "train"]
    prompts = {tuple(row["prompt"]) for row in trained if "prompt" in row}
    labelled = [row["ids"] for row in trained if "ids" in row]
    for world in bench.worlds.values() if bench.config["data"] else ():
        for problem in world.problems("train", len(world.rows), RNG(0)):
            prompts.add(tuple(bench.tokenizer.encode_chat(problem.messages())))
    return partial(was_seen, prompts, labelled)


def open_scorer(directory, path, output, verified, device):
    """A run's or a PRM's directory -> Scorer. The output is the one given; of a run else that which
    the file is named after, as in --data, or if answers are `verified` in it, the value model."""
    if directory is None:
        raise InputError(f"{path}: name the run or the PRM that is to be scored: "
                         f"python -m interop.score RUN {path}")
    bench, prm, seen = None, None, partial(was_seen, (), ())
    if "seeds" in read_json(os.path.join(directory, "config.json")):           # a run
        bench = Bench(seed_runs(directory)[0], device)
        seen, objectives = seen_in_training(bench), bench.objectives
        named = os.path.basename(path).split(".")[0]
        fit = [o.name for o in objectives if named == o.name]
        fit += [o.name for o in objectives if verified and o.case == "verifiable"]
    else:
        prm = load_prm(directory).to(pick_device(device or "auto")).eval()
        if prm.backbone.tokenizer is None:
            raise InputError(f"{directory}: no tokenizer.json, nor vocab.json and merges.txt: "
                             "without one it reads no texts")
        objectives, fit = prm.outputs, prm.names
    output = output or next(iter(fit), None)
    known = [o.name for o in objectives]
    if output not in known:
        raise InputError(f"{path}: say with --objective what it is about: {', '.join(known)}")
    return Scorer(bench, prm or bench.prm(output), output, seen)


@torch.no_grad()
def score(directory, path, output, device):
    """Print how the outputs in a file fare."""
    fields = next(read_jsonl(path), ("", {}))[1].keys()
    if {"label", "labels"} & fields:
        scorer = open_scorer(directory, path, output, True, device)
        rows, left = score_first_errors(scorer, path)
    elif {"chosen", "completions"} & fields:
        scorer = open_scorer(directory, path, output, False, device)
        rows, left = score_preferences(scorer, path)
    else:
        rows, left = score_answers(path)
    metrics = dict.fromkeys(chain.from_iterable(row["metrics"] for row in rows))
    lines = []
    for row in rows:
        n = max(metric["n"] for metric in row["metrics"].values())
        lines.append({"scored": row["policy"], "n": str(n)} | cells(row, metrics, ()))
    print(table(path, lines))
    reasons = [f"{n} rows left out: {why}." for why, n in left.items() if n]
    print("Mean ± half the 95 % interval.", *reasons)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=DATA_HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="[RUN] FILE", help="what is scored (a run, or "
                        "a PRM's directory; answers need none), and the file")
    parser.add_argument("--objective", help="what FILE is about, where its name does not tell")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    if len(args.paths) > 2:
        raise InputError("give a run and one file: python -m interop.score RUN FILE")
    join_processes()
    directory = args.paths[0] if len(args.paths) == 2 else None
    score(directory, args.paths[-1], args.objective, args.device)


if __name__ == "__main__":
    run_command(main)
