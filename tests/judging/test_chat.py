from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny_models
from selfeval.errors import ModelError
from selfeval.judging.chat import freeze_date, with_system
from selfeval.judging.templates import Templates, templates_folder
from selfeval.rollout.requests import Rollout

OWN = templates_folder("no such model")
DAY = date(2024, 7, 6)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DATED = (
    "{%- if strftime_now is defined %}\n  {%- set day = strftime_now('%d %b %Y') %}\n{%- endif %}\nToday: {{ day }}\n" + PLAIN
)
PARTS = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)


def load(chat: str | None, day: date = DAY, folder: Path = OWN) -> Templates:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = chat
    return Templates.load(folder, tokenizer, day)


def shown(templates: Templates, question: str = "How many?") -> str:
    return str(templates.tokenizer.decode(list(templates.prompt("reply", question=question).ids)))


# -- the date -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A %j %y %% %%Y", "%-d/%-m", "%H:%M:%S", "%x", "%F", "no directive"]
)
def test_the_frozen_clock_agrees_with_strftime(form: str) -> None:
    tokenizer: Any = tiny_models.words_tokenizer()
    source = freeze_date("{{ strftime_now(" + json.dumps(form) + ") }}|" + PLAIN, DAY, trims=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, tokenize=False)
    assert text == DAY.strftime(form) + "|user: x\n"


def test_a_dated_chat_template_shows_the_day_of_the_run() -> None:
    assert shown(load(DATED)) == "Today: 06 Jul 2024\nuser: How many?\n"
    assert load(DATED).prompt("reply", question="x") != load(DATED, date(2024, 7, 7)).prompt("reply", question="x")


def test_freezing_changes_nothing_else_and_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    today = tiny_models.words_tokenizer()
    for source in (DATED, "\n  {% if true %}\n  a\n{% endif %}\n" + DATED):
        today.chat_template = source
        message = [{"role": "user", "content": "How many?"}]
        real = today.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert shown(load(source, date.today())) == real
    assert freeze_date(PLAIN, DAY) == PLAIN
    once = freeze_date(DATED, DAY, trims=True)
    assert freeze_date(once, date(2030, 1, 1), trims=True) == once


def test_a_macro_of_the_template_sees_the_frozen_day() -> None:
    chat = "{% macro head() %}On {{ strftime_now('%Y') }}{% endmacro %}{{ head() }} " + PLAIN
    assert shown(load(chat)).startswith("On 2024 ")


def test_own_templates_have_the_same_clock(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "reply.jinja").write_text("  {{ strftime_now('%Y-%m-%d') }} {{ question }}")
    assert shown(load(None, folder=folder)) == "  2024-07-06 How many?"


def test_a_tokenizer_keeps_its_own_template_for_others() -> None:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = DATED
    Templates.load(OWN, tokenizer, DAY)
    assert tokenizer.chat_template == DATED


# -- the form of a message ----------------------------------------------------------------------------------------------


def test_content_in_parts_where_the_template_wants_it() -> None:
    assert shown(load(PARTS)) == "How many?"
    assert load(PARTS).parts
    assert not load(PLAIN).parts


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ raise_exception('give a system message first') }}", "give a system message first"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "drops the text of a user message"),
        ("{% for m in messages %}{{ m['content'] }}", "line 1"),
        ("{{ messages[0]['content'] }}{{ nothing.at.all }}", "nothing"),
        (" \n", "drops the text"),
        ("", "is empty"),
        (PLAIN + "{{ ['a', 'b'] | random }}", "random"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(chat: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(chat)


# -- a templates folder with a chat template ----------------------------------------------------------------------------


def test_a_templates_folder_may_replace_the_chat_template(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "chat_template.jinja").write_text("<" + PLAIN + ">")
    assert shown(load("{{ raise_exception('unusable') }}", folder=folder)) == "<user: How many?\n>"
    assert shown(load(None, folder=folder)) == "<user: How many?\n>"
    (folder / "chat_template.jinja").write_text("")
    assert shown(load(PLAIN, folder=folder)) == "Question: How many?\nAnswer:"


def test_a_frozen_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    load(DATED).tokenizer.save_pretrained(tmp_path)
    stranger: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = stranger.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False)
    assert text == "Today: 06 Jul 2024\nuser: How many?\n"


# -- arguments ----------------------------------------------------------------------------------------------------------

THINKS = (
    "{% macro head() %}{% if enable_thinking is defined and enable_thinking is false %}no {% endif %}think{% endmacro %}"
    "{{ head() }} {{ tone }} " + PLAIN
)


def load_with(chat: str | None, arguments: dict[str, Any]) -> Templates:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = chat
    return Templates.load(OWN, tokenizer, DAY, arguments=arguments)


def test_arguments_reach_every_prompt_as_if_they_were_passed() -> None:
    given = {"enable_thinking": False, "tone": "calm"}
    templates, tokenizer = load_with(THINKS, given), tiny_models.words_tokenizer()
    tokenizer.chat_template = THINKS
    asked = [{"role": "user", "content": "How many?"}]
    passed = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **given)
    assert shown(templates) == passed == "no think calm user: How many?\n"
    assert shown(load_with(THINKS, {"tone": "calm"})) == "think calm user: How many?\n"
    judged = templates.prompt("judge", question="Why?", first="So.", second="Thus.")
    assert templates.tokenizer.decode(list(judged.ids)).startswith("no think calm user: A question")


