r"""Final answers of real questions: which answer a text gives, and when two answers are the same.

    final_answer(text)      the answer in a response: what is boxed or announced, else a number
    same_answer(a, b)       have two answers the same normal form?
    majority(texts)         the response with the commonest answer

An answer takes three steps to its normal form:

    rewrite     tables drop units and what is there for the eye; one character for each sign;
                braces become brackets: \frac12x\text{ cm} -> ((1)/(2))x
    to_python   what is left becomes a list in Python: [((1)/(2))*_x]
    value       Python's parser says what belongs to what. Numbers are exact fractions, letters
                numbers drawn once: two formulas that agree there agree everywhere
"""
import ast
import hashlib
import operator
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache, partial


# -- where a text gives its answer

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# '####' as in GSM8K, a line that starts with 'A:', 'answer is', 'answer:', a line 'answer 5'.
ANNOUNCED = re.compile(r"####|^[ \t]*(?-i:A):|\banswers?(?:[\s*]*(?:\b(?:is|are)\b|:|=))+"
                       r"|^[ \t*#]*(?:final )?answer(?=[\s*]+[-$\\\d])|<answer>", re.I | re.M)
DISPLAY = re.compile(r"(?:\\\[|\$\$)(.*?)(?:\\\]|\$\$)", re.S)
# What may follow an answer that was announced: another sentence, another line, a reason ...
ENDED = re.compile(r"[.?]\s|</|\n|!(?=\s+[A-Z]|$)|;\s+(?=[a-z]{2})"
                   r"|,? (?:because|since|so|as|which)\s")
# ... and, behind a number, a remark: ', in total', ' (that is, a dozen)', but not ', and x = 3'.
REMARK = re.compile(r"(?:[,:]|\s—)\s+(?!(?:and|or)\s+(?![a-z]{2}))(?=(?:an? )?[a-z]{2}|i\.e)"
                    r"|\s+\((?=[a-z]{2})")
# \frac{1}{2}, -1,000.5, $3, .5, 1/2. The hyphen of '5-3' is no minus sign.
NUMBER = re.compile(r"(?:(?<![\w)}])[-−])?\$?(?:\\[dt]?frac\{\d+\}\{\d+\}"
                    r"|(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?)")
# What a calculation comes to.
RESULT = re.compile(r"=\s*(" + NUMBER.pattern + ")")
FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
# Words that change the number before them: 5 million is not 5.
MULTIPLES = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9",
             "trillion": "10^{12}", "dozen": "12"}
# Words of a sentence by which its number is not what is said: at least 5, half of 5.
OTHERWISE = {"not", "isn", "no", "never", "cannot", "least", "most", "than", "half", "twice",
             "minus", "negative", *MULTIPLES}
# How thoughts begin; with a '/' before the name they end.
THOUGHTS = r"[<\[◁]%s(?:think(?:ing)?|thoughts?|reasoning)[>\]▷]"


def after_last(pattern, text):
    """What follows the last match of a pattern; "" if there is none."""
    ends = [m.end() for m in pattern.finditer(text)]
    return text[ends[-1]:] if ends else ""


def without_thoughts(text):
    """What a reasoning model says: what follows </think>. Thoughts without an end say nothing."""
    said = re.split(THOUGHTS % "/", text, flags=re.I)[-1]
    return re.split(THOUGHTS % "", said, flags=re.I)[0]


def boxed_answer(text):
    """What stands in the last \\boxed{...}, or None. \\{ and \\} do not count as braces."""
    rest = after_last(BOX, text)
    depth = 1
    for m in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth == 0:
            return rest[:m.start()].strip()
    return None


def announced_answer(text):
    """What a text announces last; of a sentence the one formula or number in it. "" for none."""
    # No answer is that long, and a sentence of a million letters would only cost time.
    said = after_last(ANNOUNCED, text).strip(" \t\r\n*:")[:1000]
    display = DISPLAY.match(said)
    if display:
        return display[1].strip()
    said = re.sub(r"\*\*|__|[`\"“”]", "", ENDED.split(said, maxsplit=1)[0])
    # '72, in total' says 72, but 'red, green' names two colours.
    head = REMARK.split(said, maxsplit=1)[0]
    said = (head if re.search(r"\d", head) else said).strip(" *.")

    # 'Paula got $7.00' and 'the line $y = 2x$' are sentences, '12 or 13' holds two numbers.
    words = set(re.findall(r"(?<![\\a-z])[a-z]{2,}", said.lower())) - {"and", "or"}
    formulas = list(FORMULA.finditer(said))
    if not words or words & OTHERWISE:
        return said
    if len(formulas) == 1 and not re.search(r"\d", FORMULA.sub("", said)):
        return formulas[0][0]
    tokens = [word.strip("*,.%()") for word in said.rpartition("=")[2].split()]
    numbers = [word for word in tokens if re.search(r"\d", word)]
    return numbers[0] if len(numbers) == 1 and NUMBER.fullmatch(numbers[0]) else said


