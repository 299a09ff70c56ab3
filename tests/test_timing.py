"""experiments/timing.py: what each way of decoding feeds. Every docstring states the bug that its
test prevents."""
import re
import time

import pytest
import torch

from data import InputError
from experiments import timing
from model import GPT, GPTConfig, save_hf


def checkpoint(path, max_len):
    """A tiny random model with a short context."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=max_len)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(path), weights=0)
    return str(path)


def test_timing_counts_what_each_way_feeds(tmp_path, capsys):
    """A benchmark whose ways do unequal work, or that hides tokens fed twice: with prompt P, K
    candidates, S steps of N tokens the carried way feeds the PRM P + K S N tokens and a word of
    the user's between steps, published decoders feed it K times the whole text in every step. The
    policy never reads a loser's last token."""
    timing.main([checkpoint(tmp_path, 170)])
    out = capsys.readouterr().out
    assert "a prefix of 512 does not fit the context of 170" in out and "GB/s of a copy" in out
    fed = {}
    for line in re.findall(r"^\| (128 .*) \|$", out, re.M):
        _, K, way, *_, policy, prm = re.split(r" *\| *", line)
        fed[int(K), way] = int(policy), int(prm)
    P, S, N = 128, 2, 16
    expected = {}
    for K in (1, 2, 5, 10):
        again, once = K * (P + N + P + 2 * N), P + K * S * (N - 1)
        expected[K, "re-encoding"] = again - K * S, again
        expected[K, "cached, one by one"] = once + S - 1, again
        expected[K, "carried (here)"] = once + S + S - 1, P + K * S * N + S - 1
    assert fed == expected


def test_timing_of_a_short_context(tmp_path, capsys):
    """A traceback for a model that no prefix fits: it still has a speed of one token."""
    timing.main([checkpoint(tmp_path, 40)])
    out = capsys.readouterr().out
    assert out.count("does not fit the context of 40") == 3 and "one token: " in out


def test_one_token_is_timed_by_the_tokens_drawn(tmp_path, capsys, monkeypatch):
    """A speed 64 times too good from a model that ends its answer at once."""
    def slow(model, prompts, **options):
        time.sleep(0.05)
        return [[0]]
    monkeypatch.setattr(timing, "generate", slow)
    timing.main([checkpoint(tmp_path, 40)])
    milliseconds = re.search(r"one token: ([0-9.]+) ms", capsys.readouterr().out)[1]
    assert float(milliseconds) >= 50


def test_timing_needs_a_checkpoint(tmp_path):
    """A traceback instead of the name of what is missing."""
    with pytest.raises(InputError, match="config.json: no such file"):
        timing.main([str(tmp_path)])
