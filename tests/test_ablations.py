"""experiments/ablations.py: one option varied."""
import os
import re
import shutil

import pytest

import train
from conftest import TINY
from data import read_json
from experiments import ablations
from test_runs import refused, results_of

pytestmark = pytest.mark.usefixtures("small_worlds")


@pytest.fixture(scope="module")
def varied(small_worlds, checkpoint, tmp_path_factory):
    """A run of one objective, and beside it the runs of an ablation -> directory, the runs' common
    options, the runs whose tables were shown."""
    common = ["--objective", "honesty", "--init", checkpoint, *TINY]
    out = str(tmp_path_factory.mktemp("ablations") / "run")
    train.main([*common, "--out", out])
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations.evaluate, "main", shown.extend)
        ablations.main([out, "prm-pairs=4,2,3"])
    return out, common, shown


def test_every_value_is_a_run_of_its_own(varied, tmp_path):
    """Prevents: a variant that trains with the run's own value or takes over what depends on the
    option; one of the value that the run has already; tables that leave one out."""
    out, common, shown = varied
    assert shown == [out, f"{out}-prm_pairs=2", f"{out}-prm_pairs=3"]
    scratch = str(tmp_path / "scratch")
    train.main([*common, "--out", scratch, "--prm-pairs", "3", "--weight-steps", "0"])
    assert results_of(scratch) == results_of(shown[2])
    assert not os.path.exists(f"{out}-prm_pairs=4")


def test_a_stopped_ablation_goes_on(varied, capsys, monkeypatch):
    """Prevents: a second RUN-FIELD=a-2 for a command that is given again."""
    out, _, _ = varied
    beside = sorted(os.listdir(os.path.dirname(out)))
    os.remove(f"{out}-prm_pairs=3/results.json")
    monkeypatch.setattr(ablations.evaluate, "main", lambda argv: None)
    ablations.main([out, "prm_pairs=2,3"])
    assert len(re.findall(r"\] tables$", capsys.readouterr().out, re.MULTILINE)) == 1
    assert sorted(os.listdir(os.path.dirname(out))) == beside
    assert os.path.exists(f"{out}-prm_pairs=3/results.json")


def test_a_variant_whose_copies_are_gone_makes_them_again(varied, monkeypatch):
    """Prevents: a traceback, or other figures, where somebody has made room by removing what a
    variant has copied from the run."""
    out, _, _ = varied
    variant = f"{out}-prm_pairs=3"
    before = results_of(variant)
    shutil.rmtree(f"{variant}/sft")
    os.remove(f"{variant}/pairs.jsonl")
    os.remove(f"{variant}/results.json")
    monkeypatch.setattr(ablations.evaluate, "main", lambda argv: None)
    ablations.main([out, "prm_pairs=3"])
    assert os.path.exists(f"{variant}/sft/config.json")
    assert results_of(variant) == before


@pytest.mark.parametrize("values, message", [
    ("gamma", "write FIELD=a,b,c"), ("seed=1,2", "with one of the fields template_args, dtype"),
    ("gamma=a,b", "'a' is no float"), ("alpha=helpfulness=2;honesty=1", "no 'helpfulness' here"),
    ("k=3,0", "--k 0 is out of range"), ("n_test=9,9999999", "fewer than 9999999 distinct")])
def test_a_mistake_leaves_nothing_behind(values, message, varied, capsys, monkeypatch):
    """Prevents: an ablation whose mistake shows after the first values have been trained."""
    out, _, _ = varied
    config = read_json(f"{out}/config.json")
    beside = os.listdir(os.path.dirname(out))
    problems = train.World.problems

    def asked(self, split, n, rng):
        if n > 10**6:
            raise train.InputError(f"fewer than {n} distinct prompts")
        return problems(self, split, n, rng)
    monkeypatch.setattr(train.World, "problems", asked)
    monkeypatch.setattr(train, "run_stages", lambda run: pytest.fail("a run was started"))
    assert message in refused([out, values], capsys, ablations.main)
    assert os.listdir(os.path.dirname(out)) == beside
    assert read_json(f"{out}/config.json") == config