def marked_answer(text):
    """The answer that a text marks, or None: what it boxes last, else what it announces last."""
    said = without_thoughts(text)
    answer = boxed_answer(said)
    return (announced_answer(said) if answer is None else answer) or None


def final_answer(text):
    """The answer that a response marks, else a number of the last sentence that has one: the last
    that a calculation came to ('34 hours in 4 weeks' behind '= 34'), or else the last. Or None."""
    said, numbers = without_thoughts(text), [None]
    for sentence in re.split(r"[.?!]\s|\n", said):
        numbers = NUMBER.findall(sentence) or numbers
    results = set(RESULT.findall(said))
    computed = [number for number in numbers if number in results]
    return marked_answer(text) or (computed or numbers)[-1]


# -- rewrite: one spelling for equal answers

GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho
    varsigma sigma tau upsilon phi chi psi omega""".split()
# LaTeX command -> the character for it, or a command that does the same
COMMANDS = {
    **{name: chr(ord("α") + i) for i, name in enumerate(GREEK)},
    **dict.fromkeys(["ge", "geq", "geqslant"], ">="), **dict.fromkeys(["ne", "neq"], "!="),
    **dict.fromkeys(["le", "leq", "leqslant"], "<="), "gt": ">", "lt": "<", "in": "∈",
    "times": "*", "cdot": "*", "div": "/", "pm": "±", "mp": "∓", "cup": "∪", "cap": "∩",
    "lor": ",", "vee": ",", "lbrace": "«", "rbrace": "»", "sqrt": "√", "infty": "∞",
    "colon": ":", "varphi": "φ", "varepsilon": "ε", "bar": "\\overline", "boxed": "\\style",
    **dict.fromkeys(["dots", "cdots"], "\\ldots"), **dict.fromkeys(["dbinom", "tbinom"], "\\binom"),
    **dict.fromkeys(["lvert", "rvert", "vert", "mid"], "|"),
    **dict.fromkeys(["approx", "simeq"], "="), "angle": "",
    "emptyset": "∅", "varnothing": "∅", "degree": "°", "circ": "°",
    **dict.fromkeys(["dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"], "\\frac"),
    **dict.fromkeys("big bigl bigr bigg biggl biggr Big Bigl Bigr Bigg Biggl Biggr".split(), ""),
    **dict.fromkeys(["left", "right", "displaystyle", "textstyle", "large", "small"], ""),
    **dict.fromkeys(["quad", "qquad"], " "),
    # \text may hold a unit, the others only change the letters
    **dict.fromkeys(["textnormal", "textrm", "mbox", "hbox"], "\\text"),
    **dict.fromkeys(["mathrm", "operatorname", "mathbf", "textbf", "textit", "mathbb", "mathit",
                     "boldsymbol", "textsf", "emph", "underline", "rm", "bf"], "\\style")}
SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/",
                       "≤": "<=", "≥": ">=", "≠": "!=", "≈": "=", "€": "", "£": "", "¥": "",
                       "₹": "", "¢": "", "`": ""})

# Abbreviations that could be letters of a formula (2\pi hr, 2mg) are units behind '5 ' only.
SHORT = "m|g|s|h|hrs?|l|in|ft|mg|ml|mi|lbs?|oz|yd|min|sec"
LONG = ("[ckm]m|kg|[mk]ph|inch(?:es)?|f[eo]{2}t|(?:yard|mile|[a-z]*met(?:er|re)|[a-z]*gram|pound"
        "|ounce|[a-z]*lit(?:er|re)|gallon|cup|second|minute|hour|day|week|month|year|dollar|cent"
        "|euro|degree|radian|rad|unit|point|percent)s?|square|sq|cubic|per|people|children"
        "|(?:wo)?men")
# A plural behind a number and a space is what was counted: 18 apples per day.
PLURAL = "(?!cos)[a-z]{3,}s"
VALUE = r"(?<=[\dπ)}])"
# The 2 of r^2 h is no amount.
AMOUNT = r"(?<=\d)(?<![a-z)}]\^\d)"
POWER = r"(?:\^\{?[23]\}?)?"
# These words are no unit: they change the number, or a condition follows.
NO_UNIT = (rf"(?!\s*(?:{'|'.join(MULTIPLES)}|and|or|half|halves|thirds?"
           r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?"
           r"|squared|cubed|[ap]\.?m|if|mod|sin|cos|tan|log|exp|sqrt)s?\b)")
# One unit, and what it is divided by or goes on with: km/h, square feet, apples per day.
UNIT = (rf"{NO_UNIT}(?:{AMOUNT}\s+(?:{SHORT}|{PLURAL})|{VALUE}\s*(?:{LONG}))(?![a-z]){POWER}"
        rf"(?:[\s/]+(?:{SHORT}|{LONG}|{PLURAL})(?![a-z]){POWER})*")
# In \text any word is a unit.
TEXT_UNIT = VALUE + r"\s*\\text\s*\{" + NO_UNIT + r"[a-z /.]*\}" + POWER
# Behind a unit the answer ends, or the next one of a list begins.
ENDS = r"(?=\s*(?:$|[,;)]|\\}|and\b|or\b))"

# (pattern, replacement), one after the other. Case does not matter.
LETTERS = [
    # one letter of Unicode for several signs; the rows of a matrix end in \\
    ("([¼-¾⅐-⅞])", r" \1"),
    ("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}"),
    ("([₀-₉]+)", r"_{\1}"),
    # \left. is a bracket that is not seen
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\\\\s*(?=\\end|$)", ""),
    (r"\\\\(?:\[\d+[a-z]{2}\])?", r" ,¶, ")]
RULES = [
    # what LaTeX and Markdown add for the eye
    (r"\\[!,:;>]\s*|\\[()\[\]]|\\?[$%]|\*\*|(?<=\d)\{,\}(?=\d)|\\(?=\d)", ""),
    (r"~|\\(?=\s)", " "),
    (r"(?:\^\s*\{?\s*|(?<=[\d)}π]))°\s*\}?(?:\s*[CF]\b)?", ""),
    (r"^[\s=]+|[.\s]+$", ""),
    (r"^(?:minus|negative)\s+(?=\d)", "-"),
    # units, then words
    (r"\\style\s*(?:\{([^{}]*)\}|(\w))", r" \1\2"),
    (TEXT_UNIT + ENDS, ""),
    (r"\\text\s*\{([^{}]*)\}", r" \1 "),
    *[(rf"(?<=\d)\s*{word}s?\b", "*" + number) for word, number in MULTIPLES.items()],
    (UNIT + ENDS, ""),
    (r"\b([ap])\.m\b\.?", r"\1m"),
    (r"[,;]?\s*(?<![a-z\\])(?:and|or)(?![a-z])|;", ","),
    (r"(?<![a-z\\])pi(?![a-z])", "π"),
    (r"(?<![a-z\\])sqrt(?![a-z])", "√"),
    (r"(?<![a-z])\\?(sin|cos|tan|cot|sec|csc|log|ln|exp|min|max|mod|arc(?:sin|cos|tan))"
     r"(?![a-z])((?:[_^](?:\w|\{[^{}]*\}))?)(?:\s*[({](\w+)[)}]$)?", r"\\\1\2 \3"),
    # sets and matrices
    (r"\\\{", "«"),
    (r"\\\}", "»"),
    (r"«\s*»", "∅"),
    (r"\\begin\{(?:[pb]|small)matrix\}|[(\[]\s*\\begin\{(?:matrix|array)\}(?:\{\w*\})?",
     "(▦,"),
    (r"\\end\{(?:[pb]|small)matrix\}|\\end\{(?:matrix|array)\}\s*[)\]]", ")"),
    (r"&", ","),
    # 1 3/4 is 1\frac{3}{4}; 4 + 8 = 12 says 12; 05 is 5
    (r"(?<![\w.)])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(^|[,=])[-+*/.\d\s()]+=(?=[-+*/.\d\s()]+(?:$|[,=]))", r"\1"),
    (r"(?<![\d.,])0+(?=\d)", "")]


def argument(bare):
    """Pattern of an argument of a LaTeX command: {anything}, a letter or what `bare` matches."""
    return rf"\s*(?:\{{([^{{}}]*)\}}|([^\W\d_]|{bare}))"


# Braces go from the inside out, until none is left. The last rule is that of mixed numbers.
BRACES = [
    (r"\\frac" + argument(r"\d") * 2, r"((\1\2)/(\3\4))"),
    (r"√\s*\[(\w+)\]" + argument(r"\d"), r"((\2\3)**(1/\1))"),
    (r"√" + argument(r"\d+"), r"√(\1\2)"),
    (r"\^" + argument(r"-?\d+"), r"**(\1\2)"),
    (r"\^\s*(?=\()", "**"),
    (r"_" + argument(r"\d+"), r"‹\1\2›"),
    (r"(^|[({,+*/=«-])\s*\{([^{}]*)\}", r"\1(\2)"),
    (r"(?<![\w.)*‹])(\d+)\s*(\(\(\d+\)/\(\d+\)\))", r"(\1+\2)")]
# 1,000 and 12,345,678
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")


def known_command(m):
    """A match of a LaTeX command -> what stands for it, or itself."""
    return COMMANDS.get(m[1], m[0])


def drop_commas(m):
    """A matched text without its commas."""
    return m[0].replace(",", "")


def apply_rules(rules, text):
    """A text after each (pattern, replacement) in turn."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.I)
    return text


