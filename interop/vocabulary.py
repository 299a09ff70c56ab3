"""What the files of a byte-level BPE tokenizer say, for tokenizer.py.

    read_config           tokenizer_config.json: the names of tokens, the chat template
    read_splits           where a text is split before anything is merged
    read_added_tokens     which tokens are never merged: special ones, and others
    read_vocabulary       which pieces are merged, in which order, and their ids
    read_two_files        all this from the older vocab.json and merges.txt

path is the file, for messages. What would be encoded otherwise than by Hugging Face's own library
is refused by name. A checkpoint is not to be trusted: what else may be wrong with its files ends in
one of the exceptions of UNREADABLE.
"""
import json
import os
import re
import unicodedata

import regex                   # tiktoken requires it; it knows \p{L}, which re does not

from data import InputError, read_json

SECONDS = 3              # for a pattern to split a text
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError,
              regex.error)
# Contractions; then words, numbers and signs with the space before them; then white space, of which
# the last character is left for what follows.
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# -- splitting texts

def one_of(texts):
    """Texts -> a pattern whose split() leaves them at odd places; the longest match wins."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def isolate(patterns, text):
    """Split a text at the first pattern, its pieces at the second, and so on -> list of texts.
    TimeoutError for a pattern that tries too many ways."""
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            # A match is a piece, and so is what stands between two matches.
            end = 0
            for match in pattern.finditer(piece, timeout=SECONDS):
                found += [piece[end:match.start()], match[0]]
                end = match.end()
            found.append(piece[end:])
        pieces = [piece for piece in found if piece]
    return pieces


def read_splits(path, pre):
    """tokenizer.json's pre_tokenizer -> (patterns for isolate, add_prefix_space)."""
    # The last part maps bytes to printable characters; the others cut before that.
    *splits, last = pre.get("pretokenizers", [pre])
    patterns, known = [], last.get("type") == "ByteLevel"
    for part in splits:
        kind, pattern = part.get("type"), part.get("pattern", {})
        isolated = part.get("behavior") == "Isolated" and not part.get("invert")
        if kind == "Digits":
            patterns.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and "Regex" in pattern and isolated:
            patterns.append(pattern["Regex"])
        else:
            known = False
    # GPT-2's own pattern stands in no file: it is what ByteLevel splits by if not told otherwise.
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    # In a sequence, the reference puts a space before every piece; no checkpoint wants that.
    prefix_space = last.get("add_prefix_space", True)
    if not known or not patterns or (splits and prefix_space):
        raise InputError(f"{path}: pre_tokenizer {json.dumps(pre)[:200]} is not read, only "
                         "ByteLevel, alone or behind Digits and Split (a Regex, Isolated)")
    return patterns, prefix_space


# -- tokens

