"""Tokenizers of other people's checkpoints: their files -> data.Tokenizer, and back.

    load_tokenizer        a checkpoint's directory -> its tokenizer
    CheckpointTokenizer   what such a tokenizer does beyond the worlds' one
    use_template_args     the option --template-args
    tokenizer_files       the worlds' tokenizer as tokenizer.json, for other programs

Read are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, Mistral Nemo, DeepSeek, SmolLM2). Next to
read: vocabulary.py, what the files say; templates.py, how a checkpoint spells a chat.
"""
import json
import os
import re
import unicodedata
from pathlib import Path

import regex                   # tiktoken requires it; it knows \p{L}, which re does not

from data import InputError, PATTERN, Tokenizer, read_json
from interop.templates import CUT, PLAIN, WORLDS, written
from interop.vocabulary import (UNREADABLE, byte_alphabet, isolate, one_of, read_added_tokens,
                                read_config, read_splits, read_two_files, read_vocabulary)

# All that a checkpoint may say about its tokenizer; Tokenizer.save writes them as they came.
FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
         "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json", "template_args.json"]
# Private-use characters in place of an answer, and of what the user says next.
ANSWER, NEXT = "\U000FFFF0", "\U000FFFF1"


def load_tokenizer(directory, vocab_size=None):
    """A Hugging Face directory with tokenizer.json, or vocab.json and merges.txt -> Tokenizer.

    None where the directory has neither. vocab_size: the model's, which may have some more ids than
    its tokenizer. InputError names the file and what in it is not read."""
    found = [name for name in FILES if os.path.exists(os.path.join(directory, name))]
    main = [name for name in ("tokenizer.json", "vocab.json") if name in found]
    if not main:
        return None
    path = os.path.join(directory, main[0])
    try:
        files = {name: Path(directory, name).read_bytes().decode() for name in found}
        config = read_config(directory, files)
        if main[0] == "tokenizer.json":
            spec = read_json(path)
        else:
            spec = read_two_files(directory, files, config)
        tokenizer = CheckpointTokenizer(path, spec, config)
    except InputError:
        raise
    except UNREADABLE as e:
        raise InputError(f"{path}: not a tokenizer file that is read here "
                         f"({type(e).__name__}: {e})") from None
    # What was exported from here needs no template, nor anything else of a checkpoint's.
    if tokenizer.template == WORLDS:
        own = tokenizer
        tokenizer = Tokenizer(own.pieces, own.ranks, own.specials, PATTERN, own.eos_id, own.pad_id)
    tokenizer.files = files
    # Models often have a round number of ids: the last ones stand for nothing.
    spare = (vocab_size or tokenizer.n_vocab) - tokenizer.n_vocab
    if spare < 0:
        raise InputError(f"{directory}: its tokenizer has ids up to {tokenizer.n_vocab - 1}, "
                         f"the model {vocab_size}")
    tokenizer.pieces += [b""] * spare
    return tokenizer


