r"""interop/answers.py: final answers, when two are the same, the majority's. Every docstring states
the bug that its test prevents. test_datasets.py holds them against published answers.
"""
import time

import pytest

from interop.answers import final_answer, majority, normal_form, same_answer


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
    ("**Answer:** 18 cm", "18"),
    ("The answer is\n(C)", "(C)"),
    ("Final Answer: The final answer is $24$. I hope it is correct.", "$24$"),
    ("#### The answer is 18", "18"),
    ("#### Step 1\nadd 3\n#### Step 2\nThe answer is 7.", "7"),
    ("a 1 + 2 = 3\nanswer 3", "3"),
    ("####", None),
    ("**Final Answer**\n\n15", "15"),
    ("The answer is:\n$$\nx = 4\n$$\nas asked", "x = 4"),
    ("\\[ 3 \\] The answer is\n\\[\n\\frac{3}{4}\n\\]", "\\frac{3}{4}"),
    # remarks behind an answer
    ("The answer is 35, all told, as 30 + 5 is that.", "35"),
    ("The answer is 24 rolls, or two dozen.", "24"),
    ("The answer is 9 (nine people).", "9"),
    ("The answer is 8, not 3.", "8"),
    ("The answer is 20! Not bad.", "20"),
    ("The answer is 33; nothing else fits 5.", "33"),
    ("The answer is 7: four and three.", "7"),
    ("The answer is red, blue and green.", "red, blue and green"),
    ("The answer is x = 3, or x = 4.", "x = 3, or x = 4"),
    # sentences that hold an answer
    ("The answer is thus 15.", "15"),
    ("Answer: `15`", "15"),
    ("**Answer:** Mia paid $12.50 for it.", "$12.50"),
    ("The answer is 50% of them.", "50"),
    ("The answer is 9 - 2 = 7 pens.", "7"),
    ("The answer is the line $y = 2x$.", "$y = 2x$"),
    ("The answer is 12 or 13 pens.", "12 or 13 pens"),
    ("The answer is 5 million.", "5 million"),
    ("The answer is not 5.", "not 5"),
    ("The answer is at least 5.", "at least 5"),
    ("The answer is half of 24.", "half of 24"),
    ("The answer is nine (9).", "9"),
    ("The answer is 9 — a lot.", "9"),
    ("The answer is 9, i.e. nine.", "9"),
    ("The answers are 9 and 10.", "9 and 10"),
    ("<answer>x = 3</answer>", "x = 3"),
    ("<answer>The answer is 9.</answer>", "9"),
    # thoughts
    ("<think>The answer is 5? No.</think>\nShe has 6.", "6"),
    ("The answer is 5\n</think>", None),
    ("<think>\\boxed{7}, or", None),
    ("<think>3</think><think>4 or", None),
    ("<Thinking>3</Thinking> \\boxed{4}", "4"),
    ("[THINK]\\boxed{3}[/THINK] 4", "4"),
    ("<thought>\\boxed{3}", None),
    # numbers
    ("it cost -$1,234.50.", "-$1,234.50"),
    ("from 5-3", "3"),
    ("it is -5, or so", "-5"),
    ("Thus 1/2 remains", "1/2"),
    ("So 14 + 20 = 34. He reads 34 hours in 4 weeks.", "34"),
    ("So 14 + 20 = 34. He has 16 left of 50. Bye!", "50"),
    (r"so \(3 - 8 = −5\)", "−5"),
    (r"-\frac{1}{2}", r"-\frac{1}{2}"),
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
1,000  1000  1000.0  $1000  \$1,000.00  1{,}000  1,\!000  1000.  +1000  1000 dollars  10^3  £1000
  1\,000  (1000)  {1000}  \text{1000}  \mathbf{1000}  1 thousand  01000  1\times10^{3}
\frac{1}{2}  1/2  \dfrac12  0.5  .5  $\frac12$  \( \tfrac{1}{2} \)  2/4  0.5\%  ½
  2^{-1}  \frac{{1}}{2}  {1}/{2}
