"""experiments/samples.py. The docstring states the bug that the test prevents."""
import re

from evaluate import Bench, Job
from experiments import samples


def test_samples_of_every_policy(whole, small_worlds, capsys):
    """A policy whose responses are not shown, scores beside another's response, lines too long to
    read."""
    samples.main([whole, "2"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("=== values, test prompt") == 2 == out.count("=== tutoring, test prompt")
    for name in ("base", "sft_greedy", "soup", "mah_dpo:honesty", "sft + helpfulness",
                 "mah_dpo + unified"):
        shown = re.findall(rf"^{re.escape(name)} +helpfulness \d.\d\d  honesty", out, re.M)
        assert len(shown) == 2
    # The second student's lesson with SFT, whose tables have two prompts as well.
    bench = Bench(whole)
    talks = bench.rollout(Job("tutoring", "sft", "sft", {"policy": 1.0}))[0]
    score = talks[1].scores(bench.worlds["tutoring"], bench.tokenizer)["tutor_engagement"]
    block = out.split("=== tutoring, test prompt 2")[1].split("\nsft ")[1].split("\nsft_greedy")[0]
    assert f"tutor_engagement {score:.2f}" in block
    assert block.count("  > ") == 2 and "[cut off]" in block