class CheckpointTokenizer(Tokenizer):
    """What checkpoints need beyond data.Tokenizer: tokens that are found in ordinary text (added),
    Unicode's NFC, a space in front, several patterns, bytes without a token, chat templates.

    path: the file, for messages; spec, config: contents of tokenizer.json, tokenizer_config.json.
    """

    def __init__(self, path, spec, config):
        self.path, model = path, spec["model"]
        # Before the merging: where a text is cut.
        patterns, self.prefix_space = read_splits(path, spec.get("pre_tokenizer") or {})
        self.patterns = [regex.compile(pattern) for pattern in patterns]
        specials, added, self.nfc = read_added_tokens(path, spec)
        self.added = added[0] | added[1]
        self.early, self.late = one_of(added[0]), one_of(added[1])
        self.markup = one_of([*specials, CUT])
        # The merging: all pieces by id, and their ranks.
        vocab, ranks = read_vocabulary(path, model, specials | self.added)
        texts = {text.encode(): i for text, i in self.added.items()}
        pieces = [b""] * (1 + max([*vocab.values(), *texts.values(), *specials.values()]))
        for piece, i in [*vocab.items(), *texts.items()]:
            pieces[i] = piece
        super().__init__(pieces, ranks, specials, "", None, None)
        # Bytes without a token become the unknown token, or else vanish.
        unknown = model["vocab"].get(model.get("unk_token"))
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in vocab]
        self.lost = b"".join(missing) if unknown is None else b""
        vocab |= dict.fromkeys(missing, unknown)
        self.id_of_rank = [vocab[piece] for piece in ranks]
        self.name_tokens(spec, config)

    def name_tokens(self, spec, config):
        """Find EOS, BOS and padding, and the variables of the chat template."""
        self.template = config["chat_template"] or PLAIN
        self.variables = {name: text for name, text in config.items()
                          if name.endswith("_token") and isinstance(text, str)}
        self.args = config["template_args"]
        # BOS: a template says itself whether it comes first; for plain text the configuration says
        # so, or else the post_processor.
        bos, post = config.get("bos_token"), spec.get("post_processor") or {}
        if config["chat_template"]:
            bos = bos if "bos_token" in self.template else None
        elif "add_bos_token" in config:
            bos = bos if config["add_bos_token"] else None
        else:
            first = [part["single"][0] for part in post.get("processors", [post])
                     if part.get("type") == "TemplateProcessing"]
            bos = first[0].get("SpecialToken", {}).get("id") if first else None
        # EOS: what the template writes behind an answer ends it, whatever a base model's
        # configuration says of the end of a text. (What was exported from here says <|end|>.)
        ends = [config.get("eos_token"), "<|end|>", "</s>", "<|endoftext|>"]
        ends = [name for name in ends if name in self.specials]
        self.variables["eos_token"] = ends[0] if ends else ""
        behind = ""
        try:
            if self.template != WORLDS:
                behind = self.after_answer(NEXT)[0].partition(NEXT)[0]
        except InputError:
            pass             # a template that does not work is reported once a chat is encoded
        ends = [name for name in self.markup.findall(behind) if name not in (bos, CUT)][:1] + ends
        if not ends:
            raise InputError(f"{self.path}: no end-of-text token; name it as eos_token in "
                             "tokenizer_config.json")
        self.eos_id, self.bos_id = self.specials[ends[0]], self.specials.get(bos)
        # What a template writes between the words of an answer and the end of its turn.
        before, end, _ = behind.partition(ends[0])
        self.closing = before + end if end else ""
        # Padding is never read, but it must differ from EOS, which is.
        pads = [config.get("pad_token"), "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"]
        pads = [self.specials.get(name) for name in [*pads, *self.specials]]
        others = [i for i in pads if i not in (None, self.eos_id, self.bos_id)]
        self.pad_id = [*others, self.eos_id][0]

    # -- ordinary text

    def encode(self, text):
        """Ordinary text -> ids. The text of a special token is ordinary here; only other added
        tokens are found in it."""
        ids = []
        # At odd places of what split() gives stand the tokens.
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
        """Text without added tokens -> ids. InputError where a pattern of the checkpoint fails."""
        if self.prefix_space and text and text[0] != " ":
            text = " " + text
        # Half characters (lone surrogates) are replaced as in tiktoken, which merges each piece.
        text, ids = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), []
        try:
            for piece in isolate(self.patterns, text):
                # Bytes vanish after the split and before the merging, so that neighbours merge.
                known = piece.encode().translate(None, self.lost)
                ranks = self.encoding._encode_single_piece(known) if known else []
                ids += [self.id_of_rank[rank] for rank in ranks]
        except TimeoutError:
            raise InputError(f"{self.path}: a split pattern takes too long on {text[:40]!r}... of "
                             f"{len(text)} characters") from None
        return ids

    # -- chats

    def write(self, messages, add_generation_prompt=True):
        """Messages -> (text, said): what the chat template writes, see templates.written."""
        variables = self.variables | self.args
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return written(self.template, variables, messages, self.markup)
        except InputError as e:
            raise InputError(f"{self.path}: chat_template: {e}") from None

    def spell(self, text, said):
        """What a template has written -> ids: its special tokens, and what stands between two of
        them encoded as one text, as in transformers."""
        ids = []
        # At odd places of what split() gives stands markup; none is a message's own.
        for i, piece in enumerate(self.markup.split(text)):
            if i % 2 == 0:
                ids += self.encode(piece.translate(said))
            elif piece != CUT:
                ids.append(self.specials[piece])
        return ids

    def encode_chat(self, messages, add_generation_prompt=True):
        """Messages -> ids, as the checkpoint's chat template spells them, ready for an answer.
        InputError in the template's own words where it cannot."""
        ids = self.spell(*self.write(messages, add_generation_prompt))
        # Plain text has no BOS, templates write it.
        return ids if self.bos_id in (None, *ids[:1]) else [self.bos_id, *ids]

    def after_answer(self, content):
        """-> (text, said): what the template writes behind an answer where the user goes on."""
        talk = [("user", "."), ("assistant", ANSWER), ("user", content)]
        text, said = self.write([{"role": role, "content": words} for role, words in talk])
        return text.partition(ANSWER)[2], said

    def encode_turn(self, content):
        """A user's next message in a running conversation whose cache ends with the end-of-turn
        token: what the template writes behind that token, the head of the next answer included."""
        text, said = self.after_answer(content)
        return self.spell(text.removeprefix(self.closing), said)


def use_template_args(tokenizer, text):
    """The option --template-args, NAME=VALUE,...: more variables for a checkpoint's chat template.
    The tokenizer's files keep them. A VALUE is JSON, or else text.

    InputError for a name that the template does not read: it would change nothing, unseen."""
    known = re.findall(r"\w+", getattr(tokenizer, "template", ""))
    for part in re.split(r"[,\s]+(?=\w+=)", text) if text else []:
        name, sign, value = part.partition("=")
        if not sign or name not in known:
            raise InputError(f"--template-args {part}: give NAME=VALUE,... with names that the "
                             "checkpoint's chat template reads")
        # Also as Python spells them: the text "False" would count as true.
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            tokenizer.args[name] = json.loads(value)
        except ValueError:
            tokenizer.args[name] = value
        tokenizer.files["template_args.json"] = json.dumps(tokenizer.args)


# -- the worlds' tokenizer, for other programs

def tokenizer_files(tokenizer):
    """A data.Tokenizer -> {name: text} of files that transformers loads, with the same ids."""
    alphabet = byte_alphabet()
    vocab, merges = {}, []                    # {a piece as the file shows it: id}
    for i, piece in enumerate(tokenizer.pieces):
        if piece:
            vocab["".join([alphabet[b] for b in piece])] = i
    # tiktoken merges any two neighbours whose union is a piece: every split of every piece.
    for text in vocab:
        merges += [[text[:i], text[i:]] for i in range(1, len(text))
                   if text[:i] in vocab and text[i:] in vocab]
    # ignore_merges: a word that is a piece is taken whole, although no merge may lead to it.
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab | tokenizer.specials,
             "merges": merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    added = [{"id": i, "content": text} | flags for text, i in tokenizer.specials.items()]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    spec = {"version": "1.0", "added_tokens": added, "decoder": byte_level, "model": model,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
              "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False,
              "chat_template": WORLDS}
    return {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config))}
