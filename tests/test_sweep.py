"""experiments/sweep.py. Every docstring states the bug that its test prevents."""
import re

import pytest
import torch

from data import InputError
from evaluate import Bench
from experiments import sweep
from mah_dpo import Pair, policy_logps
from prm import load_prm


@pytest.fixture(scope="module")
def bench(whole):
    """The models of a small finished run."""
    return Bench(whole)


NAMES = ["helpfulness", "honesty"]


def test_scores_of_every_mix_by_what_was_learnt(bench, whole):
    """Weights that do not reach the heads, or in the other order; the score of another place than
    the answer's end, or of another output; a reward that forgets SFT, or beta, or is another head's."""
    prompts = sweep.held_out(whole, NAMES, 3)
    assert len({tuple(x) for x in prompts}) == 3
    model, prm = bench.model("mah_dpo"), load_prm(f"{whole}/prm")
    # The implicit reward is by the objective's own head, whatever mix has answered.
    heads = {name: torch.tensor([model.config.objectives.index(name)]) for name in NAMES}
    for share, weights in ((0.0, (1.0, 0.0)), (0.25, (0.75, 0.25)), (1.0, (0.0, 1.0))):
        answers, row = sweep.point(bench, NAMES, prompts, share)
        assert tuple(row["weights"].values()) == weights
        for name in NAMES:
            scores, rewards = [], []
            for x, y in zip(prompts, answers):
                output = prm.names.index(name)
                scores.append(prm(torch.tensor([x + y]))[0, -1, output].item())
                pair = [Pair(name, x, y, y, "dev")]
                ours = policy_logps(model, pair, heads[name])[0].item()
                sft = policy_logps(bench.sft, pair, torch.tensor([0]))[0].item()
                rewards.append(bench.config["beta"] * (ours - sft))
            metrics = row["metrics"]
            assert metrics[f"PRM {name}"]["mean"] == pytest.approx(sum(scores) / 3, abs=1e-4)
            assert metrics[f"reward {name}"]["mean"] == pytest.approx(sum(rewards) / 3, abs=1e-5)


def test_the_table_and_the_answers_at_either_end(whole, capsys):
    """A sweep without its ends, in another order, or an answer below the wrong name."""
    sweep.main([whole, *NAMES, "--steps", "2", "--n", "2"])
    out = capsys.readouterr().out
    assert re.findall(r"^\| (1.0|0.5|0.0) +\| (1.0|0.5|0.0) ", out, re.M) == [
        ("1.0", "0.0"), ("0.5", "0.5"), ("0.0", "1.0")]
    bench = Bench(whole)
    rows, prompts, ends = sweep.sweep(bench, NAMES, 2, 2)
    for name, answers in zip(NAMES, ends):
        assert f"{name}: {bench.tokenizer.decode(answers[0])}" in out


@pytest.mark.parametrize("argv, message", [
    (["honesty", "wit"], "its objectives are helpfulness, honesty"),
    ([*NAMES, "--steps", "0"], "at least 1")])
def test_mistakes_are_named(whole, argv, message):
    """A traceback, or a table of nothing."""
    with pytest.raises(InputError, match=message):
        sweep.main([whole, *argv])
