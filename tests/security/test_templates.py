"""Chat templates and Jinja lines that try to get out, never end, or eat memory."""

import resource
import shutil
import subprocess
import sys
import time

import pytest

import peftkit
from peftkit.data.chat.template import DEFAULT_TEMPLATE
from peftkit.data.jinja import render as rendering
from peftkit.data.jinja.render import is_known_template, render_chat
from peftkit.errors import UserError
from tests.conftest import ROOT, TINY_LLAMA, write_jsonl

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SAY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ namespace.__init__.__globals__['os'].system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '%s'|format(messages)|attr('format')('{0.__class__}') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{% set x = strftime_now.__globals__ %}{{ x['os'].system('touch MARK') }}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ dict.__init__.__globals__ }}",
    "{{ ''['for'+'mat_map'] }}{{ messages.append(messages) }}",
]

SANDBOX = ROOT / "peftkit" / "data" / "jinja" / "sandbox.py"


@pytest.mark.parametrize("attack", ESCAPES)
def test_nothing_leaves_the_sandbox(attack, tmp_path):
    import jinja2

    mark = tmp_path / "executed"
    try:
        text, _ = render_chat(TURNS, template=SAY + attack.replace("MARK", str(mark)))
    except (jinja2.TemplateError, TypeError):
        text = ""
    assert not mark.exists()
    assert "root:" not in text and "<class" not in text and "__builtins__" not in text