def rewrite(text):
    """An answer without units, braces and what is there for the eye."""
    text = unicodedata.normalize("NFKC", apply_rules(LETTERS, text)).translate(SIGNS)
    text = apply_rules(RULES, re.sub(r"\\([A-Za-z]+)", known_command, text))
    # 1,000 is one number, but in (1,000) and in '1, 000' the comma separates two.
    if not re.search(r"[(\[«]", text):
        text = THOUSANDS.sub(drop_commas, text)
    # Each round undoes the innermost braces.
    before = ""
    while text != before:
        before = text
        text = apply_rules(BRACES, text)
    return text


# -- to_python: an answer as a list in Python

FACTORS = [
    # Letters get a '_', so that none is a word of Python.
    (r"([^\W\d_])", r"_\1"),
    # Factors stand side by side, 2x(y+1), but a number stands first: '1 2' and x2 are no products.
    (r"(?<=[\w)›∞])\s*(?=[_(√∞])", "*"),
    # 'x = 5' compares, as x < 5 does.
    (r"(?<![<>!])=", "==")]
# ~ stands for the sign that \pm leaves open: it binds as a minus does. @ and % are union and
# intersection. [ and ] become marks in a tuple: (1,2] is (1,2,_closed).
PYTHON = str.maketrans({
    "±": "+~", "∓": "-~", "∈": " in ", "∪": "@", "∩": "%", "«": "{", "»": "}", "‹": "[", "›": "]",
    "[": "(_closed,", "]": ",_closed)", "√": "_sqrt", "∞": "_inf", "∅": "_empty", "▦": "_matrix",
    "¶": "_row"})


