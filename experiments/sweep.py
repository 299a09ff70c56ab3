"""experiments/sweep.py: what the weights do to answers that nothing can verify.

    python experiments/sweep.py RUN A B       two objectives of one domain, e.g. truthful informative

MAH-DPO answers the prompts of held-out pairs, with all weight on head A, then step by step more on
head B. Its answers are scored by what was learnt: by both outputs of the PRM at their ends, and by
the implicit rewards beta log(pi / pi_SFT) of both heads alone. Below the table stand one prompt's
answers at either end. Means over trainings, of a single one over prompts.
"""
import argparse
import os
import sys

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, run_command  # noqa: E402
from decode import generate  # noqa: E402
from evaluate import (Bench, cells, over_trainings, seed_of, seed_runs, summary,  # noqa: E402
                      table)
from interop.resume import read_rows  # noqa: E402
from mah_dpo import Pair, pair_logps  # noqa: E402
from prm import scores_at  # noqa: E402


def held_out(run, names, n):
    """The first n different prompts (ids) of held-out pairs of these objectives."""
    prompts = {}
    # A prompt may have many pairs; a dict keeps the first of each, in order.
    for pair in read_rows(f"{run}/pairs.jsonl", Pair):
        if pair.split == "dev" and pair.objective in names:
            prompts[tuple(pair.prompt)] = pair.prompt
    if not prompts:
        raise InputError(f"{run}: no pair of {' or '.join(names)} is held out")
    return list(prompts.values())[:n]


def implicit_rewards(bench, model, name, prompts, answers):
    """beta log(pi / pi_SFT) of every answer, where pi is the head `name` alone -> numbers."""
    # A pair of an answer with itself has that answer's log-probability twice.
    pairs = [Pair(name, x, y, y, "dev") for x, y in zip(prompts, answers)]
    moved = pair_logps(model, pairs) - pair_logps(bench.sft, pairs)               # (n, 2)
    return (bench.config["beta"] * moved[:, 0]).tolist()


def final_scores(prm, prompts, answers):
    """The PRM's scores where answers end (n, P)."""
    scores = []
    # One by one: the rows are few, and of very different lengths.
    for x, y in zip(prompts, answers):
        text = x + y
        scores.append(scores_at(prm, [(text, [len(text) - 1])]))
    return torch.cat(scores)


@torch.inference_mode()
def point(bench, names, prompts, share):
    """Answers with `share` of the weight on the second of two heads -> answers, and their scores as
    a row of evaluate.py's tables."""
    first, second = names
    weights = {first: round(1 - share, 3), second: round(share, 3)}
    model, config = bench.model("mah_dpo"), bench.config
    # All heads have a weight, those of other objectives 0.
    mix = list(bench.mix(weights).values())
    # Every mix has the same luck.
    generator = torch.Generator().manual_seed(seed_of(bench.seed, "sweep"))
    answers = generate(model, prompts, weights=mix, max_new_tokens=config["max_new_tokens"],
                       temperature=config["temperature"], generator=generator)
    metrics = {"tokens": summary([len(y) for y in answers])}
    # What the PRM thinks of them, and what each head alone thinks.
    for name in names:
        prm = bench.prm(name)
        scores = final_scores(prm, prompts, answers)[:, prm.names.index(name)]
        rewards = implicit_rewards(bench, model, name, prompts, answers)
        metrics[f"PRM {name}"] = summary(scores.tolist())
        metrics[f"reward {name}"] = summary(rewards)
    return answers, {"policy": "mah_dpo", "guide": None, "domain": "", "weights": weights,
                     "seed": bench.seed, "metrics": metrics}


def sweep(bench, names, n, steps):
    """All mixes of a training -> their rows, the prompts, and the answers at either end."""
    known = [o.name for o in bench.objectives]
    if not set(names) <= set(known):
        raise InputError(f"{bench.run}: its objectives are {', '.join(known)}")
    prompts = held_out(bench.run, names, n)
    # One mix after another, from the first head alone to the second alone.
    rows, said = [], []
    for i in tqdm(range(steps + 1), desc=bench.run, unit="mix", disable=None):
        answers, row = point(bench, names, prompts, i / steps)
        rows.append(row)
        said.append(answers)
    return rows, prompts, (said[0], said[-1])


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    parser.add_argument("names", nargs=2, metavar="OBJECTIVE", help="whose weights are swept")
    parser.add_argument("--steps", type=int, default=4, help="from one to the other (default 4)")
    parser.add_argument("--n", type=int, default=40, help="prompts (default 40)")
    parser.add_argument("--show", type=int, default=1, help="prompts to print (default 1)")
    args = parser.parse_args(argv)
    if min(args.steps, args.n) < 1:
        raise InputError("--steps and --n must be at least 1")
    # Training by training.
    benches = [Bench(run) for run in seed_runs(args.run)]
    found = [sweep(bench, args.names, args.n, args.steps) for bench in benches]
    # With several trainings, means over them. Prompts and answers are shown of the first.
    rows, prompts, ends = found[0]
    if len(found) > 1:
        rows = over_trainings([rows for rows, _, _ in found])
    # A line for every mix, its weights first.
    lines = []
    for row in rows:
        shares = {f"w {name}": str(w) for name, w in row["weights"].items()}
        lines.append(shares | cells(row, row["metrics"], ()))
    print(table(f"answers to {len(prompts)} held-out prompts, by weights", lines))
    text = benches[0].tokenizer.decode
    for i, prompt in enumerate(prompts[:args.show]):
        print(text(prompt))
        for name, answers in zip(args.names, ends):
            print(f"{name}: {text(answers[i])}")


if __name__ == "__main__":
    run_command(main)
