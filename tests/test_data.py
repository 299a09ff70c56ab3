"""data.py: objectives, worlds, judges, files, batches. Every docstring states the bug that its test
prevents."""
import re
import statistics
from dataclasses import asdict, replace

import pytest
import torch

import data
from data import (DOMAINS, RNG, InputError, OBJECTIVES, Objective, Problem, World,
                  batches_by_length, believed, domain_objectives, judge, pad,
                  read_json, read_objectives, response_mask, right, select_objectives, split_of)


# -- objectives

def test_objectives_are_the_papers_in_order():
    """Head index = index in this table: a reordered or renamed row swaps heads of saved runs."""
    rows = [(o.name, o.case, o.boundary, o.subjective) for o in OBJECTIVES.values()]
    assert rows == [("math_accuracy", "verifiable", "newline", False),
                    ("math_engagement", "A", "newline", True),
                    ("helpfulness", "C", "sentence", True),
                    ("honesty", "C", "sentence", True),
                    ("truthfulness", "C", "sentence", True),
                    ("tutor_accuracy", "B", "turn", False),
                    ("tutor_engagement", "B", "turn", True)]
    assert all(name == o.name for name, o in OBJECTIVES.items())


@pytest.mark.parametrize("spec, names", [
    ("all", list(OBJECTIVES)),
    ("values", ["helpfulness", "honesty", "truthfulness"]),
    (" tutor_accuracy, math_accuracy ,", ["math_accuracy", "tutor_accuracy"]),
    ("honesty,values", ["helpfulness", "honesty", "truthfulness"])])
def test_select_objectives(spec, names):
    """Names in the order typed (or twice) would give heads that do not match the table's order."""
    assert [o.name for o in select_objectives(spec)] == names


@pytest.mark.parametrize("spec, named", [
    ("math,honesti", "honesti"), ("", "''"), (" , ", "' , '"), ("Math", "Math")])
def test_unknown_objective_is_named(spec, named):
    """A typo that is skipped trains fewer heads than asked; an empty list trains none."""
    with pytest.raises(InputError, match="unknown objective") as e:
        select_objectives(spec)
    assert named in str(e.value) and "math_accuracy" in str(e.value)


def test_domain_objectives():
    """Mixing heads of other domains into a domain's ensemble."""
    honesty, maths = OBJECTIVES["honesty"], OBJECTIVES["math_accuracy"]
    other = Objective("brevity", "math", "C", "newline")
    assert domain_objectives("math", [other, honesty, maths]) == [other, maths]


def test_records_of_objectives():
    """A run's objectives that come back as the table's, not as the run recorded them."""
    own = [replace(OBJECTIVES["honesty"], boundary="turn"), OBJECTIVES["math_accuracy"]]
    assert read_objectives("config.json", [asdict(o) for o in own]) == own
    record = {"name": "n", "domain": "d", "case": "B", "boundary": "turn"}
    assert read_objectives("config.json", [record]) == [Objective("n", "d", "B", "turn")]


GOOD = {"name": "a", "domain": "b", "case": "C", "boundary": "turn"}


@pytest.mark.parametrize("records", [
    None, 5, "a", ["honesty"], [{}], [[GOOD]], [GOOD, GOOD], [GOOD | {"more": 1}],
    [GOOD | {"case": "D"}], [GOOD | {"case": ["C"]}], [GOOD | {"boundary": None}],
    [GOOD | {"name": 5}], [GOOD | {"name": "../a"}], [GOOD | {"name": ""}]])
def test_broken_records_of_objectives(records):
    """A config.json of another version, or by another hand, that ends in a traceback."""
    with pytest.raises(InputError, match="^RUN/config.json: objectives must be a list of objec"):
        read_objectives("RUN/config.json: objectives", records)


# -- randomness and splits

