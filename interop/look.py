"""A look at real data before training.

    python -m interop.datasets DIR [--init MODEL]

    look_at_pairs       what an objective learns from: how much, how long, an example
    look_at_steps       the same of labelled steps
    look_at_questions   the same of questions
    conflict            how often two objectives prefer opposite answers

Before: datasets.py, the rows of the files.
"""
import argparse
import os
import statistics
import textwrap
from collections import Counter
from itertools import chain, combinations, permutations
from types import SimpleNamespace

from data import InputError
from interop.datasets import (DATA_HELP, compare, encode_pair, names_in, paired, read_all,
                              read_questions, read_steps, train_or_dev, use_of)
from interop.real_data import left_out
from interop.tokenizer import load_tokenizer
from model import read_config


# -- lengths and examples

def load_reader(directory):
    """What reads texts as a checkpoint does, without its weights: its tokenizer and its config."""
    config = read_config(directory)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if tokenizer is None:
        raise InputError(f"{directory}: tokenizer.json, or vocab.json and merges.txt, is missing")
    return SimpleNamespace(config=config, tokenizer=tokenizer)


def size(text, model):
    """Tokens of a text; without a model its characters."""
    return len(model.tokenizer.encode(text)) if model else len(text)


def size_of_prompt(prompt, model):
    """Tokens of a conversation as the template writes it; without a model its characters."""
    if model:
        return len(model.tokenizer.encode_chat(prompt))
    return sum(len(message["content"]) for message in prompt)


def spread(sizes):
    """Numbers -> text"""
    return f"{min(sizes)} to {max(sizes)}, median {statistics.median_low(sizes)}"


def print_sizes(model, **sizes):
    """A line about lengths, {of what: [length]}."""
    unit = "tokens of --init" if model else "characters"
    parts = [f"{name} {spread(numbers)}" for name, numbers in sizes.items() if numbers]
    print(f"  {unit}: {'; '.join(parts)}")


def print_example(**texts):
    """Lines that show one row, shortened."""
    for name, text in texts.items():
        print(f"  {name:9}{textwrap.shorten(text, 88, placeholder=' ...')}")


# -- the kinds of files

def look_at_pairs(path, model):
    """Print what each objective of a file learns from -> {objective: what it compares}."""
    left, found = {}, {}
    rows = read_all(path, left, use="pairs")
    n_rows = len(rows) + sum(left.values())
    stem = os.path.basename(path).removesuffix(".jsonl")
    for name in names_in(chain.from_iterable(row.responses for row in rows)):
        name = name or stem
        dropped = Counter(left)
        found[name] = compare(rows, name, dropped)
        pairs = paired(found[name], name)
        if model:
            # What a run would leave out.
            n_all, pairs = len(pairs), [pair for pair in pairs if encode_pair(pair, model)]
            too_long = f"pairs longer than the context of {model.config.max_len} tokens, or alike"
            dropped[too_long] = n_all - len(pairs)
        prompts = [pair.prompt for pair in pairs]
        splits = Counter(train_or_dev(prompt) for prompt in prompts)
        print(f"{name} ({path})\n  {n_rows} rows, {len(pairs)} pairs: {splits['train']} to train "
              f"on, {splits['dev']} to hold out{left_out(dropped)}")
        if pairs:
            print_sizes(model, prompts=[size_of_prompt(prompt, model) for prompt in prompts],
                        chosen=[size(pair.chosen, model) for pair in pairs],
                        rejected=[size(pair.rejected, model) for pair in pairs])
            pair = pairs[0]
            print_example(prompt=pair.prompt[-1]["content"], chosen=pair.chosen,
                          rejected=pair.rejected)
    return found


