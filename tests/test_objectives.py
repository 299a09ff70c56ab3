"""Objectives that come with --data: names of one's own from one end to the other. Every docstring
states the bug that its test prevents."""
import os
import shutil
from dataclasses import replace

import pytest
import torch

import decode
import evaluate
import train
from conftest import TINY
from data import OBJECTIVES, RNG, InputError, Objective, read_json, write_json
from interop import options, real_data, score
from interop.real_data import (TAKEN, Questions, data_files, objective_files, objectives_of,
                               real_labels, real_pairs, worlds_of)
from mah_dpo import Pair
from model import load_hf, save_hf
from prm import load_prm
from test_runs import copy_of, refused, results_of, write_lines
from test_train import rows_of

pytestmark = pytest.mark.usefixtures("small_worlds")


def pair(i, chosen="a pear .", rejected="i would rather not say it now ."):
    """A row of pairs."""
    return {"prompt": f"name fruit number {i} .", "chosen": chosen, "rejected": rejected}


def rated(i, **ratings):
    """A row of two completions: {objective: how much the first has}; the second has 3 of all."""
    completions, threes = [], dict.fromkeys(ratings, 3)
    for response, of in (("dear friend , a pear !", ratings), ("a brick .", threes)):
        annotations = {name: {"Rating": str(rating)} for name, rating in of.items()}
        completions.append({"response": response, "annotations": annotations})
    return {"instruction": f"name fruit number {i} .", "completions": completions}


def files(directory, **rows):
    """A directory with these JSONL files; "." for "__" in their names."""
    os.makedirs(directory, exist_ok=True)
    for name, content in rows.items():
        write_lines(os.path.join(directory, name.replace("__", ".") + ".jsonl"), content)
    return str(directory)


def names_in(spec, data):
    """The names that --objective selects."""
    return [o.name for o in objectives_of(spec, data)]


PAIRS = [pair(i) for i in range(12)]


# -- which objectives a directory has

def test_every_file_is_an_objective(tmp_path):
    """Only the paper's names found, another order on another disk, a paper's name without its own
    record, a domain that is no plain word."""
    data = files(tmp_path / "my-data.v2", warmth=PAIRS, brevity=PAIRS, honesty=PAIRS,
                 math_accuracy=PAIRS, warmth__steps=[])
    (tmp_path / "my-data.v2" / ".hidden.jsonl").write_text("{not json")
    own = [Objective(name, "my_data_v2", "C", "sentence") for name in ("brevity", "warmth")]
    paper = [OBJECTIVES["math_accuracy"], OBJECTIVES["honesty"]]
    assert objectives_of("all", data) == paper + own == objectives_of("all", data + "/")
    assert objectives_of("my_data_v2", data) == own and objectives_of("values", data) == paper[1:]
    assert names_in("warmth, math", data) == ["math_accuracy", "warmth"]
    assert objectives_of("values", "") == [o for o in OBJECTIVES.values() if o.domain == "values"]


def test_a_name_goes_before_a_domain(tmp_path, monkeypatch):
    """A directory named like one of its objectives, all of which that name then selects; --data .
    and a domain without a name."""
    data = files(tmp_path / "warmth", warmth=PAIRS, brevity=PAIRS)
    assert names_in("warmth", data) == ["warmth"] and names_in("all", data) == ["brevity", "warmth"]
    monkeypatch.chdir(data)
    assert {o.domain for o in objectives_of("all", ".")} == {"warmth"}


def test_objectives_json_tells_what_they_are(tmp_path):
    """A field that is not taken over, or that other objectives lose."""
    data = files(tmp_path / "d", warmth=PAIRS, brevity=PAIRS, honesty=PAIRS)
    told = {"brevity": {"domain": "style", "case": "B", "boundary": "newline"},
            "honesty": {"boundary": "turn"}, "warmth": {}}
    write_json(f"{data}/objectives.json", told)
    honesty = replace(OBJECTIVES["honesty"], boundary="turn")
    expected = [honesty, Objective("brevity", "style", "B", "newline"),
                Objective("warmth", "d", "C", "sentence")]
    assert objectives_of("all", data) == expected
    assert names_in("style", data) == ["brevity"]


