"""data.py's Tokenizer. Every docstring states the bug that its test prevents. Expected ids and pieces are those of Hugging
Face's tokenizers and transformers, which were run on the same files; they are not needed here."""
import json
import re
import time

import pytest

import data
from data import DOMAINS, RNG, InputError, Tokenizer, byte_alphabet, read_json

HARD = ["", " ", "  ", "\n", "\r\n\t", "4 + 5 = 9\nanswer 9", "Zyzzyva 1,000,000.5!?", "aaaaabab 00712 007", "e.g. i.e.",
        "café ☃ 你好 👩‍👩‍👧 \u00a0\u2028\u0000\x7f", "<|end|><|pad|> <|user|>", "the the  the\n\nthe", "it's o'clock", "ß" * 9]


# -- the embedded tokenizer

def test_embedded_covers_every_byte(tokenizer):
    """A byte without a token makes tiktoken panic with a BaseException in the middle of a run."""
    assert tokenizer.pieces[:256] == [bytes([b]) for b in range(256)]
    assert sorted(tokenizer.ranks.values()) == list(range(tokenizer.n_vocab - 4))
    assert len(set(tokenizer.specials.values()) | {tokenizer.eos_id, tokenizer.pad_id}) == 4
    assert tokenizer.eos_id != tokenizer.pad_id


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    """Text that does not come back from its ids: the verifier would judge something the model did not say."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.specials.values())       # also a user who types '<|end|>' gets plain letters


def test_lone_surrogate_and_broken_utf8(tokenizer):
    """JSON may hold half a surrogate pair, and a model may sample half a character: neither may end the run."""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode([0xE2, 0x98]) == "\ufffd" and tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("domain", DOMAINS)
def test_demonstrations_need_no_bytes(tokenizer, domain):
    """A word that is missing in the vocabulary falls apart into letters, which a 0.4 M model cannot learn."""
    world, rng = DOMAINS[domain], RNG(12345)
    for _ in range(300):
        for m in world.conversation(world.problem(rng), rng, careful=True):
            pieces = [tokenizer.pieces[i] for i in tokenizer.encode(m["content"])]
            assert pieces == [w.encode() for w in re.findall(data.PATTERN, m["content"])]


def test_chat_is_encoded_message_by_message(tokenizer):
    """Tokens that merge across the border of prompt and response move with the response (trap 1)."""
    user, assistant, end = (tokenizer.specials[f"<|{s}|>"] for s in ("user", "assistant", "end"))
    messages = [{"role": "user", "content": "go the"}, {"role": "assistant", "content": "re 1"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert ids == [user, *tokenizer.encode("go the"), end, assistant, *tokenizer.encode("re 1"), end]
    assert tokenizer.encode_chat(messages) == ids + [assistant]
    system = [{"role": "system", "content": "hi"}] + messages      # has no marker of its own, and must not crash
    assert tokenizer.encode_chat(system) == [user, *tokenizer.encode("hi"), end] + ids + [assistant]


def chat_prefix_property(tokenizer, replies=("9 - 2", "")):
    messages, cache = [{"role": "user", "content": "4 + 5 ?"}], None
    for reply in replies:
        cache = (cache or tokenizer.encode_chat(messages)) + tokenizer.encode(reply) + [tokenizer.eos_id]
        messages.append({"role": "assistant", "content": reply})
        closed = cache + tokenizer.fill(tokenizer.form.tail)
        assert closed == tokenizer.encode_chat(messages, add_generation_prompt=False)
        messages.append({"role": "user", "content": " and\nthen"})
        cache += tokenizer.encode_turn(" and\nthen")
        assert cache == tokenizer.encode_chat(messages)


def test_a_running_conversation_is_a_prefix_of_the_longer_one(tokenizer):
    """encode_turn that differs from encode_chat: the KV cache of turn 1 is not the start of turn 2's prompt."""
    chat_prefix_property(tokenizer)


# -- other checkpoints' tokenizers

def split(pattern, **changes):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes,
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


