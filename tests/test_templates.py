"""interop/templates.py, interop/render.py: chats as a checkpoint's own template spells them. Every
docstring states the bug that its test prevents.

Real tokenizers and templates are read from the directory MAHALO_TEMPLATES, which
tests/fetch_templates.sh fills; without it their tests are skipped."""
import datetime
import functools
import json
import os
import re
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import InputError, Problem
from evaluate import Conversation
from interop import templates
from interop.datasets import Preference, encode_pair
from interop.render import SECONDS
from interop.tokenizer import load_tokenizer, use_template_args
from interop.vocabulary import one_of
from tests.byte_level import (GPT2, LLAMA3, NAMES, answer, build, check_prefix, shown, spelled,
                              split, user)

HEAD = "<|im_start|>{{ m.role }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# ChatML, with a system message made up where none is given.
CHATML = ("{% if messages[0].role != 'system' %}<|im_start|>system\nIt's \\boxed{}.<|im_end|>\n"
          "{% endif %}{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
          + ASK)
# Headers, contents trimmed, and a system message that always is there, with a date in it.
HEADERS = """{{- bos_token }}
{%- set first = messages[0].role == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + today | default('26 Jul') + '\n\n' }}
{{- messages[0].content | trim if first else '' }}<|eot_id|>
{%- for m in (messages[1:] if first else messages) %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# Thoughts of earlier answers are cut; the last answer always has one, an empty one at least.
THINKING = """{%- set last = messages | length - 1 %}
{%- for m in messages %}
    {%- set parts = m.content.split('</think>') %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content }}
    {%- elif loop.index0 == last %}
        {{- '<|im_start|>assistant\n<think>\n' }}
        {%- if parts | length > 1 %}{{ parts[0].replace('<think>', '').strip() }}{% endif %}
        {{- '\n</think>\n\n' + parts[-1].lstrip('\n') }}
    {%- else %}
        {{- '<|im_start|>assistant\n' + parts[-1].lstrip('\n') }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
""" + ASK
# The system message stands in the last question; nothing but the next question ends an answer.
QUESTIONS = """{%- set first = messages[0].role == 'system' %}
{%- for m in (messages[1:] if first else messages) %}
    {%- if m.role == 'user' %}
        {{- '<|user|>' + (messages[0].content + ': ' if first and loop.last else '') + m.content }}
    {%- else %}
        {{- '<|assistant|> ' + m.content + ' ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
SAID = [user(" the 12 "), answer("us"), user("\nll")]
SYSTEM = [{"role": "system", "content": "the us "}]
ML = ("<|im_start|>user\n the 12 <|im_end|>\n<|im_start|>assistant\nus<|im_end|>\n"
      "<|im_start|>user\n\nll<|im_end|>\n<|im_start|>assistant\n")
HEADED = ("<|start_header_id|>user<|end_header_id|>\n\nthe 12<|eot_id|><|start_header_id|>assistant"
          "<|end_header_id|>\n\nus<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nll"
          "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
TODAY = "<|bos|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul\n\n"
TALK = [user("1"), answer("<think>\nus\n</think>\n\nus"), user("2")]


def chat(directory, template, names=(*NAMES, "<|user|>", "<|assistant|>"), **more):
    """A tokenizer with this chat template."""
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>", "chat_template": template}
    return build(directory, split(LLAMA3), config=config, names=names, **more)


@pytest.mark.parametrize("template, messages, text", [
    (CHATML, SAID, "<|im_start|>system\nIt's \\boxed{}.<|im_end|>\n" + ML),
    (CHATML, SYSTEM + SAID, "<|im_start|>system\nthe us <|im_end|>\n" + ML),
    (HEADERS, SAID, TODAY + "<|eot_id|>" + HEADED),
    (HEADERS, SYSTEM + SAID, TODAY + "the us<|eot_id|>" + HEADED),
    (THINKING, SAID, ML), (THINKING, SYSTEM + SAID, "<|im_start|>system\nthe us <|im_end|>\n" + ML),
    (THINKING, TALK, "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nus<|im_end|>\n"
                     "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"),
    (QUESTIONS, SYSTEM + SAID[2:], "<|user|>the us : \nll<|assistant|>")])
def test_chat_is_what_the_template_writes(tmp_path, template, messages, text):
    """A default system prompt forgotten or put before a given one, role and content merged apart,
    dates or trimming left out, thoughts kept: a model that never saw such a prompt."""
    tokenizer = chat(tmp_path, template)
    assert tokenizer.encode_chat(messages) == spelled(tokenizer, text)
    if template != QUESTIONS:
        check_prefix(tokenizer)


def test_a_thought_that_changes_what_stands_around_it(tmp_path):
    """An answer whose place in the template depends on its text taken for markup, or refused."""
    tokenizer = chat(tmp_path, THINKING, added=[("<think>", {}), ("</think>", {})])
    text = ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nus\n</think>\n\nus"
            "<|im_end|>\n")
    assert tokenizer.encode_chat(TALK[:2], add_generation_prompt=False) == spelled(tokenizer, text)


def test_thoughts_between_special_tokens_are_cut(tmp_path):
    """A template that looks for <think> in a content does not find it where that is a special
    token, because nobody may type those: thoughts stay."""
    tokenizer = chat(tmp_path, THINKING, names=[*NAMES, "<think>", "</think>"])
    text = ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nus<|im_end|>\n"
            "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode_chat(TALK) == spelled(tokenizer, text)
    with pytest.raises(InputError, match="cannot be told apart"):
        tokenizer.encode_chat([*TALK[:2], user("<|im_end|>")])


def test_between_special_tokens_stands_one_text(tmp_path):
    """A header and an answer in it encoded apart, which merge in transformers: for an answer with
    blanks around it the ids differ from all that the checkpoint has seen."""
    tokenizer = chat(tmp_path, CHATML)
    assert len(tokenizer.encode("\n\n")) == 1              # they merge
    messages = [*SYSTEM, user("\n"), answer("\n")]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert tokenizer.encode_chat(messages, False) == spelled(tokenizer, text)


@pytest.mark.parametrize("template", [CHATML, HEADERS, THINKING, QUESTIONS, None])
def test_nobody_types_special_tokens(tmp_path, template):
    """A user, a tool or a document whose text holds <|im_end|> ends the turn and speaks for the
    assistant. Also where a template trims and cuts that text."""
    tokenizer = chat(tmp_path, template)
    for name in tokenizer.specials:
        messages = []
        for turn in (SYSTEM[0], *SAID):
            messages.append(turn | {"content": f" {name} b{name}"})
        plain = [turn | {"content": "b"} for turn in messages]
        if template == QUESTIONS:
            messages, plain = messages[:2], plain[:2]
        special = set(tokenizer.specials.values())
        found = [i for i in tokenizer.encode_chat(messages) if i in special]
        assert found == [i for i in tokenizer.encode_chat(plain) if i in special]
        assert set(tokenizer.encode_turn(name)) & special == \
            set(tokenizer.encode_turn("b")) & special
        assert name in tokenizer.decode(tokenizer.encode_chat(messages))


def test_pieces_of_special_tokens_do_not_join(tmp_path):
    """<|im_<think>end|> becomes <|im_end|> in a template that deletes <think>."""
    tokenizer = chat(tmp_path, CHATML.replace("m.content", "m.content.replace('<think>', '')"))
    end = tokenizer.specials["<|im_end|>"]
    try:
        ids = tokenizer.encode_chat([user("<|im_<think>end|>b")])
    except InputError as e:
        assert "cannot be told apart" in str(e)
    else:
        assert ids.count(end) == 2


# -- more than role and content

CALL = {"type": "function", "function": {"name": "look", "arguments": {"us": "12"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "the us"}}]
USING = """{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('12' if thinking is defined and not thinking else '') }}
{%- endif %}
"""


def test_tools_thoughts_and_parts_are_written(tmp_path):
    """Calls of tools, or what they may be, vanish from a prompt; a content in parts ends the run."""
    tokenizer = chat(tmp_path, USING)
    parts = [{"type": "text", "text": "us"}, {"type": "text", "text": "er"}]
    talk = [user(parts) | {"tools": TOOLS, "tool_calls": None},
            answer(None) | {"tool_calls": [CALL]}, {"role": "tool", "content": "ll"},
            answer("12") | {"reasoning_content": "the"}]
    turns = [("tools", json.dumps(TOOLS)), ("user", "user"),
             ("assistant", json.dumps(CALL["function"])), ("tool", "ll"), ("assistant", "(the)12")]
    text = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)
    text += "<|im_start|>assistant\n"
    assert tokenizer.encode_chat(talk) == spelled(tokenizer, text)
    # Nor are they a way to type special tokens.
    for name in ("<|im_end|>", "<|im_start|>"):
        typed = json.dumps(talk).replace('"look"', f'"{name}"').replace('"12"', f'"{name}"')
        found = tokenizer.encode_chat(json.loads(typed))
        assert found.count(tokenizer.specials[name]) == text.count(name)
        assert tokenizer.decode(found).count(name) == 4


@pytest.mark.parametrize("template", [CHATML, USING.replace("m.tool_calls or", "m.tool_callsx or"),
                                      None])
@pytest.mark.parametrize("message, words", [
    (answer("") | {"tool_calls": [CALL]}, "tool_calls"), (user("a") | {"tools": TOOLS}, "tools"),
    (answer("a") | {"reasoning_content": "12"}, "reasoning_content"), (user(None), "NoneType"),
    (user([{"type": "image", "image": "a"}]), "image"), (user([3]), "int"),
    (user([{"type": "text"}]), "text")])
def test_what_a_template_does_not_know_is_refused(tmp_path, template, message, words):
    """A model that is trained on half of a prompt, without a word."""
    tokenizer = chat(tmp_path, template)
    if template and "callsx" in template and words in ("tools", "reasoning_content"):
        return                                          # it knows these
    with pytest.raises(InputError, match=words):
        tokenizer.encode_chat([message, user("b")])


@pytest.mark.parametrize("message", [{"role": "tool", "content": "18 C"},
                                     answer("a") | {"reasoning_content": "b"}])
def test_the_worlds_chats_have_no_tools(tokenizer, message):
    """The words of a tool taken for the user's; a thought lost without a word."""
    with pytest.raises(InputError, match="small worlds"):
        tokenizer.encode_chat([message])


def test_template_args(tmp_path):
    """Options of a template that do not reach it, are lost when a trained model is saved, or do
    nothing because of a wrong name, a capital letter, or a second one."""
    plain = chat(tmp_path, USING).encode_chat([user("a")])
    for text, wanted in (("thinking=false", True), ("thinking=False,tools=[]", True),
                         ("tools=[], thinking=false", True), ("thinking=true", False),
                         ("thinking=off", False), ("", False)):
        tokenizer = chat(tmp_path, USING)
        use_template_args(tokenizer, text)
        expected = plain + tokenizer.encode("12") * wanted
        assert tokenizer.encode_chat([user("a")]) == expected
        (tmp_path / "saved").mkdir(exist_ok=True)
        tokenizer.save(str(tmp_path / "saved"))
        again = load_tokenizer(str(tmp_path / "saved"))
        assert again.encode_chat([user("a")]) == expected
        assert again.encode_turn("a") == tokenizer.encode_turn("a")
    for text in ("think=false", "thinking", "=false", "thinking=1,think=2"):
        with pytest.raises(InputError, match="--template-args"):
            use_template_args(tokenizer, text)


def next_words(*_):
    """What the user says next."""
    return "2"


def test_a_pair_and_a_fresh_conversation_have_one_prompt(tmp_path):
    """A policy that is asked in another form than the one it was trained in, and a cache whose past
    is written anew: what was committed stays, thoughts and blanks that a template cuts included."""
    tokenizer = chat(tmp_path, THINKING)
    model = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(max_len=200))
    pair = encode_pair(Preference("honesty", [user(" 1 ")], "us", "ll"), model)
    assert pair.prompt == tokenizer.encode_chat([user(" 1 ")])
    problem, world = Problem(" 1 "), SimpleNamespace(reply=next_words)
    talk = Conversation(problem, tokenizer)
    assert talk.ids == pair.prompt
    said = tokenizer.encode(TALK[1]["content"]) + [tokenizer.eos_id]
    talk.answer(said, world, tokenizer, None)
    assert talk.ids == pair.prompt + said + tokenizer.encode_turn("2")
    fresh = tokenizer.encode_chat(talk.messages)
    assert len(fresh) < len(talk.ids) and fresh[:len(pair.prompt)] == pair.prompt


# -- what cannot be spelled

@pytest.mark.parametrize("template, messages, words", [
    ("{{ raise_exception('only one question, please') }}", SAID, "only one question, please"),
    (CHATML.replace("m.content", "m.text"), SAID, "leaves out the content of user: ' the 12 '"),
    (CHATML.replace("m.content", "m.text.de"), SAID, "has no attribute 'text'"),
    (CHATML.replace("{% endfor %}", ""), SAID, "template"),
    ("{{ ''.__class__.__mro__ }}", SAID, "unsafe"), ("{{ 1 / 0 }}", SAID, "division"),
    ("{% include 'a' %}", SAID, "no loader"), ("{{ messages.append(1) }}", SAID, "unsafe"),
    ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
     [user("a"), {"role": "tool", "content": "18 C"}], "leaves out the content of tool: '18 C'"),
    ("{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if 'b' in m.content }}{% endfor %}",
     [user("ab")], "cannot be told apart")])
