"""Tokenizers of other people's checkpoints: tokenizer.json -> data.Tokenizer, and back.

    load_tokenizer        a checkpoint's directory -> its tokenizer
    read_*                what the files say: where a text is split, which tokens are never merged,
                          which pieces are merged in which order
    CheckpointTokenizer   what such a tokenizer does beyond the worlds' one: chats above all, which
                          the checkpoint's own template spells (render.py runs it)
    tokenizer_files       the worlds' tokenizer as tokenizer.json, for other programs

Read are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, Mistral Nemo, DeepSeek, SmolLM2). What
would be encoded otherwise than by Hugging Face's own library is refused by name.
"""
import json
import os
import re
import unicodedata
from pathlib import Path

import regex                   # tiktoken requires it; it knows \p{L}, which re does not

from data import InputError, PATTERN, Tokenizer, read_json
from interop.templates import turns

GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How data.Tokenizer spells a chat, for other programs.
WORLDS_TEMPLATE = (
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# For checkpoints that bring no template. They have learnt to continue any text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "Assistant:{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}")
# All that a checkpoint may say about its tokenizer; Tokenizer.save writes them as they came.
FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
         "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json"]
UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError,
              MemoryError, regex.error)


# -- a directory

def load_tokenizer(directory, vocab_size=None):
    """A Hugging Face directory with tokenizer.json, or vocab.json and merges.txt -> Tokenizer.

    None where the directory has neither. vocab_size: the model's, which may have some more ids than
    its tokenizer. InputError names the file and what in it is not read."""
    found = [name for name in FILES if os.path.exists(os.path.join(directory, name))]
    path = os.path.join(directory, "tokenizer.json")
    if "tokenizer.json" not in found:
        if "vocab.json" not in found:
            return None
        path = os.path.join(directory, "vocab.json")
    try:
        files = {name: Path(directory, name).read_bytes().decode() for name in found}
        config = read_config(directory, files)
        if "tokenizer.json" in files:
            spec = read_json(path)
        else:
            spec = read_two_files(directory, files, config)
        tokenizer = CheckpointTokenizer(path, spec, config)
        if tokenizer.template == WORLDS_TEMPLATE:        # the worlds' own, which needs no template
            tokenizer = tokenizer.plain()
    except InputError:
        raise
    except UNREADABLE as e:
        raise InputError(f"{path}: not a tokenizer file that is read here "
                         f"({type(e).__name__}: {e})") from None
    tokenizer.files = files
    if vocab_size is not None:
        spare = vocab_size - tokenizer.n_vocab
        if spare < 0:
            raise InputError(f"{directory}: its tokenizer has ids up to {tokenizer.n_vocab - 1}, "
                             f"the model {vocab_size}")
        tokenizer.pieces += [b""] * spare
    return tokenizer


def read_config(directory, files):
    """tokenizer_config.json and what belongs to it -> {name: value}"""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            config |= read_json(os.path.join(directory, name))
    template = files.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(template, list):           # several templates with names
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    config["chat_template"] = template or PLAIN_TEMPLATE
    # A token is named by its text, or by a record that holds the text.
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            config[key] = value["content"]
    return config


def read_two_files(directory, files, config):
    """vocab.json and merges.txt, as GPT-2 and Qwen2 ship them -> what tokenizer.json would say.

    These files hold no split pattern: the class that tokenizer_config.json names stands for it."""
    kind = (config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if "merges.txt" not in files:
        raise InputError(f"{directory}: no merges.txt beside vocab.json")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise InputError(f"{directory}: the split pattern of {kind} is not known; "
                         "save it with a tokenizer.json")
    vocab = read_json(os.path.join(directory, "vocab.json"))
    ids = dict(vocab)
    if "added_tokens.json" in files:
        ids |= read_json(os.path.join(directory, "added_tokens.json"))
    # Special is what the configuration names, or describes as such.
    named = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    for token in config.get("additional_special_tokens") or []:
        named.append(token["content"] if isinstance(token, dict) else token)
    special = {"<|endoftext|>", *named} & ids.keys()
    tokens = {}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = token | {"id": int(i)}
    for text in sorted(special | (ids.keys() - vocab.keys())):
        plain = text not in special
        tokens.setdefault(text, {"content": text, "id": ids[text], "special": not plain,
                                 "normalized": plain})
    qwen = kind == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "use_regex": not qwen,
                  "add_prefix_space": bool(config.get("add_prefix_space"))}
    merges = files["merges.txt"].splitlines()
    if merges and merges[0].startswith("#version"):
        del merges[0]
    return {"added_tokens": list(tokens.values()),
            "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": {"pretokenizers": [split, byte_level] if qwen else [byte_level]},
            "model": {"vocab": vocab, "merges": [line for line in merges if line]}}


