"""interop/vocabulary.py and the reading half of interop/tokenizer.py. Every docstring states the bug
that its test prevents. Expected ids and pieces are those of Hugging Face's tokenizers, which was run
on the same files; it is not needed here."""
import json
import time

import pytest

from data import InputError
from interop.tokenizer import load_tokenizer
from interop.vocabulary import byte_alphabet
from tests.byte_level import GPT2, LLAMA3, NAMES, answer, build, check_prefix, shown, split, user

# A tokenizer.json with every trap of real ones: ids are not merge ranks (db has a smaller id than
# ad but merges later), bytes without an id, add_prefix_space, BOS.
MERGES = ["a b", "ab c", "Ġ abc", "b c", "a d", "d b"]
TWIN = {
    "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"},
                     {"id": 12, "content": "<unk>"}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True},
    "model": {"type": "BPE", "ignore_merges": False, "merges": MERGES,
              "vocab": {"<s>": 0, "</s>": 1, "abc": 2, "b": 3, "c": 4, "Ġ": 5, "Ġabc": 6, "bc": 7,
                        "ab": 8, "a": 9, "Ċ": 10, "d": 11, "db": 13, "ad": 14}}}
TWIN_CONFIG = {"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
ALPHABET = {c: i for i, c in enumerate(byte_alphabet().values())}
END = [{"id": 300, "content": "<|endoftext|>"}]


def twin(directory, config=TWIN_CONFIG, **changes):
    (directory / "tokenizer.json").write_text(json.dumps(TWIN | changes), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(str(directory))


@pytest.mark.parametrize("merges", [MERGES, [m.split() for m in MERGES]])
def test_merging_in_merge_order(tmp_path, merges):
    """Ids taken for merge ranks ('adb' -> a + db), or only one of the two spellings of merges
    read."""
    tokenizer = twin(tmp_path, model=TWIN["model"] | {"merges": merges})
    found = [getattr(tokenizer, name) for name in ("n_vocab", "eos_id", "pad_id", "bos_id")]
    assert found == [15, 1, 12, 0]
    assert tokenizer.encode("abc") == [6]           # one space is put in front ...
    assert tokenizer.encode(" abc") == [6]          # ... unless there is one
    assert tokenizer.encode("\nabc") == [5, 10, 2]  # a newline is no space, as in the reference
    assert tokenizer.encode("bcab") == [5, 7, 8]
    assert tokenizer.encode("adb") == [5, 14, 3]
    assert tokenizer.encode("") == [] and tokenizer.encode("</s>") == [5]
    assert tokenizer.decode([0, 6, 10, 8, 1]) == " abc\nab"


def test_ids_in_another_order_than_merges(tmp_path):
    """Ids taken for merge priorities: 'abc' would be a + bc."""
    for order in (["ab", "bc", "cd"], ["bc", "cd", "ab"], ["cd", "ab", "bc"]):
        vocab = ALPHABET | {piece: 256 + i for i, piece in enumerate(order)}
        model = {"merges": ["a b", "b c", "c d"], "vocab": vocab}
        tokenizer = build(tmp_path, model=model, added_tokens=END)
        assert tokenizer.encode("abcd") == [vocab["ab"], vocab["cd"]]
        assert tokenizer.encode("bcd") == [vocab["bc"], vocab["d"]]


@pytest.mark.parametrize("ignore, pieces", [(True, "hey|h|e|y|y"), (False, "h|e|y|h|e|y|y")])
def test_ignore_merges(tmp_path, ignore, pieces):
    """A word of the vocabulary that no merge makes: Llama 3 takes it whole, the others must not,
    nor a part of a word."""
    model = {"merges": [], "vocab": ALPHABET | {"hey": 256}, "ignore_merges": ignore}
    tokenizer = build(tmp_path, model=model, added_tokens=END, pre=split("hey|hyy|."))
    assert shown(tokenizer, "hey") == pieces[:-8]
    assert tokenizer.decode(tokenizer.encode("heyheyy")) == "heyheyy"
    assert tokenizer.pieces[256] == b"hey"


@pytest.mark.parametrize("unk, cases", [
    (None, {"xabc": [6], "x": [5], "axd": [5, 14], "axb c": [5, 8, 5, 4],
            "\x04\n\x04\nab": [5, 10, 10, 8], "x\ud800a\ud83d\ude00b": [5, 9, 3],
            "a" * 63 + "bxd b": [5] + [9] * 62 + [8, 11, 5, 3]}),
    ("<s>", {"xabc": [5, 0, 2], "axb": [5, 9, 0, 3], "xx": [5, 0, 0]})])
def test_bytes_without_a_token(tmp_path, unk, cases):
    """A panic at a byte that SmolLM2's vocabulary lacks; its neighbours left apart, which merge in
    the reference; the unknown token forgotten where there is one."""
    tokenizer = twin(tmp_path, model=TWIN["model"] | {"unk_token": unk})
    assert {text: tokenizer.encode(text) for text in cases} == cases
    if unk is None:
        letters = {c: i for c, i in ALPHABET.items() if c != "x"}
        most = build(tmp_path, model={"vocab": letters, "merges": []}, added_tokens=END)
        assert most.decode(most.encode("ax\ud83d\ude00 \ud800")) == "a\U0001f600 \ufffd"


# -- where a text is split

def digits(individual):
    digits = {"type": "Digits", "individual_digits": individual}
    return {"type": "Sequence", "pretokenizers": [digits, GPT2]}


SPLITS = ["Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "1 2", "12 3", "Ġ 1", "Ġ1 2", "' L", "'L L", "l l", "' ll"]


@pytest.mark.parametrize("pre, cases", [
    (GPT2, {"a   123": "a|  | |123", "'ll 'LL": "'ll| |'|L|L", "\n\n1": "\n|\n|1",
            "\n\n": "\n\n"}),
    (digits(True), {"a   123": "a|   |1|2|3", " 1": " |1", "  a": " | |a",
                    "\n\n1\n\n": "\n\n|1|\n\n", "x 1²": "x| |1|\xc2|\xb2"}),
    (digits(False), {"a   123": "a|   |123", " 1": " |1", "\n\n12 3": "\n\n|12| |3"}),
    (split(LLAMA3), {"a   123": "a|  | |123", " 1": " |1", "'ll'LL": "'ll|'LL",
                     "\n\n1": "\n\n|1", "1231": "123|1"}),
    (split(r"\d"), {"a   12": "a|   |1|2", "ll12'LL": "ll|1|2|'LL"}),
    # DeepSeek's way: what a later pattern would take across a digit was cut before.
    (split(r"\p{N}{1,3}", "ll", LLAMA3), {"a   123": "a|   |123", "1231": "123|1", "ll": "ll",
                                         "'ll": "'|ll", "\n\n1\n\n": "\n\n|1|\n\n"})])
def test_split_patterns(tmp_path, pre, cases):
    """Digits taken for a prefix of GPT-2's pattern (they also end the white space before them);
    Llama 3's triples of digits; text between the matches of a pattern lost; only the last of
    several patterns applied."""
    tokenizer = build(tmp_path, pre, SPLITS)
    for text, pieces in cases.items():
        assert shown(tokenizer, text) == pieces.encode("latin-1").decode("utf-8", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_million_blanks(tmp_path):
    """A pattern engine that gives up on very long runs, or does not come back: no command would
    report it in one line."""
    gpt2 = build(tmp_path)
    for long in ("a" * 300_000 + " " * 100_000, " " * 2_000_000 + "a"):
        assert gpt2.decode(gpt2.encode(long)) == long
    hostile = build(tmp_path, split("(?:a|aa|aaa)+b|."))
    start = time.process_time()             # a busy machine is not slower
    with pytest.raises(InputError, match="split pattern takes too long"):
        hostile.encode("a" * 200)
    assert time.process_time() - start < 5


# -- tokens that are never merged

def test_nfc_between_tokens(tmp_path):
    """Qwen's normaliser left out, or applied to the text of added tokens that are matched as they
    stand."""
    added = [("e\u0301x", {}), ("<t>", {}), ("o\u0308!", {"normalized": True})]
    tokenizer = build(tmp_path, added=added, normalizer={"type": "NFC"})
    assert shown(tokenizer, "e\u0301") == shown(tokenizer, "\xe9") == "\xe9"
    accent = shown(tokenizer, "\u0301")
    assert shown(tokenizer, "e\u0301xe\u0301<t>\u0301") == "e\u0301x|\xe9|<t>|" + accent
    # Not the token of e + accent:
    assert tokenizer.encode("\xe9x") == tokenizer.encode("\xe9") + tokenizer.encode("x")
    last = tokenizer.n_vocab - 1
    assert tokenizer.encode("o\u0308!") == tokenizer.encode("\xf6!") == [last]


def test_added_tokens_in_text(tmp_path):
    """<think> cut into letters; the shorter of two that match; a user who types <|im_start|>, or
    DeepSeek's <｜User｜> that is not marked as special, into being one."""
    added = [("<｜User｜>", {}), ("<think>", {}), ("<think>>", {}), ("th", {"normalized": True})]
    tokenizer = build(tmp_path, added=added)
    think, longer, th = range(tokenizer.n_vocab - 3, tokenizer.n_vocab)
    a, e, blank = [tokenizer.encode(text)[0] for text in ("a", "e", " ")]
    assert tokenizer.encode("<think>") == [think]
    assert tokenizer.encode("a<think>>e") == [a, longer, e]
    assert tokenizer.encode(" the") == [blank, th, e]             # before any merge
    assert {*NAMES, "<｜User｜>"} == tokenizer.specials.keys()
    for name, i in tokenizer.specials.items():
        ids = tokenizer.encode(f"a{name}b<think>")
        assert tokenizer.decode(ids) == f"a{name}b<think>"
        assert not set(ids) & set(tokenizer.specials.values())
        assert tokenizer.encode_chat([user(name)]).count(i) == 0


@pytest.mark.parametrize("config, eos, pad, bos", [
    ({"eos_token": "<|endoftext|>"}, "<|endoftext|>", "<|im_start|>", None),
    ({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|bos|>", "add_bos_token": True},
     "<|im_end|>", "<|endoftext|>", "<|bos|>"),
    ({"eos_token": "<|eot_id|>", "bos_token": "<|bos|>", "add_bos_token": False,
      "pad_token": "<|im_end|>"}, "<|eot_id|>", "<|im_end|>", None)])
def test_eos_pad_bos(tmp_path, config, eos, pad, bos):
    """Pad equal to EOS, which would never be learnt; BOS where the configuration wants none."""
    tokenizer = build(tmp_path, config=config)
    ids = [tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id]
    assert ids == [tokenizer.specials.get(name) for name in (eos, pad, bos)]


def test_bos_from_the_post_processor(tmp_path):
    """Llama 3's base model names its BOS in the post_processor only."""
    single = [{"SpecialToken": {"id": "<|bos|>"}}, {"Sequence": {"id": "A"}}]
    parts = [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]
    tokenizer = build(tmp_path, post_processor={"type": "Sequence", "processors": parts})
    bos = tokenizer.specials["<|bos|>"]
    assert tokenizer.encode_chat([user("the")])[0] == tokenizer.bos_id == bos
    assert bos not in tokenizer.encode("the")
    post = {"type": "TemplateProcessing", "single": single[1:]}
    assert build(tmp_path, post_processor=post).bos_id is None


def test_plain_chat_has_one_bos(tmp_path):
    """BOS repeated in front of every turn, or forgotten: the checkpoint never saw such text."""
    tokenizer = twin(tmp_path)
    ids = tokenizer.encode_chat([user("ab"), answer("ab"), user("c")])
    assert ids[0] == 0 and ids.count(0) == 1 and ids.count(1) == 1
    check_prefix(tokenizer)


# -- files

def test_saves_what_came(tmp_path):
    """A foreign tokenizer rewritten in our own form would lose what this code does not model."""
    source, copy = tmp_path / "a", tmp_path / "b"
    source.mkdir(), copy.mkdir()
    twin(source)
    # Not as json.dump would write it:
    (source / "generation_config.json").write_bytes(b'{"eos_token_id":\r\n  [1, 2]}')
    (source / "chat_template.jinja").write_bytes("{# é #}\r\n".encode())
    load_tokenizer(str(source)).save(str(copy))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):
        assert (source / name).read_bytes() == (copy / name).read_bytes()
    assert load_tokenizer(str(copy)).encode("abc") == [6]


def test_padded_to_the_models_vocabulary(tmp_path):
    """A model with more ids than its tokenizer, as Qwen's: decoding one of them ends in a
    traceback. One with fewer reads beyond its embedding."""
    twin(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), 20)
    assert tokenizer.n_vocab + 1 == len(tokenizer.boundary_masks("newline")[0]) == 21
    assert tokenizer.decode([19]) == ""
    with pytest.raises(InputError, match="ids up to 14, the model 10"):
        load_tokenizer(str(tmp_path), 10)


def test_two_files_instead_of_one(tmp_path):
    """GPT-2's and Qwen2's vocab.json + merges.txt read with the wrong pattern, or '#version' and
    '# #' taken for the same."""
    folder = str(tmp_path)
    assert load_tokenizer(folder) is None
    vocab = ALPHABET | {"##": 256, "12": 257, "ĊĊ": 258, "<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match="no merges.txt"):
        load_tokenizer(folder)
    merges = "#version: 0.2\n# #\n1 2\nĊ Ċ\n"
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    gpt2 = load_tokenizer(folder)
    assert shown(gpt2, "###12\n\na") == "##|#|12|\n|\n|a"
    assert (gpt2.eos_id, gpt2.n_vocab) == (259, 260)
    assert gpt2.eos_id not in gpt2.encode("<|endoftext|>")
    # Qwen2
    (tmp_path / "added_tokens.json").write_text('{"<think>": 262}')
    described = {"260": {"content": "<|im_end|>", "special": True},
                 "261": {"content": "<t>", "special": False}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "added_tokens_decoder": described}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    qwen = load_tokenizer(folder)
    accent = shown(qwen, "\xe9")
    assert shown(qwen, "12\n\na<t><think>e\u0301") == "1|2|\n\n|a|<t>|<think>|" + accent
    assert (qwen.eos_id, qwen.pad_id, qwen.n_vocab) == (260, 259, 263)
    assert set(qwen.specials) == {"<|endoftext|>", "<|im_end|>"}
    (tmp_path / "b").mkdir()
    qwen.save(str(tmp_path / "b"))
    assert load_tokenizer(str(tmp_path / "b")).pieces == qwen.pieces
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(InputError, match="RobertaTokenizer"):
        load_tokenizer(folder)


def model(**changes):
    return {"model": TWIN["model"] | changes}


def token(**changes):
    return {"added_tokens": [{"id": 0, "content": "<m>"} | changes]}


BYTE_LEVEL_TWICE = {"pretokenizers": [*split("a")["pretokenizers"], {"type": "ByteLevel"}]}


@pytest.mark.parametrize("changes, words", [
    ({"model": {"type": "Unigram", "vocab": {}}}, "Unigram"),
    (model(byte_fallback=True), "byte_fallback"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ({"normalizer": {"type": "NFKC"}}, "NFKC"),
    ({"normalizer": {"normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": None}, "ByteLevel"),
    ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}}, "Digits"),
    ({"pre_tokenizer": split("a", behavior="Removed")}, "Removed"),
    ({"pre_tokenizer": split("a", invert=True)}, "invert"),
    ({"pre_tokenizer": BYTE_LEVEL_TWICE}, "Split"),
    ({"pre_tokenizer": split("(a")}, "not a tokenizer file"),
    (token(lstrip=True), "'<m>' with lstrip"),
    (token(id=2), "token id"), (token(id=10**9), "token id"), (token(id=-1), "token id"),
    (token(id="1"), "token id"),
    (model(merges=["a c"]), "b'ac'"), (model(merges=["a \u4f60"]), "KeyError"),
    (model(merges=["a b c"]), "ValueError"), ({"model": None}, "AttributeError"),
    ({"added_tokens": [{"id": 0, "content": "<s>"}]}, "end-of-text")])
def test_what_would_be_encoded_wrongly_is_refused(tmp_path, changes, words):
    """A tokenizer of another kind read as byte-level BPE gives wrong ids without a word."""
    config = {"eos_token": "</s>"}
    with pytest.raises(InputError, match=words) as e:
        twin(tmp_path, config, **changes)
    assert str(tmp_path) in str(e.value)


def test_a_broken_file_is_named(tmp_path):
    """A damaged checkpoint ends in a traceback instead of a file name."""
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json: not a JSON file"):
        load_tokenizer(str(tmp_path))


def test_stories_tokenizer_is_the_reference_one(stories):
    """ids of a real tokenizer.json, taken from Hugging Face's own library: prefix space, rank
    order, missing bytes."""
    tokenizer = load_tokenizer(stories)
    found = [getattr(tokenizer, name) for name in ("n_vocab", "bos_id", "eos_id", "pad_id")]
    assert found == [512, 1, 2, 0]
    for text, ids in {"Once upon a time": [403, 407, 261, 378], " a": [261], "": [],
                      "\nHello": [410, 13, 440, 411, 306, 414],
                      "3.14 e.g. this": [410, 472, 426, 475, 484, 344, 426, 428, 426, 308, 293],
                      "café ☃": [280, 412, 431, 485, 410, 229, 155, 134],
                      "<s>hi</s>": [410, 504, 419, 505, 415, 417, 504, 492, 419, 505]}.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == (text if text[:1] in ("", " ") else " " + text)
    check_prefix(tokenizer)