def test_a_file_may_rate_several(tmp_path):
    """Ratings of several objectives that give one, or that replace an objective's own file; a file
    of the paper's name, or of one that it rates, that gives others too."""
    both = [rated(i, warmth=5, caution=1) for i in range(12)]
    del both[0]["completions"][1]["annotations"]["caution"]
    data = files(tmp_path / "d", rated=both, more__v2=both, warmth=PAIRS)
    paths = {name: f"{data}/{name}.jsonl" for name in ("rated", "more.v2", "warmth", "honesty")}
    shared = [paths["more.v2"], paths["rated"]]
    assert objective_files(data) == {"warmth": [*shared, paths["warmth"]], "caution": shared}
    files(data, warmth=both, honesty=both)
    found = {"warmth": [*shared, paths["warmth"]], "caution": shared, "honesty": [paths["honesty"]]}
    assert objective_files(data) == found and objective_files("") == {}


def test_a_file_without_a_pair_beside_others(tmp_path, gpt):
    """A run that stops at a file of ties, although another has the pairs of the objective; ties of
    one objective told of another."""
    ties = [rated(i, warmth=3, caution=1) for i in range(9)]
    data = files(tmp_path / "d", rated=ties, warmth=PAIRS)
    pairs, dropped = real_pairs(data, objectives_of("all", data), gpt)
    assert sum(p.objective == "warmth" for p in pairs) == len(PAIRS)
    reason = "no two responses to the prompt have different ratings of warmth"
    assert {why: n for why, n in dropped.items() if n} == {reason: len(ties)}
    os.remove(f"{data}/warmth.jsonl")
    with pytest.raises(InputError, match=r"rated.jsonl: 0 pairs for 'warmth' fit .*: add prompts, "
                       f"or leave it out of --objective; 9 left out: {reason}$"):
        real_pairs(data, objectives_of("all", data), gpt)


def test_the_prompt_that_no_template_writes(tmp_path, gpt):
    """A call of a tool among thousands of rows, refused without a word about which it is."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    chat = [{"role": "user", "content": "ask f"}, called, {"role": "tool", "content": "five kites"}]
    data = files(tmp_path / "d", warmth=[*PAIRS, PAIRS[0] | {"prompt": chat}])
    with pytest.raises(InputError, match="hold no message .*: the prompt that ends with 'five kit"):
        real_pairs(data, objectives_of("all", data), gpt)


def test_pairs_come_from_all_files_of_an_objective(tmp_path, checkpoint):
    """One file of several read, or an objective that learns from another's ratings."""
    both = [rated(i, warmth=5, caution=1) for i in range(12)]
    data, model = files(tmp_path / "d", rated=both, warmth=PAIRS), load_hf(checkpoint)
    pairs, dropped = real_pairs(data, objectives_of("all", data), model)
    assert not any(dropped.values())
    texts = {}
    for p in pairs:
        chosen = model.tokenizer.decode(p.chosen)
        texts.setdefault(p.objective, []).append(chosen)
    assert {name: sorted(set(said)) for name, said in texts.items()} == {
        "warmth": ["a pear .", "dear friend , a pear !"], "caution": ["a brick ."]}
    assert [len(said) for said in texts.values()] in ([24, 12], [12, 24])
    splits = [p.split for p in pairs]
    assert splits == sorted(splits, reverse=True) and len(set(splits)) == 2


def test_what_changes_a_run_is_in_its_key(tmp_path):
    """A run that goes on under another objectives.json, or after a file that it reads has changed;
    one that is refused for a file that it never reads."""
    data = files(tmp_path / "d", rated=[rated(i, warmth=5) for i in range(12)], brevity=PAIRS,
                 warmth__steps=[], other=PAIRS)
    assert data_files("", []) == [] == data_files(str(tmp_path / "gone"), [])
    names = [os.path.basename(path) for path in data_files(data, objectives_of("warmth", data))]
    assert names == ["rated.jsonl", "warmth.steps.jsonl"]
    write_json(f"{data}/objectives.json", {})
    chosen = objectives_of("warmth,brevity", data)
    names = [os.path.basename(path) for path in data_files(data, chosen)]
    assert names == ["objectives.json", "brevity.jsonl", "rated.jsonl", "warmth.steps.jsonl"]


# -- from one to many

