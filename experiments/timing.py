"""What guided decoding costs: re-encoding, cached, and as done here; and one-token decoding beside the memory's speed.

    python experiments/timing.py DIR           a run, or any checkpoint
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
from evaluate import show, table  # noqa: E402
from interop.reward_models import REWARD  # noqa: E402
from model import load_hf, pick_device  # noqa: E402
from prm import PRM, load_prm  # noqa: E402


def sampled(model, cache, h, N):
    """One step for timing: N tokens for every row, no earlier end, the usual sampling."""
    masks = torch.zeros(4, model.config.vocab_size + 1, dtype=torch.bool, device=h.device)
    return draw(model, model.fold(0), cache, h, list(masks), cache.held.new_full((len(h),), N), temperature=1.0, top_k=50,
                top_p=1.0, generator=torch.Generator().manual_seed(0), feed_last=True)


def steps_carried(model, prm, prompt, K, S, N):
    """This project's way, S steps of N tokens: both caches carried on. -> bytes of both caches"""
    caches = [net.new_cache(1, len(prompt) + S * N) for net in (model, prm.backbone)]
    h = prefill(model, caches[0], [prompt]).repeat_interleave(K, 0)
    prefill(prm, caches[1], [prompt])
    policy, judge = (cache.fork(K) for cache in caches)
    for _ in range(S):
        scores, fed = score_candidates(prm, judge, sampled(model, policy, h, N), None)
        winner, size = int(scores[:, 0].argmax()), policy.nbytes() + judge.nbytes()
        policy.keep(winner)
        judge.keep(winner, fed[winner:winner + 1])
        h[:] = h[winner].clone()
    return size


def steps_one_by_one(model, prm, prompt, K, S, N):
    """As published: a cache is carried, but candidates are drawn one after another from copies of it, and the PRM reads
    prompt and steps again for every candidate."""
    running, text = model.new_cache(1, len(prompt) + S * N), list(prompt)
    state = prefill(model, running, [prompt])
    for _ in range(S):
        tried = []
        for _ in range(K):
            cache, h = copy.deepcopy(running), state.clone()
            ids, = sampled(model, cache, h, N)
            tried.append((float(prm(torch.tensor([text + ids], device=h.device))[0, -1, 0]), ids, cache, h))
        _, ids, running, state = max(tried, key=lambda t: t[0])
        running.keep(0)
        text += ids
    return K * running.nbytes()


def steps_encoded_again(model, prm, prompt, K, S, N):
    """The plain way: every step encodes prompt and text anew, for K rows at once, and so does the PRM."""
    text = list(prompt)
    for _ in range(S):
        cache = model.new_cache(K, len(text) + N)
        drawn = sampled(model, cache, prefill(model, cache, [text] * K), N)
        scores = prm(torch.tensor([text + ids for ids in drawn], device=prm.scale.device))[:, -1, 0]
        text += drawn[int(scores.argmax())]
    return cache.nbytes()


@torch.no_grad()
def timing(directory, device, S=2, N=16):
    """Print the cost of guided decoding (S steps of N tokens) with the model of a run or of a Hugging Face directory, its
    PRM a run's own or one with random weights on the same backbone; and one-token decoding beside the memory's speed."""
    run = os.path.isdir(os.path.join(directory, "mah_dpo"))
    model = load_hf(os.path.join(directory, "mah_dpo") if run else directory).to(device).eval()
    trained = os.path.isdir(os.path.join(directory, "prm"))
    prm = load_prm(os.path.join(directory, "prm")) if trained else \
        PRM(model.with_heads(()), [REWARD], torch.Generator().manual_seed(0))
    prm.to(device)
    size, room = sum(p.numel() for p in model.parameters()), min(model.config.max_len, prm.backbone.config.max_len)
    print(f"{size / 1e6:.1f} M parameters, {'its own' if trained else 'a random'} PRM, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; {S} steps of {N} tokens")
    methods = {"re-encoding": steps_encoded_again, "cached, one by one": steps_one_by_one, "carried (here)": steps_carried}
    generator, rows, fed = torch.Generator().manual_seed(0), [], {model: 0, prm.backbone: 0}

    def count(net, args, output):
        fed[net] += args[0].numel()
    for net in fed:
        net.register_forward_hook(count)
    for prefix in (128, 512, 2048):
        if prefix + S * N > room:
            print(f"a prefix of {prefix} does not fit the context of {room}: left out")
            continue
        prompt = torch.randint(0, model.config.vocab_size, (prefix,), generator=generator).tolist()
        for K in tqdm((1, 2, 5, 10), desc=f"prefix {prefix}", unit="K", disable=None):
            found = {}
            for name, work in methods.items():
                work(model, prm, prompt, K, 1, 2)                                         # warm up
                fed.update(dict.fromkeys(fed, 0))
                start = time.perf_counter()
                held = work(model, prm, prompt, K, S, N)
                found[name] = time.perf_counter() - start, held, *fed.values()
            for name, (seconds, held, *tokens) in found.items():
                rows.append([prefix, K, name, f"{seconds:.2f}", f"{K * S * N / seconds:.0f}",
                             f"{seconds / found['carried (here)'][0]:.1f}", f"{held / 1e6:.1f}", *tokens])
    head = ["prefix", "K", "method", "seconds", "tokens/s", "x here", "cache MB", "fed to policy", "fed to PRM"]
    print(table("ways to decode", show(*head), [dict(zip(head, map(str, row))) for row in rows], []))
    prompt = torch.randint(0, model.config.vocab_size, (min(64, room // 2),), generator=generator).tolist()
    for _ in range(2):                                                                    # the first warms up
        start = time.perf_counter()
        drawn, = generate(model, [prompt], max_new_tokens=64, temperature=0)              # fewer tokens if it ends itself
        per_token = (time.perf_counter() - start) / len(drawn)
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    copied = min(timeit.repeat(lambda: target.copy_(source)[-1].item(), number=1, repeat=5))       # .item() waits for a GPU
    speed = 2 * source.nbytes / copied
    read = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(("heads.", "embed", "positions")))
    read += model.heads[0].weight.nbytes
    print(f"one token: {1e3 * per_token:.2f} ms; reading the {read / 1e6:.0f} MB of weights at the {speed / 1e9:.0f} GB/s of a copy "
          f"takes {1e3 * read / speed:.2f} ms, {read / speed / per_token:.0%} of that")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a run directory, or any checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args(argv)
    timing(args.directory, pick_device(args.device))


if __name__ == "__main__":
    run_command(main)
