"""Final answers of real questions: where a text marks one, when two are equal, which one the majority gives.
"""
import re
from fractions import Fraction

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
MARKER = re.compile(r"####|^[ \t]*(?-i:A):|\banswer(?:\s*(?:\bis\b|:|=))+|^[ \t]*answer(?=\s+[-$\\\d])", re.I | re.M)
NUMBER = re.compile(r"\\[dt]?frac\{\d+\}\{\d+\}|(?:(?<![\w)}])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")
VALUE = re.compile(r"([-+]?)\s*(?:(\d+)\s+(?=.*/))?(\d+(?:\.\d*)?|\.\d+)(?:\s*/\s*(\d+(?:\.\d+)?))?")
GROUP = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})+)\}|(\d))"            # an argument of \frac: {anything} or one digit
AFTER = r"(?:(?<=[\d)}])|(?<=\\pi))\s*"                       # a unit follows a value, and changes it not as these do:
SCALE = r"(?!\s*(?:hundred|thousand|[mb]illion|dozen|sin|cos|tan|log|exp|sqrt)\b)"
SIMPLER = [(re.compile(pattern, re.I), new) for pattern, new in [
    ("\u2212", "-"), (r"\\[dtc]frac", r"\\frac"), (r"\{,\}", ","), (r"\\cdot|\\times", "*"),
    (r"(?<!\\)\\[!,;:()\[\]]\s*|\\(?:left|right)(?![a-z])|\\displaystyle|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°|\*\*", ""),
    (r"(?<!\\)\\(?=\s)", ""), (r"^\s+|[.\s]+$", ""),
    (AFTER + r"\\(?:text|mbox|mathrm)\s*\{" + SCALE + r"[a-z /.]*\}(?:\^\{?[23]\}?)?$", ""),
    (AFTER + SCALE + r"(?:[a-z]{3,}|[ckm]m|kg|ft|in|lb|oz|hr|ml|[ap]m)\b[a-z /.]*(?:\^\{?[23]\}?)?$", ""),
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"^\\?[a-z]+\s*(?:=|\\in(?![a-z]))(?!.*=)", ""), (r"^\(([a-z])\)$", r"\1"),          # 'x = 5', choice '(C)'
    (r"\\?sqrt\s*(?:\((\w+)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"), (r"([_^])\s*(-?\d+|[a-z])", r"\1{\2}"),
    (r"\\frac" + GROUP + GROUP, lambda m: " {}/{}".format(*(          # \frac{a + b}{2} -> (a + b)/2
        g if re.fullmatch(r"-?[\w.]+|\\\w+(?:\{\w+\})?", g) else f"({g})" for g in m.groups("") if g))),
    # 1,000 is one number, but in (1,000) and in '1, 000' the comma separates two.
    (r"^[^(\[]*$", lambda m: re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda n: n[0].replace(",", ""), m[0]))]]


def marked_answer(text):
    """The answer that a text marks, or None: its last \\boxed{...}, or what follows the last '####', 'A:', 'answer'."""
    start, depth = max((m.end() for m in BOX.finditer(text)), default=len(text)), 1
    for m in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return text[start:start + m.start()].strip() or None
    start = max((m.end() for m in MARKER.finditer(text)), default=len(text))
    return re.split(r"\.\s|\n|,? (?:because|since)\s", text[start:].strip(), maxsplit=1)[0].strip(" *.") or None


def final_answer(text):
    """The answer that a response marks, else its last number, else None."""
    return marked_answer(text) or (NUMBER.findall(text) or [None])[-1]


def majority(texts):
    """Responses -> the index of the first one that gives the answer which most of them mark (mention, if none marks one)."""
    answers = [marked_answer(t) for t in texts]
    if not any(answers):
        answers = [final_answer(t) for t in texts]
    keys = [a and tuple(answer_parts(a)) for a in answers]
    votes = [0 if key is None else keys.count(key) for key in keys]
    return votes.index(max(votes))


def answer_parts(text):
    """An answer -> its parts between brackets and commas, in one spelling: numbers as fractions, LaTeX undressed."""
    if len(text) > 300:      # no final answer is that long: arithmetic on it would only cost time
        return [text.strip()]
    for pattern, new in SIMPLER:
        text = pattern.sub(new, text)
    parts = []
    for part in re.split(r"(\\\\|\\[{}]|[,;&()\[\]]|\\(?:begin|end)\{\w+\})", text):
        m = VALUE.fullmatch(part.strip())
        if m and (not m[4] or float(m[4])):
            part = str(int(m[1] + "1") * (int(m[2] or 0) + Fraction(m[3]) / Fraction(m[4] or 1)))
        elif part != "\\\\":
            part = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\(?=[a-z])", "", part)
        parts.append(part.lower() if re.fullmatch("[A-Za-z]{3,}", part) else part)
    return parts


def same_answer(a, b):
    """Are two final answers the same? Numbers by exact value (1,000 = 1000.0, 1\\frac12 = 3/2 = 1.5), the rest as text.
    Units, $, % and degrees do not count (50% = 50, not 0.5); order does. None, for no answer, equals nothing."""
    return a is not None and b is not None and answer_parts(a) == answer_parts(b)