1\frac12  1.5  1 1/2  3/2  1 \frac{1}{2}  1½  \sqrt{\frac94}  1 1/2 cups
-\frac{3}{4}  minus 3/4  -0.75  \frac{-3}{4}  −3/4  –¾
-1\frac12  -1.5
50%  50  50\%  50 percent  50^\circ  50^{\circ}  50°  50 degrees  50^\circ C
18  18 cm  18\text{ cm}  18\text{ m}  18 \mbox{ inches}^2  18 apples per day  18 km/h  **18**  18 m
  x=18  x = 18.0  18~\textnormal{boxes}  18 cm²  18 square feet  18\operatorname{cm}  18kg  `18`
  18 people  18 lbs  = 18  \approx 18  \left.18\right.  \boxed{18}  \angle A = 18  {\bf 18}
  18 m/s^2  18\ \mathrm{m}^2  18\quad  10 + 8 = 18  x = 10 + 8 = 18  \text{18 pens}  f(x) = 18
\sqrt3  \sqrt{3}  sqrt(3)  \sqrt 3  √3
\frac{\sqrt{3}}{3}  sqrt(3)/3  \sqrt3/3  \frac{1}{\sqrt{3}}  \sqrt{\frac13}
\left( 3, \frac{\pi}{2} \right)  (3,\pi/2)  (3.0, \frac{\pi}2)  (x,y) = (3, \fracπ2)
(\frac32, 1)  (1.5,1)
x \in [1,2]  [1, 2]
52_8  52_{8}
x^2  x^{2}  x ^ 2  x²
\text{Evelyn}  evelyn  Evelyn.
\text{(C)}  C  (C)  \mathrm{C}
0  -0  0.00
12\pi  12\pi\text{ cm}  12 \pi  12π cm
\frac{11+9a}{20}  (11+9a)/20  \frac{9a}{20}+\frac{11}{20}
-2, 1  -2,1  1, -2  1 \text{ and } -2  x = 1 or x = -2  x=-2,\ x=1  \{-2, 1\}  1; -2
3\sqrt{2}  3 \sqrt2  \sqrt{18}  \frac{6}{\sqrt2}
2^{10}  2^10  1024
\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}  \begin{bmatrix}\frac{-1}{3}\\2.0\\\end{bmatrix}
  \left[\begin{matrix}-1/3\\[4pt]2\end{matrix}\right]
10,\! 111,\! 100  10111100
5 million  5\text{ million}  5,000,000  5 million dollars
2xy  2 xy  2yx  2x \cdot y
3\times x  3 \cdot x  3*x
2\pi  2pi  2 \pi
(1,200)  (1, 200)
\frac{1}{2}x  \frac12x  \frac12 x  \frac{x}{2}  x/2  0.5x
\frac{1}{2x}  1/(2x)  \frac1{2x}
\frac{1}{2\pi}  1/(2\pi)
1-\frac1e  1-\frac{1}{e}  1 - e^{-1}  \frac{e-1}{e}
x^2+1  1+x^2
(x+1)(x-2)  (x-2)(x+1)  x^2-x-2
x \geq 5  x \ge 5  x >= 5  5 \le x  x ≥ 5
x \ne 3  x \neq 3  3 \ne x
(3,\infty)  (3, +\infty)
(-\infty,1]\cup(2,3)  (2,3) \cup (-\infty, 1]
\emptyset  \varnothing  \{\}  ∅
\pm 7  7, -7  ±7  x = \pm7
2\pm\sqrt{5}  2+\sqrt5, 2-\sqrt5  2 \mp \sqrt5
\{1,2,3\}  \{3,2,1\}  3, 1, 2
(1,2), (3,4)  (3,4) and (1,2)
x=1, y=2  y = 2 and x = 1
\theta  θ
3 \text{ p.m.}  3 pm
\sin x  \sin(x)
\sin^2 x  \sin^{2}(x)
\log_2 x  \log_2(x)
\arctan x  \arctan(x)
|x-2|  \lvert x-2\rvert  \left|x-2\right|
1,2,\dots  1,2,\ldots
\binom{7}{3}  \dbinom{7}{3}
\varphi  \phi
x₁+x₂  x_1+x_2
red, blue  blue and red
\begin{pmatrix} 1 & 1/2 \end{pmatrix}  \begin{pmatrix}1&0.5\end{pmatrix}
  \left(\begin{array}{cc}1&\nicefrac{1}{2}\end{array}\right)
