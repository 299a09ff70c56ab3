"""experiments/samples.py: what every policy of a finished run says to the same prompts.

    python experiments/samples.py RUN N        N prompts of each domain; of several seeds the first

Every answer stands below its policy's name with its noise-free scores; > marks the user's words.
"""
import argparse
import os
import sys
import textwrap

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import Bench, row_name, seed_runs  # noqa: E402


def fold(text, margin):
    """Print a text in 100 columns, every line behind a margin."""
    for line in text.splitlines():
        print(textwrap.fill(line, 100, initial_indent=margin, subsequent_indent=margin))


def show_conversation(name, conversation, world, tokenizer):
    """Print a policy's name and scores, its answers and the user's replies between them."""
    # The scores are the world's own, without noise.
    line = f"\n{name:<38}"
    for objective, score in conversation.scores(world, tokenizer).items():
        line += f"  {objective} {score:.2f}"
    print(line)
    for number, turn in enumerate(conversation.turns):
        # Before every answer but the first, what the user has replied to the one before it.
        if number:
            fold(turn.messages[-1]["content"], "  > ")
        # An answer that was cut off lacks the end of the turn.
        whole = turn.response[-1] == tokenizer.eos_id
        fold(tokenizer.decode(turn.response) + ("" if whole else " [cut off]"), "    ")


def show_samples(run, n, device=None):
    """Print the responses of every row's policy to the same n prompts of each domain."""
    bench = Bench(seed_runs(run)[0], device)
    # The first n prompts of the tables, or more of the same.
    bench.config["n_test"] = n
    for domain, world in bench.worlds.items():
        # Policy by policy, as models are loaded; printed below prompt by prompt.
        jobs, played = bench.jobs(domain), []
        for job in tqdm(jobs, desc=domain, unit="policy", disable=None):
            played.append(bench.rollout(job)[0])
        # All policies have met the same prompts.
        for i, met in enumerate(played[0]):
            print(f"=== {domain}, {bench.config['split']} prompt {i + 1}")
            for message in met.problem.messages():
                fold(message["content"], "> ")
            for job, conversations in zip(jobs, played):
                show_conversation(row_name(job._asdict()), conversations[i], world,
                                  bench.tokenizer)
            print()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    parser.add_argument("n", type=int, metavar="N", help="how many prompts of each domain")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    show_samples(args.run, args.n, args.device)


if __name__ == "__main__":
    run_command(main)