def test_its_own_words_are_the_error(tmp_path, template, messages, words):
    """A traceback from inside Jinja, or a prompt of another form than the model learnt, without a
    word. encode() works all the same: a base model may come with any template."""
    tokenizer = chat(tmp_path, template)
    assert shown(tokenizer, " the") == " the" and tokenizer.pieces[tokenizer.eos_id] == b""
    with pytest.raises(InputError, match=words) as e:
        tokenizer.encode_chat(messages)
    assert str(tmp_path) in str(e.value) and "chat_template" in str(e.value)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = ("{% set n = namespace(a='0123456789') %}{% for i in range(64) %}"
          "{% set n.a = n.a + n.a %}{% endfor %}")


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    """The process that renders has one second for a request -> 1."""
    assert SECONDS <= 4
    program = (Path(templates.__file__).parent / "render.py").read_text(encoding="utf-8")
    quick = program.replace(f"SECONDS = {SECONDS} ", "SECONDS = 1 ")
    assert quick != program
    (tmp_path / "render.py").write_text(quick, encoding="utf-8")
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "templates.py"))
    another = functools.cache(templates.renderer.__wrapped__)
    monkeypatch.setattr(templates, "renderer", another)
    yield 1
    another(os.getpid()).kill()


@pytest.mark.parametrize("template, words", [
    (LOOPS, "too long"), ("{{ 10 ** (10 ** 10) }}", "too long"),
    (DOUBLE, "MemoryError|too long"), ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
    ("{{ 'ab' * 10 ** (messages | length + 4) }}", "20000000 characters"),
    ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion")])
def test_a_hostile_template_is_ended(tmp_path, impatient, template, words):
    """The sandbox stops neither nested loops nor a huge number or text: a checkpoint from elsewhere
    hangs the machine, or takes its memory. After that, others must still be rendered."""
    good = chat(tmp_path, CHATML).encode_chat(SAID)
    start = time.monotonic()
    tokenizer = chat(tmp_path, template)
    for _ in range(2):
        with pytest.raises(InputError, match=words):
            tokenizer.encode_chat(SAID)
    assert time.monotonic() - start < impatient + 1
    assert chat(tmp_path, CHATML).encode_chat(SAID) == good


def test_threads_and_lost_processes(tmp_path):
    """Signals work in the main thread alone: in a notebook's or a server's threads nothing would be
    bounded, or answers would get mixed up. A process that was killed from outside is replaced."""
    tokenizer, found = chat(tmp_path, CHATML), {}

    def encode(n):
        found[n] = [tokenizer.encode_chat([user(f"{n} {i}")]) for i in range(20)]

    workers = [threading.Thread(target=encode, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for n in range(4):
        assert found[n] == [tokenizer.encode_chat([user(f"{n} {i}")]) for i in range(20)]
    templates.renderer(os.getpid()).kill()
    with pytest.raises(InputError, match="process ended"):
        tokenizer.encode_chat([user("0 0")])
    assert tokenizer.encode_chat([user("0 0")]) == found[0][0]


# -- what templates may use

@pytest.mark.parametrize("template, text", [
    ("{{ {'b': '<', 'a': 'é'} | tojson }}", '{"b": "<", "a": "é"}'),
    ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
    ("{% generation %}a{% endgeneration %}", "a"),
    ("{{ strftime_now('%Y') }}", str(datetime.date.today().year)),
    ("{{ tools is none }} {{ documents is none }} {{ eos_token }} {{ nothing is defined }}",
     "True True </s> False")])
def test_what_templates_may_use(template, text):
    """Templates are written for transformers: blocks trimmed, its functions and variables. One
    missing, and the template fails or takes another turn."""
    found = templates.written(template, {"eos_token": "</s>"}, [], re.compile("(?!)"))
    assert found == (text, {})


@pytest.mark.parametrize("template, config, eos, turn", [
    (CHATML, "<|endoftext|>", "<|im_end|>",
     "\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"),
    (CHATML.replace("m.content }}<", "m.content }} <"), "<|endoftext|>", "<|im_end|>",
     "\n<|im_start|>user\nB <|im_end|>\n<|im_start|>assistant\n"),
    (QUESTIONS, "<|endoftext|>", "<|user|>", "B<|assistant|>"),
    ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<|eot_id|>",
     "<|eot_id|>", "B<|eot_id|>"),
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "<|eot_id|>", "<|eot_id|>", "\nB\n"),
    (None, "<|eot_id|>", "<|eot_id|>", "User: B\nAssistant:")])
def test_what_ends_an_answer(tmp_path, template, config, eos, turn):
    """Answers that end with a base model's end of text where the template ends turns otherwise; the
    user's next message glued to the answer."""
    config = {"eos_token": config, "bos_token": "<|bos|>", "add_bos_token": True,
              "chat_template": template}
    tokenizer = build(tmp_path, config=config, names=[*NAMES, "<|user|>", "<|assistant|>"])
    assert tokenizer.eos_id == tokenizer.specials[eos]
    assert tokenizer.encode_turn("B") == spelled(tokenizer, turn)
    assert (tokenizer.bos_id is None) == (template is not None)


def test_without_a_template(tmp_path):
    """A base model that cannot be asked at all, or whose answers have no end."""
    tokenizer = build(tmp_path, GPT2, config={"eos_token": "<|endoftext|>"})
    text = "User:  the 12 \nAssistant:us<|endoftext|>User: \nll\nAssistant:"
    assert tokenizer.encode_chat(SAID) == spelled(tokenizer, text)
    check_prefix(tokenizer)


def test_where_the_template_lies(tmp_path):
    """chat_template.jinja or the list of named templates overlooked: the model is asked in a form
    that it never learnt."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert chat(tmp_path, named).template == CHATML
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    assert load_tokenizer(str(tmp_path)).template == HEADERS
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="tokenizer.json"):
        chat(tmp_path, {"no": "text"})


# -- real ones

BRIEF = {"role": "system", "content": " Be brief.\n"}
CHATS = [[user("What is 12345 + 678?")], [user("  \n What's up? 你好 \n\n ")], [BRIEF, user("Hi")],
         [user("Hi"), answer("Hello! 3.14"), user("And 2+2?")],
         [user(" Hi\n"), answer(" Hello! \n"), user(" And ")],
         [BRIEF, user("Hi"), answer("Yes"), user("x"), answer("No."), user("1 2 3")],
         [user("Hi"), answer("<think>\nhm, 1\n</think>\n\nHello"), user("Next")]]
# crc32 of the ids that transformers 5.24 gives for each of CHATS (tokenizers' own reading of
# tokenizer.json, the checkpoint's template, add_generation_prompt).
REAL = {
    "llama3_1": [1787855475, 1496211577, 175888988, 3801253564,
                 2418385066, 3423032582, 4014074858],
    "qwen2_5": [2486009199, 2813923287, 2642256239, 3973522497,
                565222372, 3047345977, 1244481689],
    "qwen3": [3906867789, 4108650767, 2642256239, 3226928892,
              229773197, 3047345977, 1327917788],
    "mistral_nemo": [2929837999, 1048714501, 3154122877, 3355219067,
                     474213243, 4178244766, 1977962581],
    "deepseek_v3": [4209903100, 4131205509, 3659128009, 2304126743,
                    1238010665, 286479614, 2808575542]}


def real(*names):
    """A file of MAHALO_TEMPLATES."""
    path = os.path.join(os.environ.get("MAHALO_TEMPLATES", ""), *names)
    if "MAHALO_TEMPLATES" not in os.environ or not os.path.exists(path):
        pytest.skip("MAHALO_TEMPLATES does not lead there; see tests/fetch_templates.sh")
    return path


def digest(ids):
    return zlib.crc32(json.dumps(ids).encode())


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name):
    """ids that differ from what the checkpoint was trained on: the model answers as if confused."""
    tokenizer = load_tokenizer(real(name))
    assert [digest(tokenizer.encode_chat(messages)) for messages in CHATS] == REAL[name]
    check_prefix(tokenizer)
    for text in ("<|im_end|>", *tokenizer.specials):
        assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values())


SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?[A-Z_]{3,20}\]|</?s>"
                     r"|<(?:start|end)_of_turn>|<\|?turn\|?>|<\|channel>|<channel\|>")


def test_real_templates():
    """Templates of a family that is not foreseen: a message refused or lost. Templates for pictures
    want contents in parts and take texts for nothing; Gemma's first refuses a system message."""
    folder, refused = real("templates"), {}
    for name in sorted(os.listdir(folder)):
        if name.endswith("_training.jinja"):                # the same, with marks for training
            continue
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            template = f.read()
        markup = one_of(set(SPECIAL.findall(template)) | {"<s>", "</s>"})
        variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
        for messages in CHATS:
            try:
                text, _ = templates.written(template, variables, messages, markup)
            except InputError as e:
                refused.setdefault(name.removesuffix(".jinja"), []).append(str(e))
                continue
            assert messages[-1]["content"].strip() in text
    pictures = {"idefics3", "llava_next", "smolvlm"}
    assert refused.keys() - pictures <= {"gemma"}
    assert set(refused.get("gemma", [])) <= {"System role not supported"}
