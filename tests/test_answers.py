r"""interop/answers.py: final answers, when two are the same, the majority's. Every docstring states
the bug that its test prevents. test_datasets.py holds them against published answers.
"""
import time

import pytest

from interop.answers import answer_parts, final_answer, majority, same_answer


# -- where a text gives its answer

@pytest.mark.parametrize("text, answer", [
    # boxes
    (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"\boxed{1} or \boxed {\{1,\{2\}\}} .", r"\{1,\{2\}\}"),
    (r"\boxed{\boxed{5}}", "5"),
    ("\\fbox{3}\n#### 4", "3"),
    (r"\boxed{x\}y}", r"x\}y"),
    (r"as 2 is \boxed{5", "5"),
    (r"\boxed{}", None),
    # announcements
    ("2 + 3\n#### 1,000\n", "1,000"),
    ("2\nA: 18", "18"),
    ("The answer is 3.14.", "3.14"),
    ("the answer is: $18. Hope 5", "$18"),
    ("Answer: 18 because 3 + 15 = 18", "18"),
    ("**Answer:** 18 cm", "18 cm"),
    ("The answer is\n(C)", "(C)"),
    ("Final Answer: The final answer is $24$. I hope it is correct.", "$24$"),
    ("#### The answer is 18", "18"),
    ("#### Step 1\nadd 3\n#### Step 2\nThe answer is 7.", "7"),
    ("a 1 + 2 = 3\nanswer 3", "3"),
    ("####", None),
    # numbers
    ("it cost -$1,234.50.", "-$1,234.50"),
    ("from 5-3", "3"),
    ("it is -5, or so", "-5"),
    ("Thus 1/2 remains", "1/2"),
    (r"\frac{1}{2}.", r"\frac{1}{2}"),
    ("none", None),
    ("", None)])
def test_final_answers(text, answer):
    """Braces cut at the first '}', the first of several answers, a heading taken for the answer."""
    assert final_answer(text) == answer


@pytest.mark.parametrize("texts, index", [
    (["#### 7", "so 8\n#### 1,000", "\\boxed{1000.0}"], 1),
    (["it is 3", "#### 4"], 1),
    (["perhaps 3 or 4", "5", "maybe 4"], 0),
    (["no", "none"], 0),
    (["", "#### 2", "#### 3"], 1)])
def test_majority(texts, index):
    """A vote split by spelling, guesses that outvote marked answers, a crash where none answers."""
    assert majority(texts) == index


# -- when two answers are the same

# A line holds spellings of one answer, with two blanks between them; an indented line goes on with
# the line before it. No two lines are the same answer.
SAME = r"""
1,000  1000  1000.0  $1000  \$1,000.00  1{,}000  1,\!000  1000.  +1000  1000 dollars
\frac{1}{2}  1/2  \dfrac12  0.5  .5  $\frac12$  \( \tfrac{1}{2} \)  2/4  0.5\%
1\frac12  1.5  1 1/2  3/2  1 \frac{1}{2}
-\frac{3}{4}  -0.75  \frac{-3}{4}  −3/4
-1\frac12  -1.5
50%  50  50\%  50 percent  50^\circ  50^{\circ}  50°  50 degrees
18  18 cm  18\text{ cm}  18\text{ m}  18 \mbox{ inches}^2  18 apples per day  18 km/h  **18**
  x=18  x = 18.0
\sqrt3  \sqrt{3}  sqrt(3)  \sqrt 3
\frac{\sqrt{3}}{3}  sqrt(3)/3  \sqrt3/3
\left( 3, \frac{\pi}{2} \right)  (3,\pi/2)  (3.0, \frac{\pi}2)
(\frac32, 1)  (1.5,1)
x \in [1,2]  [1, 2]
52_8  52_{8}
x^2  x^{2}  x ^ 2
\text{Evelyn}  evelyn
\text{(C)}  C  (C)
0  -0  0.00
12\pi  12\pi\text{ cm}  12 \pi
\frac{11+9a}{20}  (11+9a)/20
-2, 1  -2,1
3\sqrt{2}  3 \sqrt2
2^{10}  2^10
\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}  \begin{pmatrix}\frac{-1}{3}\\2.0\end{pmatrix}
10,\! 111,\! 100  10111100
5 million  5\text{ million}
2xy  2 xy
3\times x  3 \cdot x  3*x
2\pi  2pi  2 \pi
(1,200)  (1, 200)
""".strip().replace("\n  ", "  ")
SAME = [line.split("  ") for line in SAME.split("\n")]
# Answers that equal none of those above, nor each other.
OTHERS = r"""
32\sqrt{2}  (1200)  1200  1, 200  1,-2  528  5  2  2k  2 sin x  12  12 pi i  [1,2)  (1,2)  1/0  1 2
2/1/2  x=1,y=2  y=1,x=2  1.0.0  1e3  2\frac{1}{x}  \frac{21}{x}  5\text{ or }7  57  2^{1}0  \infty
-\infty  i  10x  5:30  3^2  \frac{}{3}  \frac  (1,200]  x+1  x-1
""".strip().replace("\n", "  ").split("  ")


def test_same_answers():
    """A right answer marked wrong for its spelling."""
    for first, *others in SAME:
        assert all(same_answer(first, other) for other in others), first


def test_different_answers():
    """A wrong answer marked right: (1,200) is not 1200, 2xy is not 2."""
    by_parts = {}
    for answer in [group[0] for group in SAME] + OTHERS + [""]:
        by_parts.setdefault(tuple(answer_parts(answer)), []).append(answer)
    assert [group for group in by_parts.values() if len(group) > 1] == []


def test_no_answer_is_never_right():
    """None compared with None as equal: saying nothing can be right."""
    assert not same_answer(None, None) and not same_answer("1", None)
    assert not same_answer("50%", "0.5")              # the sign is dropped as a unit is


@pytest.mark.parametrize("text", [
    "9" * 10**6, "1e999999999", "9" * 299 + "." + "9" * 299, "\\boxed{" * 10**5,
    "\\boxed{" + "{" * 10**6, "answer is " * 10**5, "\n" * 10**6, "answer" + " " * 10**6,
    "1," * 10**6, "-" * 10**6, "\\frac{" * 10**5, "0." + "0" * 290 + "1/0." + "0" * 290,
    "####" * 10**5, "\\frac" * 50 + "1" * 50, " " * 10**6 + "A", "\\text{" * 50, "1/" * 140],
    ids=len)
def test_hostile_answers_cost_no_time(text):
    """A sampled answer of a million digits on which arithmetic or a regular expression hangs."""
    start = time.time()
    same_answer(final_answer(text) or text, text)
    same_answer(text[:300], text[:299])
    assert time.time() - start < 5
