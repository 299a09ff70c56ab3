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
    rows = []
    for name, right in found.items():
        rows.append({"policy": name, "metrics": {"accuracy": summary(right)}})
    return rows, left


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
    errs, hit = float(label >= 0), float(guess == label)
    return errs, errs * hit, 1 - errs, (1 - errs) * hit


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
        # Every step's score could be the threshold; some 200 of them will do.
        stride = max(1, len(steps) // 200)
        cuts.append(max(steps[::stride], key=partial(f1_at, others)))
    return [outcome(scores, label, cuts[fold]) for scores, label, fold in responses]


def bootstrap_f1(rows, times=1000):
    """A summary of all rows' F1. Its standard error is its spread over samples of as many rows,
    drawn with replacement: the bootstrap."""
    values = torch.tensor(rows, dtype=torch.float64)                           # (n, 4)
    n = len(rows)
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
        # Two halves by prompt: solutions of one problem are alike, and stay together.
        fold = zlib.crc32(json.dumps(row.prompt).encode()) % 2
        if scorer.seen(tokenizer.encode_chat(row.prompt)):
            left["seen in training"] += 1
        elif not encoded or len(encoded[0]) > prm.backbone.config.max_len:
            left["too long"] += 1
        else:
            kept.append((encoded, label, fold))
    kinds = {(fold, label >= 0) for _, label, fold in kept}
    if len(kinds) < 4:
        raise InputError(f"{path}: {len(kept)} responses are left ({left}); each half of them, "
                         "by hash of the prompt, must hold right and wrong ones")
    sequences, labels, folds = zip(*kept)
    scores = score_sequences(prm, scorer.output, sequences)
    rows = localise(list(zip(scores, labels, folds)))
    found = [found for errs, found, _, _ in rows if errs]
    passed = [passed for _, _, right, passed in rows if right]
    metrics = {"errors found": summary(found), "right ones passed": summary(passed),
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
    # A policy's implicit reward of a response is beta log(pi / pi_sft).
    rows = []
    if bench:
        pairs = [pair for _, pair in fresh]
        reference, beta = own_logps(bench.sft, pairs), bench.config["beta"]
        for name in ("sft", "base", "single_head_dpo", "modpo", f"dpo_{output}", "mah_dpo"):
            logps = own_logps(bench.model(name), pairs)
            rows += pair_metrics_rows(name, logps, reference, pairs, beta, bench.seed)
    # The PRM reads every response as a single step.
    whole = []
    for p, _ in fresh:
        for text in (p.chosen, p.rejected):
            whole.append(encode_steps(reader.tokenizer, p.prompt, [text], "turn", prm.marker))
    scores = [score for score, in score_sequences(prm, output, whole)]
    right = [float(c > r) for c, r in zip(scores[::2], scores[1::2])]
    metrics = {"reward_accuracy": summary(right)}
    return rows + [{"policy": f"PRM {output}", "metrics": metrics}], left


# -- command

class Scorer(NamedTuple):
    """What is scored on a file."""
    bench: Bench           # of a run, or None
    prm: object
    output: str            # one of the PRM's
    seen: partial          # was_seen in the run's training


def was_seen(prompts, labelled, ids):
    """Are a prompt's ids among these, or the beginning of a labelled sequence?"""
    n = len(ids)
    return tuple(ids) in prompts or any(row[:n] == ids for row in labelled)


def seen_in_training(bench):
    """A function of a prompt's ids: did the run train on a response to it? (On any of the training
    questions in --data, it may have.)"""
    trained = []
    for name in ("pairs.jsonl", "mah_dpo_pairs.jsonl", "labels.jsonl"):
        found = [row for _, row in read_jsonl(f"{bench.run}/{name}")]
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
    if "seeds" in read_json(f"{directory}/config.json"):                       # a run
        bench = Bench(seed_runs(directory)[0], device)
        seen, objectives = seen_in_training(bench), bench.objectives
        # The file's name without all its endings: honesty.jsonl, math_accuracy.steps.jsonl.
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
    # What the first row holds tells what all of them are.
    fields = next(read_jsonl(path), ("", {}))[1].keys()
    if {"label", "labels"} & fields:
        scorer = open_scorer(directory, path, output, True, device)
        rows, left = score_first_errors(scorer, path)
    elif {"chosen", "completions"} & fields:
        scorer = open_scorer(directory, path, output, False, device)
        rows, left = score_preferences(scorer, path)
    else:
        rows, left = score_answers(path)
    # Columns are the metrics that any row has.
    metrics = dict.fromkeys(chain.from_iterable(row["metrics"] for row in rows))
    lines = []
    for row in rows:
        n = max(metric["n"] for metric in row["metrics"].values())
        line = {"scored": row["policy"], "n": str(n)}
        lines.append(line | cells(row, metrics, ()))
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