def test_sixteen_objectives(tmp_path, checkpoint, monkeypatch, capsys):
    """A number of objectives up to which the options, the heads, the PRM or a file's name go."""
    names = [f"a_longish_objective_{i:02d}" for i in range(16)]
    rows = [rated(i, **dict.fromkeys(names, 5)) for i in range(20)]
    data = files(tmp_path / "data", everything=rows)
    monkeypatch.chdir(tmp_path)
    policies = [*[f"dpo_{name}" for name in names], "modpo", "mah_dpo"]
    kept, stages = ["base", "sft", "pairs.jsonl", *policies, "labels.jsonl", "prm"], train.stages
    monkeypatch.setattr(train, "stages", lambda run: [
        stage for stage in stages(run) if stage.files[-1] in kept])
    train.main(["--objective", ",".join(reversed(names)), "--init", checkpoint, "--data", data,
                *TINY, "--alpha", f"{names[15]}=2", "--dpo-steps", "1", "--prm-steps", "1"])
    run, = os.listdir("runs")
    model, prm = load_hf(f"runs/{run}/mah_dpo"), load_prm(f"runs/{run}/prm")
    assert list(model.config.objectives) == names == prm.names
    assert prm.outputs == objectives_of("all", data)
    capsys.readouterr()
    for guide in (names[15], "unified"):
        decode.main([f"runs/{run}", "--prompt", "hi", "--guide", guide, "--k", "2",
                     "--max-new-tokens", "3"])
    first = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  ->") for line in first)


def test_one_objective_of_ones_own(tmp_path, checkpoint):
    """A single objective whose name only a table could explain."""
    data = files(tmp_path / "d", brevity=PAIRS)
    run = train.new_run(options.read_command(
        ["--init", checkpoint, "--data", data, "--out", str(tmp_path / "run")], "")[0])
    assert run.names == ["brevity"] and run.domains == {"d": ["brevity"]}
    titles = [stage.title for stage in train.stages(run)]
    assert "policy dpo_brevity" in titles


# -- a run

NAMES = ["brevity", "caution", "warmth"]


@pytest.fixture(scope="module")
def own_run(small_worlds, checkpoint, tmp_path_factory):
    """A finished run of three invented objectives: two from one file of ratings, one with a domain
    of its own; labelled steps for one -> its directory, --data."""
    root = tmp_path_factory.mktemp("own")
    steps = [{"prompt": f"a word about {i} ?", "steps": ["take care .", " so hot ."],
              "labels": [1, 0]} for i in range(20)]
    data = files(root / "my-data", answers=[rated(i, warmth=5, caution=1) for i in range(20)],
                 brevity=[pair(i) for i in range(20)], caution__steps=steps)
    write_json(f"{data}/objectives.json", {"brevity": {"domain": "style", "boundary": "newline"}})
    out = str(root / "run")
    train.main(["--init", checkpoint, "--data", data, "--out", out, *TINY])
    return out, data


def test_a_run_of_ones_own_objectives(own_run, capsys):
    """A stage, a table or an export that knows only the paper's names."""
    out, data = own_run
    saved = read_json(f"{out}/config.json")["objectives"]
    assert [(o["name"], o["domain"], o["boundary"]) for o in saved] == [
        ("brevity", "style", "newline"), ("caution", "my_data", "sentence"),
        ("warmth", "my_data", "sentence")]
    model, prm = load_hf(f"{out}/mah_dpo"), load_prm(f"{out}/prm")
    assert list(model.config.objectives) == NAMES
    assert prm.outputs == [Objective(**o) for o in saved]
    pairs = train.read_rows(f"{out}/pairs.jsonl", Pair)
    assert {p.objective for p in pairs} == set(NAMES)
    rows = {(row["policy"], row["domain"]) for row in read_json(f"{out}/results.json")}
    policies = ("base", "sft", "single_head_dpo", "modpo", "soup", "mah_dpo")
    assert rows == {(policy, f"pairs:{name}") for policy in policies for name in NAMES}
    with open(f"{out}/results.md", encoding="utf-8") as f:
        assert "Objectives: brevity, caution, warmth." in f.read()
    save_hf(model, f"{out}-export", weights=[0.5, 0, 0.5])
    exported = load_hf(f"{out}-export")
    mixed = (model.heads[0].weight + model.heads[2].weight) / 2
    assert torch.allclose(exported.heads[0].weight, mixed)


