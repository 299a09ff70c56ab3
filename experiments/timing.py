"""experiments/timing.py: what guided decoding costs.

    python experiments/timing.py DIR           a run, or any checkpoint

Three ways to take S steps of N tokens, each the best of K candidates (experiments/ways.py): the
plain one encodes the text again in every step; the published one keeps a cache, but draws
candidates one by one; this project's carries both caches. Then one-token decoding, beside the speed
of the memory.
"""
import argparse
import os
import sys
import timeit
from collections import Counter
from functools import partial

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from decode import generate  # noqa: E402
from evaluate import table  # noqa: E402
from experiments.ways import METHODS, N, S  # noqa: E402
from interop.reward_models import REWARD  # noqa: E402
from model import load_hf, pick_device  # noqa: E402
from prm import PRM, load_prm  # noqa: E402


def count(fed, name, net, args, output):
    """A hook that counts in `fed` the tokens that a network is given."""
    fed[name] += args[0].numel()


def time_methods(model, prm, prompt, K, fed):
    """Every method's lines of the table, for one prompt and one K. fed: a Counter of both hooks."""
    lines = []
    for name, work in METHODS.items():
        work(model, prm, prompt[:8], K)                                       # warms up
        fed.clear()
        start = timeit.default_timer()
        size = work(model, prm, prompt, K)
        seconds = timeit.default_timer() - start
        lines.append({"prefix": str(len(prompt)), "K": str(K), "method": name,
                      "seconds": f"{seconds:.2f}", "tokens/s": f"{K * S * N / seconds:.0f}",
                      "x here": seconds, "cache MB": f"{size / 1e6:.1f}",
                      "fed to policy": str(fed["policy"]), "fed to PRM": str(fed["PRM"])})
    # The last method is this project's: the others' times are so many times as long.
    for line in lines:
        line["x here"] = f"{line['x here'] / seconds:.1f}"
    return lines


def time_one_token(model, prompt):
    """Print the time of a token decoded by itself, beside that of reading the weights once."""
    generate(model, [prompt], max_new_tokens=64, temperature=0)               # warms up
    start = timeit.default_timer()
    drawn, = generate(model, [prompt], max_new_tokens=64, temperature=0)
    seconds = (timeit.default_timer() - start) / len(drawn)                   # it may be cut off
    # The memory's speed is that of a copy, which reads and writes each byte.
    source = torch.ones(64 * 2 ** 20, device=model.embed.weight.device)
    target = torch.empty_like(source)
    timer = timeit.Timer("target.copy_(source)[-1].item()", globals=locals())   # waits for a GPU
    speed = 2 * source.nbytes / min(timer.repeat(5, 1))
    # A token needs all weights but of the embedding's, one row, and one head.
    read = model.heads[0].weight.nbytes
    for name, p in model.named_parameters():
        if not name.startswith(("heads.", "embed", "positions")):
            read += p.nbytes
    print(f"one token: {1e3 * seconds:.2f} ms; reading the {read / 1e6:.0f} MB of weights at the "
          f"{speed / 1e9:.0f} GB/s of a copy takes {1e3 * read / speed:.2f} ms, "
          f"{read / speed / seconds:.0%} of that")


@torch.no_grad()
def main(argv=None):
    """The command line: a run's own PRM, or one with random weights on the model's backbone."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run directory, or any checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    directory, device = args.directory, pick_device(args.device)
    run = os.path.isdir(f"{directory}/mah_dpo")
    model = load_hf(f"{directory}/mah_dpo" if run else directory).to(device).eval()
    # Time does not depend on what the weights are, nor on words: tokens are random, and without a
    # tokenizer no answer ends by itself.
    generator = torch.Generator().manual_seed(0)
    model.tokenizer = None
    prm, whose = PRM(model.with_heads(()), [REWARD], generator), "a random"
    if os.path.isdir(f"{directory}/prm"):
        prm, whose = load_prm(f"{directory}/prm"), "its own"
    prm = prm.to(device).eval()
    prm.backbone.tokenizer = None
    room = min(model.config.max_len, prm.backbone.config.max_len)
    text = torch.randint(0, model.config.vocab_size, (room,), generator=generator).tolist()
    fed, lines = Counter(), []
    model.register_forward_hook(partial(count, fed, "policy"))
    prm.backbone.register_forward_hook(partial(count, fed, "PRM"))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {whose} PRM, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; {S} steps of {N} tokens")
    for prefix in (128, 512, 2048):
        if prefix + S * (N + 1) > room:
            print(f"a prefix of {prefix} does not fit the context of {room}: left out")
            continue
        for K in tqdm((1, 2, 5, 10), desc=f"prefix {prefix}", unit="K", disable=None):
            lines += time_methods(model, prm, text[:prefix], K, fed)
    if lines:
        print(table("ways to decode", lines))
    time_one_token(model, text[:min(64, room // 2)])


if __name__ == "__main__":
    run_command(main)
