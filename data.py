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
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Objective:
    """One axis of alignment. `case` names the row of the paper's table of label constructions (Sec. 4)."""
    name: str
    domain: str      # math | values | tutoring
    case: str        # verifiable | A (judge on rollouts) | B (judge on prefixes) | C (preference pairs)
    boundary: str    # where a step ends: newline | sentence | turn

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

# Words and numbers keep the space before them, as in GPT-2; anything else is cut into characters.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"
SPECIALS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]


# --- exercise 11: ends_step (2 points) ---
def ends_step(masks, token, previous, before):
    """Does a step end with `token`, given the two tokens of the step before it? -> bool

    Works on ids and lists of bool as on tensors of ids and bool masks (Tokenizer.boundary_masks). A
    stop does not end a sentence after a number or an initial ('3.14', 'e.'), nor after a bare
    letter that itself follows a stop (the 'g' of 'e.g.')."""
    always, stops, initials, letters = masks
    abbreviated = initials[previous] | (letters[previous] & stops[before])
    return always[token] | (stops[token] & (abbreviated ^ True))
# --- end of exercise 11 ---


class Tokenizer:
    """Text <-> token ids. tiktoken merges the bytes of a text into pieces: first PATTERN cuts it
    into words, then in each word the two neighbours whose union has the lowest rank become one
    piece, again and again.

    pieces:   list of bytes by id; b"" for special tokens and unused ids
    ranks:    {piece: rank}, from 0 on; all 256 single bytes are among them, since tiktoken panics at
              a byte that it lacks. Ranks need not be ids: in some checkpoints the order differs
    specials: {text: id}. Ordinary text never becomes one; only chats are written with them
    """

    def __init__(self, pieces, ranks, specials, pattern, eos_id, pad_id, bos_id=None):
        self.pieces = pieces
        self.ranks = ranks
        self.specials = specials
        self.eos_id, self.pad_id, self.bos_id = eos_id, pad_id, bos_id
        self.files = {}                        # {name: text} of the files that it came from
        self.masks = {}                        # boundary masks as lists, by kind
        # What tiktoken calls tokens are ranks here; a table leads from them to ids.
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.id_of_rank = [ids.get(piece) for piece in ranks]
        self.encoding = tiktoken.Encoding("mahalo", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})

    @classmethod
    def embedded(cls):
        """The tokenizer of the three worlds: 256 bytes, then every word and number that occurs in
        3,000 conversations, then the special tokens."""
        rng, words = RNG(0), set()
        for world in DOMAINS.values():
            for _ in range(1000):
                for message in world.conversation(world.problem(rng), rng):
                    words.update(re.findall(PATTERN, message["content"]))
        longer = sorted(word.encode() for word in words if len(word) > 1)
        # Any text can be written with the bytes; what is longer only makes it shorter.
        pieces = [bytes([b]) for b in range(256)]
        pieces += longer
        ranks = {piece: i for i, piece in enumerate(pieces)}
        specials = {text: len(pieces) + i for i, text in enumerate(SPECIALS)}
        pieces += [b""] * len(specials)
        return cls(pieces, ranks, specials, PATTERN, specials["<|end|>"], specials["<|pad|>"])

    @property
    def n_vocab(self):
        """The number of ids."""
        return len(self.pieces)

    def encode(self, text):
        """Ordinary text -> ids. The text of a special token is ordinary here."""
        return [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        """ids -> text; special tokens vanish, broken UTF-8 becomes U+FFFD."""
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def encode_chat(self, messages, add_generation_prompt=True):
        """Messages -> ids, ready for the model to go on: <|user|> ... <|end|><|assistant|> ... <|end|>

        Every message is encoded apart. In one text, tokens could merge across the border between
        prompt and response, and a cached conversation would change when it goes on."""
        ids = []
        for message in messages:
            # A system message has no marker of its own: it counts as the user's.
            role = "<|assistant|>" if message["role"] == "assistant" else "<|user|>"
            ids += [self.specials[role], *self.encode(message["content"]), self.eos_id]
        if add_generation_prompt:
            ids.append(self.specials["<|assistant|>"])
        return ids

    def encode_turn(self, content):
        """A user's next message in a running conversation whose cache ends with <|end|>."""
        return self.encode_chat([{"role": "user", "content": content}])

    def save(self, directory):
        """Write the files that it came from, as they came, for other programs to load. The worlds'
        tokenizer came from none: its tokenizer.json is made."""
        from interop.tokenizer import tokenizer_files     # here, because that file imports this one
        for name, content in (self.files or tokenizer_files(self)).items():
            write_text(os.path.join(directory, name), content)

    # -- where steps end, as masks over the vocabulary: no text is decoded inside a decoding loop

    def boundary_masks(self, kind):
        """Kind of boundary (newline, sentence, turn) -> four masks (V + 1,) bool for ends_step.

        Tokens that always end a step (EOS, and but for turns what holds a newline); sentence stops;
        initials and numbers; bare letters. Index V stands for "no token before"."""
        texts = [piece.decode("utf-8", errors="replace") for piece in self.pieces]
        # A newline ends a line and a sentence; nothing but EOS ends a turn.
        always = [kind != "turn" and "\n" in text for text in texts]
        always[self.eos_id] = True
        stops, initials, letters = [[False] * self.n_vocab] * 3
        if kind == "sentence":
            stops = [text.rstrip("\"')").endswith((".", "!", "?")) for text in texts]
            initials = [bool(re.fullmatch(r".*[0-9]|\s[b-zB-HJ-Z]", text)) for text in texts]
            letters = [bool(re.fullmatch(r"[A-Za-z]", text)) for text in texts]
        return tuple(torch.tensor([*m, False]) for m in (always, stops, initials, letters))

    def step_ends(self, ids, kind):
        """Response ids -> indices of the last token of every step; a cut-off last step counts."""
        if kind not in self.masks:
            self.masks[kind] = [mask.tolist() for mask in self.boundary_masks(kind)]
        none, ends = self.n_vocab, []
        previous = before = none
        for t, token in enumerate(ids):
            if ends_step(self.masks[kind], token, previous, before) or t == len(ids) - 1:
                ends.append(t)
                previous = before = none          # a step does not know how the one before ended
            else:
                previous, before = token, previous
        return ends


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