@pytest.mark.parametrize("argv, steps_of", [
    (["--guide", "warmth"], 1), (["--guide", "brevity", "--weights", "caution=1,warmth=3"], 1),
    (["--guide", "unified"], 1), (["--weights", "caution=1"], 1),
    (["--guide", "unified", "--weights", "caution=1"], 2)])
def test_decoding_a_run_of_ones_own(own_run, capsys, argv, steps_of):
    """A guide, a weight or a boundary that only the paper's objectives have; "unified" that
    averages outputs whose steps end elsewhere."""
    decode.main([own_run[0], "--prompt", "a fruit ?", "--max-new-tokens", "5", "--k", "2", *argv])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  ->"))
    scores = [word for word in line[5:].partition("'")[0].split() if word[0] in "+-"]
    assert len(scores) == steps_of


def test_guides_and_weights_that_a_run_lacks(own_run, capsys):
    """The paper's names accepted for a run that has none of them."""
    for argv, message in ((["--guide", "honesty"], "no PRM output 'honesty' here: this PRM has br"),
                          (["--weights", "honesty=1"], "no 'honesty' here; choose from brevity")):
        argv = [own_run[0], "--prompt", "hi", "--max-new-tokens", "3", *argv]
        assert message in refused(argv, capsys, decode.main)


def test_scoring_a_run_of_ones_own(own_run, tmp_path, capsys):
    """Pairs and steps of one's own objectives that python -m interop.score cannot place."""
    new = [pair(i) for i in range(50, 56)]
    steps = {"steps": ["a b", "c d"]}
    labelled = [{"prompt": f"again {i} ?", "label": -1 + i % 2} | steps for i in range(40)]
    data = files(tmp_path / "new", warmth=new, others=new, caution__steps=labelled)
    score.main([own_run[0], f"{data}/warmth.jsonl"])
    assert "PRM warmth" in capsys.readouterr().out
    score.main([own_run[0], f"{data}/others.jsonl", "--objective", "brevity"])
    assert "PRM brevity" in capsys.readouterr().out
    score.main([own_run[0], f"{data}/caution.steps.jsonl"])
    assert "PRM caution" in capsys.readouterr().out
    error = refused([own_run[0], f"{data}/others.jsonl"], capsys, score.main)
    assert "say with --objective what it is about: brevity, caution, warmth" in error


def test_resume_needs_no_table(own_run, tmp_path, monkeypatch):
    """A run whose objectives are looked up again, when the table or the directory says something
    else; another end than that of a run that nobody stopped."""
    out, _ = own_run
    copied = copy_of(out, tmp_path, "results.json", "pair_metrics.json", "prm", "mah_dpo", "modpo")

    def looked_up(*args):
        raise AssertionError("looked up again")
    monkeypatch.setattr(options, "objectives_of", looked_up)
    monkeypatch.setattr(train, "objectives_of", looked_up)
    monkeypatch.setattr(real_data, "OBJECTIVES", {})
    train.main(["--resume", copied])
    assert results_of(copied) == results_of(out)
    evaluate.main([copied])


def test_a_later_seed_has_the_objectives_of_the_first(own_run, checkpoint, tmp_path, monkeypatch):
    """Seeds of one run that are trained on different objectives, because a file came after the
    first; a run from another that takes over files of other objectives than its own."""
    data = str(tmp_path / "my-data")
    shutil.copytree(own_run[1], data)
    common = ["--init", checkpoint, "--data", data, *TINY]
    seen = []

    def add_file(run):
        seen.append(run.names)
        files(data, zeal=PAIRS)
    monkeypatch.setattr(train, "run_stages", add_file)
    monkeypatch.setattr(train, "publish", print)
    monkeypatch.setattr(train, "load_rows", print)
    train.main([*common, "--seeds", "2", "--out", str(tmp_path / "a")])
    assert seen == [NAMES, NAMES]
    for name in ("base", "sft"):
        shutil.copytree(f"{own_run[0]}/{name}", str(tmp_path / "a" / "seed=0" / name))
    # Two policies learn from the same words, and from other pairs than the first run's.
    for spec, copied in (("all", ["base"]), (",".join(NAMES), ["base", "sft"])):
        out = str(tmp_path / f"b{len(copied)}")
        train.main([*common, "--objective", spec, "--from", str(tmp_path / "a"), "--out", out])
        assert [name for name in ("base", "sft") if os.path.exists(f"{out}/{name}")] == copied
    assert seen[2:] == [[*NAMES, "zeal"], NAMES]