def test_random_draws_depend_on_their_seed_only():
    """Draws from global random state: two runs of the same seed would differ."""
    torch.manual_seed(1)
    a, b, c = RNG(7), RNG(7), RNG(8)
    first = [a.random() for _ in range(5000)]          # more than one block of the pool
    torch.manual_seed(2)
    assert first == [b.random() for _ in range(5000)]
    assert first != [c.random() for _ in range(5000)]
    assert len(set(first)) == 5000 and all(0 <= u < 1 for u in first)


def test_choice():
    """An item that is never drawn, or drawn more often than another."""
    rng = RNG(3)
    drawn = [rng.choice(range(5)) for _ in range(5000)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert all(abs(drawn.count(k) - 1000) < 100 for k in range(5))


def test_judge_noise_is_calibrated():
    """A biased judge, or a variance where a standard deviation is meant, spoils every label."""
    rng = RNG(3)
    ratings = [judge(0.4, rng) for _ in range(4000)]
    assert abs(statistics.mean(ratings) - 0.4) < 0.01
    assert abs(statistics.stdev(ratings) - data.JUDGE_NOISE) < 0.005


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_prompt(domain):
    """Test prompts seen in training: every number of the tables would be too good."""
    for seed, split in enumerate(("train", "dev", "tune", "test")):
        problems = DOMAINS[domain].problems(split, 60, RNG(seed))
        prompts = {p.prompt for p in problems}
        assert len(problems) == len(prompts) == 60
        assert {p.split for p in problems} == {split}


def without_names(problem):
    """A tutoring prompt with a number for every name, in the order in which they come."""
    text = problem.prompt
    for number, name in enumerate(dict.fromkeys(re.findall(r"\b[a-z]\b", text))):
        text = re.sub(rf"\b{name}\b", f"#{number}", text)
    return text


def facts_of(problem):
    """The operations of a chain, as a tuple."""
    return tuple(problem.truth["facts"])


def test_unseen_prompts_are_no_training_prompts_in_other_clothes():
    """Test prompts of which training has seen the same problem, with other names of variables (166
    of 200 in tutoring), or a chain that holds them whole (75 of 200 in maths)."""
    seen = {without_names(p) for p in DOMAINS["tutoring"].problems("train", 8000, RNG(0))}
    assert len(seen) > 2000
    chains = set()
    for facts in map(facts_of, DOMAINS["math"].problems("train", 12000, RNG(0))):
        for i in range(len(facts)):
            chains |= {facts[i:j] for j in range(i + 1, len(facts) + 1)}
    for split, n in (("test", 500), ("tune", 500), ("dev", 400)):
        tutoring = DOMAINS["tutoring"].problems(split, n, RNG(1))
        assert sum(without_names(p) in seen for p in tutoring) == 0
        maths = DOMAINS["math"].problems(split, n, RNG(1))
        assert sum(facts_of(p) in chains for p in maths) == 0
        # The facts themselves are shared: they are what is learnt.
        assert all(facts_of(p)[:1] in chains for p in maths)


def test_chains_of_all_lengths_are_in_all_splits():
    """Test chains of other lengths than people ask for: the longer a chain, the surer one of its
    pairs is held out."""
    for split in ("train", "test"):
        lengths = [len(facts_of(p)) for p in DOMAINS["math"].problems(split, 600, RNG(2))]
        for length, share in zip((2, 3, 4, 5), (1 / 6, 1 / 3, 1 / 3, 1 / 6)):
            assert abs(lengths.count(length) / 600 - share) < 0.1


def test_split_is_a_function_of_the_text():
    """A split by order of drawing moves a prompt from test to train when seed or count change."""
    splits = [split_of(p) for p in ("4 + 5 - 2 = ?", "a", "b", "g")]
    assert splits == ["train", "train", "train", "tune"]
    shares = [split_of(str(i)) for i in range(4000)]
    for split, share in (("train", 0.8), ("dev", 0.05), ("tune", 0.05), ("test", 0.1)):
        assert abs(shares.count(split) / 4000 - share) < 0.02


class Small(World):
    """Ten problems, of one letter each."""
    name = "small"

    def problem(self, rng):
        return Problem(rng.choice("abcdefghij"))


def test_too_many_problems_is_an_error():
    """A world that runs out of prompts loops for ever or returns fewer rows than asked."""
    held = [c for c in "abcdefghij" if split_of(c) == "train"]
    found = Small().problems("train", len(held), RNG(0))
    assert sorted(p.prompt for p in found) == held and 0 < len(held) < 10
    with pytest.raises(InputError, match=f"has fewer than {len(held) + 1} distinct train"):
        Small().problems("train", len(held) + 1, RNG(0))


# -- maths

SUM = Problem("4 ; a + 5 ; b - 2 = ?", {"facts": [(4, "+", 5, 9), (9, "-", 2, 7)]})


@pytest.mark.parametrize("solution, z, r", [
    ("a 4 + 5 = 9|b 9 - 2 = 7|answer 7", 1, [1, 1, 1]),
    ("a 4 + 5 = 9 . nice work so far !|b 9 - 2 = 7|answer 7|", 1, [1, 1, 1]),
    # sound work on a wrong value is still wrong; so is a wrong value that was copied
    ("a 4 + 5 = 8|b 8 - 2 = 6|answer 6", 0, [0, 0, 0]),
    ("a 4 + 5 = 8|b 9 - 2 = 7|answer 7", 1, [0, 1, 1]),
    ("a 4 + 5 = 9|b 8 - 2 = 6|answer 7", 1, [1, 0, 1]),
    # another order of the operations; the right steps at the wrong time
    ("a 4 - 2 = 2|b 2 + 5 = 7|answer 7", 1, [0, 0, 1]),
    ("b 9 - 2 = 7|a 4 + 5 = 9|answer 7", 1, [0, 0, 1]),
    ("a 4 + 5 = 9|b 9 - 2 = 7|answer 70", 0, [1, 1, 0]),
    ("a 4 + 5 = 9|b 9 - 2 = 7|c 7 + 1 = 8|answer 7", 1, [1, 1, 0, 1]),
    ("a 4 + 5 = 90", 0, [0]),
    ("a 4 + 5 = 9", 0, [1]),
    ("b 4 + 5 = 9", 0, [0]),
    ("answer 7|hm", 0, [1, 0]),
    ("", 0, [])])
def test_verifier(solution, z, r):
    """A verifier that accepts a copied wrong value, '70' for '7', or a missing answer."""
    steps = solution.replace("|", "\n").splitlines(keepends=True)
    assert DOMAINS["math"].verify(SUM, steps) == (float(z), [float(v) for v in r])


@pytest.mark.parametrize("response, accuracy, engagement", [
    ("a 4 + 5 = 9\nb 9 - 2 = 7\nanswer 7", 1, 0),
    ("a 4 + 5 = 9 . now it gets fun !\nb 9 - 2 = 7 . now it gets fun !\nanswer 6", 0, 0.5),
    ("x . now it gets fun !\ny . you can do this !\nz . high five for that !", 0, 1)])
def test_math_scores(response, accuracy, engagement):
    """Engagement counted per repetition would reward saying one thing all the time."""
    scores = DOMAINS["math"].scores(SUM, [], response)
    assert scores == {"math_accuracy": accuracy, "math_engagement": engagement}


def test_math_problems_are_what_they_say():
    """A stored answer that is not the prompt's value, or values outside the facts taught."""
    for problem in DOMAINS["math"].problems("dev", 200, RNG(4)):
        tokens = problem.prompt.removesuffix(" = ?").split()
        value = int(tokens[0])
        for op, b in zip(tokens[3::4], tokens[4::4]):
            value = right(value, op, int(b))
            assert 0 <= value <= 20
        assert problem.truth["facts"][-1][-1] == value


def test_misconceptions_are_fixed():
    """Misconceptions drawn anew each time average out: nothing systematic is left to mend."""
    facts = [(a, op, b) for a in range(21) for op in "+-*" for b in range(2, 10)]
    wrong = [f for f in facts if believed(*f) != right(*f)]
    assert wrong == [f for f in facts if believed(*f) != right(*f)]
    assert 0.15 < len(wrong) / len(facts) < 0.30
    assert {abs(believed(*f) - right(*f)) for f in wrong} == {1, 2}
    assert [right(7, op, 3) for op in "+-*"] == [10, 4, 21]


# -- values

NOTES = Problem("...", {"color": ("seen", "red", "red"),
                        "size": ("heard", "tall", "tiny"),
                        "home": ("heard", "lake", "lake"),
                        "food": ("none", "fish", None),
                        "job": ("none", "baker", None)})


@pytest.mark.parametrize("response, fifths", [
    ("", (0, 0, 3.5)),
    ("the color is red . the size is tiny . the home may be lake . the food remains unknown .",
     (2.8, 3, 2.8)),
    ("the size may be tiny . the job remains unknown .", (0.8, 2, 2.3)),
    # the first mention counts
    ("the color is red . the color is blue . the size is tall .", (2, 1, 4.1)),
    # truthfulness is clipped at 0
    ("the color is blue . the size is tiny . the home is hill . the food is rice .", (4, 1, 0)),
    ("the food is fish . the weather is red .", (1, 0, 3.8))])
def test_values_scores(response, fifths):
    """Help, honesty and truth that measure the same thing leave nothing to trade off."""
    names = ("helpfulness", "honesty", "truthfulness")
    scores = DOMAINS["values"].scores(NOTES, [], response)
    assert scores == pytest.approx({name: n / 5 for name, n in zip(names, fifths)})


# -- tutoring

def lesson(*replies):
    """A problem whose student is wrong at first, and the messages up to the next tutor turn."""
    truth = {"facts": [(3, "+", 4, 7), (7, "-", 2, 5)], "last": "z"}
    problem = Problem("x = 3 ; y = x + 4 ; z = y - 2 . i get y = 8 .", truth)
    messages = problem.messages()
    for reply in replies:
        messages += [{"role": "assistant", "content": reply},
                     {"role": "user", "content": "hmm ok . i get z = 5 ."}]
    return problem, messages


@pytest.mark.parametrize("earlier, response, accuracy, engagement", [
    ([], "not quite . 3 + 4 = 7 . good try ! what comes next ?", 1, 1),
    ([], "3 + 4 = 7 .", 0.5, 0),
    ([], "yes . 3 + 4 = 7 .", 0, 0),
    ([], "yes . not quite .", 0, 0),
    ([], "not quite . 3 + 4 = 8 . well done !", 0, 0.4),
    ([], "7 - 2 = 5 .", 0, 0),
    ([], "not quite . 3 + 4 = 7 . 3 + 4 = 7 .", 1, 0),
    ([], "what is it ?", 0, 0),
    (["can you say why ?"], "yes . 7 - 2 = 5 . can you say why ?", 1, 0),
    (["can you say why ?"], "not quite . does that make sense ?", 0, 0.6),
    (["ok .", "ok ."], "yes . 7 - 2 = 5 .", 1, 0)])
def test_tutor_scores(earlier, response, accuracy, engagement):
    """A turn judged against the wrong line, the student's old claim, or paid for old questions."""
    problem, messages = lesson(*earlier)
    scores = DOMAINS["tutoring"].scores(problem, messages, response)
    assert scores == pytest.approx({"tutor_accuracy": accuracy, "tutor_engagement": engagement})


def replies_to(response, *earlier):
    """300 replies of the student to a tutor's response."""
    problem, messages = lesson(*earlier)
    messages.append({"role": "assistant", "content": response})
    rng = RNG(5)
    return [DOMAINS["tutoring"].reply(problem, messages, rng) for _ in range(300)]


def test_student_replies_twice_and_learns_from_good_tutoring():
    """A lesson that never ends, or a student on whom tutoring has no effect."""
    good = replies_to("not quite . 3 + 4 = 7 . good try ! what comes next ?")
    bad = replies_to("yes .")
    assert all(re.fullmatch(r"(oh nice|hmm ok) \. i get z = \d+ \.", r) for r in good + bad)
    learnt = [sum("z = 5 " in r for r in replies) / 300 for replies in (good, bad)]
    assert learnt[0] > learnt[1] + 0.3
    assert set(replies_to("ok .", "ok .", "ok .")) == {None}


# -- all worlds

@pytest.mark.parametrize("domain, turns", [("math", 1), ("values", 1), ("tutoring", 3)])
def test_conversations_have_the_promised_shape(domain, turns):
    """A conversation that ends with the user: there is no response to train on."""
    world, rng = DOMAINS[domain], RNG(2)
    assert world.turns == turns
    for problem in world.problems("train", 30, rng):
        roles = [m["role"] for m in world.conversation(problem, rng)]
        assert roles == ["user", "assistant"] * turns


@pytest.mark.parametrize("domain, metric", [
    ("math", "math_accuracy"), ("tutoring", "tutor_accuracy")])
def test_careful_demonstrations_err_less(domain, metric):
    """SFT data no better than pre-training data: the SFT stage would show nothing."""
    world, mean = DOMAINS[domain], {}
    for careful in (False, True):
        rng, scores = RNG(9), []
        for problem in [world.problem(rng) for _ in range(1500)]:
            ask, answer, *_ = world.conversation(problem, rng, careful)
            scores.append(world.scores(problem, [ask], answer["content"])[metric])
        mean[careful] = statistics.mean(scores)
    assert 0.1 < mean[False] < mean[True] - 0.02 and mean[True] < 0.95



# -- files

def test_write_json_leaves_no_half_file(tmp_path):
    """A crash while writing leaves half a file under the final name, or a left-over .tmp."""
    path = tmp_path / "x.json"
    data.write_json(str(path), {"a": "é"})
    assert read_json(str(path)) == {"a": "é"}
    with pytest.raises(TypeError):
        data.write_json(str(path), {"a": object()})
    assert read_json(str(path)) == {"a": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# -- batches

def test_pad_and_response_mask():
    """Padding or prompt tokens that are scored as response (trap 1)."""
    ids, lengths = pad([[5, 6, 7], [8], []], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]] and lengths.tolist() == [3, 1, 0]
    assert ids.dtype == torch.long and pad([[]], 9)[0].shape == (1, 1)
    mask = response_mask(torch.tensor([1, 1, 0]), lengths, 3)
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]