def read_added_tokens(path, spec):
    """tokenizer.json -> (specials, added, nfc): tokens that are never merged, {text: id}.

    specials are written by chat templates alone. Of the two dicts in added, the first is found in
    ordinary text as it is, the second after the text is brought to Unicode's form NFC."""
    # None, one normalizer, or a sequence of them.
    normalizer = spec.get("normalizer") or {"normalizers": []}
    kinds = [n.get("type") for n in normalizer.get("normalizers", [normalizer])]
    odd = [f"normalizer {kind}" for kind in kinds if kind != "NFC"]
    specials, added, nfc = {}, ({}, {}), bool(kinds)
    for token in spec.get("added_tokens") or []:
        text, late = token["content"], bool(token.get("normalized"))
        odd += [f"added token {text!r} with {flag}"
                for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        # <|User|> is markup even where it is not marked as special: nobody may type it.
        if token.get("special", True) or re.fullmatch(r"<[|｜].*[|｜]>", text):
            specials[text] = token["id"]
        else:
            if nfc and late:
                text = unicodedata.normalize("NFC", text)
            added[late][text] = token["id"]
    if odd:
        raise InputError(f"{path}: {odd[0]} is not read, only the normalizer NFC and added tokens "
                         "without such flags")
    return specials, added, nfc


def byte_alphabet():
    """byte -> the printable character that stands for it in byte-level files (GPT-2's own map)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(odd)}


def read_vocabulary(path, model, others):
    """tokenizer.json's model, and the ids of all added tokens -> (vocab, ranks).

    vocab: {piece (bytes): id}; ranks: {piece: priority in merging}, the lowest is merged first."""
    odd = [key for key in ("byte_fallback", "dropout", "continuing_subword_prefix",
                           "end_of_word_suffix") if model.get(key)]
    if model.get("fuse_unk") and model.get("unk_token"):
        odd.append("fuse_unk")
    if model.get("type", "BPE") != "BPE" or odd:
        raise InputError(f"{path}: only byte-level BPE is read, not {model.get('type')} "
                         + " ".join(odd))
    # Files show every byte as one character; added tokens stand there as they are.
    to_byte = {c: b for b, c in byte_alphabet().items()}
    vocab = {}
    for shown, i in model["vocab"].items():
        if shown not in others:
            vocab[bytes([to_byte[c] for c in shown])] = i
    # Lists as long as the largest id are made of these numbers.
    ids = [*vocab.values(), *others.values()]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < 1000 + 10 * len(ids)]
    if wrong or len(set(ids)) < len(ids):
        raise InputError(f"{path}: a token id stands twice, or is not a whole number from 0 to ten "
                         "times the number of tokens")
    # Priorities: single bytes first, then results of merges in merge order, then what only a whole
    # word can be. tiktoken merges any two neighbours whose union has a priority, the reference only
    # pairs on its list. In vocabularies made by training that is the same.
    ordered = [bytes([b]) for b in range(256)]
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right not in others:
            ordered.append(bytes([to_byte[c] for c in left + right]))
    if model.get("ignore_merges"):
        ordered += sorted(vocab, key=vocab.get)
    return vocab, {piece: rank for rank, piece in enumerate(dict.fromkeys(ordered))}


# -- other files

def read_config(directory, files):
    """tokenizer_config.json and what belongs to it -> {name: value}, chat_template among them."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            config |= read_json(os.path.join(directory, name))
    template = files.get("chat_template.jinja", config.get("chat_template"))
    # There may be several templates with names.
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    config |= {"chat_template": template, "template_args": {}}
    if "template_args.json" in files:
        config["template_args"] = dict(read_json(os.path.join(directory, "template_args.json")))
    # A token is named by its text, or by a record that holds the text.
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            config[key] = value["content"]
    return config


def read_two_files(directory, files, config):
    """vocab.json and merges.txt, as GPT-2 and Qwen2 ship them -> what tokenizer.json would say."""
    if "merges.txt" not in files:
        raise InputError(f"{directory}: no merges.txt beside vocab.json")
    # These files hold no split pattern: the class that the configuration names stands for it.
    kind = (config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise InputError(f"{directory}: the split pattern of {kind} is not known; "
                         "save it with a tokenizer.json")
    qwen = kind == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "use_regex": not qwen,
                  "add_prefix_space": bool(config.get("add_prefix_space"))}
    # Never merged are tokens that the configuration describes, or names for a purpose, and those
    # that are not in vocab.json.
    vocab, extra = read_json(os.path.join(directory, "vocab.json")), {}
    if "added_tokens.json" in files:
        extra = read_json(os.path.join(directory, "added_tokens.json"))
    tokens = {token["content"]: token | {"id": int(i)}
              for i, token in (config.get("added_tokens_decoder") or {}).items()}
    special = {"<|endoftext|>"}
    special.update(config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad"))
    for token in config.get("additional_special_tokens") or []:
        special.add(token["content"] if isinstance(token, dict) else token)
    for text, i in (vocab | extra).items():
        if text in special or text not in vocab:
            plain = text not in special
            tokens.setdefault(text, {"content": text, "id": i, "special": not plain,
                                     "normalized": plain})
    # A line is a merge, but for the first, which may be a comment.
    merges = re.sub("^#version.*", "", files["merges.txt"]).splitlines()
    return {"added_tokens": list(tokens.values()),
            "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": {"pretokenizers": [split, byte_level] if qwen else [byte_level]},
            "model": {"vocab": vocab, "merges": [line for line in merges if line]}}
