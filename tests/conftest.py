"""Shared by all tests: the project's root on the path, one thread (tiny models are slower with
more), a tiny model, a tiny run."""
import contextlib
import os
import re
import sys
from functools import partial

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import DOMAINS, Tokenizer, World  # noqa: E402
from model import GPT, GPTConfig, save_hf  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config):
    """`-k ex1` means exercise 1 alone, not also 10 to 15: their tests are called test_ex1_..."""
    config.option.keyword = re.sub(r"\bex(\d+)\b", r"ex\1_", config.option.keyword)


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded tokenizer of the three worlds."""
    return Tokenizer.embedded()


@pytest.fixture(scope="session")
def gpt(tokenizer):
    """A tiny random Llama with two different heads on the embedded tokenizer. Do not change it."""
    generator = torch.Generator().manual_seed(0)
    config = GPTConfig(tokenizer.n_vocab, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40,
                       max_len=128, init_std=0.2,
                       objectives=("math_accuracy", "math_engagement"))
    model = GPT(config, generator)
    with torch.no_grad():
        for p in model.parameters():
            # Norm weights of exactly 1 would hide a norm that is loaded into the wrong place.
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="session")
def checkpoint(gpt, tmp_path_factory):
    """A tiny Hugging Face directory that serves as --init. Do not change it."""
    directory = str(tmp_path_factory.mktemp("init"))
    save_hf(gpt, directory, weights=0)
    return directory


@pytest.fixture(scope="session")
def stories():
    """Directory of the stories260k checkpoint; tests that ask for it are skipped where MAHALO_DATA
    does not lead to it."""
    directory = os.path.join(os.environ.get("MAHALO_DATA", ""), "stories260k")
    if "MAHALO_DATA" not in os.environ or not os.path.isdir(directory):
        pytest.skip("MAHALO_DATA does not name a directory with stories260k")
    return directory


# The options of a run that takes seconds.
TINY = ("--fast --base-steps 2 --sft-steps 2 --n-prompts 8 --n-samples 3 --n-rollout-prompts 8 "
        "--rollouts 2 --prm-steps 2 --dpo-steps 2 --dpo-pairs 2 --n-test 2 --k 2 --device cpu").split()
NAMES = ["helpfulness", "honesty", "tutor_engagement"]


@contextlib.contextmanager
def few_problems():
    """At most 40 problems wherever a stage asks for thousands, a smaller base model, and short
    answers: untrained models talk until they are cut off."""
    plain = World.problems
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "problems",
                      lambda self, split, n, rng: plain(self, split, min(n, 40), rng))
        patch.setattr(train, "GPTConfig", partial(GPTConfig, n_layer=2, d_model=32, d_ff=48))
        for name, most in (("math", 20), ("values", 12), ("tutoring", 8)):
            patch.setattr(type(DOMAINS[name]), "max_new_tokens", most)
        yield


@pytest.fixture(scope="module")
def small_worlds():
    """few_problems in a file of tests, and not in those after it."""
    with few_problems():
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """One finished run of three objectives in two domains. Do not change it."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    with few_problems():
        train.main(["--objective", ",".join(NAMES), "--out", out, *TINY])
    return out
