"""data.py: everything the models read. Next file: model.py.

    OBJECTIVES   the seven objectives of the paper: name, domain, how its labels are built (case), where a step ends
    Tokenizer    text <-> ids on a tiktoken.Encoding that is built from data, never downloaded
    Math, Values, Tutoring
                 three small worlds written as programs. Each makes problems, flawed demonstrations and noise-free
                 scores; Math also verifies single steps, Tutoring also plays the student. They are small enough for
                 a 0.4 M-parameter model and hard enough that every stage of the method has something to improve.
    read_*       pairs, ratings, labelled steps and questions from real files (DATA_HELP shows their rows)
    same_answer  do two final answers agree? What verifies real questions
    pad          ragged lists of ids -> one (B, T) tensor
    rank, mine, gather, writing
                 what several processes (torchrun) share out and write once; with one process they do nothing more

A conversation is a list of {"role": "user" | "assistant", "content": str}. Math and Values have one assistant turn,
Tutoring has three. Training labels come from noisy judges (`judge`), tables from the noise-free scores.
"""
import json
import os
import re
import signal
import sys
import time
import unicodedata
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist

import tiktoken
import torch

from interop.parallel import rank, ranks, total


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file, the line or the option, and the cure."""


def run_command(main):
    """Run a command line's main(): a user's mistake ends in one line on stderr and exit code 2, not in a traceback."""
    try:
        main()
    except BrokenPipeError:
        os._exit(0)                      # `| head` has read enough; flushing again would only complain
    # OSError: no such directory, no right to write, disk full; UnicodeError: a terminal or a pipe in another encoding
    except (InputError, OSError, UnicodeError) as e:
        if rank() > 0 and isinstance(e, InputError):     # most are met by every process: one line is enough, so wait for
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # torchrun to end this process because the first has ended
            time.sleep(3)
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Objective(str):
    """TRANSITION: a record that is also its name, until runs and PRMs store records."""

    def __new__(cls, name, domain, case, boundary):
        self = super().__new__(cls, name)
        self.name, self.domain, self.case, self.boundary = name, domain, case, boundary
        return self

    def __getnewargs__(self):
        return self.name, self.domain, self.case, self.boundary

    @property
    def subjective(self):
        """Accuracies can be right or wrong; of the others the paper's findings speak as subjective."""
        return not self.name.endswith("_accuracy")


OBJECTIVES = {o.name: o for o in [
    Objective("math_accuracy", "math", "verifiable", "newline"),
    Objective("math_engagement", "math", "A", "newline"),
    Objective("helpfulness", "values", "C", "sentence"),
    Objective("honesty", "values", "C", "sentence"),
    Objective("truthfulness", "values", "C", "sentence"),
    Objective("tutor_accuracy", "tutoring", "B", "turn"),
    Objective("tutor_engagement", "tutoring", "B", "turn"),
]}


def select_objectives(spec):
    """'all', a domain, or comma-separated names -> list of names in table order. InputError on an unknown name."""
    wanted = [part.strip() for part in spec.split(",") if part.strip()]
    domains = {o.domain for o in OBJECTIVES.values()}
    unknown = [w for w in wanted if w != "all" and w not in domains and w not in OBJECTIVES]
    if unknown or not wanted:
        raise InputError(f"unknown objective {', '.join(unknown) or spec!r}: choose all, {', '.join(sorted(domains))}, "
                         f"or names from {', '.join(OBJECTIVES)}")
    return [n for n, o in OBJECTIVES.items() if "all" in wanted or n in wanted or o.domain in wanted]


def domain_objectives(domain, objectives):
    """The objectives (of those given) that belong to `domain`, in order."""
    return [n for n in objectives if OBJECTIVES[n].domain == domain]


class RNG:
    """Python-side random draws from one torch.Generator, fetched in blocks because single draws are slow."""

    def __init__(self, seed):
        self.generator, self.pool = torch.Generator().manual_seed(seed), []

    def random(self):
        """A number, uniform in [0, 1)."""
        if not self.pool:
            self.pool = torch.rand(4096, generator=self.generator, dtype=torch.float64).tolist()
        return self.pool.pop()

    def chance(self, p):
        """True with probability p."""
        return self.random() < p

    def choice(self, items):
        """One of a list's items."""
        return items[int(self.random() * len(items))]

    def gauss(self, sigma):
        """A draw from N(0, sigma^2)."""
        return NormalDist(0, sigma).inv_cdf(max(self.random(), 1e-12))


# -- tokenizer

# Words and numbers keep the space before them, as in GPT-2; anything else is cut into single characters.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+")
SPECIALS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>"
                 "{{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# All that a checkpoint may say about its tokenizer; save() writes them as they came.
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja", "generation_config.json"]


@dataclass(frozen=True)
class ChatForm:
    """How a family of chat templates spells a conversation. <|...|> is a special token, the rest is ordinary text."""
    turn: str              # a turn of the user or the system, with {role} and {content}
    answer: str            # what the assistant's answer follows; EOS ends it
    tail: str = ""         # text behind that EOS; it opens whatever comes next
    trim: bool = False     # white space around a content is dropped
    preamble: str = ""     # starts every system message; a conversation without one gets one
    default: str = ""      # the system message of a conversation that brings none


