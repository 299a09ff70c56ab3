"""data.py: objectives, worlds, files, batches. Every docstring states the bug that its test prevents."""
import re
import statistics

import pytest
import torch

import data
from data import (DOMAINS, RNG, InputError, OBJECTIVES, Problem, World, batches_by_length,
                  believed, domain_objectives, fit_threshold, judge, pad, read_json, response_mask,
                  right, select_objectives, split_of)


# -- objectives

def test_objectives_are_the_papers_in_order():
    """Head index = index in this table: a reordered or renamed row silently swaps heads of saved runs."""
    assert list(OBJECTIVES) == ["math_accuracy", "math_engagement", "helpfulness", "honesty", "truthfulness",
                                "tutor_accuracy", "tutor_engagement"]
    assert [o.case for o in OBJECTIVES.values()] == ["verifiable", "A", "C", "C", "C", "B", "B"]
    assert [o.boundary for o in OBJECTIVES.values()] == ["newline"] * 2 + ["sentence"] * 3 + ["turn"] * 2
    assert all(name == o.name for name, o in OBJECTIVES.items())
    assert [o.subjective for o in OBJECTIVES.values()] == [False, True, True, True, True, False, True]


@pytest.mark.parametrize("spec, names", [
    ("all", list(OBJECTIVES)),
    ("values", ["helpfulness", "honesty", "truthfulness"]),
    (" tutor_accuracy, math_accuracy ,", ["math_accuracy", "tutor_accuracy"]),
    ("honesty,values", ["helpfulness", "honesty", "truthfulness"])])
def test_select_objectives(spec, names):
    """Names in the order typed (or twice) would give heads that do not match the table's order."""
    assert select_objectives(spec) == names


@pytest.mark.parametrize("spec, named", [("math,honesti", "honesti"), ("", "''"), (" , ", "' , '"), ("Math", "Math")])
def test_unknown_objective_is_named(spec, named):
    """A typo that is skipped trains fewer heads than asked; an empty list trains none."""
    with pytest.raises(InputError, match="unknown objective") as e:
        select_objectives(spec)
    assert named in str(e.value) and "math_accuracy" in str(e.value)


def test_domain_objectives():
    """Mixing heads of other domains into a domain's ensemble."""
    assert domain_objectives("math", list(OBJECTIVES)) == ["math_accuracy", "math_engagement"]
    assert domain_objectives("values", ["truthfulness", "math_accuracy"]) == ["truthfulness"]


# -- randomness and splits

def test_dice_depend_on_their_seed_only():
    """Draws from global random state: two runs of the same seed would differ."""
    torch.manual_seed(1)
    a, b, c = RNG(7), RNG(7), RNG(8)
    first = [a.random() for _ in range(5000)]          # more than one block of the pool
    torch.manual_seed(2)
    assert first == [b.random() for _ in range(5000)]
    assert first != [c.random() for _ in range(5000)]
    assert len(set(first)) == 5000 and all(0 <= u < 1 for u in first)


def test_judge_noise_is_calibrated():
    """A biased judge, or a variance where a standard deviation is meant, spoils every training label."""
    rng = RNG(3)
    ratings = [judge(0.4, rng) for _ in range(4000)]
    assert abs(statistics.mean(ratings) - 0.4) < 0.01
    assert abs(statistics.stdev(ratings) - data.JUDGE_NOISE) < 0.005


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_prompt(domain):
    """Test prompts seen in training: every number of the tables would be too good."""
    world = DOMAINS[domain]
    prompts = {s: [p.prompt for p in world.problems(s, 60, RNG(seed))] for seed, s in enumerate(("train", "dev", "test"))}
    for split, found in prompts.items():
        assert len(found) == len(set(found)) == 60
        assert all(split_of(p) == split for p in found)


def test_split_is_a_function_of_the_text():
    """A split by order of drawing moves a prompt from test to train when the seed or the count changes."""
    assert [split_of(p) for p in ("4 + 5 - 2 = ?", "a", "b", "g")] == ["train", "train", "train", "dev"]
    shares = [split_of(str(i)) for i in range(4000)]
    assert abs(shares.count("dev") / 4000 - 0.1) < 0.02 and abs(shares.count("test") / 4000 - 0.1) < 0.02


