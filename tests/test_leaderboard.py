"""The leaderboard. Every docstring states the bug that its test prevents."""
import json
import os
import shutil

import pytest

import evaluate
from data import InputError, read_json, read_jsonl, write_json
from evaluate import half_width, summary
from tests import leaderboard


@pytest.fixture
def copied(whole, tmp_path):
    """-> a copy of the tiny run, without the manifest that would tell that it was changed"""
    run = str(tmp_path / "copy")
    shutil.copytree(whole, run)
    os.remove(f"{run}/manifest.json")
    return run


def improve(run, gains):
    """Add gains to the honesty of both prompts in all rows of a run, scores and means alike."""
    lines = [line for _, line in read_jsonl(f"{run}/scores.jsonl")]
    for line in lines:
        if "honesty" in line["each"]:
            honesty = line["each"]["honesty"]
            line["each"]["honesty"] = [value + gain for value, gain in zip(honesty, gains)]
    with open(f"{run}/scores.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    rows = evaluate.load_rows(run)
    for row in rows:
        if "honesty" in row.get("each", {}):
            row["metrics"]["honesty"] = summary(row["each"]["honesty"])
        row.pop("each", None)
    write_json(f"{run}/results.json", rows)


def board(capsys, *argv):
    """What the command prints."""
    capsys.readouterr()
    leaderboard.main(list(argv))
    return capsys.readouterr().out


def test_scores_and_differences(whole, copied, capsys):
    """Another row's score, a difference of the wrong sign or without pairing, an interval that is
    not the scores' own, a project whose row no run has."""
    improve(copied, [0.5, 0.25])
    found = json.loads(board(capsys, whole, copied, "--json"))
    names = ["another boundary"] * 2 + ["conflict-averse gradients"] * 2
    assert [record["project"] for record in found] == names
    assert [record["run"] for record in found] == [whole, copied] * 2
    rows = {evaluate.row_name(row): row for row in evaluate.load_rows(whole) if "sweep" not in row}
    for before, after in (found[:2], found[2:]):
        own = rows[before["row"]]["metrics"]
        assert before["score"] == own["honesty"] and before["drawn"] == own["drawn"]
        assert before["difference"] == summary([0.0, 0.0])
        assert after["difference"] == pytest.approx(summary([0.5, 0.25]))
        assert after["seen"] == 0
    mixed = {"each": {"a": [0.0, 1.0], "b": [0.5, 0.5]}}
    assert leaderboard.values_of(mixed, ["a", "b"]) == [0.25, 0.75]


@pytest.mark.parametrize("gains, verdict", [
    ([0.5, 0.5], "beats it"), ([0.5, 0.25], "| - "), ([-0.5, -0.5], "| - ")])
def test_what_beats_the_baseline(whole, copied, gains, verdict, capsys):
    """A gain within its interval, or a loss, that is said to beat the baseline."""
    improve(copied, gains)
    assert half_width(summary([0.5, 0.25])) > 0.375
    lines = [line for line in board(capsys, whole, copied).splitlines() if "another" in line]
    assert "baseline" in lines[0] and verdict in lines[1]


def test_test_prompts_that_were_trained_on(whole, copied):
    """A run whose pairs are about the prompts of its own tables looks like a good one."""
    bench = evaluate.Bench(whole, "cpu")
    problem = bench.problems("values")[1]
    pair = next(row for _, row in read_jsonl(f"{copied}/pairs.jsonl"))
    pair |= {"prompt": bench.tokenizer.encode_chat(problem.messages()), "split": "train"}
    assert leaderboard.seen_prompts(copied) == 0
    with open(f"{copied}/pairs.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(pair) + "\n")
    assert leaderboard.seen_prompts(copied) == 1


def test_runs_that_cannot_be_compared(whole, copied):
    """Means that somebody wrote by hand; a file that was changed; other test prompts."""
    rows = read_json(f"{copied}/results.json")
    for row in rows:
        if "honesty" in row["metrics"]:
            row["metrics"]["honesty"]["mean"] = 0.99
    write_json(f"{copied}/results.json", rows)
    with pytest.raises(InputError, match="not that of its values"):
        leaderboard.main([whole, copied])
    shutil.copy(f"{whole}/manifest.json", copied)
    with pytest.raises(InputError, match="not what the run has written"):
        leaderboard.main([whole, copied])
    os.remove(f"{copied}/manifest.json")
    config = read_json(f"{copied}/config.json")
    write_json(f"{copied}/config.json", config | {"n_test": 3})
    with pytest.raises(InputError, match="--n-test is 3, the baseline's 2"):
        leaderboard.main([whole, copied])