def test_another_objectives_json_is_another_run(own_run, tmp_path, capsys):
    """A run that goes on, or is measured again, when objectives.json has become another."""
    out, data = own_run
    path = f"{data}/objectives.json"
    before = read_json(path)
    write_json(path, before | {"warmth": {"boundary": "turn"}})
    for argv, main in ((["--resume", out], train.main), ([out], evaluate.main)):
        assert f"the files in --data ({data}), are not those" in refused(argv, capsys, main)
    write_json(path, before)
    train.main(["--resume", out])


# -- verified objectives

def test_questions_belong_to_verifiable_objectives(tmp_path, gpt):
    """Questions for the paper's name alone, or with its boundary; two objectives of one domain, of
    whose questions the first are forgotten."""
    questions = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(60)]
    data = files(tmp_path / "d", sums=questions, counts=questions, brevity=PAIRS)
    told = {name: {"case": "verifiable", "boundary": "sentence"} for name in ("sums", "counts")}
    write_json(f"{data}/objectives.json", told)
    with pytest.raises(InputError, match="sums.jsonl: counts has questions in the domain 'd', too; "
                       'give each a "domain" of its own in .*objectives.json'):
        worlds_of(objectives_of("all", data), data, 8, gpt)
    told["counts"]["domain"] = "counting"
    write_json(f"{data}/objectives.json", told)
    worlds = worlds_of(objectives_of("all", data), data, 8, gpt)
    assert {domain: world.objectives for domain, world in worlds.items()} == {
        "counting": ["counts"], "d": ["sums"]}
    world = worlds["d"]
    assert isinstance(world, Questions) and (world.name, world.boundary) == ("d", "sentence")
    problem, = world.problems("train", 1, RNG(0))
    assert world.scores(problem, [], problem.truth["question"].answer) == {"sums": 1.0}
    pairs, _ = real_pairs(data, objectives_of("all", data), gpt)
    assert {p.objective for p in pairs} == {"brevity"}


def test_labels_of_ones_own(tmp_path, gpt):
    """Labelled steps of one objective taken for another's, or cut where another's steps end."""
    rows = [{"prompt": f"p {i}", "steps": ["a .", "b ."], "labels": [1, 0]} for i in range(4)]
    data = files(tmp_path / "d", brevity=PAIRS, warmth=PAIRS, brevity__steps=rows)
    labels, _ = real_labels(data, objectives_of("all", data), gpt)
    assert [row.targets for row in labels] == [[{"brevity": 1.0}, {"brevity": 0.0}]] * 4


# -- mistakes

@pytest.mark.parametrize("rows, argv, message", [
    ({}, "", "/d: no directory with an objective; put the pairs of each into"),
    ({"brevity": PAIRS}, "--objective clarity", "/d: unknown objective 'clarity': choose from all, "
     "d, brevity, or add <objective>.jsonl"),
    ({"brevity": PAIRS}, "--objective math", "/d: unknown objective 'math'"),
    ({"brevity": PAIRS}, "--alpha honesty=2", "--alpha: no 'honesty' here; choose from brevity"),
    ({"brevity": []}, "", "/d/brevity.jsonl: no rows to use"),
    ({"brevity__steps": []}, "", "/d/brevity.steps.jsonl: labelled steps alone are too little; add "
     "the pairs or questions of 'brevity' as"),
    ({"brevity": [{"prompt": "p", "completions": ["a"], "labels": [True]}]}, "",
     "/d/brevity.jsonl: labelled steps; they belong into brevity.steps.jsonl"),
    ({"brevity": [pair(i, "same", "same") for i in range(9)]}, "",
     "/d/brevity.jsonl: no rows to use; 9 left out: chosen equals rejected"),
    ({"all_alike": [rated(i, warmth=3) for i in range(9)]}, "",
     "/d/all_alike.jsonl: 0 pairs for 'warmth' fit the context of 128 tokens, on 0 prompts; some "
     "to train on and some to hold out are needed: add prompts, or leave it out of --objective; 9 "
     "left out: no two "),
    ({name: [pair(1), pair(4)] for name in ("a", "b", "c")}, "",
     "/d: 3 objectives have only 2 different prompts; add pairs, or choose fewer"),
    ({"brevity": [{"question": "q", "answer": "1"}]}, "", "/d/brevity.jsonl: questions with "
     "answers are verified: give 'brevity' the \"case\" \"verifiable\" in an objectives.json"),
    ({"brevity": ["{"]}, "", "/d/brevity.jsonl:1: not JSON"),
    ({"my-data": PAIRS}, "", "/d/my-data.jsonl: no objective can be called 'my-data'; give it "
     "another name, a single word that is none of all, unified"),
    ({"x": [rated(1, **{"to the point": 5})]}, "", "/d/x.jsonl: no objective can be called 'to "),
    ({"": PAIRS}, "", "no directory with an objective"),
    *[({name: PAIRS}, "", f"/d/{name}.jsonl: no objective can be called {name!r}")
      for name in ("w" * 61, "all", "unified", "policy", "step_correctness", "guide", "run", "kl",
                   "step")],
    ({"step__steps": PAIRS}, "", "/d/step.steps.jsonl: no objective can be called 'step'")])