HOGS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long number": "{{ 10 ** 10 ** 9 }}",
    "doubling in a row": "{% set a = messages|string %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "doubling in a loop": "{% set n = namespace(a='x') %}{% for m in messages %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a wide number": "{{ '%9999999999d' % 1 }}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "a wide filter": "{{ 'a'|center(9999999999) }}",
    "a wide indent": "{{ messages|tojson(indent=9999999999) }}",
    "a wide time": "{{ strftime_now('%9999999999d') }}",
    "longer replacements": "{% set a = 'a' %}" + "{% set a = a.replace('a', 'aaaaaaaaaa') %}" * 12 + "{{ a }}",
    "quotes of quotes": "{% set a = 'x\\\\' %}" + "{% set a = a|tojson %}" * 60,
    "lists of lists": "{% set a = 'x\\\\' %}" + "{% set a = [a]|string %}" * 60,
    "split and joined": "{% set a = 'x\\\\y' %}" + "{% set a = a.split('z') ~ '' %}" * 60,
    "in one expression": "{{ " + "[" * 60 + "'\\\\'" + "]|string" * 60 + " }}",
    "macros that call": (
        "{% macro m0() %}x{% endmacro %}"
        + "".join(f"{{% macro m{i}() %}}{{{{ m{i - 1}() }}}}{{{{ m{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 60))
        + "{{ m59() }}"
    ),
    "a macro that calls itself": "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "letters of letters": "{% for a in messages[0].content %}{% for b in messages[0].content %}{{ messages }}"
    "{% endfor %}{% endfor %}",
    "a call block": "{% macro m() %}{{ caller() ~ caller() }}{% endmacro %}{% call m() %}x{% endcall %}",
    "a filter block": "{% filter center(9999999999) %}x{% endfilter %}",
    "a set block": "{% set a %}{{ messages }}{{ messages }}{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "lorem ipsum": "{{ lipsum(n=99999999) }}",
    "slices": "{{ messages|slice(9999999999)|list }}",
    "a recursive loop": "{% for a in [[]] recursive %}{{ loop([[]]) }}{{ loop([[]]) }}{% endfor %}",
    "a large dict": "{% set a = messages %}" + "{% set a = {'a': a, 'b': a} %}" * 60 + "{{ a }}",
    "equal for long": "{% set a = [] %}{% set b = [] %}"
    + "{% set a = [a, a] %}{% set b = [b, b] %}" * 60
    + "{{ a == b }}",
    "squares": "{% set n = namespace(a=9) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "an escaped text": "{% set a = '&' %}" + "{% set a = a|e %}" * 9999,
    "a very long template": "{% if true %}{% endif %}" * 99999,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "two that feed each other": "{% set n = namespace(a='x', b='y') %}{% for m in messages %}"
    "{% set n.a = n.a ~ n.b %}{% set n.b = n.b ~ n.a %}{% endfor %}",
    "added to a part": "{% set a = messages[0].content %}{% for m in messages %}{% set a = a + a %}{% endfor %}",
    "letters that add": "{% set n = namespace(a='x') %}{% for c in n.a %}{% set n.a = n.a ~ 'xxxxxxxx' %}{% endfor %}",
    "a filter by name": "{{ messages|map('center', 9999999999)|list }}",
    "a name of a method": "{{ messages[0]['content']['center'](9999999999) }}",
    "a cycle": "{% for m in messages %}{{ loop.cycle('a' * 9999999, 'b') }}{% endfor %}",
    "wide by a variable": "{% set f = '%99999999' ~ 'd' %}{{ f % 1 }}",
    "a number that is none": "{% set n = namespace(a=1) %}{% set n.a = '%9999999999d' %}{{ n.a % 1 }}",
    "one name for two": "{% set a = 1 %}{% for a in ['%9999999999d'] %}{{ a % 1 }}{% endfor %}",
    "an argument": "{% macro m(a) %}{{ a % 1 }}{% endmacro %}{% set a = 1 %}{{ m('%9999999999d') }}",
    "varargs": "{% macro m() %}{% for a in varargs %}{{ a ~ a }}{% endfor %}{% endmacro %}{{ m(*messages) }}",
}


@pytest.mark.parametrize("hog", HOGS)
def test_what_is_not_known_word_for_word_is_never_rendered_in_this_process(hog):
    assert not is_known_template(SAY + HOGS[hog])
    assert not is_known_template(DEFAULT_TEMPLATE + " ")


QUICK = ["a long text", "a wide number", "doubling in a row", "lists of lists", "deep brackets"]


def bounded(hog):
    """(what is told, seconds, bytes that this process grew by)."""
    import jinja2

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        render_chat(TURNS, template=SAY + HOGS[hog])
        told = ""
    except (UserError, jinja2.TemplateError, TypeError) as error:
        told = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return told, time.monotonic() - start, grown * 1024


@pytest.mark.parametrize("hog", QUICK)
def test_memory_is_bounded(hog):
    render_chat(TURNS, template=SAY + "{{ 'a' * 3 }}")  # the process with limits is there
    told, took, grown = bounded(hog)
    assert told
    assert took < rendering.TIMEOUT_SECONDS + 5
    assert grown < 300e6


@pytest.mark.slow
@pytest.mark.parametrize("hog", HOGS)
def test_every_hog_ends_in_time(hog):
    _, took, grown = bounded(hog)
    assert took < rendering.TIMEOUT_SECONDS + 5
    assert grown < 300e6


def test_time_is_bounded_and_asked_for_once(monkeypatch, recipe, tmp_path):
    """A base whose template never ends: told as an error, once, and nothing is trained."""
    monkeypatch.setattr(rendering, "TIMEOUT_SECONDS", 1.0)
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    (base / "chat_template.jinja").write_text(SAY + HOGS["nested ranges"] + HOGS["nested ranges"])
    recipe["base"] = str(base)
    start = time.monotonic()
    with pytest.raises(UserError, match="a template that takes more than 1 seconds for one chat"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    assert time.monotonic() - start < 20


def test_the_process_comes_back(monkeypatch):
    monkeypatch.setattr(rendering, "TIMEOUT_SECONDS", 1.0)
    with pytest.raises(UserError, match="takes more than 1 seconds"):
        render_chat(TURNS, template=SAY + "{# again #}" + HOGS["nested ranges"])
    assert render_chat(TURNS, template=SAY + "{{ 'b' * 3 }}")[0].endswith("bbb")


def test_a_template_with_limits_renders_as_without():
    """The same text and spans from both processes, for templates in use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = rendering.Path(rendering.importlib.util.find_spec("trl").origin).parent / "chat_templates"
    chat = [{"role": "system", "content": "short"}, *TURNS, {"role": "user", "content": "é\u2028'\"\\"}, TURNS[1]]
    described = {"type": "object", "properties": {"x": {"type": "string", "description": 'a "text"'}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": described}}]
    compared = 0
    for name in ("gptoss", "glm4moe_training", "lfm2", "deepseekv3_training", "llama3_1", "qwen3_6_training"):
        template = (folder / f"{name}.jinja").read_text() + "{# mine #}"
        assert not is_known_template(template) and is_known_template(template.removesuffix("{# mine #}"))
        options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        options["return_assistant_tokens_mask"] = "generation" in template and "training" in name
        [text], spans = render_jinja_template([chat], tools=tools, chat_template=template, **options)
        assert render_chat(chat, template=template, tools=tools, **options) == (text, [s for o in spans for s in o])
        compared += 1
    assert compared == 6


def test_templates_in_use_are_known():
    assert is_known_template(DEFAULT_TEMPLATE)
    folder = rendering.Path(rendering.importlib.util.find_spec("trl").origin).parent / "chat_templates"
    assert all(is_known_template(path.read_text()) for path in folder.glob("*.jinja"))


def test_even_outside_the_sandbox_there_is_nothing_to_do(tmp_path):
    """The guard of the process that renders, without any sandbox before it."""
    mark = tmp_path / "executed"
    program = f"""
import importlib.util, os, socket, subprocess, sys
spec = importlib.util.spec_from_file_location("renderer", {str(SANDBOX)!r})
renderer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(renderer)
sys.addaudithook(renderer.deny_side_effects)
for attempt in (
    lambda: os.system("touch {mark}"), lambda: subprocess.run(["touch", "{mark}"]), lambda: os.fork(),
    lambda: open("{mark}", "w"), lambda: os.open("{mark}", os.O_CREAT), lambda: os.mkdir("{mark}"),
    lambda: socket.create_connection(("127.0.0.1", 9)), lambda: __import__("ctypes").CDLL(None),
):
    try:
        attempt()
    except PermissionError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * 8, done.stderr
    assert not mark.exists()


LINES = ["{{ q * 10**10 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "{{ '%9999999999d' % 1 }}", "{{ q|center(10**10) }}",
         "{% set a = q %}" + "{% set a = a ~ a %}" * 60]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_of_columns_are_rendered_within_limits(line, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "TIMEOUT_SECONDS", 1.0)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "a": "b"}] * 8)
    recipe["data"] = {"train": str(rows), "columns": {"prompt": line, "completion": "a"}}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot render|for one row"):
        peftkit.check_data(recipe)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("attack", ["{{ q.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ q|attr('__class__') }}"])
def test_lines_of_columns_stay_in_the_sandbox(attack, recipe, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "a": "b"}] * 8)
    recipe["data"] = {"train": str(rows), "columns": {"prompt": attack, "completion": "a"}}
    with pytest.raises(UserError) as refused:
        peftkit.finetune(recipe, out=tmp_path / "run")
    assert "<class" not in str(refused.value)


def test_honest_lines_work(recipe, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a", "tags": ["x", "y"], "a": "b"}] * 8)
    listed = "{% for t in tags %}{{ t }}{% if not loop.last %}, {% endif %}{% endfor %}"
    line = "{{ q|trim }} (" + listed + ") {{ tags|join('; ') }}"
    recipe["data"] = {"train": str(rows), "columns": {"prompt": line, "completion": "a"}}
    report = peftkit.check_data(recipe)
    assert "a (x, y) x; y" in "".join(piece.text for piece in report.samples[0].pieces)