def test_batches_by_length():
    """A batch padded beyond the bound, rows lost or taken twice, a long row that is refused, a
    batch that is mostly padding."""
    lengths = [7, 1, 30, 4, 4, 5, 2, 9]
    found = list(batches_by_length(lengths, tokens=12))
    assert found == [[1, 6, 3], [4, 5], [0], [7], [2]]          # 3 x 4 fits exactly, 2 x 7 not
    assert list(batches_by_length([], tokens=12)) == []
    # 5 x 10 places, 46 of them tokens: 8 % padding. With a row of 12, 58 of 72: 19 %.
    lengths = [12, 9, 9, 9, 9, 10]
    assert list(batches_by_length(lengths, few=20)) == [[1, 2, 3, 4, 5], [0]]
    assert list(batches_by_length(lengths, few=72)) == [[1, 2, 3, 4, 5, 0]]
    # Parts that are padded apart: 5 + 1 and 1 + 5 would be padded to 5 + 5.
    lengths = [(5, 1), (1, 5), (1, 5), (5, 1)]
    assert list(batches_by_length(lengths, few=6)) == [[1, 2], [0, 3]]
    assert list(batches_by_length(lengths, tokens=20)) == [[1, 2], [0, 3]]
    assert list(batches_by_length(lengths)) == [[1, 2, 0, 3]]
