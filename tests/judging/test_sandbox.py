"""Limits of prompt templates, which may come from an untrusted folder: no rendering takes much memory or time."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from jinja2 import DictLoader, Environment, StrictUndefined
from jinja2.exceptions import SecurityError

from selfeval.judging.sandbox import PromptEnvironment

DOUBLED = "{% set x = namespace(y='0123456789') %}{% for i in range(30) %}{% set x.y = TWICE %}{% endfor %}{{ x.y }}"
MANY = "{% set a = 'a,' * 20000 %}"


def render(text: str, others: dict[str, str] | None = None, **values: Any) -> str:
    return PromptEnvironment(DictLoader({**(others or {}), "t.jinja": text})).render("t.jinja", **values)


@pytest.mark.parametrize(
    "text",
    [
        # methods
        "{{ 'a'.center(50000000) }}",
        "{{ 'a'.ljust(50000000) }}",
        "{{ 'a'.rjust(50000000, 'b') }}",
        "{{ '1'.zfill(50000000) }}",
        "{{ '\t'.expandtabs(50000000) }}",
        MANY + "{{ a.replace(',', a) }}",
        MANY + "{{ a.join(a) }}",
        MANY + "{{ a.join(range(1000)|map('string')) }}",
        MANY + "{{ a.translate({97: a}) }}",
        "{{ '{:>50000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 50000000) }}",
        "{{ '{:>{w[w]}}'.format(1, w={'w': '50000000'}) }}",
        "{{ '{a:>50000000}'.format_map({'a': 1}) }}",
        MANY + "{{ ('{0}' * 10000).format(a) }}",
        "{{ (5).to_bytes(50000000, 'big')|length }}",
        "{{ ('a'|attr('center'))(50000000) }}",
        # filters
        "{{ 'a'|center(50000000) }}",
        "{{ 'a'|indent(50000000, first=true) }}",
        "{{ 'a'|indent('b' * 4000000, first=true) }}",
        MANY + "{{ a|wordwrap(1, wrapstring=a) }}",
        "{{ '%50000000d'|format(1) }}",
        MANY + "{{ a|replace(',', a) }}",
        MANY + "{{ a|list|join(a) }}",
        MANY + "{{ range(9999)|map('center', 100000)|join }}",
        "{{ [1]|batch(5000000, 'a')|list }}",
        "{{ [1]|slice(50000000)|list }}",
        "{{ [[1]]|tojson(indent=50000000) }}",
        MANY + "{{ [a]|map('replace', ',', a)|list }}",
        MANY + "{% filter replace(',', a) %}{{ a }}{% endfilter %}",
        "{% set a = 'a' | center(50000000) %}",
        # operators
        "{{ '%50000000d' % 1 }}",
        "{{ '%*d' % (50000000, 1) }}",
        "{{ '%.50000000f' % 1 }}",
        "{{ '%(a(b))50000000d' % {'a(b)': 1} }}",
        MANY + "{{ ('%(a)s' * 10000) % {'a': a} }}",
        "{{ ('a' * 3000000) ~ ('b' * 3000000) }}",
        "{{ ('a' * 3000000) + ('b' * 3000000) }}",
        "{{ ([[1] * 100000] * 1000)|string }}",
        DOUBLED.replace("TWICE", "x.y ~ x.y"),
        DOUBLED.replace("TWICE", "x.y + x.y"),
        DOUBLED.replace("TWICE", "[x.y, x.y]"),
        # outputs
        MANY + "{% for i in range(1000) %}{{ a }}{% endfor %}",
        MANY + "{% set b %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endset %}",
        MANY + "{% macro m() %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endmacro %}{{ m()|length }}",
        MANY + "{{ [" + "a, " * 1000 + "] }}",
        MANY + "{{ {" + "".join(f"{i}: a, " for i in range(1000)) + "}.values()|join }}",
        MANY + "{{ namespace(" + ", ".join(f"a{i}=a" for i in range(1000)) + ") }}",
    ],
)
def test_no_text_becomes_too_large(text: str) -> None:
    environment = PromptEnvironment(DictLoader({"t.jinja": text}))
    tracemalloc.start()
    try:
        with pytest.raises(SecurityError, match="a template may"):
            environment.render("t.jinja")
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% set x = 'a,' * 9999 %}{% for a in x %}{% for b in x.split(',') %}{{ b }}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{% set x = ('a,' * 9999).split(',') %}{% for a in x recursive %}{% if loop.depth < 3 %}{{ loop(x) }}{% endif %}"
        "{% endfor %}",
        "{% set n = namespace(i=0) %}{% macro m() %}{% set n.i = n.i + 1 %}{% if n.i < 30 %}"
        "{{ caller() }}{{ caller() }}{% endif %}{% endmacro %}{% for i in range(99999) %}{% call m() %}"
        + "{{ 1 }}" * 1000 + "{% endcall %}{% set n.i = 0 %}{% endfor %}",
        "{% import 'other' as o %}{% for i in range(999) %}{{ o.m() }}{% endfor %}",
        "{% include 'twice' %}",
    ],
)  # fmt: skip
def test_no_template_runs_forever(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.judging.sandbox.MOST_STEPS", 50_000)
    others = {
        "other": "{% macro m() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}",
        "twice": "{% set depth = (depth|default(0)) + 1 %}{% if depth < 40 %}{% include 'twice' %}{% include 'twice' %}"
        "{% endif %}",
    }
    start = time.thread_time()
    with pytest.raises(SecurityError, match="may take 50,000 steps at most"):
        render(text, others)
    assert time.thread_time() - start < 5


def test_a_step_that_is_slow_on_a_long_text_is_limited_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.judging.sandbox.MOST_SECONDS", 0.2)
    with pytest.raises(SecurityError, match=r"may take 0\.2 seconds of CPU time at most"):
        render("{% set a = 'a b' * 1000000 %}{% for i in range(9999) %}{{ a|wordcount }}{% endfor %}")


def test_every_rendering_has_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.judging.sandbox.MOST_STEPS", 2000)
    environment = PromptEnvironment(DictLoader({"t.jinja": "{% for i in range(999) %}{% endfor %}{{ q }}"}))
    assert [environment.render("t.jinja", q=str(i)) for i in range(12)] == [str(i) for i in range(12)]


TEXT = "One two  three.\n\n\tFour * 5 = {20}% & <b>six</b>\n" * 40
ORDINARY = [
    "{{ q }}{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}: {{ i * 2 }}{{ ', ' if not loop.last }}{% endfor %}",
    "{% for e in examples if e != 'b' %}{{ loop.cycle('x', 'y') }}{{ e|upper }}{% else %}none{% endfor %}",
    "{{ '-' * 10 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ 'a' ~ 1 ~ none ~ q }}{{ [1] + [2] }}{{ 5000000 }}",
    "{{ q.replace(' ', '_').strip().split('_')|join('; ') }}{{ ', '.join(examples) }}{{ q.center(80) }}{{ '7'.zfill(3) }}",
    "{{ q|indent(4)|wordwrap(20)|trim|truncate(900) }}{{ q|replace('six', 'seven', 1) }}{{ 'x'|center(9) }}",
    "{{ '%s costs 10000000 or 50%%, %5.2f'|format(q, 1.5) }}{{ '%(a)s' % {'a': q} }}{{ '{} of 10000000 {:>5}'.format(q, 3) }}",
    "{{ examples|map('upper')|join(' ') }}{{ examples|select('ne', 'a')|list }}{{ [3, 1]|sort }}{{ [1, 2]|sum }}",
    "{{ {'a': examples}|tojson(indent=2) }}{{ q|length }}{{ 3.14159|round(2) }}{{ missing|default('none') }}{{ q|wordcount }}",
    "{% macro m(x, y=2) %}<{{ x }}{{ y }}{{ caller() }}>{% endmacro %}"
    "{% call m(1) %}{% endcall %}{% call m(3, y=4) %}!{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for e in examples %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns }}",
    "{% set block %}a{{ q }}{% endset %}{{ block }}{% filter upper %}{{ q }}{% endfilter %}",
    "{% with z = 3 %}{{ z }}{% endwith %}{{ q|e }}",
    "{% include 'part' %}{% from 'other' import hello %}{{ hello('x') }}{% block b %}B{{ q }}{% endblock %}{{ self.b() }}",
    "{% extends 'base' %}{% block b %}{{ super() }}child{% endblock %}",
    "{% for row in examples|batch(2, '-') %}{{ row|join }}{% endfor %}",
    "{% for g in examples|groupby('0') %}{{ g.grouper }}{% endfor %}",
    "{% for x in [['a', ['b']]] recursive %}{% if x is string %}{{ x }}{% else %}({{ loop(x) }}){% endif %}{% endfor %}",
    "{{ examples|reverse|list }}{{ q|lower|title|e }}{{ {'k': 'v'}.items()|list }}{{ examples[-1] }}{{ q[:5] }}{{ 'a' in q }}",
    "{% set c = cycler('a', 'b') %}{% macro n(c) %}{{ c.next() }}{% endmacro %}{{ n(c) }}{{ n(c) }}{{ joiner()() }}",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_templates_render_as_without_limits(text: str) -> None:
    others = {
        "part": "part {{ q }}",
        "other": "{% macro hello(x) %}hello {{ x }}{% endmacro %}",
        "base": "<{% block b %}base{% endblock %}>",
    }
    plain = Environment(loader=DictLoader({**others, "t.jinja": text}), undefined=StrictUndefined)
    values = {"q": TEXT, "examples": ["a", "b", "c"]}
    assert render(text, others, **values) == plain.get_template("t.jinja").render(**values)
