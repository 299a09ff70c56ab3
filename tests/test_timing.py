"""experiments/timing.py: what each way of decoding feeds. Every docstring states the bug that its test prevents."""
import re
import time

import pytest
import torch

from data import InputError
from experiments import timing
from model import GPT, GPTConfig, save_hf


def test_timing_counts_what_each_way_feeds(tmp_path, capsys):
    """A benchmark whose ways do unequal work, or that hides tokens fed twice: with prompt P, K candidates, S steps of N tokens
    the carried way feeds each model P + K S N tokens, published decoders the PRM K times the whole text in every step."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=170)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    timing.main([str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in printed.splitlines() if line.startswith("| 128 ")]
    assert "a prefix of 512 does not fit the context of 170" in printed and "GB/s of a copy" in printed
    fed = {(int(r[1]), r[2]): (int(r[7]), int(r[8])) for r in rows}
    P, S, N = 128, 2, 16
    assert sorted(fed) == sorted((K, way) for K in (1, 2, 5, 10) for way in ("re-encoding", "cached, one by one", "carried (here)"))
    for K in (1, 2, 5, 10):
        assert fed[K, "carried (here)"] == (P + K * S * N, P + K * S * N)
        assert fed[K, "cached, one by one"] == (P + K * S * N, K * (P + N + P + 2 * N))
        assert fed[K, "re-encoding"] == (K * (P + N + P + 2 * N), K * (P + N + P + 2 * N))


def test_timing_of_a_short_context(tmp_path, capsys):
    """A traceback for a model that no prefix fits: it still has a speed of one token."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=40)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    timing.main([str(tmp_path)])
    assert capsys.readouterr().out.count("does not fit the context of 40") == 3


def test_one_token_is_timed_by_the_tokens_drawn(tmp_path, capsys, monkeypatch):
    """A speed 64 times too good from a model that ends its answer at once."""
    config = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=40)
    save_hf(GPT(config, torch.Generator().manual_seed(0)), str(tmp_path), weights=0)
    monkeypatch.setattr(timing, "generate", lambda model, prompts, **options: time.sleep(0.05) or [[0]])
    timing.main([str(tmp_path)])
    assert float(re.search(r"one token: ([0-9.]+) ms", capsys.readouterr().out)[1]) >= 50


def test_timing_needs_a_checkpoint(tmp_path):
    """A traceback instead of the name of what is missing."""
    with pytest.raises(InputError, match="config.json: no such file"):
        timing.main([str(tmp_path)])
