"""Small checkpoints' tokenizers for tests: all bytes, a few merges, the usual special tokens."""
import json
import re

from interop.tokenizer import load_tokenizer
from interop.vocabulary import byte_alphabet

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# 'Ġ' is the space, 'Ċ' the newline, 'Ã ©' the two bytes of é.
WORDS = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "Ċ Ċ", "1 2", "Ġ 1", "l l", "' ll", "' L", "Ã ©", "u s",
         "e r", "us er", "i m", "< |"]
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eot_id|>", "<|bos|>"]
NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def split(pattern, *more, **changes):
    """A pre_tokenizer that splits at one pattern after the other."""
    parts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
             for p in (pattern, *more)]
    parts[0] |= changes
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*parts, byte_level]}


def build(directory, pre=GPT2, merges=WORDS, config=None, added=(), names=NAMES, **changes):
    """Write a tokenizer.json with all bytes, then `merges`, then the special tokens `names`, then
    `added` -> its tokenizer."""
    pieces = [*sorted(byte_alphabet().values()), *(merge.replace(" ", "") for merge in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokens = [{"content": name, "special": True} for name in names]
    tokens += [{"content": text, "special": False} | more for text, more in added]
    tokens = [NO_FLAGS | token | {"id": len(vocab) + i} for i, token in enumerate(tokens)]
    spec = {"version": "1.0", "normalizer": None, "pre_tokenizer": pre, "added_tokens": tokens,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}} | changes
    if config is None:
        config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>"}
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(str(directory))


def shown(tokenizer, text):
    """The pieces of a text, joined by |."""
    pieces = [tokenizer.pieces[i].decode("utf-8", "replace") for i in tokenizer.encode(text)]
    return "|".join(pieces)


def spelled(tokenizer, text):
    """What a template has written -> ids as the reference makes them: special tokens by name, what
    stands between them as one text."""
    ids = []
    names = sorted(tokenizer.specials, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    for k, part in enumerate(parts):
        ids += [tokenizer.specials[part]] if k % 2 else tokenizer.encode(part)
    return ids


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


def check_prefix(tokenizer, replies=("9 - 2", "")):
    """A running conversation is the start of the longer one: encode_turn agrees with encode_chat."""
    messages = [user("4 + 5 ?")]
    cache = tokenizer.encode_chat(messages)
    for reply in replies:
        messages += [answer(reply), user("and\nthen")]
        cache += tokenizer.encode(reply) + [tokenizer.eos_id] + tokenizer.encode_turn("and\nthen")
        assert cache == tokenizer.encode_chat(messages)