# A byte-level tokenizer.json with every trap of real ones: ids are not merge ranks (db has a smaller id than ad but merges
# later), bytes without an id, add_prefix_space, BOS. 'Ġ' is the space, 'Ċ' the newline.
MERGES = ["a b", "ab c", "Ġ abc", "b c", "a d", "d b"]
TWIN = {
    "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}, {"id": 12, "content": "<unk>"}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True},
    "model": {"type": "BPE", "ignore_merges": False, "merges": MERGES,
              "vocab": {"<s>": 0, "</s>": 1, "abc": 2, "b": 3, "c": 4, "Ġ": 5, "Ġabc": 6, "bc": 7, "ab": 8, "a": 9,
                        "Ċ": 10, "d": 11, "db": 13, "ad": 14}}}
TWIN_CONFIG = {"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}}


def write_twin(directory, config=TWIN_CONFIG, **changes):
    (directory / "tokenizer.json").write_text(json.dumps(TWIN | changes), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize("merges", [MERGES, [m.split() for m in MERGES]])
def test_from_hf_merges_in_merge_order(tmp_path, merges):
    """Ids taken for merge ranks ('adb' -> a + db), or only one of the two spellings of merges read."""
    twin = Tokenizer.from_hf(write_twin(tmp_path, model=TWIN["model"] | {"merges": merges}))
    assert (twin.n_vocab, twin.eos_id, twin.pad_id, twin.bos_id) == (15, 1, 12, 0)
    assert twin.encode("abc") == [6]                         # one space is put in front ...
    assert twin.encode(" abc") == [6]                        # ... unless there is one
    assert twin.encode("\nabc") == [5, 10, 2]                # a newline is no space, as in the reference implementation
    assert twin.encode("bcab") == [5, 7, 8]
    assert twin.encode("adb") == [5, 14, 3]
    assert twin.encode("") == [] and twin.encode("</s>") == [5]
    assert twin.decode([0, 6, 10, 8, 1]) == " abc\nab"


@pytest.mark.parametrize("unk, cases", [
    (None, {"xabc": [6], "x": [5], "axd": [5, 14], "axb c": [5, 8, 5, 4], "\x04\n\x04\nab": [5, 10, 10, 8],
            "a" * 63 + "bxd b": [5] + [9] * 62 + [8, 11, 5, 3], "x\ud800a\ud83d\ude00b": [5, 9, 3]}),
    ("<s>", {"xabc": [5, 0, 2], "axb": [5, 9, 0, 3], "xx": [5, 0, 0]})])
def test_bytes_without_a_token(tmp_path, unk, cases):
    """A panic at a byte that SmolLM2's vocabulary lacks; its neighbours left apart, which merge in the reference; the
    unknown token forgotten where there is one."""
    twin = Tokenizer.from_hf(write_twin(tmp_path, model=TWIN["model"] | {"unk_token": unk}))
    assert {text: twin.encode(text) for text in cases} == cases
    if unk is None:
        letters = {c: i for i, c in enumerate(byte_alphabet().values()) if c != "x"}
        most = build(tmp_path, model={"vocab": letters, "merges": []}, added_tokens=[{"id": 256, "content": "<|endoftext|>"}])
        assert most.decode(most.encode("ax\ud83d\ude00 \ud800")) == "a\U0001f600 \ufffd"


def test_from_hf_chat_has_one_bos(tmp_path):
    """BOS repeated in front of every turn, or forgotten: the checkpoint never saw such text."""
    twin = Tokenizer.from_hf(write_twin(tmp_path))
    ids = twin.encode_chat([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab"}])
    assert ids[0] == 0 and ids.count(0) == 1 and ids.count(1) == 1
    chat_prefix_property(twin)


def test_from_hf_saves_what_came(tmp_path):
    """A foreign tokenizer rewritten in our own form would lose what this code does not model."""
    source, copy = tmp_path / "a", tmp_path / "b"
    source.mkdir(), copy.mkdir()
    write_twin(source)
    (source / "generation_config.json").write_bytes(b'{"eos_token_id":\r\n  [1, 2]}')        # not as json.dump would write it
    (source / "chat_template.jinja").write_bytes("{# é #}\r\n".encode())
    Tokenizer.from_hf(str(source)).save(str(copy))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (copy / name).read_bytes()
    assert Tokenizer.from_hf(str(copy)).encode("abc") == [6]


@pytest.mark.parametrize("changes, config, words", [
    ({"model": {"type": "Unigram", "vocab": {}}}, TWIN_CONFIG, "Unigram"),
    ({"model": TWIN["model"] | {"byte_fallback": True}}, TWIN_CONFIG, "byte_fallback"),
    ({"normalizer": {"type": "NFKC"}}, TWIN_CONFIG, "NFKC"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, {}, "Lowercase"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, TWIN_CONFIG, "Metaspace"),
    ({"pre_tokenizer": None}, TWIN_CONFIG, "ByteLevel"),
    ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}}, {}, "only ByteLevel, Digits"),
    ({"pre_tokenizer": split("a", behavior="Removed")}, {}, "Removed"), ({"pre_tokenizer": split("a", invert=True)}, {}, "invert"),
    ({"pre_tokenizer": split("a") | {"pretokenizers": split("a")["pretokenizers"] + [{"type": "ByteLevel"}]}}, {}, "Split"),
    ({"pre_tokenizer": split("(a")}, {}, "not a tokenizer file"), ({"pre_tokenizer": split("a*")}, {}, "split pattern fails"),
    ({"added_tokens": [{"id": 0, "content": "<m>", "lstrip": True}]}, {}, "'<m>' with lstrip"),
    ({"added_tokens": [{"id": 2, "content": "<m>"}]}, {}, "same id"), ({"added_tokens": [{"id": 10**9, "content": "<m>"}]}, {}, "token id"),
    ({"added_tokens": [{"id": -1, "content": "<m>"}]}, {}, "token id"), ({"added_tokens": [{"id": "1", "content": "<m>"}]}, {}, "token id"),
    ({"model": TWIN["model"] | {"merges": ["a c"]}}, {}, "b'ac'"), ({"model": TWIN["model"] | {"merges": ["a \u4f60"]}}, {}, "KeyError"),
    ({"model": TWIN["model"] | {"merges": ["a b c"]}}, {}, "ValueError"), ({"model": None}, {}, "AttributeError"),
    ({"model": TWIN["model"] | {"end_of_word_suffix": "</w>"}}, {}, "end_of_word_suffix"),
    ({"added_tokens": [{"id": 0, "content": "<s>"}]}, {}, "end-of-text")])
def test_from_hf_refuses_what_it_would_encode_wrongly(tmp_path, changes, config, words):
    """A tokenizer of another kind read as byte-level BPE gives wrong ids without a word."""
    with pytest.raises(InputError, match=words) as e:
        Tokenizer.from_hf(write_twin(tmp_path, config, **changes))
    assert str(tmp_path) in str(e.value)


def test_from_hf_names_the_missing_or_broken_file(tmp_path):
    """A checkpoint directory without its tokenizer ends in a traceback instead of a file name."""
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        Tokenizer.from_hf(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json: not a JSON file"):
        Tokenizer.from_hf(str(tmp_path))


def test_export_gives_the_same_ids(tokenizer, tmp_path):
    """An exported run whose tokenizer cuts unknown words, digits or unicode differently answers nonsense elsewhere."""
    tokenizer.save(str(tmp_path))
    again = Tokenizer.from_hf(str(tmp_path))
    words = [p.decode() for p in tokenizer.pieces[256:] if p]
    joined = ["".join(words[i::7]) for i in range(7)] + [w.strip() + w[::-1] for w in words]
    for text in HARD + joined:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.n_vocab, again.eos_id, again.pad_id, again.bos_id, again.specials) == \
           (tokenizer.n_vocab, tokenizer.eos_id, tokenizer.pad_id, None, tokenizer.specials)
    assert again.pieces == tokenizer.pieces


def test_export_is_what_the_reference_library_needs(tokenizer, tmp_path):
    """Without ignore_merges and a merge for every token, Hugging Face's tokenizers splits our words into letters."""
    tokenizer.save(str(tmp_path))
    spec, config = read_json(str(tmp_path / "tokenizer.json")), read_json(str(tmp_path / "tokenizer_config.json"))
    assert spec["model"]["ignore_merges"] is True
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    assert vocab["Ġthe"] == tokenizer.encode(" the")[0] and vocab["Ċ"] == 10 and vocab["<|end|>"] == tokenizer.eos_id
    whole = {p for p in tokenizer.ranks if any(p[:i] in tokenizer.ranks and p[i:] in tokenizer.ranks for i in range(1, len(p)))}
    assert len({a + b for a, b in merges}) == len(whole) > 50
    results = [vocab[a + b] for a, b in merges]                          # in the order of the merged token's id ...
    assert results == sorted(results)
    assert all(a in vocab and b in vocab for a, b in merges)
    assert {t["content"]: t["id"] for t in spec["added_tokens"]} == tokenizer.specials
    assert config["eos_token"] == "<|end|>" and config["pad_token"] == "<|pad|>"


def test_stories_tokenizer_is_the_reference_one(stories):
    """ids of a real tokenizer.json, taken from Hugging Face's own library: prefix space, rank order, missing bytes."""
    tok = Tokenizer.from_hf(stories)
    assert (tok.n_vocab, tok.bos_id, tok.eos_id, tok.pad_id) == (512, 1, 2, 0)
    for text, ids in {"Once upon a time": [403, 407, 261, 378], " a": [261], "": [],
                      "\nHello": [410, 13, 440, 411, 306, 414],
                      "3.14 e.g. this": [410, 472, 426, 475, 484, 344, 426, 428, 426, 308, 293],
                      "café ☃": [280, 412, 431, 485, 410, 229, 155, 134],
                      "<s>hi</s>": [410, 504, 419, 505, 415, 417, 504, 492, 419, 505]}.items():
        assert tok.encode(text) == ids
        assert tok.decode(ids) == (text if text[:1] in ("", " ") else " " + text)
    chat_prefix_property(tok)


# -- families

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDS = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "Ċ Ċ", "1 2", "Ġ 1", "l l", "' ll", "' L", "Ã ©", "u s", "e r", "us er", "i m", "< |"]
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|bos|>"]


