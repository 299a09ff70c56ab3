"""Final answers of real questions: which answer a text gives, and when two answers are the same.

    final_answer(text)      the answer in a response: what is boxed or announced, else a number
    answer_parts(answer)    one spelling for equal answers: RULES undress LaTeX and drop the unit,
                            the rest is cut at brackets and commas, numbers become fractions
    same_answer(a, b)       compares two answers by these parts
    majority(texts)         the response with the commonest answer
"""
import re
from fractions import Fraction


# -- where a text gives its answer

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# '####' as in GSM8K, a line that starts with 'A:', 'answer is', 'answer:', a line 'answer 5'.
ANNOUNCED = re.compile(r"####|^[ \t]*(?-i:A):|\banswer(?:\s*(?:\bis\b|:|=))+"
                       r"|^[ \t]*answer(?=\s+[-$\\\d])", re.I | re.M)
# What may follow an answer that was announced: another sentence, another line, a reason.
ENDED = re.compile(r"\.\s|\n|,? (?:because|since)\s")
# \frac{1}{2}, -1,000.5, $3, .5, 1/2. The hyphen of '5-3' is no minus sign.
NUMBER = re.compile(r"\\[dt]?frac\{\d+\}\{\d+\}"
                    r"|(?:(?<![\w)}])-)?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def after_last(pattern, text):
    """What follows the last match of a pattern; "" if there is none."""
    ends = [m.end() for m in pattern.finditer(text)]
    return text[ends[-1]:] if ends else ""


def boxed_answer(text):
    """What stands in the last \\boxed{...}, or None. \\{ and \\} do not count as braces."""
    rest = after_last(BOX, text)
    depth = 1
    for m in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return rest[:m.start()].strip()
    return None


def marked_answer(text):
    """The answer that a text marks, or None: what it boxes last, else what it announces last."""
    answer = boxed_answer(text)
    if answer is None:
        announced = after_last(ANNOUNCED, text).strip()
        answer = ENDED.split(announced, maxsplit=1)[0].strip(" *.")
    return answer or None


def final_answer(text):
    """The answer that a response marks, else its last number, else None."""
    numbers = [None, *NUMBER.findall(text)]
    return marked_answer(text) or numbers[-1]


# -- one spelling for equal answers

def write_fraction(m):
    """A match of \\frac{a}{b} -> ' a/b', with brackets round what is no single number or name."""
    arguments = []
    for argument in (m[1] or m[2], m[3] or m[4]):
        simple = re.fullmatch(r"-?[\w.]+|\\\w+(?:\{\w+\})?", argument)
        arguments.append(argument if simple else f"({argument})")
    return " {}/{}".format(*arguments)


def drop_commas(m):
    """A matched text without its commas."""
    return m[0].replace(",", "")


# A unit stands at the end, behind a value. These words are none, because they change it:
NO_UNIT = r"(?!\s*(?:hundred|thousand|[mb]illion|dozen|sin|cos|tan|log|exp|sqrt)\b)"
AFTER_VALUE = r"(?:(?<=[\d)}])|(?<=\\pi))\s*"
# An argument of \frac: {anything}, or one digit.
ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})+)\}|(\d))"
# (pattern, replacement), one after the other. Case does not matter.
RULES = [
    # What LaTeX and Markdown add for the eye, and several ways to write one sign.
    ("\u2212", "-"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{,\}", ","),
    (r"\\cdot|\\times", "*"),
    # \! \, \; \: and the brackets \( \) \[ \] of formulas; \left, \right; $ and %; degrees; bold
    (r"(?<!\\)\\[!,;:()\[\]]\s*|\\(?:left|right)(?![a-z])|\\displaystyle"
     r"|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°|\*\*", ""),
    (r"(?<!\\)\\(?=\s)", ""),
    (r"^\s+|[.\s]+$", ""),
    # units
    (AFTER_VALUE + r"\\(?:text|mbox|mathrm)\s*\{" + NO_UNIT + r"[a-z /.]*\}(?:\^\{?[23]\}?)?$", ""),
    (AFTER_VALUE + NO_UNIT + r"(?:[a-z]{3,}|[ckm]m|kg|ft|in|lb|oz|hr|ml|[ap]m)\b"
     r"[a-z /.]*(?:\^\{?[23]\}?)?$", ""),
    # \text{word} is a word
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1"),
    # 'x = 5' says 5, if it is the only equation; a choice '(C)' says C
    (r"^\\?[a-z]+\s*(?:=|\\in(?![a-z]))(?!.*=)", ""),
    (r"^\(([a-z])\)$", r"\1"),
    # sqrt(3) and \sqrt 3 are \sqrt{3}; x^2 is x^{2}; \frac12 is 1/2
    (r"\\?sqrt\s*(?:\((\w+)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"([_^])\s*(-?\d+|[a-z])", r"\1{\2}"),
    (r"\\frac" + ARGUMENT + ARGUMENT, write_fraction)]

THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
SEPARATOR = re.compile(r"(\\\\|\\[{}]|[,;&()\[\]]|\\(?:begin|end)\{\w+\})")
# sign, whole part of a mixed number, numerator (or all of it), denominator
VALUE = re.compile(r"([-+]?)\s*(?:(\d+)\s+(?=.*/))?(\d+(?:\.\d*)?|\.\d+)"
                   r"(?:\s*/\s*(\d+(?:\.\d+)?))?")


def read_value(text):
    """'-1 1/2', '.5' or '3' -> its exact value as a Fraction; None for what is no number."""
    m = VALUE.fullmatch(text.strip())
    if m is None or (m[4] and float(m[4]) == 0):
        return None
    value = int(m[2] or 0) + Fraction(m[3]) / Fraction(m[4] or 1)
    return -value if m[1] == "-" else value


def answer_parts(text):
    """An answer -> list of its parts and the brackets and commas between them, in one spelling."""
    # No final answer is that long, and arithmetic on it would only cost time.
    if len(text) > 300:
        return [text.strip()]
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text, flags=re.I)
    # 1,000 is one number, but in (1,000) and in '1, 000' the comma separates two.
    if "(" not in text and "[" not in text:
        text = THOUSANDS.sub(drop_commas, text)

    parts = []
    for part in SEPARATOR.split(text):
        value = read_value(part)
        if value is not None:
            part = str(value)
        # Space counts between two numbers only, and a backslash before a name never.
        elif part != "\\\\":
            part = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\(?=[a-z])", "", part)
        parts.append(part.lower() if re.fullmatch("[A-Za-z]{3,}", part) else part)
    return parts


def same_answer(a, b):
    """Are two final answers the same? Numbers are compared by exact value (1,000 = 1000.0, and
    1\\frac12 = 3/2 = 1.5), the rest as text. Units, $, % and degrees do not count (50% = 50, not
    0.5); order does. None, for no answer, equals nothing."""
    if a is None or b is None:
        return False
    return answer_parts(a) == answer_parts(b)


# -- several answers to one question

def majority(texts):
    """Responses -> the index of the first one that gives the commonest answer. Answers that are
    only mentioned count if no response marks one."""
    answers = [marked_answer(text) for text in texts]
    if not any(answers):
        answers = [final_answer(text) for text in texts]
    spellings = [answer_parts(answer) if answer else None for answer in answers]
    votes = [spellings.count(s) if s else 0 for s in spellings]
    return votes.index(max(votes))
