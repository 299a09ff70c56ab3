"""experiments/growth.py: how the cost of guided decoding and of training grows.

    python experiments/growth.py [DIR]         a checkpoint; default: a random model of 4 M

Decoding, as the prefix and the number of candidates K grow: time per token of a step, and the
memory of both caches, which is prefix + K x step. Training, as the number of objectives H grows
while the pairs of a step stay as many: the time of forward and backward. Writes growth.svg.
"""
import argparse
import math
import os
import sys
import timeit
from functools import partial

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, run_command  # noqa: E402
from decode import State, guided_decode  # noqa: E402
from evaluate import table  # noqa: E402
from experiments.vary import picture  # noqa: E402
from interop.reward_models import REWARD  # noqa: E402
from mah_dpo import Pair, mah_dpo_loss, own_heads, policy_logps  # noqa: E402
from model import GPT, GPTConfig, load_hf, pick_device  # noqa: E402
from prm import PRM  # noqa: E402

PREFIXES, KS, HS = (128, 512, 2048, 4096), (1, 4, 16), (1, 4, 16)
N = 16                      # tokens of a step
PAIRS, T = 16, 32           # pairs of a training step; tokens of a prompt, and of a response


def time_decoding(model, prm, text, K):
    """Seconds per token of a step of K candidates behind a text (ids), the best of three; and the
    bytes of both caches."""
    room = len(text) + 5 * (N + 1)
    state = State(model.new_cache(1, room), prm.backbone.new_cache(1, room))
    step = partial(guided_decode, model, prm, boundary="turn", K=K, guide=REWARD.name,
                   max_new_tokens=N, state=state)
    # The first step reads the text, too; those that are timed follow a single word of the user's.
    step([text])
    seconds = timeit.repeat(partial(step, [text[:1]]), number=1, repeat=3)
    return min(seconds) / N, state.policy.nbytes() + state.prm.nbytes()


def train_step(model, pairs):
    """The gradient of one batch of pairs."""
    model.zero_grad()
    # As in train.py, but that the reference is not asked.
    head = own_heads(model, pairs)
    chosen, rejected = policy_logps(model, pairs, head)
    # Where the reference has said 0 costs what any other number costs.
    reference = torch.zeros_like(chosen)
    alpha = torch.ones(len(model.heads), device=chosen.device)
    loss, _ = mah_dpo_loss(chosen, rejected, reference, reference, head, alpha, beta=0.1)
    loss.backward()


def time_training(model, H, generator):
    """Seconds of forward and backward for PAIRS pairs of H objectives, the best of five."""
    names = [f"objective_{i}" for i in range(H)]
    model = model.with_heads(names)
    # Prompt, chosen and rejected of every pair; the objectives take turns.
    size = PAIRS, 3, T
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).tolist()
    pairs = [Pair(names[i % H], *texts, "train") for i, texts in enumerate(ids)]
    work = partial(train_step, model, pairs)
    # The first step is slower than all others, and not counted.
    work()
    return min(timeit.repeat(work, number=1, repeat=5))


def decoding_table(model, prm, text):
    """Print the costs of all Ks and prefixes that fit -> two plots, with a curve for every K."""
    lines, times, sizes = [], {}, {}
    for K in tqdm(KS, desc="decoding", unit="K", disable=None):
        name = f"K = {K}"
        times[name], sizes[name] = [], []
        for prefix in PREFIXES:
            # A small checkpoint has no room for the long ones.
            if prefix + 5 * (N + 1) > len(text):
                continue
            seconds, size = time_decoding(model, prm, text[:prefix], K)
            ms = 1e3 * seconds
            MB = size / 1e6
            # Prefixes stand at equal distances, and what grows in proportion is straight.
            across = math.log2(prefix)
            times[name].append((across, math.log2(ms)))
            sizes[name].append((across, math.log2(MB)))
            lines.append({"K": str(K), "prefix": str(prefix), "ms/token": f"{ms:.2f}",
                          "cache MB": f"{MB:.2f}"})
    if not lines:
        raise InputError(f"a context of {len(text)} tokens is too short for a prefix of "
                         f"{PREFIXES[0]}")
    print(table("decoding", lines))
    across = "log2 of the prefix"
    return [("log2 of ms per token", across, times), ("log2 of MB of caches", across, sizes)]


def training_table(model, generator):
    """Print the cost of a step for all numbers of objectives."""
    # The first number of objectives is 1, which the others are compared with.
    times = [1e3 * time_training(model, H, generator) for H in HS]
    lines = []
    for H, ms in zip(HS, times):
        lines.append({"H": str(H), "ms": f"{ms:.1f}", "x H = 1": f"{ms / times[0]:.2f}"})
    print(table(f"training: forward and backward of {PAIRS} pairs", lines))


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a checkpoint; a run's models are some, too")
    parser.add_argument("--out", default="growth.svg", help="the picture (default growth.svg)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    device, generator = pick_device(args.device), torch.Generator().manual_seed(0)
    # The policy: a checkpoint, or a model with random weights and room for the longest prefix.
    if args.directory:
        model = load_hf(args.directory)
    else:
        room = PREFIXES[-1] + 6 * N
        shape = GPTConfig(4096, 4, d_model=256, d_ff=512, max_len=room)
        model = GPT(shape, generator)
    # Without a tokenizer no answer ends by itself.
    model, model.tokenizer = model.to(device), None
    prm = PRM(model.with_heads(()), [REWARD], generator).to(device).eval()
    # The words do not matter: any costs what any other costs.
    room, size = model.config.max_len, sum(p.numel() for p in model.parameters())
    text = torch.randint(0, model.config.vocab_size, (room,), generator=generator).tolist()
    print(f"{size / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; steps of {N} tokens")
    # Two tables, and two plots beside each other.
    plots = decoding_table(model, prm, text)
    training_table(model, generator)
    picture(args.out, plots)


if __name__ == "__main__":
    run_command(main)