def build(directory, pre=GPT2, merges=WORDS, config=None, added=(), **changes):
    """A tokenizer.json with all bytes, then `merges`, then the special tokens NAMES, then `added` -> its Tokenizer."""
    vocab = {t: i for i, t in enumerate([*sorted(byte_alphabet().values()), *(m.replace(" ", "") for m in merges)])}
    tokens = [{"content": t, "special": True} for t in NAMES] + [{"content": t, "special": False} | more for t, more in added]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
            "pre_tokenizer": pre, "added_tokens": [plain | t | {"id": len(vocab) + i} for i, t in enumerate(tokens)],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "vocab": vocab,
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "merges": merges}} | changes
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>"} if config is None else config
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_hf(str(directory))


def shown(tokenizer, text):
    """The pieces of a text, joined by |."""
    return "|".join(tokenizer.pieces[i].decode("utf-8", "replace") for i in tokenizer.encode(text))


def digits(individual):
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": individual}, GPT2]}


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
SPLITS = ["Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "1 2", "12 3", "Ġ 1", "Ġ1 2", "' L", "'L L", "l l", "' ll"]


@pytest.mark.parametrize("pre, cases", [
    (GPT2, {"a   123": "a|  | |123", "'ll 'LL": "'ll| |'|L|L", "\n\n1": "\n|\n|1", "\n\n": "\n\n"}),
    (digits(True), {"a   123": "a|   |1|2|3", " 1": " |1", "  a": " | |a", "\n\n1\n\n": "\n\n|1|\n\n", "x 1²": "x| |1|\xc2|\xb2"}),
    (digits(False), {"a   123": "a|   |123", " 1": " |1", "\n\n12 3": "\n\n|12| |3"}),
    (split(LLAMA3), {"a   123": "a|  | |123", " 1": " |1", "'ll'LL": "'ll|'LL", "\n\n1": "\n\n|1", "1231": "123|1"}),
    (split(r"\d"), {"a   12": "a|   |1|2", "ll12'LL": "ll|1|2|'LL"})])
def test_split_patterns(tmp_path, pre, cases):
    """Digits taken for a prefix of GPT-2's pattern (they also end the white space before them); Llama-3's triples of
    digits; text between the matches of a pattern lost."""
    tokenizer = build(tmp_path, pre, SPLITS)
    for text, pieces in cases.items():
        assert shown(tokenizer, text) == pieces.encode("latin-1").decode("utf-8", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_in_another_order_than_merges(tmp_path):
    """Ids taken for merge priorities: 'abc' would be a + bc."""
    model = {"merges": ["a b", "b c", "c d"], "vocab": {c: i for i, c in enumerate(byte_alphabet().values())}}
    for order in (["ab", "bc", "cd"], ["bc", "cd", "ab"], ["cd", "ab", "bc"]):
        vocab = model["vocab"] | {t: 256 + i for i, t in enumerate(order)} | {t: 259 + i for i, t in enumerate(NAMES)}
        tokenizer = build(tmp_path, model=model | {"vocab": vocab}, added_tokens=[{"id": 259, "content": "<|endoftext|>"}])
        assert tokenizer.encode("abcd") == [vocab["ab"], vocab["cd"]]
        assert tokenizer.encode("bcd") == [vocab["bc"], vocab["d"]]


@pytest.mark.parametrize("ignore, pieces", [(True, "hey|h|e|y|y"), (False, "h|e|y|h|e|y|y")])
def test_ignore_merges(tmp_path, ignore, pieces):
    """A word of the vocabulary that no merge makes: Llama-3 takes it whole, the others must not, nor a part of a word."""
    vocab = {c: i for i, c in enumerate(byte_alphabet().values())} | {"hey": 256}
    model = {"merges": [], "vocab": vocab, "ignore_merges": ignore}
    tokenizer = build(tmp_path, model=model, added_tokens=[{"id": 257, "content": "<|endoftext|>"}], pre=split("hey|hyy|."))
    assert shown(tokenizer, "hey") == pieces[:-8] and tokenizer.decode(tokenizer.encode("heyheyy")) == "heyheyy"
    assert tokenizer.pieces[256] == b"hey"


def test_nfc_between_tokens(tmp_path):
    """Qwen's normaliser left out, or applied to the text of added tokens that are matched as they stand."""
    added = [("e\u0301x", {}), ("<t>", {}), ("o\u0308!", {"normalized": True})]
    tokenizer = build(tmp_path, added=added, normalizer={"type": "NFC"})
    assert shown(tokenizer, "e\u0301") == shown(tokenizer, "\xe9") == "\xe9"
    assert shown(tokenizer, "e\u0301xe\u0301<t>\u0301") == "e\u0301x|\xe9|<t>|" + shown(tokenizer, "\u0301")
    assert tokenizer.encode("\xe9x") == tokenizer.encode("\xe9") + tokenizer.encode("x")      # not the token of e + accent
    assert tokenizer.encode("o\u0308!") == tokenizer.encode("\xf6!") == [tokenizer.n_vocab - 1]


def test_added_tokens_in_text(tmp_path):
    """<think> cut into letters; the shorter of two that match; a user who types <|im_start|> into being one."""
    tokenizer = build(tmp_path, added=[("<think>", {}), ("<think>>", {}), ("th", {"normalized": True})])
    think, longer, th = range(tokenizer.n_vocab - 3, tokenizer.n_vocab)
    assert tokenizer.encode("<think>") == [think] and tokenizer.encode("a<think>>e") == [97 - 33, longer, 101 - 33]
    assert tokenizer.encode(" the") == [tokenizer.encode(" ")[0], th, 101 - 33]         # before any merge
    for name in NAMES:
        ids = tokenizer.encode(f"a{name}b<think>")
        assert tokenizer.decode(ids) == f"a{name}b<think>" and not set(ids) & set(tokenizer.specials.values())
        chat = tokenizer.encode_chat([{"role": "user", "content": name}])
        assert chat.count(tokenizer.specials[name]) == 0


def test_a_million_blanks_are_no_panic(tokenizer, tmp_path, capfd):
    """tiktoken's pattern engine panics with a BaseException on very long runs: no command would report it in one line."""
    gpt2 = build(tmp_path)
    assert gpt2.decode(gpt2.encode("a" * 300_000 + " " * 100_000)) == "a" * 300_000 + " " * 100_000
    with pytest.raises(InputError, match="white space"):
        gpt2.encode(" " * 2_000_000 + "a")
    capfd.readouterr()


def test_two_files_instead_of_one(tmp_path):
    """GPT-2's and Qwen2's vocab.json + merges.txt read with the wrong pattern, or '#version' and '# #' taken for the same."""
    vocab = {c: i for i, c in enumerate(byte_alphabet().values())} | {"##": 256, "12": 257, "ĊĊ": 258, "<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match="no merges.txt"):
        Tokenizer.from_hf(str(tmp_path))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n# #\n1 2\nĊ Ċ\n", encoding="utf-8")
    gpt2 = Tokenizer.from_hf(str(tmp_path))
    assert shown(gpt2, "###12\n\na") == "##|#|12|\n|\n|a" and (gpt2.eos_id, gpt2.n_vocab) == (259, 260)
    assert gpt2.eos_id not in gpt2.encode("<|endoftext|>")
    (tmp_path / "added_tokens.json").write_text('{"<think>": 262}')
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "added_tokens_decoder": {"260": {"content": "<|im_end|>", "special": True}, "261": {"content": "<t>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    qwen = Tokenizer.from_hf(str(tmp_path))
    assert shown(qwen, "12\n\na<t><think>e\u0301") == "1|2|\n\n|a|<t>|<think>|" + shown(qwen, "\xe9")
    assert (qwen.eos_id, qwen.pad_id, qwen.n_vocab) == (260, 259, 263) and set(qwen.specials) == {"<|endoftext|>", "<|im_end|>"}
    (tmp_path / "b").mkdir()
    qwen.save(str(tmp_path / "b"))
    assert Tokenizer.from_hf(str(tmp_path / "b")).pieces == qwen.pieces
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(InputError, match="RobertaTokenizer"):
        Tokenizer.from_hf(str(tmp_path))


def test_a_large_vocabulary_is_quick(tmp_path):
    """Boundary masks filled one by one through tensors: many seconds with the 150,000 tokens of Qwen, for every run."""
    tokenizer = Tokenizer([b"%d." % i for i in range(150_000)] + [b""], {bytes([b]): b for b in range(256)}, {"e": 150_000},
                          data.GPT2_PATTERN, 150_000, 150_000)
    start = time.process_time()
    assert int(tokenizer.boundary_masks("sentence")[1].sum()) == 150_000
    assert time.process_time() - start < 3


# -- chat templates

TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
FIRST = "{%% for message in messages %%}{%% if loop.first and messages[0]['role'] != 'system' %%}{{ '<|im_start|>system\n%s<|im_end|>\n' }}{%% endif %%}"
ASK = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM2 = FIRST % "You are a helpful AI assistant named SmolLM, trained by Hugging Face" + TURN + ASK
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'It\'s \\boxed{}.' }}
    {%- endif %}
    {{- "\n\n# Tools\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nIt\'s \\boxed{}.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = QWEN25.replace("""    {%- else %}
        {{- '<|im_start|>system\\nIt\\'s \\\\boxed{}.<|im_end|>\\n' }}
""", "").replace("""assistant\\n' }}
""", """assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
""")
LLAMA = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
         "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
         "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
SAID = [{"role": "user", "content": " the 12 "}, {"role": "assistant", "content": "us"}, {"role": "user", "content": "\nll"}]
SYSTEM = [{"role": "system", "content": "the us"}]
ML = ("<|im_start|>user\n the 12 <|im_end|>\n<|im_start|>assistant\nus<|im_end|>\n<|im_start|>user\n\nll<|im_end|>\n"
      "<|im_start|>assistant\n")
HEADERS = ("<|start_header_id|>user<|end_header_id|>\n\nthe 12<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nus<|eot_id|>"
           "<|start_header_id|>user<|end_header_id|>\n\nll<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
DATES = "<|bos|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def rendered(tokenizer, text):
    """Text of a rendered template -> ids, as the reference does it: special tokens by name, what is between in one piece."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [i for k, p in enumerate(parts) for i in ([tokenizer.specials[p]] if k % 2 else tokenizer.encode(p))]


@pytest.mark.parametrize("template, messages, text", [
    (SMOLLM2, SAID, "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" + ML),
    (SMOLLM2, SYSTEM + SAID, "<|im_start|>system\nthe us<|im_end|>\n" + ML),
    (QWEN25, SAID, "<|im_start|>system\nIt's \\boxed{}.<|im_end|>\n" + ML),
    (QWEN25, SYSTEM + SAID, "<|im_start|>system\nthe us<|im_end|>\n" + ML),
    (QWEN3, SAID, ML), (QWEN3, SYSTEM + SAID, "<|im_start|>system\nthe us<|im_end|>\n" + ML),
    (LLAMA, SAID, "<|bos|>" + HEADERS),
    (LLAMA, SYSTEM + SAID, "<|bos|><|start_header_id|>system<|end_header_id|>\n\nthe us<|eot_id|>" + HEADERS),
    (LLAMA31, SAID, DATES + "<|eot_id|>" + HEADERS), (LLAMA31, SYSTEM + SAID, DATES + "the us<|eot_id|>" + HEADERS),
    (None, SAID, "User:  the 12 \n|Assistant:|us<|endoftext|>User: \nll\n|Assistant:")])
def test_chat_is_what_the_template_writes(tmp_path, template, messages, text):
    """A default system prompt forgotten or put before a given one, role and content merged apart, Llama's dates or its
    trimming left out: a model that never saw such a prompt."""
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>"} | ({"chat_template": template} if template else {})
    tokenizer = build(tmp_path, split(LLAMA3), config=config)
    if template:
        assert tokenizer.encode_chat(messages) == rendered(tokenizer, text)
    else:
        assert tokenizer.encode_chat(messages) == [i for p in text.split("|", 2)[:2] for i in tokenizer.encode(p)] + \
            tokenizer.encode("us") + [tokenizer.eos_id] + [i for p in ("User: \nll\n", "Assistant:") for i in tokenizer.encode(p)]
    chat_prefix_property(tokenizer)


@pytest.mark.parametrize("template", [
    TURN.replace("'\n' + message", "'<|im_sep|>' + message") + ASK,                               # Phi-4
    TURN + ASK.replace("assistant\n'", "assistant\n<think>\n'"), TURN.replace("['content']", "['content'] | upper") + ASK,
    SMOLLM2.replace("named", "' + name + '"), LLAMA31.replace("date_string =", "day ="), LLAMA.replace(" | trim", ""),
    "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}",
    TURN.replace("<|im_start|>", "<|startoftext|>") + ASK, {"no": "text"}])
def test_unknown_template_is_named_and_refused(tmp_path, template):
    """A template that is nearly ChatML taken for it; or a base model refused altogether, whose encode() is all one needs."""
    if isinstance(template, dict):
        with pytest.raises(InputError, match="tokenizer.json"):
            build(tmp_path, config={"eos_token": "<|endoftext|>", "chat_template": template})
        return
    tokenizer = build(tmp_path, config={"eos_token": "<|endoftext|>", "chat_template": template})
    assert shown(tokenizer, " the") == " the"
    with pytest.raises(InputError) as e:
        tokenizer.encode_chat(SAID)
    assert "tokenizer.json: chat_template" in str(e.value) and repr(template[:30])[1:20] in str(e.value)


def test_template_may_lie_beside_the_config(tmp_path):
    """chat_template.jinja or the list of named templates overlooked: the model is asked in a form that it never learnt."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SMOLLM2}]
    first = build(tmp_path, config={"eos_token": "<|endoftext|>", "chat_template": named})
    assert first.form.default.startswith("You are a helpful AI")
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    second = Tokenizer.from_hf(str(tmp_path))
    assert second.form.default == "" and second.form.tail == "\n" and second.form_error is None


@pytest.mark.parametrize("template, config, eos, pad, bos", [
    (None, {"eos_token": "<|endoftext|>"}, "<|endoftext|>", "<|im_start|>", None),
    (None, {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|bos|>", "add_bos_token": True}, "<|im_end|>", "<|endoftext|>", "<|bos|>"),
    (SMOLLM2, {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}, "<|im_end|>", "<|endoftext|>", None),
    (LLAMA, {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "pad_token": "<|im_end|>"}, "<|eot_id|>", "<|im_end|>", "<|bos|>")])
def test_eos_pad_bos(tmp_path, template, config, eos, pad, bos):
    """Answers that end with a base model's end of text where the template ends turns otherwise; pad equal to EOS."""
    tokenizer = build(tmp_path, config=config | ({"chat_template": template} if template else {}))
    named = [None if i is None else next(s for s, j in tokenizer.specials.items() if i == j)
             for i in (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id)]
    assert named == [eos, pad, bos]


def test_bos_from_the_post_processor(tmp_path):
    """Llama-3's base model names its BOS in the post_processor only."""
    single = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]}
    tokenizer = build(tmp_path, post_processor=post)
    assert tokenizer.encode_chat(SAID)[0] == tokenizer.bos_id == tokenizer.specials["<|bos|>"]
    assert tokenizer.bos_id not in tokenizer.encode("the")
    assert build(tmp_path, post_processor={"type": "TemplateProcessing", "single": single[1:]}).bos_id is None


# -- boundaries

def cut(tokenizer, text, kind):
    """The steps of a text, as texts."""
    ids = tokenizer.encode(text)
    ends = [e + 1 for e in tokenizer.step_ends(ids, kind)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip([0] + ends, ends)]


@pytest.mark.parametrize("kind, steps", [
    ("newline", ["4 + 5 = 9 . ok !\n", "9 - 2 = 7\n", "answer 7"]),
    ("newline", ["a\n", "\n", "b\n"]),
    ("sentence", ["the color is red .", " the size may be tall .", " no idea"]),
    ("sentence", ["pi is 3.14 or so.", " good !", " why ?"]),
    ("sentence", ["take e.g. this.", " well.", " or i.e. that\n", "done"]),
    ("sentence", ["x = 3\n", "the dog.", " see plan b\n", "end"]),
    ("sentence", ["so.", "g.", " done."]),           # a step does not remember how the one before it ended
    ("turn", ["yes . 3 + 4 = 7 .\ngood try !"])])
def test_steps_are_cut_where_the_objective_says(tokenizer, kind, steps):
    """A cut inside '3.14' or 'e.g.', a lost last step without an end, or a newline that does not end a step."""
    assert cut(tokenizer, "".join(steps), kind) == steps


def test_end_of_text_ends_a_step(tokenizer):
    """EOS after a digit that blocks a full stop: the step would never end; or an empty last step is made up after it."""
    ids = tokenizer.encode("answer 7") + [tokenizer.eos_id]
    for kind in ("newline", "sentence", "turn"):
        assert tokenizer.step_ends(ids, kind) == [len(ids) - 1]
        assert tokenizer.step_ends(ids + ids, kind) == [len(ids) - 1, 2 * len(ids) - 1]
        assert tokenizer.step_ends([], kind) == []
        masks = tokenizer.boundary_masks(kind)
        assert all(m.shape == (tokenizer.n_vocab + 1,) for m in masks) and masks[0][tokenizer.eos_id]
        assert not any(m[-1] for m in masks)          # "no token before" is neither a stop nor an initial
    assert int(tokenizer.boundary_masks("turn")[0].sum()) == 1