def test_too_many_problems_is_an_error():
    """A world that runs out of prompts loops for ever or returns fewer rows than asked."""
    class Small(World):
        name = "small"

        def problem(self, rng):
            return Problem(rng.choice("abcdefghij"))

    held = [c for c in "abcdefghij" if split_of(c) == "train"]
    found = Small().problems("train", len(held), RNG(0))
    assert sorted(p.prompt for p in found) == held and 0 < len(held) < 10
    with pytest.raises(ValueError, match=f"small world has fewer than {len(held) + 1} distinct train"):
        Small().problems("train", len(held) + 1, RNG(0))


# -- worlds

SUM = Problem("4 ; a + 5 ; b - 2 = ?", {"first": 4, "terms": [("+", 5), ("-", 2)], "answer": 7})


@pytest.mark.parametrize("steps, z, r", [
    (["a 4 + 5 = 9\n", "b 9 - 2 = 7\n", "answer 7"], 1, [1, 1, 1]),
    (["a 4 + 5 = 9 . nice work so far !\n", "b 9 - 2 = 7\n", "answer 7\n"], 1, [1, 1, 1]),
    (["a 4 + 5 = 8\n", "b 8 - 2 = 6\n", "answer 6"], 0, [0, 0, 0]),       # sound work on a wrong value is still wrong
    (["a 4 + 5 = 8\n", "b 9 - 2 = 7\n", "answer 7"], 1, [0, 1, 1]),       # wrong step, right final
    (["a 4 + 5 = 9\n", "b 8 - 2 = 6\n", "answer 7"], 1, [1, 0, 1]),       # wrong value copied
    (["a 4 - 2 = 2\n", "b 2 + 5 = 7\n", "answer 7"], 1, [0, 0, 1]),       # not left to right
    (["b 9 - 2 = 7\n", "a 4 + 5 = 9\n", "answer 7"], 1, [0, 0, 1]),       # right steps at the wrong time
    (["a 4 + 5 = 9\n", "b 9 - 2 = 7\n", "answer 70"], 0, [1, 1, 0]),
    (["a 4 + 5 = 9\n", "b 9 - 2 = 7\n", "c 7 + 1 = 8\n", "answer 7"], 1, [1, 1, 0, 1]),
    (["a 4 + 5 = 90\n"], 0, [0]), (["a 4 + 5 = 9\n"], 0, [1]), (["b 4 + 5 = 9\n"], 0, [0]), (["answer 7", "hm"], 0, [1, 0]), ([], 0, [])])
def test_verifier(steps, z, r):
    """Step labels of the value model: a verifier that accepts a copied wrong value, '70' for '7', or a missing answer."""
    assert DOMAINS["math"].verify(SUM, steps) == (float(z), [float(v) for v in r])


def test_math_scores():
    """Engagement counted per repetition would reward saying one thing all the time."""
    def score(response):
        return DOMAINS["math"].scores(SUM, [], response)
    nice, neat, fun = (DOMAINS["math"].CHAT[i] for i in range(3))
    assert score("a 4 + 5 = 9\nb 9 - 2 = 7\nanswer 7") == {"math_accuracy": 1.0, "math_engagement": 0.0}
    assert score(f"a 4 + 5 = 9{nice}\nb 9 - 2 = 7{nice}\nanswer 6") == {"math_accuracy": 0.0, "math_engagement": 0.5}
    assert score(f"x{nice}\ny{neat}\nz{fun}")["math_engagement"] == 1.0


def test_math_problems_are_what_they_say():
    """A stored answer that is not the left-to-right value of the prompt, or values outside the facts that are taught."""
    for problem in DOMAINS["math"].problems("dev", 200, RNG(4)):
        tokens = problem.prompt.removesuffix(" = ?").split()
        value = int(tokens[0])
        for op, b in zip(tokens[3::4], tokens[4::4]):
            value = right(value, op, int(b))
            assert 0 <= value <= 20
        assert value == problem.truth["answer"]