# -- tokenizer.json

def byte_alphabet():
    """byte -> the printable character that stands for it in byte-level files (GPT-2's own map)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(odd)}


def read_splits(path, pre):
    """tokenizer.json's pre_tokenizer -> (patterns, add_prefix_space).

    Merging never crosses the pieces of a text. The first pattern's matches, and what stands between
    them, are pieces; each of them is split by the second pattern, and so on."""
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
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    prefix_space = last.get("add_prefix_space", True)
    # In a sequence, the reference puts a space before every piece; no checkpoint wants that.
    if not known or not patterns or (splits and prefix_space):
        raise InputError(f"{path}: pre_tokenizer {json.dumps(pre)[:200]} is not read, only "
                         "ByteLevel, alone or behind Digits and Split (a Regex, Isolated)")
    return patterns, prefix_space


def read_added_tokens(path, spec):
    """tokenizer.json -> (specials, added, nfc): tokens that are never merged, {text: id}.

    specials are written by chat templates alone; of the two dicts in added, the first is found in
    ordinary text as it is, the second after the text is brought to Unicode's form NFC."""
    normalizer = spec.get("normalizer") or {"normalizers": []}
    kinds = [n.get("type") for n in normalizer.get("normalizers", [normalizer])]
    odd = [f"normalizer {kind}" for kind in kinds if kind != "NFC"]
    specials, added, nfc = {}, ({}, {}), bool(kinds)
    for token in spec.get("added_tokens") or []:
        text, late = token["content"], bool(token.get("normalized"))
        odd += [f"added token {text!r} with {flag}"
                for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        # <|User|> is markup, even where it is not marked as special: nobody may type it.
        if token.get("special", True) or re.fullmatch(r"<[|｜].*[|｜]>", text):
            specials[text] = token["id"]
        else:
            added[late][unicodedata.normalize("NFC", text) if nfc and late else text] = token["id"]
    if odd:
        raise InputError(f"{path}: {odd[0]} is not read, only the normalizer NFC and added tokens "
                         "without such flags")
    return specials, added, nfc


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
    to_byte = {c: b for b, c in byte_alphabet().items()}
    vocab = {}
    for shown, i in model["vocab"].items():
        if shown not in others:
            vocab[bytes([to_byte[c] for c in shown])] = i
    ids = [*vocab.values(), *others.values()]
    for i in ids:
        if type(i) is not int or not 0 <= i < 1000 + 10 * len(ids):
            raise InputError(f"{path}: the token id {i!r} is not a whole number from 0 to ten "
                             "times the number of tokens")
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: two tokens have the same id")
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
    missing = set(ordered[256:]) - vocab.keys()
    if missing:
        raise InputError(f"{path}: the merged piece {min(missing)} is not in the vocabulary")
    return vocab, {piece: rank for rank, piece in enumerate(dict.fromkeys(ordered))}


def read_bos(spec, config):
    """-> the token that stands before every text or chat, or None."""
    bos = config.get("bos_token")
    if config["chat_template"] != PLAIN_TEMPLATE:          # which says itself whether it does
        return bos if "bos_token" in config["chat_template"] else None
    if "add_bos_token" in config:
        return bos if config["add_bos_token"] else None
    post = spec.get("post_processor") or {}
    for processor in post.get("processors", [post]):
        if processor.get("type") == "TemplateProcessing":
            return processor["single"][0].get("SpecialToken", {}).get("id")
    return None


# -- the tokenizer

def one_of(texts):
    """Texts -> a pattern whose split() leaves them at odd places; the longest match wins."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def isolate(patterns, text):
    """Split a text at the first pattern, its pieces at the second, and so on -> list of texts."""
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            end = 0
            for match in pattern.finditer(piece):
                found += [piece[end:match.start()], match[0]]
                end = match.end()
            found.append(piece[end:])
        pieces = [piece for piece in found if piece]
    return pieces


class CheckpointTokenizer(Tokenizer):
    """What checkpoints need beyond data.Tokenizer: tokens that are found in ordinary text (added),
    Unicode's NFC, a space in front (prefix_space), several patterns, bytes that have no token, and
    the checkpoint's own chat template.

    path: the file, for messages; spec, config: contents of tokenizer.json, tokenizer_config.json.
    """

    def __init__(self, path, spec, config):
        self.path, self.template = path, config["chat_template"]
        patterns, self.prefix_space = read_splits(path, spec.get("pre_tokenizer") or {})
        self.patterns = [regex.compile(pattern) for pattern in patterns]
        specials, added, self.nfc = read_added_tokens(path, spec)
        self.added = added[0] | added[1]
        self.early, self.late = one_of(added[0]), one_of(added[1])
        self.markup = one_of(specials)
        vocab, ranks = read_vocabulary(path, spec["model"], specials | self.added)
        pieces = [b""] * (1 + max([*vocab.values(), *specials.values(), *self.added.values()]))
        for piece, i in vocab.items():
            pieces[i] = piece
        for text, i in self.added.items():
            pieces[i] = text.encode()
        # What stands between the matches of a pattern is a piece too; tiktoken would drop it.
        whole = rf"(?:{patterns[-1]})|(?:(?!{patterns[-1]})[\s\S])+"
        super().__init__(pieces, ranks, specials, whole, None, None)
        # Bytes without a token become the unknown token, or else vanish: see merge.
        unknown = spec["model"]["vocab"].get(spec["model"].get("unk_token"), -1)
        self.id_of_rank = [vocab.get(piece, unknown) for piece in ranks]
        self.lost = bytes(b for b in range(256) if bytes([b]) not in vocab)
        self.encode("a 1\n")                  # a pattern that cannot run shows now
        self.name_tokens(spec, config)

    def name_tokens(self, spec, config):
        """Find the ids of EOS, BOS and padding."""
        bos = read_bos(spec, config)
        ends = [config.get("eos_token"), "<|end|>", "</s>", "<|endoftext|>"]
        ends = [name for name in ends if name in self.specials]
        self.variables = {key: value for key, value in config.items()
                          if key.endswith("_token") and isinstance(value, str)}
        self.variables |= {"bos_token": bos or "", "eos_token": ends[0] if ends else ""}
        # What the template writes behind an answer ends it, whatever a base model's configuration
        # says of the end of a text. Without a template that can be used, encode() works all the same.
        try:
            _, tail = self.after_answer(".")[0]
            ends = [name for name in self.markup.findall(tail) if name != bos][:1] + ends
        except InputError:
            pass
        if not ends:
            raise InputError(f"{self.path}: no end-of-text token; name it as eos_token in "
                             "tokenizer_config.json")
        self.end = ends[0]
        self.eos_id, self.bos_id = self.specials[self.end], self.specials.get(bos)
        pads = [config.get("pad_token"), "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"]
        pads = [self.specials[name] for name in [*pads, *self.specials] if name in self.specials]
        self.pad_id = next((i for i in pads if i not in (self.eos_id, self.bos_id)), self.eos_id)

    def encode(self, text):
        """Ordinary text -> ids. The text of a special token is ordinary here; only other added
        tokens are found in it."""
        ids = []
        for i, part in enumerate(self.early.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            if self.nfc:
                part = unicodedata.normalize("NFC", part)
            for j, piece in enumerate(self.late.split(part)):
                ids += [self.added[piece]] if j % 2 else self.merge(piece)
        return ids

    def merge(self, text):
        """Text without added tokens -> ids.

        InputError where a pattern fails: tiktoken panics with a BaseException when it backtracks
        too much, say in half a million blanks."""
        if self.prefix_space and text and text[0] != " ":
            text = " " + text
        ranks = []
        try:
            for part in isolate(self.patterns[:-1], text):
                ranks += self.encoding.encode_ordinary(part)
        except BaseException as e:
            if type(e).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer's split pattern fails on {text[:40]!r}... of "
                             f"{len(text)} characters; shorten its runs of white space") from None
        ids = [self.id_of_rank[rank] for rank in ranks]
        if -1 not in ids:
            return ids
        # In the reference, bytes without a token vanish after the split and before the merging, so
        # that their neighbours merge. Half characters (lone surrogates) are replaced as in tiktoken.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ranks = []
        for piece in isolate(self.patterns, text):
            known = piece.encode().translate(None, self.lost)
            if known:
                ranks += self.encoding._encode_single_piece(known)
        return [self.id_of_rank[rank] for rank in ranks]

    # -- chats

    def turns(self, messages, add_generation_prompt):
        """Messages -> [(role or None, text), ...], as the chat template writes them."""
        variables = self.variables | {"add_generation_prompt": add_generation_prompt}
        try:
            return turns(self.template, variables, messages, self.markup)
        except InputError as e:
            raise InputError(f"{self.path}: chat_template: {e}") from None

    def spell(self, turns):
        """turns -> ids. Special tokens in the markup become ids, contents never do. The text between
        two of them is encoded as one, as in the reference, but for an answer: it is encoded alone,
        so that no token reaches across the border of prompt and response."""
        ids, text = [], ""
        for role, part in turns:
            if role == "assistant":
                ids += self.encode(text) + self.encode(part)
                text = ""
                continue
            for i, piece in enumerate([part] if role else self.markup.split(part)):
                if i % 2:
                    ids += [*self.encode(text), self.specials[piece]]
                    text = ""
                else:
                    text += piece
        return ids + self.encode(text)

    def encode_chat(self, messages, add_generation_prompt=True):
        """Messages -> ids, as the checkpoint's chat template spells them, ready for an answer.
        InputError in the template's own words where it cannot."""
        return self.spell(self.turns(messages, add_generation_prompt))

    def after_answer(self, content):
        """-> the turns behind an answer, where the user goes on with `content`"""
        talk = [("user", "."), ("assistant", "."), ("user", content)]
        found = self.turns([{"role": role, "content": text} for role, text in talk], True)
        roles = [role for role, _ in found]
        return found[roles.index("assistant") + 1:]

    def encode_turn(self, content):
        """A user's next message in a running conversation whose cache ends with the end-of-turn
        token: what the template writes behind that token, the head of the next answer included."""
        (_, tail), *rest = self.after_answer(content)
        before, end, behind = tail.partition(self.end)
        return self.spell([(None, behind if end else before), *rest])

    def plain(self):
        """The same as a data.Tokenizer, for one that was exported from here."""
        return Tokenizer(self.pieces, self.ranks, self.specials, self.patterns[-1].pattern,
                         self.eos_id, self.pad_id)


# -- the worlds' tokenizer, for other programs

def tokenizer_files(tokenizer):
    """A data.Tokenizer -> {name: text} of files that transformers loads, with the same ids."""
    alphabet = byte_alphabet()
    shown = {}                                # piece -> how the file shows its bytes
    for piece in tokenizer.pieces:
        if piece:
            shown[piece] = "".join([alphabet[b] for b in piece])
    # tiktoken merges any two neighbours whose union is a piece: every split of every piece.
    merges = []
    for piece in shown:
        for i in range(1, len(piece)):
            if piece[:i] in shown and piece[i:] in shown:
                merges.append([shown[piece[:i]], shown[piece[i:]]])
    vocab = {text: tokenizer.pieces.index(piece) for piece, text in shown.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    added = [{"id": i, "content": text} | flags for text, i in tokenizer.specials.items()]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": True, "vocab": vocab | tokenizer.specials, "merges": merges}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "post_processor": None, "decoder": byte_level, "model": model,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
              "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False,
              "chat_template": WORLDS_TEMPLATE}
    return {"tokenizer.json": json.dumps(spec, indent=1, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n"}