@pytest.mark.parametrize(
    "value", [None, True, 2, -0.5, 1e20, 'a "quoted" {% line %} \\ {{ x }}\n', [1, [None, "b"]], {"k": {"l": False}}]
)
def test_a_template_reads_the_very_value(value: Any) -> None:
    chat = "{{ [extra] | tojson }} " + PLAIN
    assert shown(load_with(chat, {"extra": value})) == f"{json.dumps([value], ensure_ascii=False)} user: How many?\n"


def test_other_tools_can_override_an_argument() -> None:
    any_tokenizer: Any = load_with(THINKS, {"enable_thinking": False, "tone": "calm"}).tokenizer
    text = any_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, enable_thinking=True)
    assert text.startswith("think calm")


def test_an_argument_that_the_template_does_not_read_is_named() -> None:
    given = {"enable_thinking": False, "thinking": False, "tone": "calm"}
    assert load_with(THINKS, given).ignored_arguments(given) == ["thinking"]


def test_arguments_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ModelError, match=r"chat.arguments has tone, but .* has no chat template to read them; remove"):
        load_with(None, {"tone": "calm"})


def test_without_arguments_a_template_is_not_changed() -> None:
    assert load(PLAIN).tokenizer.chat_template == PLAIN  # type: ignore[attr-defined]


# -- system prompts -----------------------------------------------------------------------------------------------------

REFUSES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}{% endfor %}"
SYSTEM = 'Reply in one sentence.\nSay "no" to {{ nothing }}.'


def load_system(chat: str | None, system: str = SYSTEM, folder: Path = OWN) -> Templates:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = chat
    return Templates.load(folder, tokenizer, DAY, system=system)


def test_a_system_prompt_is_a_turn_before_the_question_of_a_reply_alone() -> None:
    templates = load_system(PLAIN)
    assert shown(templates) == f"system: {SYSTEM}\nuser: How many?\n"
    for kind in ("grade", "judge", "referee", "ask"):
        values = {"question": "Why?", "first": "So.", "second": "Thus.", "examples": [], "reference_answer": ""}
        assert templates.prompt(kind, **values) == load(PLAIN).prompt(kind, **values)
    assert load_system(PLAIN, "").prompt("reply", question="x") == load(PLAIN).prompt("reply", question="x")


def test_a_template_with_turns_gets_the_system_prompt_before_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "reply.jinja").write_text("{{ user() }}Hello {{ assistant() }}Hi {{ user() }}{{ question }}")
    text = "system: Be brief.\nuser: Hello\nassistant: Hi\nuser: How many?\n"
    assert shown(load_system(PLAIN, "Be brief.", folder)) == text
    (folder / "reply.jinja").write_text("{{ system() }}Be long. {{ user() }}{{ question }}")
    with pytest.raises(ModelError, match=r"reply.jinja begins a system turn .* and chat.system is set too; remove one"):
        load_system(PLAIN, "Be brief.", folder)


@pytest.mark.parametrize("system", ["Be brief.", "Call strftime_now if you need the date."])
def test_a_system_prompt_is_added_once_also_where_the_date_is_frozen(system: str) -> None:
    texts = with_system({"reply.jinja": "{{ strftime_now('%Y') }} {{ question }}"}, system)
    frozen = {name: freeze_date(text, DAY) for name, text in texts.items()}
    assert with_system(frozen, system) == frozen