def to_python(text):
    """A rewritten answer as a list in Python's spelling; not all that comes out is Python."""
    return "[" + apply_rules(FACTORS, text).translate(PYTHON) + "]"


# -- value: what the syntax tree is worth

def point(text):
    """The number that a letter, or whatever is not looked into, stands for: drawn once."""
    # That two different formulas agree there happens about once in 2^40 times.
    drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")
    return 1 + Fraction(drawn, 2**40)


def show(number):
    """A number as text: exact, but for an irrational one, of which 10 digits count."""
    if isinstance(number, float):
        # sqrt(2) times sqrt(2) comes out beside 2.
        near = Fraction(number).limit_denominator(1000)
        return str(near) if abs(number - near) < 1e-12 * abs(number) else f"{number:.9e}"
    return str(number)


def power(a, b):
    """a to the power of b: exact where it can be."""
    whole = isinstance(b, Fraction) and b.denominator == 1
    # Nobody's answer has thousands of digits; and roots of -5 are not looked into.
    if len(show(a)) * abs(b) > 3000 or (a < 0 and not whole):
        return point(f"{show(a)} ** {show(b)}")
    # \sqrt{9/4} is 3/2.
    if isinstance(a, Fraction) and isinstance(b, Fraction) and 1 < b.denominator < 10:
        numerator = round(a.numerator ** (1 / b.denominator))
        root = Fraction(numerator, round(a.denominator ** (1 / b.denominator)))
        if root ** b.denominator == a:
            return root ** b.numerator
    return a ** b


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: power}


