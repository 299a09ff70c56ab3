"""experiments/growth.py: memory and pictures of growing costs. Every docstring states the bug that
its test prevents."""
import re
from xml.etree import ElementTree

import pytest

from data import InputError
from experiments import growth
from test_timing import checkpoint


def test_memory_is_prefix_and_k_steps(tmp_path, capsys):
    """A benchmark that counts the prefix once for each candidate, or forgets one of the caches; a
    picture without a line of each K; heads that are left out of training."""
    growth.main([checkpoint(tmp_path, 700), "--out", str(tmp_path / "growth.svg")])
    out = capsys.readouterr().out
    sizes = {}
    for K, prefix, _, size in re.findall(r"^\| (\d+) +\| (\d+) +\| ([\d.]+) +\| ([\d.]+) +\|", out,
                                         re.M):
        sizes[int(K), int(prefix)] = float(size)
    assert list(sizes) == [(K, prefix) for K in growth.KS for prefix in (128, 512)]
    # Two caches of 2 layers, with keys and values of 8 channels in float32 for every place.
    place = 2 * 2 * 2 * 8 * 4 / 1e6
    for K in growth.KS:
        assert sizes[K, 512] - sizes[K, 128] == pytest.approx(384 * place, abs=0.011)
    steps = [(sizes[K, 128] - sizes[1, 128]) / place for K in growth.KS]
    # The places that a row's step takes: its tokens, in room for a few more.
    assert all(growth.N - 3 <= n / max(1, K - 1) <= 2 * growth.N
               for n, K in zip(steps[1:], growth.KS[1:]))
    assert [int(H) for H in re.findall(r"^\| (\d+) +\| [\d.]+ +\| [\d.]+ +\|$", out, re.M)] == list(
        growth.HS)
    picture = ElementTree.parse(tmp_path / "growth.svg")
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(growth.KS)


def test_growth_needs_room(tmp_path):
    """A traceback for a model that no prefix fits."""
    with pytest.raises(InputError, match="a context of 40 tokens is too short for a prefix of 128"):
        growth.main([checkpoint(tmp_path, 40)])
