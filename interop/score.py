"""interop/score.py: score real outputs.

    python -m interop.score FILE                  models' answers to questions, verified
    python -m interop.score RUN|PRM_DIR FILE      steps: ProcessBench's F1 of a PRM's output
                                                  preference pairs: accuracy of a PRM's output, and
                                                  of the implicit rewards of a run's policies

What a file holds shows in its rows. A run is asked only about prompts it was not trained on.
"""
import argparse
import json
import math
import os
import statistics
import zlib
from collections import Counter
from functools import partial
from itertools import chain

import torch

from data import RNG, InputError, batches_by_length, read_json, read_jsonl, run_command
from evaluate import Bench, half_width, pair_metrics_rows, seed_runs, summary, table
from interop.answers import final_answer, same_answer
from interop.datasets import (DATA_HELP, encode_pair, encode_steps, left_out, read_outputs,
                              read_preferences, read_steps, use_of)
from interop.parallel import join_processes
from mah_dpo import pair_logps
from model import pick_device
from prm import load_prm, scores_at


def wilson(mean, n):
    """The mean of n numbers in [0, 1], such as the share of right answers -> its 95 % interval
    after Wilson. It never leaves [0, 1], and n equal numbers do not make it a point."""
    z = 1.96
    # Its centre lies between the mean and 1/2, nearer to the mean if n is large.
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n))**2)
    return max(0.0, centre - half), min(1.0, centre + half)


def written(name, metric):
    """A metric as text: the mean and its 95 % interval; a dash where a row has no such metric."""
    if metric is None:
        return "-"
    mean, n = metric["mean"], metric["n"]
    if name in ("loss", "margin"):
        half = half_width(metric)
        bounds = mean - half, mean + half
    else:
        bounds = metric.get("bounds") or wilson(mean, n)
    low, high = bounds
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


# -- answers

def pass_at(k, right):
    """Of n samples of an answer, right (n,) or not: how likely is it that of k of them, drawn at
    random, one is right? 0 where there are no samples."""
    n_wrong = len(right) - sum(right)
    return 1 - math.comb(n_wrong, k) / math.comb(len(right), k) if right else 0.0


def score_answers(path):
    """Models' answers to questions, verified -> a row per model, {why rows were left out: n}."""
    rows, left = [], Counter()
    outputs = read_outputs(path, left)
    # The models that any row has; a question without a response has a wrong one.
    names = dict.fromkeys(chain.from_iterable(said for _, said in outputs))
    if not names:
        raise InputError(f"{path}: no row has a response; give one as \"response\", or several as "
                         "\"responses\", beside the question and its answer")
    for name in names:
        verdicts, n_missing = [], 0
        for question, said in outputs:
            texts = said.get(name, [])
            # Not spelling counts, but value.
            verdicts.append([same_answer(final_answer(text), question.answer) for text in texts])
            n_missing += texts.count("") + (not texts)
        metrics = {"accuracy": summary([sum(v) / max(1, len(v)) for v in verdicts])}
        k = min([len(v) for v in verdicts if v], default=1)
        if k > 1:
            metrics[f"pass@{k}"] = summary([pass_at(k, v) for v in verdicts])
        rows.append({"policy": name, "metrics": metrics})
        if n_missing:
            print(f"{name}: {n_missing} responses are missing or empty; they count as wrong.")
    return rows, left


# -- first errors

def score_sequences(prm, output, sequences):
    """[(ids, ends)] -> for each sequence the scores of the output of that name at its ends."""
    p = prm.names.index(output)
    found = [None] * len(sequences)
    # Sequences of similar length go together, so that little is padded.
    for index in batches_by_length([len(ids) for ids, _ in sequences]):
        batch = [sequences[i] for i in index]
        scores = scores_at(prm, batch)[:, p].cpu()                                 # (N,)
        parts = scores.split([len(ends) for _, ends in batch])
        for i, part in zip(index, parts):
            found[i] = part.tolist()
    return found


def first_error_f1(hits, errs):
    """ProcessBench's F1 (arXiv 2412.06559) of n responses: the harmonic mean of two accuracies, on
    those that err and on right ones. hits, errs (n,) bool: is the guess right? does it err?"""
    # Nothing of nothing is NaN, and counts as 0.
    found = hits[errs].double().mean().nan_to_num()
    passed = hits[~errs].double().mean().nan_to_num()
    return float((2 * found * passed / (found + passed)).nan_to_num())