def test_directories_that_cannot_serve(rows, argv, message, checkpoint, tmp_path, capsys):
    """A traceback, or a run directory, for data that no run can use: the message says which file,
    and what helps."""
    data, out = files(tmp_path / "d", **rows), str(tmp_path / "out")
    argv = ["--init", checkpoint, "--data", data, "--out", out, *argv.split()]
    assert message in refused(argv, capsys) and not os.path.exists(out)


@pytest.mark.parametrize("told, message", [
    ("{", "not a JSON file"), ("[]", "not such as {"), ('{"brevity": "C"}', "not such as {"),
    ('{"clarity": {}}', "'clarity' has no file; add clarity.jsonl beside it, or take the name out"),
    *[('{"brevity": {%s}}' % told, f"'brevity': {told} means nothing; give a \"domain\" (a single "
       'word), a "case" (verifiable, A, B, C) or a "boundary" (newline, sentence, turn)')
      for told in ('"name": "x"', '"case": "D"', '"case": ["C"]', '"boundary": "word"',
                   '"boundary": ""', '"domain": "../x"', '"domain": 5', '"Case": "C"',
                   '"subjective": true')]])
def test_broken_objectives_json(told, message, tmp_path, capsys, checkpoint):
    """A word that is skipped, and another objective than the user meant; a traceback."""
    data = files(tmp_path / "d", brevity=PAIRS)
    (tmp_path / "d" / "objectives.json").write_text(told)
    error = refused(["--init", checkpoint, "--data", data, "--out", str(tmp_path / "out")], capsys)
    assert f"{data}/objectives.json: {message}" in error and os.listdir(tmp_path) == ["d"]


def test_taken_names_are_those_that_rows_use(own_run, whole):
    """An objective that hides another number of a row of the log, or another column of a table."""
    used = set()
    for row in rows_of(f"{own_run[0]}/log.jsonl"):
        if set(row) & set(NAMES):
            used |= set(row)
    assert used == {*NAMES, "stage", "step", "split", "gradient_norm"}
    for row in read_json(f"{whole}/results.json"):
        if not row["domain"].startswith("pairs:"):
            used |= set(row["metrics"]) - set(OBJECTIVES)
            used |= set(evaluate.cells(row, {}))
    used = {name for name in used if name.isidentifier()}
    assert {"kl", "tokens", "guide"} <= used and used - set(NAMES) <= set(TAKEN)
    lines = evaluate.side_by_side([whole, whole]).splitlines()
    assert next(line for line in lines if line[:2] == "| ").split()[1] in TAKEN


def test_names_that_only_look_taken(tmp_path, checkpoint):
    """Names refused although nothing is called so."""
    names = ["base", "labels", "mah_dpo", "modpo", "pairs", "prm", "sft", "single_head_dpo", "soup"]
    data = files(tmp_path / "d", **{name: PAIRS for name in names})
    assert names_in("all", data) == names
    run = train.Run(str(tmp_path), options.Config(init=checkpoint, data=data))
    left = sum([stage.files for stage in train.stages(run)], [])
    assert len(left) == len(set(left)) and not set(left) & {"config.json", "log.jsonl"}