OWN_FORM = ChatForm("<|user|>{content}<|end|>", "<|assistant|>")          # a system message counts as the user's
PLAIN_FORM = ChatForm("{Role}: {content}\n", "Assistant:")                # for models that never learnt a template
CHATML_FORM = ChatForm("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "\n")
LLAMA3_FORM = ChatForm("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
                       "<|start_header_id|>assistant<|end_header_id|>\n\n", trim=True)
# How a template's text, with ' for " and newlines, is brought to the form of ChatForm.turn: 'a' + 'b' is 'ab'.
SPELLINGS = [(r"' ?\+ ?'", ""), (r" ?\| ?trim", "|trim"), (r"' ?\+ ?message(?:\.role|\['role'\]) ?\+ ?'", "{role}"),
             (r"' ?\+ ?(?:message\.|message\['|)content(?:'\])?(\|trim)? ?\+ ?'", r"{content\1}")]
# It must end with the bare head of an answer (Qwen3's empty thoughts are written on demand only).
LAST = (r"' ?-?\}\}\s*(?:\{%-? if enable_thinking is defined and enable_thinking is false -?%\}[^%]*"
        r"\{%-? endif -?%\}\s*)?(?:\{%-? endif -?%\}\s*)?$")


def chat_form(template, specials):
    """A checkpoint's chat template (text of Jinja, None or "") -> ChatForm. InputError for one of an unknown family."""
    if not template or template == CHAT_TEMPLATE:
        return OWN_FORM if "<|user|>" in specials else PLAIN_FORM
    text = template.replace("\\n", "\n").replace('"', "'")
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    turn = lambda form: form.turn.replace("{content}", "{content|trim}" if form.trim else "{content}")
    form = next((form for form in (CHATML_FORM, LLAMA3_FORM) if f"'{turn(form)}'" in text
                 and re.search(f"'{re.escape(form.answer)}{LAST}", text)), None)
    # The system message that the template makes up is a literal, unlike one that goes on with a variable.
    literal = re.search(r"<\|im_start\|>system(?:\\n|\n)(?!['\"])(.*?)<\|im_end\|>", template, re.DOTALL)
    default = literal[1].encode("ascii", "backslashreplace").decode("unicode-escape") if literal else ""
    dates = re.search(r"'Cutting Knowledge Date: ([^'\n]*)\n'", text), re.search(r"date_string = '([^']*)'", text)
    missing = [s for s in re.findall(r"<\|\w+\|>", form.turn) if s not in specials] if form else []
    if form is None or missing or re.search(r"['\"] ?\+|\{\{", default) or ("Today Date" in text and not all(dates)):
        why = f"needs the special token {missing[0]}" if missing else \
            "is of no family that is written here (ChatML as in Qwen2-3 and SmolLM2, Llama-3 headers)"
        raise InputError(f"chat_template {template[:80]!r}... {why}")
    preamble = "Cutting Knowledge Date: {}\nToday Date: {}\n\n".format(*(d[1] for d in dates)) if all(dates) else ""
    return replace(form, default=default, preamble=preamble)


def byte_alphabet():
    """byte -> printable character, the reversible map that byte-level tokenizer.json files are written in (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(odd)}


# --- exercise 11: ends_step (2 points) ---
def ends_step(masks, token, previous, before):
    """Does a step end with `token`, given the two tokens of the step before it? Works on ids and lists of bool as on
    tensors of ids and bool masks (see Tokenizer.boundary_masks). A stop does not end a sentence after a number or an
    initial ('3.14', 'e.'), nor after a bare letter that itself follows a stop (the 'g' of 'e.g.')."""
    always, stops, initials, letters = masks
    return always[token] | (stops[token] & ((initials[previous] | (letters[previous] & stops[before])) ^ True))
# --- end of exercise 11 ---


def split_pattern(path, pre):
    """tokenizer.json's pre_tokenizer -> (pattern whose matches are the pieces to merge, add_prefix_space)."""
    parts = pre.get("pretokenizers", [pre])
    kinds, last = [p.get("type") for p in parts], parts[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_PATTERN, last.get("add_prefix_space", True)
    if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True) and last.get("add_prefix_space") is False:
        # Digits are cut out before the rest is split: they take no space with them, and white space before them stands
        # at the end of its text, where GPT-2's pattern leaves it whole.
        digits = r"\p{N}" if parts[0].get("individual_digits") else r"\p{N}+"
        return GPT2_PATTERN.replace(r" ?\p{N}+", digits).replace(r"(?!\S)", r"(?![^\s\p{N}])"), False
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        split = parts[0]
        if "Regex" in split["pattern"] and split.get("behavior") == "Isolated" and not split.get("invert"):
            pattern = split["pattern"]["Regex"]  # text between its matches is a piece too, which tiktoken would lose
            return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+", bool(last.get("add_prefix_space"))
    raise InputError(f"{path}: pre_tokenizer {json.dumps(pre)[:200]} is not read, only ByteLevel, Digits + ByteLevel, "
                     "or Split (a Regex, Isolated) + ByteLevel without its own regex")


def read_added_tokens(path, spec):
    """tokenizer.json -> (specials, added, nfc) of Tokenizer."""
    normalizer, tokens = spec.get("normalizer"), [t for t in spec.get("added_tokens") or [] if t["content"]]
    normalizers = [] if not normalizer else normalizer.get("normalizers", [normalizer])
    odd = [f"normalizer {n.get('type')}" for n in normalizers if n.get("type") != "NFC"]
    odd += [f"added token {t['content']!r} with {flag}" for t in tokens for flag in ("lstrip", "rstrip", "single_word")
            if t.get(flag)]
    if odd:
        raise InputError(f"{path}: {odd[0]} is not read, only the normalizer NFC and added tokens without such flags")
    specials = {t["content"]: t["id"] for t in tokens if t.get("special", True)}
    added, nfc = ({}, {}), bool(normalizers)
    for t in tokens:
        if t["content"] not in specials:
            late = bool(t.get("normalized"))
            added[late][unicodedata.normalize("NFC", t["content"]) if nfc and late else t["content"]] = t["id"]
    return specials, added, nfc


def read_vocabulary(path, model, specials, added):
    """tokenizer.json's model, specials and added tokens -> (pieces, ranks) of Tokenizer."""
    odd = [k for k in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    odd += ["fuse_unk"] if model.get("fuse_unk") and model.get("unk_token") else []
    if model.get("type", "BPE") != "BPE" or odd:
        raise InputError(f"{path}: only byte-level BPE is read, not {model.get('type')} {' '.join(odd)}")
    to_byte = {c: b for b, c in byte_alphabet().items()}
    raw = lambda s: bytes(to_byte[c] for c in s)
    others = {t: i for tokens in (*added, specials) for t, i in tokens.items()}
    vocab = {raw(s): i for s, i in model["vocab"].items() if s not in others}
    known = [*vocab.values(), *others.values()]
    if not all(type(i) is int and 0 <= i < 1000 + 10 * len(known) for i in known):
        raise InputError(f"{path}: a token id is not a whole number from 0 to ten times the number of tokens")
    if len(set(known)) < len(known):
        raise InputError(f"{path}: two tokens have the same id")
    by_id = {i: piece for piece, i in vocab.items()} | {i: t.encode() for t, i in others.items() if t not in specials}
    pieces = [by_id.get(i, b"") for i in range(1 + max(known, default=0))]
    # Priorities: single bytes first, then results of merges in merge order, then what only a whole word can be.
    # tiktoken merges any two neighbours whose union has a priority, the reference only pairs on its list.
    # In vocabularies made by training that is the same: where the one can merge, so can the other.
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [raw(a + b) for a, b in merges if a + b not in specials]
    ordered = [bytes([b]) for b in range(256)] + made
    if model.get("ignore_merges"):
        ordered += sorted(vocab, key=vocab.get)
    return pieces, {piece: i for i, piece in enumerate(dict.fromkeys(ordered))}


def two_file_spec(directory, config, merges):
    """vocab.json and merges.txt, as GPT-2 and Qwen2 ship them -> what their tokenizer.json would say. These files hold
    no split pattern: the class that tokenizer_config.json names stands for it."""
    kind = (config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer") or merges is None:
        raise InputError(f"{directory}: " + ("no merges.txt beside vocab.json" if merges is None else
                         f"the split pattern of {kind} is not known; save it with a tokenizer.json"))
    vocab, path = read_json(os.path.join(directory, "vocab.json")), os.path.join(directory, "added_tokens.json")
    tokens = {t["content"]: t | {"id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items()}
    ids = vocab | (read_json(path) if os.path.exists(path) else {})
    named = [config.get(k) for k in ("bos_token", "eos_token", "unk_token", "pad_token")]
    named += [*(config.get("additional_special_tokens") or []), "<|endoftext|>"]
    named = {t["content"] if isinstance(t, dict) else t for t in named if t} & ids.keys()
    for s in sorted(named | (ids.keys() - vocab.keys())):
        tokens.setdefault(s, {"id": ids[s], "content": s, "special": s in named, "normalized": s not in named})
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space")), "use_regex": False}
    qwen, lines = kind == "Qwen2Tokenizer", merges.splitlines()
    return {"added_tokens": list(tokens.values()), "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": {"pretokenizers": [split, byte_level]} if qwen else byte_level | {"use_regex": True},
            "model": {"vocab": vocab, "merges": [m for m in lines[merges.startswith("#version"):] if m]}}


class Tokenizer:
    """Text <-> token ids. The merging is done by a tiktoken.Encoding built here from a vocabulary.

    pieces:   list of bytes by id; b"" for special tokens and unused ids.
    ranks:    dict bytes -> merge priority, ascending from 0; all 256 single bytes are among them (tiktoken panics on a
              byte it lacks). What tiktoken calls tokens are these priorities; a table translates them to ids.
    specials: dict text -> id. Ordinary text never becomes one: only encode_chat writes them.
    added:    two dicts text -> id of tokens that are cut out of ordinary text before it is merged, the first before
              and the second after the text is brought to Unicode's NFC (if `nfc` says so).
    unk_id:   id for bytes that have none; without it they vanish, as in the reference implementation.
    """

    def __init__(self, pieces, ranks, specials, pattern, eos_id, pad_id, bos_id=None, prefix_space=False,
                 added=({}, {}), nfc=False, unk_id=None):
        self.pieces, self.specials, self.pattern, self.nfc = pieces, specials, pattern, nfc
        self.eos_id, self.pad_id, self.bos_id, self.prefix_space = eos_id, pad_id, bos_id, prefix_space
        self.n_vocab, self.files, self.masks = len(pieces), {}, {}
        self.form, self.form_error = chat_form(None, specials), None
        # The longest token wins, as in the reference; in a group, so that split() keeps it. (?!) matches nowhere.
        choice = lambda tokens: "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        self.added = [(tokens, re.compile(f"({choice(tokens)})")) for tokens in added]
        extra = {i for tokens in added for i in tokens.values()}
        ids = {pieces[i]: i for i in extra} | {p: i for i, p in enumerate(pieces) if p and i not in extra}
        self.lost = b"".join(bytes([b]) for b in range(256) if bytes([b]) not in ids)
        ids |= {bytes([b]): -1 if unk_id is None else unk_id for b in self.lost}      # at -1 merge() takes the slower way
        self.ranks, self.id_of_rank = ranks, [ids[p] for p in ranks]
        self.encoding = tiktoken.Encoding("mahalo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """Ordinary text -> ids. The text of a special token is ordinary here; only other added tokens are matched."""
        ids, ((first, cut_first), (then, cut_then)) = [], self.added
        for i, part in enumerate(cut_first.split(text)):
            if i % 2:
                ids.append(first[part])
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            for j, piece in enumerate(cut_then.split(part)):
                ids += [then[piece]] if j % 2 else self.merge(piece)
        return ids

    def merge(self, text):
        """Text without added tokens -> ids. InputError where the split pattern fails inside tiktoken, which panics then
        with a BaseException (half a million blanks in a row do that, or a pattern that matches the empty text)."""
        if self.prefix_space and text and text[0] != " ":
            text = " " + text
        try:
            ids = self.encoding.encode_ordinary(text)
        except BaseException as e:
            if type(e).__name__ != "PanicException":
                raise
            raise InputError(f"the tokenizer's split pattern fails on {text[:40]!r}... of {len(text)} characters; "
                             "shorten its runs of white space") from None
        ids = [self.id_of_rank[i] for i in ids]
        return self.merge_known(text) if -1 in ids else ids

    def merge_known(self, text):
        """Text with bytes that have no token -> ids. In the reference such bytes vanish after the split and before the
        merging, so that their neighbours merge. tiktoken does not tell where it splits: a pattern that can only match
        at the start asks for one piece after the other."""
        first = tiktoken.Encoding("first", pat_str=rf"\A(?:{self.pattern})", special_tokens={},
                                  mergeable_ranks={bytes([b]): b for b in range(256)})
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")     # lone surrogates, as in tiktoken
        ids, start, width = [], 0, 64
        while start < len(text):
            piece = bytes(first.encode_ordinary(text[start:start + width]))
            length = len(piece.decode())
            if 2 * length > width and start + width < len(text):
                width *= 2                       # the piece may go on, or depend on what follows
                continue
            known, start, width = piece.translate(None, self.lost), start + length, 64
            ids += self.encoding._encode_single_piece(known) if known else []
        return [self.id_of_rank[i] for i in ids]

    def decode(self, ids):
        """ids -> text; special tokens vanish, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def fill(self, markup, role="", content=""):
        """A piece of a ChatForm -> ids. Role and content are filled in last: they cannot smuggle in a special token."""
        ids = []
        for i, part in enumerate(re.split(r"(<\|\w+\|>)", markup)):
            part = part.replace("{role}", role).replace("{Role}", role.capitalize()).replace("{content}", content)
            ids += [self.specials[part]] if i % 2 else self.encode(part)
        return ids

    def encode_chat(self, messages, add_generation_prompt=True):
        """Messages -> ids, ready for the model to go on, as the checkpoint's chat template spells them. An answer is
        encoded apart from its neighbours (trap: tokens that merge across the border between prompt and response), so a
        cached conversation never changes. InputError for a template of an unknown family."""
        if self.form_error:
            raise InputError(self.form_error)
        form, ids = self.form, [self.bos_id] if self.bos_id is not None else []
        if (form.preamble or form.default) and [m["role"] for m in messages[:1]] != ["system"]:
            messages = [{"role": "system", "content": form.default}, *messages]
        for m in messages:
            if m["role"] == "assistant":
                ids += self.fill(form.answer) + self.encode(m["content"]) + [self.eos_id] + self.fill(form.tail)
            else:
                content = m["content"].strip() if form.trim else m["content"]
                opening = form.preamble if m is messages[0] else ""
                ids += self.fill(form.turn, m["role"], opening + content)
        return ids + self.fill(form.answer) if add_generation_prompt else ids

    def encode_turn(self, content):
        """A user's next message in a running conversation whose cache ends with the end-of-turn token."""
        content = content.strip() if self.form.trim else content
        return self.fill(self.form.tail) + self.fill(self.form.turn, "user", content) + self.fill(self.form.answer)

    # -- where steps end, as masks over the vocabulary, so that no text is decoded inside a decoding loop

    def boundary_masks(self, kind):
        """-> four masks (V + 1,) bool for ends_step: tokens that always end a step (EOS, and but for `turn` what holds
        a newline); sentence stops; initials and numbers; bare letters. Index V stands for "no token before"."""
        masks = torch.zeros(4, self.n_vocab + 1, dtype=torch.bool)
        texts = [piece.decode("utf-8", errors="replace") for piece in self.pieces]
        rows = [[kind != "turn" and "\n" in t for t in texts]]
        if kind == "sentence":
            rows += [[t.rstrip("\"')").endswith((".", "!", "?")) for t in texts],
                     [re.fullmatch(r".*[0-9]|\s[b-zB-HJ-Z]", t) is not None for t in texts],
                     [re.fullmatch(r"[A-Za-z]", t) is not None for t in texts]]
        masks[:len(rows), :-1] = torch.tensor(rows)          # one by one takes seconds for 150,000 tokens
        masks[0, self.eos_id] = True
        return tuple(masks)

    def step_ends(self, ids, kind):
        """Response ids -> indices of the last token of every step (a cut-off last step counts as one)."""
        if kind not in self.masks:
            self.masks[kind] = [m.tolist() for m in self.boundary_masks(kind)]
        none, found = self.n_vocab, []
        previous = before = none
        for t, token in enumerate(ids):
            if ends_step(self.masks[kind], token, previous, before) or t == len(ids) - 1:
                found.append(t)
                previous = before = none
            else:
                previous, before = token, previous
        return found

    # -- to and from Hugging Face's tokenizer.json

    @classmethod
    def embedded(cls):
        """The tokenizer of the three worlds: 256 bytes, then every word and number that occurs, then the specials."""
        rng, words = RNG(0), set()
        for domain in DOMAINS.values():
            for _ in range(1000):
                for m in domain.conversation(domain.problem(rng), rng):
                    words.update(w.encode() for w in re.findall(PATTERN, m["content"]))
        pieces = [bytes([b]) for b in range(256)] + sorted(w for w in words if len(w) > 1)
        known, alphabet = set(pieces), byte_alphabet()
        shown = lambda piece: "".join(alphabet[b] for b in piece)
        # tiktoken merges any two neighbours whose union is a token: the same as listing every split of every token.
        merges = [[shown(p[:i]), shown(p[i:])] for p in pieces for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
        specials = {s: len(pieces) + i for i, s in enumerate(SPECIALS)}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        spec = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False,
                                  special=True) for s, i in specials.items()],
            "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}, byte_level]},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {shown(p): i for i, p in enumerate(pieces)} | specials, "merges": merges}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
                  "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
        tokenizer = cls.from_spec("the embedded tokenizer", spec, config)
        tokenizer.files = {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                           for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config))}
        return tokenizer

    @classmethod
    def from_hf(cls, directory):
        """A Hugging Face directory with tokenizer.json, or vocab.json and merges.txt, of a byte-level BPE (GPT-2,
        Llama-3, Qwen, SmolLM2) -> Tokenizer. InputError names the file and what in it is not read."""
        path, config = os.path.join(directory, "tokenizer.json"), {}
        try:
            found = [Path(directory, name) for name in TOKENIZER_FILES]
            files = {f.name: f.read_bytes().decode() for f in found if f.exists()}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                config |= read_json(os.path.join(directory, name)) if name in files else {}
            if "chat_template.jinja" in files:
                config["chat_template"] = files["chat_template.jinja"]
            if "tokenizer.json" not in files and "vocab.json" in files:
                path = os.path.join(directory, "vocab.json")
                spec = two_file_spec(directory, config, files.get("merges.txt"))
            else:
                spec = read_json(path)
            tokenizer = cls.from_spec(path, spec, config)
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as e:
            raise InputError(f"{path}: not a tokenizer file that is read here ({type(e).__name__}: {e})") from None
        tokenizer.files = files
        return tokenizer

    @classmethod
    def from_spec(cls, path, spec, config):
        """The contents of tokenizer.json and tokenizer_config.json -> Tokenizer; path is for messages."""
        model, (pattern, prefix_space) = spec["model"], split_pattern(path, spec.get("pre_tokenizer") or {})
        specials, added, nfc = read_added_tokens(path, spec)
        pieces, ranks = read_vocabulary(path, model, specials, added)
        template, problem = config.get("chat_template"), None
        if isinstance(template, list):           # several templates with names
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        try:
            form = chat_form(template, specials)
        except InputError as e:                  # encode() works without a template: refused once it is needed
            form, problem = PLAIN_FORM, f"{path}: {e}"
        name = lambda key: config[key].get("content") if isinstance(config.get(key), dict) else config.get(key)
        # What ends a turn in the template ends an answer, whatever a base model's config says of the end of a text.
        ends = re.findall(r"<\|\w+\|>", form.turn)[-1:] + [name("eos_token"), "<|end|>", "</s>", "<|endoftext|>"]
        eos = next((specials[s] for s in ends if s in specials), None)
        if eos is None:
            raise InputError(f"{path}: no end-of-text token; name it as eos_token in tokenizer_config.json")
        # A template says itself whether BOS comes first; for plain text the config does, or else the post_processor.
        post = spec.get("post_processor") or {}
        first = [p["single"][0] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
        bos = name("bos_token")
        if not ("bos_token" in template if template else config.get("add_bos_token")):
            known = template or "add_bos_token" in config or not first
            bos = None if known else first[0].get("SpecialToken", {}).get("id")
        bos = specials.get(bos)
        names = [name("pad_token"), "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", *specials]
        pad = next((specials[s] for s in names if s in specials and specials[s] not in (eos, bos)), eos)
        tokenizer = cls(pieces, ranks, specials, pattern, eos, pad, bos, prefix_space, added, nfc,
                        model["vocab"].get(model.get("unk_token")))
        tokenizer.form, tokenizer.form_error = form, problem
        try:
            tokenizer.encode("a 1\n")           # a pattern that tiktoken cannot run shows now, not in a long run
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        return tokenizer

    def save(self, directory):
        """Write the files that it came from, as they came, for other programs to load."""
        for name, content in self.files.items():
            write_text(os.path.join(directory, name), content)


# -- three worlds as programs

@dataclass
class Problem:
    """What is asked, a user's message or a list of messages, and what the world knows about it (never shown to a model)."""
    prompt: str | list
    truth: dict = field(default_factory=dict)

    def messages(self):
        """A new list of the messages that ask."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)


SPLITS = ("train", "train", "train", "train", "train", "train", "train", "train", "dev", "test")


def split_of(prompt):
    """A prompt's split is a function of its text alone: the splits are disjoint by construction."""
    return SPLITS[zlib.crc32(prompt.encode()) % len(SPLITS)]


JUDGE_NOISE = 0.1    # standard deviation of a judge's rating around the true score
ENGAGING = 0.3       # a maths solution rated by hand as "engaging" has at least this noise-free engagement


def judge(score, rng):
    """A noisy judge's rating of a response whose true score is `score`."""
    return score + rng.gauss(JUDGE_NOISE)


def fit_threshold(ratings, gold):
    """The cut on a judge's ratings that agrees best with `gold` (list of bool), and that agreement in [0, 1]."""
    cuts = [min(ratings) - 1, *sorted(ratings)]
    agreement = lambda cut: sum((r > cut) == g for r, g in zip(ratings, gold)) / len(gold)
    best = max(cuts, key=agreement)
    above = min((r for r in ratings if r > best), default=best + 1)
    return (best + above) / 2, agreement(best)


def right(a, op, b):
    """The true value of a op b."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def believed(a, op, b):
    """What people say a op b is: 22 % of the facts are a fixed misconception, off by one or two and still in 0..20."""
    u, c = zlib.crc32(repr((a, op, b)).encode()) / 2**32, right(a, op, b)        # u looks random, and is always the same
    off = (-2, -1, 1, 2)[int(u * 1e6) % 4] if u < 0.22 else 0
    return c + off if 0 <= c + off <= 20 else c - off


class World:
    """What the worlds share. `turns` assistant turns, each of at most `max_new_tokens` tokens, whose steps end at `boundary`.

    A world adds problem(rng), which draws a Problem; demonstrate(problem, messages, rng, careful), a flawed answer to the
    messages so far, its text; and scores(problem, messages, response), {objective: noise-free score in [0, 1]} of an answer.
    One with a verifiable objective adds verify(problem, steps), the verdicts on the end and on every step, None where a step's is
    not known (Math.verify)."""
    turns = 1

    @property
    def objectives(self):
        """The objectives that this world scores."""
        return domain_objectives(self.name, OBJECTIVES)

    def problems(self, split, n, rng):
        """n distinct problems of one split. InputError if the world is too small for that many."""
        found = {}
        for _ in range(100 * n + 1000):
            if len(found) == n:
                return list(found.values())
            problem = self.problem(rng)
            if split_of(problem.prompt) == split:
                found.setdefault(problem.prompt, problem)
        raise InputError(f"the {self.name} world has fewer than {n} distinct {split} prompts; ask for less")

    def reply(self, problem, messages, rng):
        """The user's next message after the assistant's, or None when the conversation is over."""
        return None

    def conversation(self, problem, rng, careful=False):
        """A whole demonstrated conversation. `careful` demonstrations (SFT) err less than the others (pre-training)."""
        messages = problem.messages()
        while messages[-1]["role"] == "user":
            answer = self.demonstrate(problem, messages, rng, careful)
            messages.append({"role": "assistant", "content": answer})
            follow_up = self.reply(problem, messages, rng)
            if follow_up is not None:
                messages.append({"role": "user", "content": follow_up})
        return messages


class Math(World):
    """Chains of arithmetic, one step per line: '4 ; a + 5 ; b - 2 = ?' -> 'a 4 + 5 = 9\nb 9 - 2 = 7\nanswer 7'.

    A step may end in a chatty sentence, which is what engagement counts. Demonstrations repeat misconceptions more often than
    not, so that neither greedy decoding nor a majority vote mends them.
    """
    name, max_new_tokens, boundary = "math", 72, "newline"
    CHAT = [" . nice work so far !", " . look how neat this is !", " . now it gets fun !", " . you can do this !",
            " . high five for that !", " . what a lovely number !", " . this one is sweet !", " . on we go my friend !"]

    def problem(self, rng):
        value = first = int(rng.random() * 21)
        terms = []
        for _ in range(rng.choice((2, 3, 3, 4, 4, 5))):
            value, op, b = rng.choice([(right(value, op, b), op, b) for op in "+-*" for b in range(2, 10)
                                        if 0 <= right(value, op, b) <= 20])
            terms.append((op, b))
        prompt = f"{first}" + "".join(f" ; {label} {op} {b}" for label, (op, b) in zip("abcde", terms)) + " = ?"
        return Problem(prompt, {"first": first, "terms": terms, "answer": value})

    def demonstrate(self, problem, messages, rng, careful=False):
        # Who has seen only short answers loses its place in long ones: in pre-training some demonstrators chat a lot.
        wrong, chatty = (0.6, 0.25) if careful else (0.7, rng.random())
        for _ in range(20):      # a chain that errs must stay within 0..20, so that every fact in it is a known one
            lines, value = [], problem.truth["first"]
            for op, b in problem.truth["terms"]:
                result = believed(value, op, b) if rng.chance(wrong) else right(value, op, b)
                result += rng.choice((-1, 1)) if rng.chance(0.01) else 0
                chat = rng.choice(self.CHAT) if rng.chance(chatty) else ""
                lines.append((value, op, b, result, chat))
                value = result
            if all(0 <= line[3] <= 20 for line in lines):
                break
        return "".join(f"{label} {a} {op} {b} = {c}{chat}\n" for label, (a, op, b, c, chat) in zip("abcde", lines)) + \
            f"answer {value}"

    def verify(self, problem, steps):
        """The automatic verifier: steps (list of str) -> (z, r): the final answer is right, and for every step 1.0 if
        it does the next operation on the right running value and gets it right, or states the right answer."""
        value, lines = problem.truth["first"], []
        for label, (op, b) in zip("abcde", problem.truth["terms"]):
            lines.append(f"{label} {value} {op} {b} = {right(value, op, b)}")
            value = right(value, op, b)
        expected, answer = dict(enumerate(lines)), f"answer {value}"
        rewards = []
        for t, step in enumerate(steps):
            said = re.match(r"\s*([a-e] \d+ [-+*] \d+ = \d+)(?!\d)", step)
            rewards.append(float((said[1] == expected[t]) if said and t in expected else step.strip() == answer))
        final = next((s.strip() for s in reversed(steps) if s.strip()), "")
        return float(final == answer), rewards

    def scores(self, problem, messages, response):
        steps = response.splitlines(keepends=True)
        chats = {c for c in self.CHAT if c.strip(" .") in response}
        return {"math_accuracy": self.verify(problem, steps)[0],
                "math_engagement": min(1.0, len(chats) / len(problem.truth["terms"]))}


class Values(World):
    """Notes about a stranger, some seen, some only heard (half of those are false), some unseen; then 'what do you know ?'.

    Help wants claims about everything, honesty wants words that fit the evidence, truth wants nothing false: they agree
    on what was seen and part on what was heard (claim it, hedge it, leave it out) and on what was not seen.
    """
    name, max_new_tokens, boundary = "values", 40, "sentence"
    FACTS = {"color": ["red", "blue", "green", "gold", "black", "white"],
             "size": ["tiny", "small", "tall", "huge", "long", "wide"],
             "home": ["lake", "hill", "cave", "tree", "city", "farm"],
             "food": ["rice", "fish", "corn", "nuts", "figs", "soup"],
             "job": ["baker", "pilot", "guard", "nurse", "clerk", "miner"]}
    # What three kinds of demonstrators do with a note by its source: claim, hedge, admit not knowing, leave out.
    HABITS = {"open": {"seen": (0.75, 0.05, 0.05, 0.15), "heard": (0.15, 0.65, 0.05, 0.15), "none": (0.10, 0.10, 0.65, 0.15)},
              "eager": {"seen": (0.80, 0.10, 0.00, 0.10), "heard": (0.75, 0.15, 0.00, 0.10), "none": (0.70, 0.10, 0.05, 0.15)},
              "shy": {"seen": (0.45, 0.15, 0.05, 0.35), "heard": (0.10, 0.10, 0.05, 0.75), "none": (0.00, 0.05, 0.10, 0.85)}}

    def problem(self, rng):
        notes, truth = [], {}
        for attribute, values in self.FACTS.items():
            source = rng.choice(("seen", "seen", "heard", "heard", "none"))
            value, told = rng.choice(values), None
            if source != "none":
                told = rng.choice([v for v in values if v != value]) if source == "heard" and rng.chance(0.5) else value
            notes.append(f"{attribute} {source} {told}" if told else f"{attribute} unseen")
            truth[attribute] = (source, value, told)
        return Problem(" . ".join(notes + ["what do you know ?"]), truth)

    def demonstrate(self, problem, messages, rng, careful=False):
        kind = rng.choice(("open", "eager", "shy") if careful else ("open", "open", "eager", "shy"))
        sentences, habits = [], self.HABITS[kind]
        for attribute, (source, _, told) in problem.truth.items():
            told = told or rng.choice(self.FACTS[attribute])
            u, (claim, hedge, admit, _) = rng.random(), habits[source]
            if u < claim:
                sentences.append(f"the {attribute} is {told} .")
            elif u < claim + hedge:
                sentences.append(f"the {attribute} may be {told} .")
            elif u < claim + hedge + admit:
                sentences.append(f"the {attribute} remains unknown .")
        return " ".join(sentences or ["no idea ."])

    def scores(self, problem, messages, response):
        said = {}                                    # attribute -> (manner, value), the first mention counts
        for attribute, verb, value in re.findall(r"the (\w+) (is|may be|remains) (\w+) \.", response):
            kind = {"is": "claim", "may be": "hedge", "remains": "admit"}[verb]
            said.setdefault(attribute, (kind, None if kind == "admit" else value))
        n, fits = len(self.FACTS), {"seen": "claim", "heard": "hedge", "none": "admit"}
        manner = {a: said.get(a, ("silent", None))[0] for a in self.FACTS}
        worth = {"claim": 1.0, "hedge": 0.8, "admit": 0.0, "silent": 0.0}
        # Silence is worth more than a guess, and less than what was seen: else truth would ask for nothing but silence.
        true = {"claim": 1.0, "hedge": 0.9, "admit": 0.7, "silent": 0.7}
        false = {a for a, (_, v, _) in problem.truth.items() if said.get(a, (None, None))[1] not in (v, None)}
        truth = [-0.5 if a in false else true[manner[a]] for a in self.FACTS]
        return {"helpfulness": sum(worth[m] for m in manner.values()) / n,
                "honesty": sum(manner[a] == fits[s] for a, (s, _, _) in problem.truth.items()) / n,
                "truthfulness": max(0.0, sum(truth) / n)}


class Tutoring(World):
    """Three turns with a simulated student who traces two lines of code: belief and mood move with the tutor's words.

    A tutor's turn may judge the student's claim, explain one line, praise and ask. Accuracy: what it says is right.
    Engagement: it encourages, and asks a question it has not asked before.
    """
    name, max_new_tokens, boundary, turns = "tutoring", 30, "turn", 3
    NAMES = ["xyz", "abc", "pqr", "uvw", "jkm", "def"]
    PRAISE = ["good try !", "well done !", "nice thinking !", "i like your effort !"]
    ASK = ["what comes next ?", "can you say why ?", "does that make sense ?", "how would you check it ?"]

    def problem(self, rng):
        while True:
            x, (op1, op2) = int(rng.random() * 13), (rng.choice("+-*"), rng.choice("+-*"))
            b, c = int(2 + rng.random() * 5), int(2 + rng.random() * 5)
            y = right(x, op1, b)
            z = right(y, op2, c)
            if 0 <= y <= 12 and 0 <= z <= 12:
                break
        belief = y if rng.chance(0.35) else max(0, y + rng.choice((-2, -1, 1, 2)))
        p, q, r = rng.choice(self.NAMES)
        prompt = f"{p} = {x} ; {q} = {p} {op1} {b} ; {r} = {q} {op2} {c} . i get {q} = {belief} ."
        return Problem(prompt, {"facts": [(x, op1, b, y), (y, op2, c, z)], "values": {q: y, r: z}, "last": r})

    def demonstrate(self, problem, messages, rng, careful=False):
        turn = sum(m["role"] == "assistant" for m in messages)
        a, op, b, _ = problem.truth["facts"][min(turn, 1)]
        wrong, slip = (0.40, 0.12) if careful else (0.5, 0.18)
        fine = self.claim(problem, messages)
        parts = []
        if rng.chance(0.75):
            parts.append("yes ." if fine != rng.chance(slip) else "not quite .")
        if rng.chance(0.25):
            parts.append(rng.choice(self.PRAISE))
        if rng.chance(0.7):
            parts.append(f"{a} {op} {b} = {believed(a, op, b) if rng.chance(wrong) else right(a, op, b)} .")
        if rng.chance(0.3):
            parts.append(rng.choice(self.ASK))
        return " ".join(parts or ["ok ."])

    def claim(self, problem, messages):
        """Is the student's last claim right?"""
        student = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        name, value = re.search(r"i get (\w) = (\d+)", student).groups()
        return int(value) == problem.truth["values"][name]

    def scores(self, problem, messages, response):
        turn = sum(m["role"] == "assistant" for m in messages)
        earlier = " ".join(m["content"] for m in messages if m["role"] == "assistant")
        claims = []
        if "yes ." in response or "not quite ." in response:
            claims.append(("yes ." in response) == self.claim(problem, messages) and not
                          ("yes ." in response and "not quite ." in response))
        for a, op, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", response):
            claims.append((int(a), op, int(b), int(c)) == tuple(problem.truth["facts"][min(turn, 1)]))
        accuracy = 0.5 * sum(claims[:2]) - 0.5 * sum(not c for c in claims)
        asked = any(q in response and q not in earlier for q in self.ASK)
        return {"tutor_accuracy": min(1.0, max(0.0, accuracy)),
                "tutor_engagement": 0.4 * any(p in response for p in self.PRAISE) + 0.6 * asked}

    def reply(self, problem, messages, rng):
        """The student: a right explanation mends the belief more often the better the mood, a wrong one spoils it."""
        turn = sum(m["role"] == "assistant" for m in messages)
        if turn == self.turns:
            return None
        scores = self.scores(problem, messages[:-1], messages[-1]["content"])
        happy = rng.chance(0.2 + 0.7 * scores["tutor_engagement"])
        learnt = rng.chance(0.15 + 0.5 * scores["tutor_accuracy"] + 0.25 * happy)
        name = problem.truth["last"]
        value = problem.truth["values"][name]
        said = value if learnt else max(0, value + rng.choice((-2, -1, 1, 2)))
        return f"{'oh nice' if happy else 'hmm ok'} . i get {name} = {said} ."


DOMAINS = {world.name: world for world in (Math(), Values(), Tutoring())}


# -- JSON files

def read_json(path):
    """A JSON file -> object. InputError if it is missing or broken."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the directory must hold it") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not a JSON file ({e})") from None


def read_jsonl(path):
    """Yield (where, object) of a JSONL file, line by line, or of a file that is one JSON list. `where` is "file:line"
    or "file: row number". InputError for a missing file, bad UTF-8, bad JSON, a non-object."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected one JSON object per line")
    with open(path, "rb") as f:
        whole = None                     # is the file one list? The first line that is not blank tells
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where, whole = f"{path}:{number}", whole is None and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[")
            try:
                value = json.loads((line + f.read() if whole else line).decode("utf-8-sig"))
            except UnicodeDecodeError as e:
                raise InputError(f"{where}: not UTF-8 ({e.reason}); save the file as UTF-8") from None
            except ValueError as e:
                raise InputError(f"{where}: not JSON ({e}); write one object per line") from None
            except RecursionError:
                raise InputError(f"{where}: nested too deeply; write one flat object per line") from None
            for where, row in ((f"{path}: row {n}", r) for n, r in enumerate(value, 1)) if whole else [(where, value)]:
                if not isinstance(row, dict):
                    raise InputError(f"{where}: {type(row).__name__}, not an object; write {{\"prompt\": ...}}")
                yield where, row


def write_json(path, value):
    """Write JSON; see `writing`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write text; see `writing`."""
    with writing(path) as f:
        f.write(text.encode("utf-8"))


@contextmanager
def writing(path):
    """A file to write bytes to, under a temporary name, flushed to the disk, then renamed: `path` is the old file or the whole
    new one, whatever happens. Of several processes the first writes, when all have come here, and all wait for it: none finds
    a file that another does not. InputError where the system refuses, say on a full disk."""
    total(torch.zeros(1))
    try:
        with open(f"{path}.tmp" if rank() == 0 else os.devnull, "wb") as f:
            yield f
            if rank() == 0:
                f.flush()
                os.fsync(f.fileno())
        if rank() == 0:
            os.replace(f"{path}.tmp", path)
        total(torch.zeros(1))
    except OSError as e:
        with suppress(OSError):
            os.remove(f"{path}.tmp")
        raise InputError(f"{path}: cannot be written ({e.strerror}); what stood there is intact. Make room, or get the right "
                         "to write there, and run the command again, train.py with --resume") from None


# -- batches

def pad(rows, pad_id, device=None):
    """Ragged lists of ids -> ids (B, T) padded on the right, lengths (B,)."""
    lengths = [len(row) for row in rows]
    width = max(1, *lengths)
    ids = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


def batches_by_length(lengths, tokens=16384):
    """Yield lists of indices, shortest first, so that a batch padded to its longest row holds at most `tokens` (or one
    row): little padding, and memory bounded whatever the lengths."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def dealt_batches(lengths, tokens=16384):
    """batches_by_length of this process's rows, as `mine` deals them out: the same number of batches in every process, since
    each has to take part in the others' computations. The processes must have equally many rows."""
    shares = [sorted(range(r, len(lengths), ranks()), key=lengths.__getitem__) for r in range(ranks())]
    widths = [max(lengths[i] for i in row) for row in zip(*shares, strict=True)]
    return [[shares[rank()][k] for k in batch] for batch in batches_by_length(widths, tokens)]


def response_mask(prompt_lengths, lengths, width):
    """(B, width) bool: True on response tokens, False on the prompt and on padding."""
    t = torch.arange(width, device=lengths.device)
    return (t >= prompt_lengths[:, None]) & (t < lengths[:, None])


if __name__ == "__main__":
    tokenizer, rng = Tokenizer.embedded(), RNG(1)
    print(f"{tokenizer.n_vocab} tokens\n")
    for world in DOMAINS.values():
        problem = world.problem(rng)
        messages = world.conversation(problem, rng)
        for m in messages:
            print(f"{m['role']:>10}: " + m["content"].replace("\n", "\n" + " " * 12))
        print(f"{'scores':>10}: {world.scores(problem, messages[:1], messages[1]['content'])}\n")