def hits_at(responses, cut):
    """Is the first step that scores below `cut` the first error? responses: (scores of the steps,
    first wrong step, or -1 if there is none, fold) each -> (n,) bool."""
    hits = []
    for scores, label, _ in responses:
        guess = next((t for t, score in enumerate(scores) if score < cut), -1)
        hits.append(guess == label)
    return torch.tensor(hits)


def f1_at(responses, cut):
    """F1 of responses at a threshold."""
    errs = torch.tensor([label >= 0 for _, label, _ in responses])
    return first_error_f1(hits_at(responses, cut), errs)


def localise(responses):
    """`hits_at` of every response. Its threshold is that of the largest F1, among some 200 step
    scores, on the other fold (0 or 1): no response has a say in its own."""
    cuts = []
    for fold in (0, 1):
        # What the other half of the responses says of a threshold.
        others = [response for response in responses if response[2] != fold]
        steps = sorted(chain.from_iterable(scores for scores, _, _ in others))
        # Every step's score could be the threshold; some 200 of them will do.
        stride = max(1, len(steps) // 200)
        cuts.append(max(steps[::stride], key=partial(f1_at, others)))
    return torch.cat([hits_at([response], cuts[response[2]]) for response in responses])


def bootstrap_f1(hits, errs, times=1000):
    """A summary of the F1 of n responses. Its interval holds 95 % of the F1s of samples of as many
    responses, drawn with replacement: the bootstrap."""
    n, drawn = len(hits), []
    # The same draws every time: an interval is no matter of luck.
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        index = torch.randint(n, (n,), generator=generator)
        drawn.append(first_error_f1(hits[index], errs[index]))
    low, *_, high = statistics.quantiles(drawn, n=40)
    return {"mean": first_error_f1(hits, errs), "bounds": (low, high), "n": n}


def score_first_errors(scorer, path):
    """ProcessBench's measure of a PRM's output on labelled steps -> a row, what was left out."""
    prm, tokenizer = scorer.prm, scorer.prm.backbone.tokenizer
    boundary = prm.outputs[prm.names.index(scorer.output)].boundary
    sequences, labels, folds, left = [], [], [], Counter()
    for row in read_steps(path, left):
        encoded = encode_steps(tokenizer, row.prompt, row.steps, boundary, prm.marker)
        if scorer.seen(tokenizer.encode_chat(row.prompt)):
            left["seen in training"] += 1
        elif not encoded or len(encoded[0]) > prm.backbone.config.max_len:
            left["too long"] += 1
        else:
            sequences.append(encoded)
            # The first step that is wrong.
            labels.append(next((t for t, right in enumerate(row.labels) if right < 0.5), -1))
            # Two halves by prompt: solutions of one problem are alike, and stay together.
            folds.append(zlib.crc32(json.dumps(row.prompt).encode()) % 2)
    errs = torch.tensor([label >= 0 for label in labels])
    # Every threshold needs both kinds to be chosen by.
    if len(set(zip(folds, errs.tolist()))) < 4:
        raise InputError(f"{path}: {len(labels)} responses are left; each half of them, by hash "
                         f"of the prompt, must hold right and wrong ones{left_out(left)}")
    scores = score_sequences(prm, scorer.output, sequences)
    hits = localise(list(zip(scores, labels, folds)))
    metrics = {"errors found": summary(hits[errs].double().tolist()),
               "right ones passed": summary(hits[~errs].double().tolist()),
               "F1": bootstrap_f1(hits, errs)}
    return [{"policy": f"PRM {scorer.output}", "metrics": metrics}], left


# -- preference pairs

def score_preferences(scorer, path):
    """Accuracy on real pairs: of the implicit rewards of a run's policies, and of a PRM's output
    on whole responses -> rows, what was left out."""
    bench, prm, output, left = scorer.bench, scorer.prm, scorer.output, Counter()
    reader = bench.sft if bench else prm.backbone
    pairs, whole = [], []
    for p in read_preferences(path, output, left):
        pair = encode_pair(p, reader)
        if not pair:
            left["too long or alike"] += 1
        elif scorer.seen(pair.prompt):
            left["seen in training"] += 1
        else:
            pairs.append(pair)
            # The PRM reads every response as a single step.
            for text in (p.chosen, p.rejected):
                step = encode_steps(reader.tokenizer, p.prompt, [text], "turn", prm.marker)
                whole.append(step)
    if not pairs:
        raise InputError(f"{path}: no pair is left{left_out(left)}")
    rows = []
    if bench:
        # A policy's implicit reward of a response is beta log(pi / pi_sft).
        reference, beta = pair_logps(bench.sft, pairs), bench.config["beta"]
        for name in ("sft", "base", "single_head_dpo", "modpo", f"dpo_{output}", "mah_dpo"):
            logps = pair_logps(bench.model(name), pairs)
            rows += pair_metrics_rows(name, logps, reference, pairs, beta, bench.seed)
    # One score for every response: chosen and rejected by turns.
    scores = [score for score, in score_sequences(prm, output, whole)]
    right = [float(c > r) for c, r in zip(scores[::2], scores[1::2])]
    rows.append({"policy": f"PRM {output}", "metrics": {"reward_accuracy": summary(right)}})
    return rows, left


# -- command

class Scorer:
    """What is scored on a file: an output of a PRM, and the policies of a run (bench) if it is
    one's. The output is the one given; of a run else that which the file is named after, as in
    --data, or if answers are `verified` in it, the value model."""

    def __init__(self, directory, path, output, verified, device):
        if directory is None:
            raise InputError(f"{path}: name the run or the PRM that is to be scored: "
                             f"python -m interop.score RUN {path}")
        self.bench, self.trained = None, []
        # Only a run's configuration says how many seeds it has.
        if "seeds" in read_json(f"{directory}/config.json"):
            if not os.path.isfile(f"{directory}/results.json"):
                raise InputError(f"{directory}: not a finished run (no results.json); finish it "
                                 f"with: python train.py --resume {directory}")
            self.bench = Bench(seed_runs(directory)[0], device)
            self.read_training(self.bench)
            objectives = self.bench.objectives
            # The file's name without all its endings: honesty.jsonl, math_accuracy.steps.jsonl.
            named = os.path.basename(path).split(".")[0]
            fit = [o.name for o in objectives if named == o.name]
            fit += [o.name for o in objectives if verified and o.case == "verifiable"]
        else:
            self.prm = load_prm(directory).to(pick_device(device or "auto")).eval()
            if self.prm.backbone.tokenizer is None:
                raise InputError(f"{directory}: no tokenizer.json, nor vocab.json and merges.txt: "
                                 "without one it reads no texts")
            objectives, fit = self.prm.outputs, self.prm.names
        self.output = output or next(iter(fit), None)
        known = [o.name for o in objectives]
        if self.output not in known:
            raise InputError(f"{path}: say with --objective what it is about: {', '.join(known)}")
        # Which PRM of a run is asked depends on the output.
        if self.bench:
            self.prm = self.bench.prm(self.output)

    def read_training(self, bench):
        """Keep what a run was trained on: prompts, and labelled sequences, which begin with one."""
        for name in ("pairs.jsonl", "mah_dpo_pairs.jsonl", "labels.jsonl"):
            for _, row in read_jsonl(f"{bench.run}/{name}"):
                if row["split"] == "train":
                    self.trained.append(row.get("prompt") or row["ids"])
        # It may have been trained on any of the training questions in --data.
        for world in bench.worlds.values() if bench.config["data"] else ():
            for problem in world.problems("train", len(world.rows), RNG(0)):
                self.trained.append(bench.tokenizer.encode_chat(problem.messages()))

    def seen(self, ids):
        """Was the run trained on a response to this prompt?"""
        return any(row[:len(ids)] == ids for row in self.trained)


@torch.no_grad()
def score(directory, path, output, device):
    """Print how the outputs in a file fare."""
    # What the first row holds tells what all of them are.
    use = use_of(path, ["pairs", "outputs", "steps"])
    if use == "outputs":
        rows, left = score_answers(path)
    elif use == "steps":
        rows, left = score_first_errors(Scorer(directory, path, output, True, device), path)
    else:
        rows, left = score_preferences(Scorer(directory, path, output, False, device), path)
    # Columns are the metrics that any row has; a row without one has a dash there.
    columns = dict.fromkeys(chain.from_iterable(row["metrics"] for row in rows))
    lines = []
    for row in rows:
        n = max(metric["n"] for metric in row["metrics"].values())
        line = {name: written(name, row["metrics"].get(name)) for name in columns}
        lines.append({"scored": row["policy"], "n": str(n)} | line)
    print(table(path, lines))
    print(f"Mean [95 % interval]{left_out(left)}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=DATA_HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="what is scored: a run, or a PRM's "
                        "directory; answers need none")
    parser.add_argument("file", metavar="FILE", help="what it is scored on")
    parser.add_argument("--objective", help="what FILE is about, where its name does not tell")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    join_processes()
    score(args.run, args.file, args.objective, args.device)


if __name__ == "__main__":
    run_command(main)
