"""The worlds' tokenizer, data.Tokenizer. Every docstring states the bug that its test prevents."""
import re
import time

import pytest

from data import DOMAINS, PATTERN, RNG, Tokenizer, read_json
from interop.tokenizer import load_tokenizer
from tests.byte_level import answer, check_prefix, user

HARD = ["", " ", "  ", "\n", "\r\n\t", "4 + 5 = 9\nanswer 9", "Zyzzyva 1,000,000.5!?", "e.g. i.e.",
        "aaaaabab 00712 007", "café ☃ 你好 👩‍👩‍👧 \u00a0\u2028\u0000\x7f", "the the  the\n\nthe",
        "<|end|><|pad|> <|user|>", "it's o'clock", "ß" * 9]


def test_embedded_covers_every_byte(tokenizer):
    """A byte without a token makes tiktoken panic with a BaseException in the middle of a run."""
    assert tokenizer.pieces[:256] == [bytes([b]) for b in range(256)]
    assert sorted(tokenizer.ranks.values()) == list(range(tokenizer.n_vocab - 4))
    assert len(set(tokenizer.specials.values()) | {tokenizer.eos_id, tokenizer.pad_id}) == 4
    assert tokenizer.eos_id != tokenizer.pad_id and tokenizer.bos_id is None


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    """Text that does not come back from its ids: the verifier would judge something the model did
    not say. Or a user who types '<|end|>' and thereby ends a turn."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.specials.values())


def test_lone_surrogate_and_broken_utf8(tokenizer):
    """JSON may hold half a surrogate pair, and a model may sample half a character: neither may end
    the run."""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode([0xE2, 0x98]) == "\ufffd"
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("domain", DOMAINS)
def test_demonstrations_need_no_bytes(tokenizer, domain):
    """A word that is missing in the vocabulary falls apart into letters, which a 0.4 M model cannot
    learn."""
    world, rng = DOMAINS[domain], RNG(12345)
    for _ in range(300):
        for message in world.conversation(world.problem(rng), rng, careful=True):
            text = message["content"]
            pieces = [tokenizer.pieces[i].decode() for i in tokenizer.encode(text)]
            assert pieces == re.findall(PATTERN, text)


def test_chat_is_encoded_message_by_message(tokenizer):
    """Tokens that merge across the border of prompt and response move with the response (trap 1)."""
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    asks, answers, end = [tokenizer.specials[name] for name in names]
    messages = [user("go the"), answer("re 1")]
    expected = [asks, *tokenizer.encode("go the"), end, answers, *tokenizer.encode("re 1"), end]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == expected
    assert tokenizer.encode_chat(messages) == expected + [answers]
    # A system message has no marker of its own, and must not crash.
    system = [{"role": "system", "content": "hi"}, *messages]
    assert tokenizer.encode_chat(system) == [asks, *tokenizer.encode("hi"), end, *expected, answers]


def test_a_running_conversation_is_a_prefix_of_the_longer_one(tokenizer):
    """encode_turn that differs from encode_chat: the KV cache of turn 1 is not the start of turn
    2's prompt."""
    check_prefix(tokenizer)


# -- as tokenizer.json

def test_export_gives_the_same_ids(tokenizer, tmp_path):
    """An exported run whose tokenizer cuts unknown words, digits or unicode differently answers
    nonsense elsewhere. Read again it is the same class: no template has to be run."""
    tokenizer.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    words = [piece.decode() for piece in tokenizer.pieces[256:] if piece]
    joined = ["".join(words[i::7]) for i in range(7)]
    for text in HARD + joined + [word.strip() + word[::-1] for word in words]:
        assert again.encode(text) == tokenizer.encode(text)
    for name in ("n_vocab", "eos_id", "pad_id", "bos_id", "specials", "pieces"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert type(again) is Tokenizer
    check_prefix(again)


def test_export_is_what_the_reference_library_needs(tokenizer, tmp_path):
    """Without ignore_merges and a merge for every token, Hugging Face's tokenizers splits our words
    into letters."""
    tokenizer.save(str(tmp_path))
    spec = read_json(str(tmp_path / "tokenizer.json"))
    config = read_json(str(tmp_path / "tokenizer_config.json"))
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    assert spec["model"]["ignore_merges"] is True
    assert vocab["Ġthe"] == tokenizer.encode(" the")[0]
    assert vocab["Ċ"] == 10 and vocab["<|end|>"] == tokenizer.eos_id
    # Every piece that two others make up is merged, in the order of ids.
    ranks = tokenizer.ranks
    made = {p for p in ranks for i in range(1, len(p)) if p[:i] in ranks and p[i:] in ranks}
    assert len({left + right for left, right in merges}) == len(made) > 50
    results = [vocab[left + right] for left, right in merges]
    assert results == sorted(results)
    assert {t["content"]: t["id"] for t in spec["added_tokens"]} == tokenizer.specials
    assert config["eos_token"] == "<|end|>" and config["pad_token"] == "<|pad|>"


# -- boundaries

def cut(tokenizer, text, kind):
    """The steps of a text, as texts."""
    ids = tokenizer.encode(text)
    ends = [end + 1 for end in tokenizer.step_ends(ids, kind)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], ends)]


@pytest.mark.parametrize("kind, steps", [
    ("newline", ["4 + 5 = 9 . ok !\n", "9 - 2 = 7\n", "answer 7"]),
    ("newline", ["a\n", "\n", "b\n"]),
    ("sentence", ["the color is red .", " the size may be tall .", " no idea"]),
    ("sentence", ["pi is 3.14 or so.", " good !", " why ?"]),
    ("sentence", ["take e.g. this.", " well.", " or i.e. that\n", "done"]),
    ("sentence", ["x = 3\n", "the dog.", " see plan b\n", "end"]),
    # A step does not remember how the one before it ended.
    ("sentence", ["so.", "g.", " done."]),
    ("turn", ["yes . 3 + 4 = 7 .\ngood try !"])])
def test_steps_are_cut_where_the_objective_says(tokenizer, kind, steps):
    """A cut inside '3.14' or 'e.g.', a lost last step without an end, or a newline that does not
    end a step."""
    assert cut(tokenizer, "".join(steps), kind) == steps


@pytest.mark.parametrize("kind", ["newline", "sentence", "turn"])
def test_end_of_text_ends_a_step(tokenizer, kind):
    """EOS after a digit that blocks a full stop: the step would never end; or an empty last step is
    made up after it."""
    ids = tokenizer.encode("answer 7") + [tokenizer.eos_id]
    assert tokenizer.step_ends(ids, kind) == [len(ids) - 1]
    assert tokenizer.step_ends(ids + ids, kind) == [len(ids) - 1, 2 * len(ids) - 1]
    assert tokenizer.step_ends([], kind) == []
    masks = tokenizer.boundary_masks(kind)
    assert [m.shape for m in masks] == [(tokenizer.n_vocab + 1,)] * 4
    assert masks[0][tokenizer.eos_id]
    assert not any(m[-1] for m in masks)            # "no token before" is no stop and no initial
    assert kind != "turn" or int(masks[0].sum()) == 1


def test_a_large_vocabulary_is_quick():
    """Boundary masks filled one by one through tensors: many seconds with the 150,000 tokens of
    Qwen, for every run."""
    pieces = [b"%d." % i for i in range(150_000)] + [b""]
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer(pieces, ranks, {"e": 150_000}, r"[\s\S]", 150_000, 150_000)
    start = time.process_time()
    assert int(tokenizer.boundary_masks("sentence")[1].sum()) == 150_000
    assert time.process_time() - start < 3
