"""A look at real data before training: what each objective has to learn from, and which of them
pull apart.

    python -m interop.datasets DIR [--init MODEL]

    look_at_pairs, look_at_questions, look_at_steps   what an objective has: how much, how long
    conflict                                          where two objectives prefer opposite answers

Before: real_data.py, what a run reads of such a directory.
"""
import argparse
import functools
import os
import statistics
import textwrap
from collections import Counter
from itertools import chain, combinations_with_replacement, permutations
from types import SimpleNamespace

from data import InputError
from interop.datasets import (DATA_HELP, compare, encode_pair, encode_prompt, left_out, paired,
                              read_questions, read_rated, read_steps, train_or_dev)
from interop.real_data import holds_questions, objective_files, objectives_of
from interop.tokenizer import load_tokenizer
from model import read_config


# -- what an objective has

def load_reader(directory):
    """What reads texts as a checkpoint does, without its weights: its tokenizer and its config."""
    config = read_config(directory)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if tokenizer is None:
        raise InputError(f"{directory}: tokenizer.json, or vocab.json and merges.txt, is missing")
    return SimpleNamespace(config=config, tokenizer=tokenizer)


def size(said, model):
    """Tokens of a text, or of a conversation as the template writes it; without a model the
    characters."""
    if isinstance(said, str):
        return len(model.tokenizer.encode(said)) if model else len(said)
    if model:
        return len(encode_prompt(model.tokenizer, said))
    return sum(len(message["content"]) for message in said)


def print_texts(model, **columns):
    """Two kinds of lines about {name: texts or conversations}: how long they are, then the first
    of each, shortened."""
    columns = {name: texts for name, texts in columns.items() if texts}
    parts = []
    for name, texts in columns.items():
        sizes = [size(text, model) for text in texts]
        middle = statistics.median_low(sizes)
        parts.append(f"{name} {min(sizes)} to {max(sizes)}, median {middle}")
    if parts:
        print(f"  {'tokens' if model else 'characters'}: {'; '.join(parts)}")
    for name, (first, *_) in columns.items():
        text = first if isinstance(first, str) else first[-1]["content"]
        # JSON can hold half a character, which no terminal prints.
        text = text.encode(errors="replace").decode()
        print(f"  {name:9} {textwrap.shorten(text, 88, placeholder=' ...')}")


@functools.cache
def rated_rows(path):
    """The rows of a file of pairs, ratings or verdicts, and why others were left out: read once for
    all objectives that it rates."""
    left = Counter()
    return read_rated(path, left), left


def look_at_pairs(name, path, model):
    """Print which pairs a file has for an objective -> what the objective compares there."""
    rows, left = rated_rows(path)
    dropped = Counter(left)
    groups = compare(rows, name, dropped)
    pairs = paired(groups, name)
    # A run leaves out what the model cannot read as a whole.
    if model:
        n_all, pairs = len(pairs), [pair for pair in pairs if encode_pair(pair, model)]
        too_long = f"pairs longer than the context of {model.config.max_len} tokens, or alike"
        dropped[too_long] = n_all - len(pairs)
    splits = Counter(train_or_dev(pair.prompt) for pair in pairs)
    n_prompts = len({str(pair.prompt) for pair in pairs})
    print(f"  {path}: {len(rows) + left.total()} rows, {len(pairs)} pairs on {n_prompts} prompts, "
          f"{splits['train']} to train on, {splits['dev']} to hold out{left_out(dropped)}")
    print_texts(model, prompts=[pair.prompt for pair in pairs],
                chosen=[pair.chosen for pair in pairs], rejected=[pair.rejected for pair in pairs])
    return groups


def look_at_questions(path, model):
    """Print what is in a file of questions."""
    left = Counter()
    rows = read_questions(path, left)
    print(f"  {path}: {len(rows) + left.total()} rows, {len(rows)} questions{left_out(left)}")
    print_texts(model, prompts=[row.prompt for row in rows], answers=[row.answer for row in rows],
                solutions=[row.solution or row.answer for row in rows])


def look_at_steps(path, model):
    """Print what is in a file of labelled steps."""
    left = Counter()
    rows = read_steps(path, left)
    steps = list(chain.from_iterable(row.steps for row in rows))
    n_right = sum(label >= 0.5 for label in chain.from_iterable(row.labels for row in rows))
    print(f"  {path}: {len(rows) + left.total()} rows, {len(rows)} responses of {len(steps)} "
          f"steps, {n_right} of them right{left_out(left)}")
    print_texts(model, prompts=[row.prompt for row in rows], steps=steps)


# -- where objectives pull apart

def preferred(groups):
    """What an objective compares -> set of (prompt, better response, worse response)"""
    found = set()
    for prompt, scores in groups:
        # Of all that it compares, not only of the pairs that a run learns from.
        for a, b in permutations(scores, 2):
            if scores[a] > scores[b]:
                found.add((str(prompt), a, b))
    return found


def conflict(first, second):
    """What two objectives prefer, sets as of `preferred` -> (number of prompts that both have; of
    those on which they prefer opposite answers; of pairs of answers that both rank; of those that
    they rank in opposite ways)."""
    # What the first prefers, turned round: does the second say so?
    opposite = {(prompt, worse, better) for prompt, better, worse in first} & second
    n_ranked = len(opposite) + len(first & second)
    shared = {prompt for prompt, *_ in first} & {prompt for prompt, *_ in second}
    return len(shared), len({prompt for prompt, *_ in opposite}), n_ranked, len(opposite)


def print_conflicts(compared):
    """A line for every two objectives that share prompts, and for one that prefers both of two
    answers. compared: {objective: what it compares}"""
    known = {name: preferred(groups) for name, groups in compared.items()}
    for one, other in combinations_with_replacement(known, 2):
        n_shared, n_prompts, n_ranked, n_opposite = conflict(known[one], known[other])
        if one == other:
            if n_prompts:
                print(f"{one} contradicts itself on {n_prompts} of {n_shared} prompts")
        elif n_shared:
            print(f"{one} and {other} prefer opposite answers on {n_prompts} of {n_shared} shared "
                  f"prompts ({n_prompts / n_shared:.0%}), {n_opposite} of {n_ranked} pairs of "
                  "answers that both rank")


# -- command

def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m interop.datasets", epilog=DATA_HELP,
        description="Tell what the files of a directory hold, before a run with --data DIR.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", type=os.path.normpath,
                        help="directory as of train.py --data")
    parser.add_argument("--init", metavar="MODEL", help="directory as of train.py --init: lengths "
                        "are in its tokens, and what exceeds its context is left out")
    args = parser.parse_args(argv)
    model = load_reader(args.init) if args.init else None
    compared, files = {}, objective_files(args.data)
    for objective in objectives_of("all", args.data):
        name = objective.name
        print(f"{name}: domain {objective.domain}, case {objective.case}")
        for path in files[name]:
            if holds_questions(path, objective):
                look_at_questions(path, model)
            else:
                groups = look_at_pairs(name, path, model)
                compared[name] = compared.get(name, []) + groups
        # Any objective may have labelled steps beside its pairs or questions.
        labelled = f"{args.data}/{name}.steps.jsonl"
        if os.path.exists(labelled):
            look_at_steps(labelled, model)
    print_conflicts(compared)