\sqrt[3]{1331}  11
x^(a+b)  x^{a+b}  x^{b+a}
""".strip().replace("\n  ", "  ")
SAME = [line.split("  ") for line in SAME.split("\n")]
# Answers that equal none of those above, nor each other.
OTHERS = r"""
32\sqrt{2}  1200  1, 200  528  5  2  2k  2 sin x  sin 2x  12  12 pi i  [1,2)  (1,2)  1/0  1 2
(1,2]  (2,1)  x=2,y=1  1.0.0  1e3  2\frac{1}{x}  \frac{21}{x}  5\text{ or }7  57  2^{1}0  \infty
-\infty  i  10x  5:30  5:03  3^2  \frac{}{3}  \frac  (1,200]  x+1  x-1  7  -7  x > 5  x < 5  x = 5y
6xyz  6  2abc  2abd  3xyz^2  3  2\pi hr  2mg  4pqs  4 dozen  4  8\text{ thirds}  8 sevenths  8  3 am  1024x
\pi r^2 h  \pi r^2
\frac{a}{b}c  \frac{a}{bc}  \frac{3}{4}y  \frac{3}{4y}  \sqrt{2}x  \sqrt{2x}  2^{x}y  2^{xy}
0.\overline{3}  0.3  0.333  \frac13  \binom{5}{2}  5!  |x|  x  x_1  (x,1)  x'  a  A  \overline{AB}
3+4i  3-4i  \{1,2\}  \{1,3\}  \begin{pmatrix}2\\1\end{pmatrix}  \begin{pmatrix}2&1\end{pmatrix}
\frac{1}{2^{99}}  \frac{1}{2^{98}}  10^{999999}  10^{999998}  4 R 1  seat  east  x^2+y^2=1  \log_2 3
\log_3 2  sin x cos y  cos x sin y  12345678901234567  12345678901234568  52_9  1.41421356
""".strip().replace("\n", "  ").split("  ")


def test_same_answers():
    """A right answer marked wrong for its spelling, or for the order of solutions."""
    for first, *others in SAME:
        assert all(same_answer(first, other) for other in others), first


def test_different_answers():
    """A wrong answer marked right: (1,200) is not 1200, 6xyz is not 6 of some unit, \\frac12x is not
    \\frac{1}{2x}, the two solutions \\pm 7 are not 7."""
    by_form = {}
    for answer in [group[0] for group in SAME] + OTHERS + [""]:
        _, values = normal_form(answer)
        by_form.setdefault(str(values), []).append(answer)
    assert [group for group in by_form.values() if len(group) > 1] == []


def test_a_name_counts_if_both_answers_give_one():
    """The line x = 3 taken for the line y = 3, or x = 3 not for 3."""
    assert same_answer("x = 3", "3") and same_answer("3", "y = 3")
    assert not same_answer("x = 3", "y = 3")


def test_no_answer_is_never_right():
    """None compared with None as equal: saying nothing can be right."""
    assert not same_answer(None, None) and not same_answer("1", None)
    assert not same_answer("50%", "0.5")              # the sign is dropped as a unit is


@pytest.mark.parametrize("text", [
    "9" * 10**6, "1e999999999", "9" * 299 + "." + "9" * 299, "\\boxed{" * 10**5,
    "\\boxed{" + "{" * 10**6, "answer is " * 10**5, "\n" * 10**6, "answer" + " " * 10**6,
    "1," * 10**6, "-" * 10**6, "\\frac{" * 10**5, "0." + "0" * 290 + "1/0." + "0" * 290,
    "answer is \\(" + "\\(" * 10**6, "answer: x" + " " * 10**6 + "y", "<think>" * 10**5,
    "answer: " + "! " * 10**6, "9^" * 140 + "9", "(" * 290, "-" * 290 + "1", "\\pm\\{" * 50,
    "x^{" * 60 + "2" + "}" * 60, "((2^{999})^{999})^{999}", "(a+b)^{99}" * 20, "5 " + "a" * 290,
    "####" * 10**5, "\\frac" * 50 + "1" * 50, " " * 10**6 + "A", "\\text{" * 50, "1/" * 140],
    ids=len)
def test_hostile_answers_cost_no_time(text):
    """A sampled answer of a million digits on which arithmetic or a regular expression hangs."""
    start = time.time()
    same_answer(final_answer(text) or text, text)
    same_answer(text[:300], text[:299])
    assert time.time() - start < 5