def look_at_steps(path, model):
    """Print what is in a file of labelled steps."""
    left = {}
    rows = read_steps(path, left)
    n_steps = [len(row.steps) for row in rows]
    n_right = sum(label >= 0.5 for label in chain.from_iterable(row.labels for row in rows))
    print(f"labelled steps ({path})\n  {len(rows) + sum(left.values())} rows, {sum(n_steps)} steps "
          f"of {len(rows)} responses, {n_right} of them right{left_out(left)}")
    texts = ["".join(row.steps) for row in rows]
    print_sizes(model, prompts=[size_of_prompt(row.prompt, model) for row in rows],
                responses=[size(text, model) for text in texts])
    print_example(prompt=rows[0].prompt[-1]["content"], step=rows[0].steps[0])


def look_at_questions(path, model):
    """Print what is in a file of questions."""
    left = {}
    rows = read_questions(path, left)
    print(f"questions ({path})\n  {len(rows) + sum(left.values())} rows, {len(rows)} "
          f"questions{left_out(left)}")
    print_sizes(model, prompts=[size_of_prompt(row.prompt, model) for row in rows],
                solutions=[size(row.solution, model) for row in rows if row.solution])
    print_example(prompt=rows[0].prompt[-1]["content"], answer=rows[0].answer)


# -- where objectives pull apart

def preferred(groups):
    """What `compare` finds -> {prompt: set of (better response, worse response)}"""
    found = {}
    for prompt, scores in groups:
        pairs = [(a, b) for a, b in permutations(scores, 2) if scores[a] > scores[b]]
        found.setdefault(str(prompt), set()).update(pairs)
    return found


def conflict(first, second):
    """What two objectives prefer, {prompt: set of (better, worse)} each -> (prompts that both know;
    those of them on which the two prefer opposite answers; two answers that both compare; those of
    them that they rank in opposite ways)."""
    shared = first.keys() & second.keys()
    n_prompts = n_both = n_opposite = 0
    for prompt in shared:
        swapped = {(worse, better) for better, worse in first[prompt]}
        opposite = swapped & second[prompt]
        n_prompts += bool(opposite)
        n_opposite += len(opposite)
        n_both += len(opposite) + len(first[prompt] & second[prompt])
    return len(shared), n_prompts, n_both, n_opposite


def print_conflicts(groups):
    """groups: {objective: what it compares}"""
    known = {name: preferred(found) for name, found in groups.items()}
    for one, other in combinations(known, 2):
        n_shared, n_prompts, n_both, n_opposite = conflict(known[one], known[other])
        share = f" ({n_prompts / n_shared:.0%})" if n_shared else ""
        print(f"{one} and {other} prefer opposite answers on {n_prompts} of {n_shared} shared "
              f"prompts{share}, {n_opposite} times of {n_both} that both compare two answers")


# -- command

def files_in(directory):
    """The .jsonl files of a directory; those with labelled steps stand last."""
    if not os.path.isdir(directory):
        raise InputError(f"{directory}: no such directory")
    names = [name for name in sorted(os.listdir(directory)) if name.endswith(".jsonl")]
    if not names:
        raise InputError(f"{directory}: no file NAME.jsonl; NAME is the objective that it is about")
    names.sort(key=lambda name: name.endswith(".steps.jsonl"))
    return [os.path.join(directory, name) for name in names]


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m interop.datasets", epilog=DATA_HELP,
        description="Tell what the files of a directory hold, before a run with --data DIR.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", help="directory with NAME.jsonl, NAME.steps.jsonl")
    parser.add_argument("--init", metavar="MODEL", help="Hugging Face directory: lengths are in its "
                        "tokens, and what exceeds its context is left out")
    args = parser.parse_args(argv)
    model = load_reader(args.init) if args.init else None
    groups = {}
    for path in files_in(args.data):
        if path.endswith(".steps.jsonl"):
            look_at_steps(path, model)
        elif use_of(path, ["pairs", "questions"]) == "questions":
            look_at_questions(path, model)
        else:
            found = look_at_pairs(path, model)
            for name in groups.keys() & found.keys():
                raise InputError(f"{path}: another file has pairs of {name!r} too; keep one")
            groups |= found
    print_conflicts(groups)
