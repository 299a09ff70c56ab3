"""experiments/timing.py: what guided decoding costs.

    python experiments/timing.py DIR           a run, or any checkpoint

Three ways to take S steps of N tokens, each the best of K candidates: the plain one encodes the
text again in every step; the published one keeps a cache, but draws candidates one by one; this
project's carries both caches. Then one-token decoding, beside the speed of the memory.
"""
import argparse
import copy
import os
import sys
import time
import timeit

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from decode import draw, generate, prefill, score_candidates  # noqa: E402
from evaluate import table  # noqa: E402
from interop.reward_models import REWARD  # noqa: E402
from model import load_hf, pick_device  # noqa: E402
from prm import PRM, load_prm  # noqa: E402


def sampled(model, cache, h, N):
    """N tokens for every row of a cache, none ends earlier, with the usual sampling."""
    # Masks in which no token ends a step.
    shape = 4, model.config.vocab_size + 1
    never = torch.zeros(shape, dtype=torch.bool, device=h.device)
    limits = cache.held.new_full((len(h),), N)
    generator = torch.Generator().manual_seed(0)
    return draw(model, model.fold(0), cache, h, list(never), limits, temperature=1.0, top_k=50,
                top_p=1.0, generator=generator, feed_last=True)


def last_score(prm, texts):
    """The PRM's score at the end of texts of one length, read from the beginning -> (n,)."""
    ids = torch.tensor(texts, device=prm.scale.device)                        # (n, T)
    return prm(ids)[:, -1, 0]


def steps_carried(model, prm, prompt, K, S, N):
    """This project's way: candidates in one batch, both caches carried on. -> bytes of caches"""
    room = len(prompt) + S * N
    policy = model.new_cache(1, room)
    judge = prm.backbone.new_cache(1, room)
    # The prompt is read once, by one row, which is then forked into K.
    h = prefill(model, policy, [prompt]).repeat_interleave(K, 0)
    prefill(prm, judge, [prompt])
    policy, judge = policy.fork(K), judge.fork(K)
    for _ in range(S):
        # K candidates, each behind the shared prefix; then what the PRM says of them.
        candidates = sampled(model, policy, h, N)
        scores, fed = score_candidates(prm, judge, candidates, None)
        winner = int(scores[:, 0].argmax())
        size = policy.nbytes() + judge.nbytes()
        # The winner's tokens join the shared text; all K rows go on from its state.
        policy.keep(winner)
        judge.keep(winner, fed[winner:winner + 1])
        h[:] = h[winner].clone()
    return size


def steps_one_by_one(model, prm, prompt, K, S, N):
    """As published: a cache is carried, but candidates are drawn one after another from copies of
    it, and the PRM reads prompt and steps again for every candidate."""
    text = list(prompt)
    running = model.new_cache(1, len(prompt) + S * N)
    state = prefill(model, running, [prompt])
    for _ in range(S):
        scores, tried = [], []
        for _ in range(K):
            # Every candidate begins from a copy of the whole cache.
            cache, h = copy.deepcopy(running), state.clone()
            ids, = sampled(model, cache, h, N)
            scores.append(float(last_score(prm, [text + ids])))
            tried.append((ids, cache, h))
        # The best one's copy becomes the cache that goes on.
        ids, running, state = tried[scores.index(max(scores))]
        running.keep(0)
        text += ids
    return K * running.nbytes()


def steps_encoded_again(model, prm, prompt, K, S, N):
    """The plain way: policy and PRM read prompt and text anew in every step, K rows at once."""
    text = list(prompt)
    for _ in range(S):
        # A cache within the step only: the next one begins anew.
        cache = model.new_cache(K, len(text) + N)
        drawn = sampled(model, cache, prefill(model, cache, [text] * K), N)
        winner = last_score(prm, [text + ids for ids in drawn]).argmax()
        text += drawn[int(winner)]
    return cache.nbytes()


# As the table calls them; the last is what the others are compared with.
METHODS = {"re-encoding": steps_encoded_again, "cached, one by one": steps_one_by_one,
           "carried (here)": steps_carried}


class Fed:
    """Counts the tokens that a network is fed."""

    def __init__(self, net):
        self.tokens = 0
        net.register_forward_hook(self.count)

    def count(self, net, args, output):
        self.tokens += args[0].numel()


def time_methods(model, prm, prompt, K, S, N, counters):
    """Every method's lines of the table, for one prompt and one K."""
    measured = []
    for name, work in METHODS.items():
        # Once to warm up, then what counts.
        work(model, prm, prompt, K, 1, 2)
        for counter in counters:
            counter.tokens = 0
        start = time.perf_counter()
        size = work(model, prm, prompt, K, S, N)
        seconds = time.perf_counter() - start
        measured.append((name, seconds, size, counters[0].tokens, counters[1].tokens))
    # The last method is this project's: the others' times are so many times as long.
    here, lines = measured[-1][1], []
    for name, seconds, size, to_policy, to_prm in measured:
        lines.append({"prefix": str(len(prompt)), "K": str(K), "method": name,
                      "seconds": f"{seconds:.2f}", "tokens/s": f"{K * S * N / seconds:.0f}",
                      "x here": f"{seconds / here:.1f}", "cache MB": f"{size / 1e6:.1f}",
                      "fed to policy": str(to_policy), "fed to PRM": str(to_prm)})
    return lines


def time_one_token(model, prompt):
    """Print the time of a token decoded by itself, beside that of reading the weights once."""
    for _ in range(2):                                                        # the first warms up
        start = time.perf_counter()
        drawn, = generate(model, [prompt], max_new_tokens=64, temperature=0)
        seconds = (time.perf_counter() - start) / len(drawn)                  # it may end itself
    # The memory's speed is that of a copy, which reads and writes each byte.
    source = torch.ones(64 * 2 ** 20, device=model.embed.weight.device)
    target = torch.empty_like(source)
    timer = timeit.Timer("target.copy_(source)[-1].item()",                   # waits for a GPU
                         globals={"source": source, "target": target})
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
def timing(directory, device, S=2, N=16):
    """Print the costs with the model of a run or of a Hugging Face directory, and with a PRM: a
    run's own, or one with random weights on the same backbone."""
    run = os.path.isdir(f"{directory}/mah_dpo")
    model = load_hf(f"{directory}/mah_dpo" if run else directory).to(device).eval()
    # Time does not depend on what the weights are.
    generator = torch.Generator().manual_seed(0)
    if os.path.isdir(f"{directory}/prm"):
        prm, whose = load_prm(f"{directory}/prm"), "its own"
    else:
        prm, whose = PRM(model.with_heads(()), [REWARD], generator), "a random"
    prm = prm.to(device).eval()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {whose} PRM, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; {S} steps of {N} tokens")
    # What is fed does not matter, only how much: random tokens.
    room = min(model.config.max_len, prm.backbone.config.max_len)
    text = torch.randint(0, model.config.vocab_size, (room,), generator=generator).tolist()
    counters, lines = [Fed(model), Fed(prm.backbone)], []
    for prefix in (128, 512, 2048):
        if prefix + S * N > room:
            print(f"a prefix of {prefix} does not fit the context of {room}: left out")
            continue
        for K in tqdm((1, 2, 5, 10), desc=f"prefix {prefix}", unit="K", disable=None):
            lines += time_methods(model, prm, text[:prefix], K, S, N, counters)
    if lines:
        print(table("ways to decode", lines))
    time_one_token(model, text[:min(64, room // 2)])


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run directory, or any checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    timing(args.directory, pick_device(args.device))


if __name__ == "__main__":
    run_command(main)