def test_misconceptions_are_fixed():
    """Misconceptions drawn anew each time are noise that averages out: accuracy would have nothing systematic to mend."""
    facts = [(a, op, b) for a in range(21) for op in "+-*" for b in range(2, 10)]
    wrong = [f for f in facts if believed(*f) != right(*f)]
    assert wrong == [f for f in facts if believed(*f) != right(*f)]
    assert 0.15 < len(wrong) / len(facts) < 0.30
    assert {abs(believed(*f) - right(*f)) for f in wrong} == {1, 2}
    assert (right(7, "+", 3), right(7, "-", 3), right(7, "*", 3)) == (10, 4, 21)


NOTES = Problem("...", {"color": ("seen", "red", "red"), "size": ("heard", "tall", "tiny"),
                                  "home": ("heard", "lake", "lake"), "food": ("none", "fish", None),
                                  "job": ("none", "baker", None)})


@pytest.mark.parametrize("response, help_, honest, true", [
    ("", 0, 0, 0.7),
    ("the color is red . the size is tiny . the home may be lake . the food remains unknown .", 2.8 / 5, 3 / 5, 2.8 / 5),
    ("the size may be tiny . the job remains unknown .", 0.8 / 5, 2 / 5, 2.3 / 5),
    ("the color is red . the color is blue . the size is tall .", 2 / 5, 1 / 5, 4.1 / 5),    # the first mention counts
    ("the color is blue . the size is tiny . the home is hill . the food is rice .", 4 / 5, 1 / 5, 0),    # clipped at 0
    ("the food is fish . the weather is red .", 1 / 5, 0, 3.8 / 5)])
def test_values_scores(response, help_, honest, true):
    """Help, honesty and truth that measure the same thing leave nothing to trade off."""
    scores = DOMAINS["values"].scores(NOTES, [], response)
    assert scores == pytest.approx({"helpfulness": help_, "honesty": honest, "truthfulness": true})


def lesson(*replies):
    """A problem whose student is wrong at first (y is 7, z is 5), and the messages up to the next tutor turn."""
    problem = Problem("x = 3 ; y = x + 4 ; z = y - 2 . i get y = 8 .",
                      {"facts": [(3, "+", 4, 7), (7, "-", 2, 5)], "values": {"y": 7, "z": 5}, "last": "z"})
    messages = [{"role": "user", "content": problem.prompt}]
    for reply in replies:
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "hmm ok . i get z = 5 ."}]
    return problem, messages


@pytest.mark.parametrize("earlier, response, accuracy, engagement", [
    ([], "not quite . 3 + 4 = 7 . good try ! what comes next ?", 1, 1),
    ([], "3 + 4 = 7 .", 0.5, 0), ([], "yes . 3 + 4 = 7 .", 0, 0), ([], "yes . not quite .", 0, 0),
    ([], "not quite . 3 + 4 = 8 . well done !", 0, 0.4), ([], "7 - 2 = 5 .", 0, 0),
    ([], "not quite . 3 + 4 = 7 . 3 + 4 = 7 .", 1, 0), ([], "what is it ?", 0, 0),
    (["can you say why ?"], "yes . 7 - 2 = 5 . can you say why ?", 1, 0),           # asked before: no credit
    (["can you say why ?"], "not quite . does that make sense ?", 0, 0.6),
    (["ok .", "ok ."], "yes . 7 - 2 = 5 .", 1, 0)])
def test_tutor_scores(earlier, response, accuracy, engagement):
    """A turn judged against the wrong line of code, against the student's old claim, or paid for repeated questions."""
    problem, messages = lesson(*earlier)
    scores = DOMAINS["tutoring"].scores(problem, messages, response)
    assert scores == pytest.approx({"tutor_accuracy": accuracy, "tutor_engagement": engagement})


def test_student_replies_twice_and_learns_from_good_tutoring():
    """A lesson that never ends (the third reply must be None), or a student on whom tutoring has no effect."""
    tutoring, learnt = DOMAINS["tutoring"], {}
    for response in ("not quite . 3 + 4 = 7 . good try ! what comes next ?", "yes ."):
        problem, messages = lesson()
        messages.append({"role": "assistant", "content": response})
        rng = RNG(5)
        replies = [tutoring.reply(problem, messages, rng) for _ in range(300)]
        assert all(re.fullmatch(r"(oh nice|hmm ok) \. i get z = \d+ \.", r) for r in replies)
        learnt[response] = sum("z = 5 " in r for r in replies) / 300
    good, bad = learnt.values()
    assert good > bad + 0.3
    problem, messages = lesson("ok .", "ok .")
    assert tutoring.reply(problem, messages + [{"role": "assistant", "content": "ok ."}], RNG(0)) is None


