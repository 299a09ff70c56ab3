"""Score real outputs: answers to GSM8K or MATH questions by the verifier, ProcessBench's F1 for the value model or a PRM,
accuracy on preference pairs.

    python -m interop.score [RUN] FILE
"""
import argparse
import json
import os
import zlib

import torch

from data import RNG, InputError, read_json, read_jsonl, run_command
from evaluate import Bench, jackknife, own_logps, pair_metrics_rows, seed_runs, summary, table
from interop.answers import final_answer, same_answer
from interop.datasets import DATA_HELP, read_outputs, read_preferences, read_steps
from interop.parallel import join_processes
from mah_dpo import encode_pair
from model import pick_device
from prm import encode_steps, load_prm, score_sequences


def score_answers(path):
    """Models' answers to questions, verified (data.same_answer) -> rows of a table, what was left out."""
    found, left = {}, {}
    for question, said in read_outputs(path, left):
        for name, text in said.items():
            found.setdefault(name, []).append(float(same_answer(final_answer(text), question.answer)))
    return [{"policy": name, "metrics": {"accuracy": summary(right)}} for name, right in found.items()], left


def first_error_f1(sums):
    """Sums or means of four columns of 0 and 1 (the response errs; and its first error is found; it is right; and it is passed)
    -> ProcessBench's F1, the harmonic mean of the accuracies on responses that err and on right ones (arXiv 2412.06559)."""
    errs, found, right, passed = sums
    a, b = found / errs if errs else 0.0, passed / right if right else 0.0
    return 2 * a * b / (a + b) if a + b else 0.0