@pytest.mark.parametrize("words", ["Solve the system (two equations): ", "Answer the user (briefly). "])
def test_words_of_a_template_are_no_turns(words: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "reply.jinja").write_text(words + "{{ question }}")
    assert shown(load_system(PLAIN, "Be brief.", folder)) == f"system: Be brief.\nuser: {words}How many?\n"


def test_the_turns_of_an_included_template_are_seen(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OWN, tmp_path / "templates"))
    (folder / "reply.jinja").write_text('{% include "turns.jinja" %}')
    (folder / "turns.jinja").write_text("{{ user() }}{{ question }}")
    assert shown(load_system(PLAIN, "Be brief.", folder)) == "system: Be brief.\nuser: How many?\n"


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (REFUSES + PLAIN, r"refuses a system message \(No system role\).*remove chat.system"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "drops the text of a system message"),
        (None, "chat.system needs a chat template"),
    ],
)
def test_a_model_that_cannot_be_shown_a_system_prompt_is_refused(chat: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_system(chat)


# -- thinking -----------------------------------------------------------------------------------------------------------

OPENS = PLAIN + "{% if add_generation_prompt and enable_thinking is not defined %}<think>\n{% endif %}"


def load_thinking(chat: str | None, **arguments: Any) -> Templates:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat
    return Templates.load(OWN, tokenizer, DAY, arguments=arguments)


def test_thinking_is_recognised_by_the_tokens_of_the_tokenizer() -> None:
    assert load(PLAIN).thinking(9) is None
    found = load_thinking(PLAIN).thinking(9)
    assert found is not None
    names = [load_thinking(PLAIN).tokenizer.convert_ids_to_tokens(list(ids)) for ids in (found.opening, found.closing)]
    assert (names, found.limit) == ([["<think>"], ["</think>"]], 9)


@pytest.mark.parametrize(
    ("chat", "arguments", "opened"), [(PLAIN, {}, False), (OPENS, {}, True), (OPENS, {"enable_thinking": 0}, False)]
)
def test_a_chat_template_that_opens_the_thinking_is_recognised(chat: str, arguments: dict[str, Any], opened: bool) -> None:
    templates = load_thinking(chat, **arguments)
    thinking = templates.thinking()
    assert thinking is not None
    assert thinking.opened_by(templates.prompt("reply", question="How <think> many apples are left?")) == opened


def test_the_thinking_is_decoded_without_its_markers() -> None:
    templates = load_thinking(OPENS)
    encode = templates.tokenizer.encode
    assert templates.thinking_text(tuple(encode("<think>\ntwo plus three\n</think>"))) == "two plus three"
    assert templates.thinking_text(tuple(encode("two plus three</think>"))) == "two plus three"
    assert templates.thinking_text(()) == ""


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


def test_thinking_in_the_channels_of_harmony_is_recognised() -> None:
    tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", *HARMONY))
    turns = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer.chat_template = f"{turns}<|start|>assistant"
    templates = Templates.load(templates_folder("none"), tokenizer)
    thinking, prompt = templates.thinking(99), templates.prompt("reply", question="How many?")
    said = "<|channel|>analysis<|message|>two plus three<|end|><|start|>assistant<|channel|>final<|message|>"
    before, after = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (said, "It is five.<|return|>"))
    rollout = Rollout(before + after, (0.0,) * len(before + after), finished=True).within(99, prompt, thinking)
    assert (rollout.thinking_ids, rollout.reply_ids) == (before, after)
    assert templates.thinking_text(rollout.thinking_ids) == "two plus three"
    assert templates.text(rollout.reply_ids) == "It is five."
    assert templates.without_thinking(f"{said}It is five.") == "It is five."
    cut = Rollout(before + after, (0.0,) * len(before + after), finished=True).within(99, prompt, templates.thinking(3))
    assert (cut.reply_ids, cut.finished) == ((), False), "three tokens of thinking, and no reply"
    assert templates.thinking_text(cut.thinking_ids) != ""
    assert load(PLAIN).thinking() is None, "its tokens are not those of this tokenizer"


def test_a_typed_reply_is_shown_without_its_thinking() -> None:
    templates = load_thinking(OPENS)
    assert templates.without_thinking("<think>four? no</think> Five. ") == "Five."
    assert templates.without_thinking("four? </think>five</think>six") == "six"
    assert templates.without_thinking(" Five. ") == " Five. "
    assert load(PLAIN).without_thinking("<think>four</think> Five.") == "<think>four</think> Five.", "it has no such tokens"