@pytest.mark.parametrize("domain", DOMAINS)
def test_conversations_have_the_promised_shape(domain):
    """Roles that do not alternate, or a conversation that ends with the user: there is no response to train on."""
    world, rng = DOMAINS[domain], RNG(2)
    for problem in world.problems("train", 30, rng):
        roles = [m["role"] for m in world.conversation(problem, rng)]
        assert roles == ["user", "assistant"] * (3 if domain == "tutoring" else 1) == ["user", "assistant"] * world.turns


def test_careful_demonstrations_err_less():
    """SFT data no better than pre-training data: the SFT stage would show nothing."""
    for domain, metric in (("math", "math_accuracy"), ("tutoring", "tutor_accuracy")):
        world, mean = DOMAINS[domain], {}
        for careful in (False, True):
            rng = RNG(9)
            found = [world.problem(rng) for _ in range(1500)]
            chats = [world.conversation(p, rng, careful) for p in found]
            mean[careful] = statistics.mean(world.scores(p, m[:1], m[1]["content"])[metric] for p, m in zip(found, chats))
        assert 0.1 < mean[False] < mean[True] - 0.02 and mean[True] < 0.95


@pytest.mark.parametrize("ratings, gold, cut_, agreement", [
    ([0.1, 0.2, 0.6, 0.9], [False, False, True, True], 0.4, 1.0),
    ([0.9, 0.1, 0.6, 0.2], [True, False, True, False], 0.4, 1.0),
    ([0.1, 0.2, 0.3, 0.4], [False, True, False, True], 0.15, 0.75),
    ([0.3, 0.5], [True, True], -0.2, 1.0),         # all engaging: the cut lies below every rating
    ([0.3, 0.5], [False, False], 1.0, 1.0),        # none: above every rating
    ([0.5, 0.5, 0.7], [False, True, True], 0.0, 2 / 3)])
def test_fit_threshold(ratings, gold, cut_, agreement):
    """A cut that sits on a rating, or is fitted on its complement: Case A's labels would be turned around."""
    fitted, agrees = fit_threshold(ratings, gold)
    assert agrees == pytest.approx(agreement)
    assert sum((r > fitted) == g for r, g in zip(ratings, gold)) / len(gold) == pytest.approx(agreement)
    assert fitted == pytest.approx(cut_) and fitted not in ratings


# -- files

def test_write_json_leaves_no_half_file(tmp_path):
    """A crash while writing leaves half a file under the final name; a left-over .tmp means no rename happened."""
    path = tmp_path / "x.json"
    data.write_json(str(path), {"a": "é"})
    assert read_json(str(path)) == {"a": "é"}
    with pytest.raises(TypeError):
        data.write_json(str(path), {"a": object()})
    assert read_json(str(path)) == {"a": "é"} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# -- batches

def test_pad_and_response_mask():
    """Padding or prompt tokens that are scored as response (trap 1)."""
    ids, lengths = pad([[5, 6, 7], [8], []], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]] and lengths.tolist() == [3, 1, 0]
    assert ids.dtype == torch.long and pad([[]], 9)[0].shape == (1, 1)
    mask = response_mask(torch.tensor([1, 1, 0]), lengths, 3)
    assert mask.tolist() == [[False, True, True], [False, False, False], [False, False, False]]


def test_batches_by_length():
    """A batch that is padded beyond the bound, rows lost or taken twice, one long row that is refused or shares its batch."""
    lengths = [7, 1, 30, 4, 4, 5, 2, 9]
    found = list(batches_by_length(lengths, tokens=12))
    assert found == [[1, 6, 3], [4, 5], [0], [7], [2]]          # 3 x 4 fits exactly, 2 x 7 does not
    assert list(batches_by_length([], tokens=12)) == []