def localise(scores, labels, folds):
    """Step scores of responses, their first wrong step (or -1) and a fold in {0, 1} of each -> the four columns of
    first_error_f1. The first step that scores below a threshold is taken for the first error; a fold's threshold is the one
    of the largest F1 on the other fold, so that no response has a say in its own."""
    guess = lambda i, cut: next((t for t, s in enumerate(scores[i]) if s < cut), -1)
    hit = lambda i, cut: (labels[i] >= 0, labels[i] == guess(i, cut) >= 0, labels[i] < 0, labels[i] == guess(i, cut) < 0)
    rows = [None] * len(scores)
    for fold in (0, 1):
        others = [i for i, f in enumerate(folds) if f != fold]
        steps = sorted(s for i in others for s in scores[i])
        quality = lambda cut: first_error_f1(map(sum, zip(*(hit(i, cut) for i in others))))
        best = max(steps[::max(1, len(steps) // 200)], key=quality)
        for i in range(len(scores)):
            rows[i] = hit(i, best) if folds[i] == fold else rows[i]
    return [list(map(float, column)) for column in zip(*rows)]


def score_first_errors(prm, output, path, seen):
    """ProcessBench's measure of a PRM's output on labelled steps -> the row of a table, what was left out."""
    boundary = prm.outputs[prm.names.index(output)].boundary or "newline"
    tokenizer, sequences, labels, folds, left = prm.backbone.tokenizer, [], [], [], {"seen in training": 0, "too long": 0}
    for row in read_steps(path):
        found = encode_steps(tokenizer, row.prompt, row.steps, boundary, prm.marker)
        why = "seen in training" if seen(tokenizer.encode_chat(row.prompt)) else \
            "too long" if not found or len(found[0]) > prm.backbone.config.max_len else None
        if why:
            left[why] += 1
        else:
            sequences.append(found)
            labels.append(next((t for t, v in enumerate(row.labels) if v < 0.5), -1))
            folds.append(zlib.crc32(json.dumps(row.prompt).encode()) % 2)
    if len({(f, t >= 0) for f, t in zip(folds, labels)}) < 4:
        raise InputError(f"{path}: {len(labels)} responses are left ({left}); each half of them, by hash of the prompt, must "
                         "hold right and wrong ones")
    columns = localise(score_sequences(prm, output, sequences), labels, folds)
    part = lambda whole, hit: summary([h for w, h in zip(columns[whole], columns[hit]) if w])
    return {"policy": f"PRM {output}", "metrics": {"errors found": part(0, 1), "right ones passed": part(2, 3),
                                                   "F1": summary(jackknife(first_error_f1, columns))}}, left


def score_preferences(bench, prm, output, seen, path):
    """Accuracy on real pairs: of the implicit rewards of a run's policies (bench, if it is a run), and of a PRM's output on
    whole responses -> rows of a table, what was left out."""
    reader, rows, left = bench.sft if bench else prm.backbone, [], {}
    preferences = read_preferences(path, output, left)
    encoded = [encode_pair(p, reader) for p in preferences]
    fresh = [i for i, p in enumerate(encoded) if p and not seen(p.prompt)]
    pairs, unfit = [encoded[i] for i in fresh], encoded.count(None)
    left |= {"seen in training": len(encoded) - unfit - len(fresh), "too long or alike": unfit}
    if not pairs:
        raise InputError(f"{path}: no pair is left ({left})")
    if bench:
        logps = {name: own_logps(bench.model(name), pairs)
                 for name in ("sft", "base", "single_head_dpo", "modpo", f"dpo_{output}", "mah_dpo")}
        for name, found in logps.items():
            rows += pair_metrics_rows(name, found, logps["sft"], pairs, bench.config["beta"], bench.seed)
    whole = lambda p, text: encode_steps(reader.tokenizer, p.prompt, [text], "turn", prm.marker)
    chosen = score_sequences(prm, output, [whole(preferences[i], preferences[i].chosen) for i in fresh])
    rejected = score_sequences(prm, output, [whole(preferences[i], preferences[i].rejected) for i in fresh])
    right = summary([float(c > r) for c, r in zip(chosen, rejected)])
    return rows + [{"policy": f"PRM {output}", "metrics": {"reward_accuracy": right}}], left


def seen_in_training(bench):
    """A function of a prompt's ids: did the run train on a response to it? (On any of the training questions in --data, it may
    have.)"""
    of = lambda name: [row for _, row in read_jsonl(os.path.join(bench.run, name)) if row["split"] == "train"]
    known = {tuple(row["prompt"]) for name in ("pairs.jsonl", "mah_dpo_pairs.jsonl") for row in of(name)}
    for world in bench.worlds.values() if bench.config["data"] else ():
        known |= {tuple(bench.tokenizer.encode_chat(p.messages())) for p in world.problems("train", len(world.rows), RNG(0))}
    labelled = [row["ids"] for row in of("labels.jsonl")]
    return lambda ids: tuple(ids) in known or any(row[:len(ids)] == ids for row in labelled)


def open_scored(directory, path, output, default, device):
    """What is to be scored on a file -> (Bench of a run, or None; PRM; its output; seen_in_training). A run's objective may be
    named by the file, as in --data."""
    if directory is None:
        raise InputError(f"{path}: name the run or the PRM that is to be scored: evaluate.py RUN --score {path}")
    bench, seen = None, lambda ids: False
    if {"objectives", "seeds"} <= read_json(os.path.join(directory, "config.json")).keys():
        directory = seed_runs(directory)[0]
        bench = Bench(directory, device)
        seen, stem = seen_in_training(bench), os.path.basename(path).split(".")[0]
        known, output = bench.objectives, output or (stem if stem in bench.objectives else default)
    else:
        prm = load_prm(directory).to(pick_device(device or "auto")).eval()
        if prm.backbone.tokenizer is None:
            raise InputError(f"{directory}: no tokenizer.json, nor vocab.json and merges.txt: without one it reads no texts")
        known, output = prm.names, output or prm.names[0]
    if output not in known:
        raise InputError(f"{path}: say with --objective what it is about: {', '.join(known)}")
    return bench, bench.prm(output) if bench else prm, output, seen


@torch.no_grad()
def score(directory, path, output, device):
    """Print how real outputs fare; a file's kind shows in its rows. directory: a run, or a PRM's; answers need none."""
    row = next(read_jsonl(path), ("", {}))[1]
    if {"label", "labels"} & row.keys():
        _, prm, output, seen = open_scored(directory, path, output, "math_accuracy", device)
        found, left = score_first_errors(prm, output, path, seen)
        rows, columns = [found], ["errors found", "right ones passed", "F1"]
    elif {"chosen", "completions"} & row.keys():
        rows, left = score_preferences(*open_scored(directory, path, output, None, device), path)
        columns = ["loss", "margin", "reward_accuracy", "logp_accuracy"]
    else:
        (rows, left), columns = score_answers(path), ["accuracy"]
    first = {"scored": lambda r: r["policy"], "n": lambda r: str(max(m["n"] for m in r["metrics"].values()))}
    print(table(path, first, rows, columns) + "\nMean ± half the 95 % interval."
          + "".join(f" {n} rows left out: {why}." for why, n in left.items() if n))


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=DATA_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="[RUN] FILE", help="what is scored (a run, or a PRM's directory; answers need "
                        "none), and the file")
    parser.add_argument("--objective", help="the objective that FILE is about, where its name does not tell")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    if len(args.paths) > 2:
        raise InputError("give a run and one file: python -m interop.score RUN FILE")
    join_processes()
    score(args.paths[0] if len(args.paths) == 2 else None, args.paths[-1], args.objective, args.device)


if __name__ == "__main__":
    run_command(main)