def value(node, sign):
    """A node of a syntax tree -> a number. sign: what \\pm is, 1 or -1; 0 where both are meant.
    Raises an error of UNREADABLE for what is no part of an answer."""
    match node:
        # 5, 0.25
        case ast.Constant(value=number):
            return Fraction(str(number))
        # x
        case ast.Name(id=name):
            return point(name)
        # -x, and ~x for \pm x
        case ast.UnaryOp(op=op, operand=operand):
            return {ast.UAdd: 1, ast.USub: -1, ast.Invert: sign}[type(op)] * value(operand, sign)
        # x + y, x * y
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value(left, sign), value(right, sign))
        # sqrt(x) is the only call that rewrite writes.
        case ast.Call(args=[inner]):
            return power(value(inner, sign), Fraction(1, 2))
        # {1, 2}, in any order
        case ast.Set(elts=nodes):
            return point(f"Set {items(nodes, sign)}")
    # Anything else is known by its kind and its parts: (1, 2), x > 5, A @ B, x[1].
    if not isinstance(node, ast.Tuple | ast.Compare | ast.BinOp | ast.Subscript):
        raise ValueError("no part of an answer")
    children = [node, *ast.iter_child_nodes(node)]
    parts = [show(value(child, sign)) for child in children[1:] if isinstance(child, ast.expr)]
    kinds = [type(child).__name__ for child in children if not isinstance(child, ast.expr)]
    if set(kinds) <= {"Gt", "GtE"}:
        # 5 > x is x < 5.
        kinds = [kind.replace("Gt", "Lt") for kind in reversed(kinds)]
        parts.reverse()
    # Sides of = and sets that are united may change places.
    if set(kinds) <= {"Eq", "NotEq", "MatMult", "Mod"}:
        parts.sort()
    return point(f"{type(node).__name__} {kinds} {parts}")


def items(nodes, sign=0):
    """Trees of several answers -> their values as texts, sorted. An open \\pm makes two of one."""
    found = []
    for node in nodes:
        both = sign == 0 and not isinstance(node, ast.Set) and "Invert()" in ast.dump(node)
        for s in (1, -1) if both else (sign,):
            found.append(show(value(node, s)))
    return sorted(found)


# -- the normal form

# 'x =', 'f(x) =', '(x,y) =' in front of a value that is no equation itself
NAME = re.compile(r"(?:^|(?<=,))\s*(\\?[^\W\d_]+(?:‹\w+›)?(?:\(\w\))?"
                  r"|\([^\W\d_](?:,\s*[^\W\d_])*\))\s*[=∈](?![^,]*=)")
# words and lists of words
PHRASES = re.compile(r"(?=.*[^\W\d_]{3})(?:[^\W\d_]|[\s,.'-])*")
UNREADABLE = (SyntaxError, LookupError, ValueError, ArithmeticError, AttributeError,
              RecursionError, MemoryError)


@lru_cache(1000)
def normal_form(answer):
    """An answer -> the name that it gives its value, or "", and its values as texts, sorted."""
    # No final answer is that long, and arithmetic on it would only cost time.
    if len(answer) > 300:
        return "", [answer.strip()]
    text = rewrite(answer)
    # 'x = 2, x = 3' names its values once; in 'x = 1, y = 2' names are part of the answer.
    names = set(NAME.findall(text))
    name = ""
    if len(names) == 1:
        name, = names
        text = NAME.sub("", text)
    if PHRASES.fullmatch(text):
        return name, sorted(phrase.strip(" .").lower() for phrase in text.split(","))
    try:
        nodes = ast.parse(to_python(text), mode="eval").body.elts
        # {1, 2} lists the same solutions as 1, 2.
        if len(nodes) == 1 and isinstance(nodes[0], ast.Set):
            nodes = nodes[0].elts
        return name, items(nodes)
    except UNREADABLE:
        # Space counts between two numbers only, and a backslash before a name never.
        return name, [re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\(?=[a-z])", "", text)]


def same_answer(a, b):
    """Are two final answers the same? None, for no answer, equals nothing.

    Numbers are compared by exact value (1,000 = 1000.0, 1\\frac12 = 1.5, 2^3 = 8), formulas by what
    they are worth, the rest as text. Units, $, % and degrees do not count (50% = 50, not 0.5), nor
    does the order of 3, 5 or of a set; that of (3, 5) does."""
    if a is None or b is None:
        return False
    (name, values), (other, others) = normal_form(a), normal_form(b)
    # A name counts where both have one: x = 3 is not y = 3.
    return values == others and (name == other or not name or not other)


# -- several answers to one question

def majority(texts):
    """Responses -> the index of the first one that gives the commonest answer. Answers that are
    only mentioned count if no response marks one."""
    answers = [marked_answer(text) for text in texts]
    if not any(answers):
        answers = [final_answer(text) for text in texts]
    # Each answer gets a vote from every one that is the same.
    votes = [sum(map(partial(same_answer, answer), answers)) for answer in answers]
    return votes.index(max(votes))
