"""experiments/candidates.py. Every docstring states the bug that its test prevents."""
import re

import pytest
import torch

from data import InputError
from evaluate import Bench
from experiments import candidates
from prm import load_prm


def test_own_and_true_scores_by_number_of_candidates(whole, small_worlds, capsys):
    """A PRM's score that is not the PRM's, in another unit, or of other answers than those whose
    worth stands beside it; one K measured for all; whole answers among the rows."""
    candidates.main([whole, "honesty", "--k", "1,3"])
    lines = re.findall(r"^\| (sft|mah_dpo) .*", capsys.readouterr().out, re.M)
    assert lines == ["sft", "sft", "mah_dpo", "mah_dpo"]
    bench = Bench(whole)
    job = next(job for job in bench.jobs("values") if job.guide == "honesty")
    found = candidates.measure(bench, job, [1, 3])
    assert [(line["policy"], line["guide"], line["K"]) for line in found] == [
        ("sft", "honesty", "1"), ("sft", "honesty", "3")]
    talks, _, _ = bench.rollout(job)                             # K is 3 still
    prm, scores = load_prm(f"{whole}/prm"), []
    for talk in talks:
        turn, = talk.turns
        ids = torch.tensor([turn.before + turn.response])
        scores.append(prm(ids)[0, -1, prm.names.index("honesty")].item())
    worth = [talk.scores(bench.worlds["values"], bench.tokenizer)["honesty"] for talk in talks]
    for column, values in (("PRM's score", scores), ("true score", worth)):
        assert found[1][column].startswith(f"{sum(values) / len(values):.3f} ")


@pytest.mark.parametrize("argv, message", [
    (["math_accuracy"], "'math_accuracy' is not measured here, only helpfulness, honesty"),
    (["--k", "0,2"], "--k 0,2: write whole numbers"), (["--k", "2,"], "--k 2,: write")])
def test_mistakes_are_named(whole, argv, message):
    """A traceback, or a table of nothing."""
    with pytest.raises(InputError, match=message):
        candidates.main([whole, *argv])
