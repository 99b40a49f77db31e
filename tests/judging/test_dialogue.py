from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import processors
from transformers import AutoTokenizer

import tiny_models
from selfeval.judging.dialogue import dialogue_tokenizer, evaluator_ids, hostile, policy_tokenizer
from selfeval.judging.templates import Templates, templates_folder
from toy import LAB

SAMPLES = (
    ("Tom has 3 pens.\nHe buys 2. How many?", "3 + 2 = 5\n\nThe answer is 5.", "He has 5."),
    ("Wie heißt „Straße“? 😀", "« rue »", "rue"),
)
# With features of real templates: a default system prompt, loops with trimmed blocks, a namespace, text after the end token.
CHAT = """{%- set ns = namespace(system='You are helpful.') %}
{%- if messages[0]['role'] == 'system' %}
{%- set ns.system = messages[0]['content'] %}
{%- endif %}
<|im_start|>system
{{ ns.system }}<eos>
{% for message in messages %}
{% if message['role'] != 'system' %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<eos>' + '\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def templates(tokenizer: Any, folder: Path | None = None) -> Templates:
    return Templates.load(folder or templates_folder("none"), tokenizer)


def messages(question: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def with_grade(folder: Path, text: str) -> Path:
    shutil.copytree(templates_folder("none"), folder)
    (folder / "grade.jinja").write_text(text, encoding="utf-8")
    return folder


def chat_tokenizer() -> Any:
    tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", "<|im_start|>"))
    tokenizer.chat_template = CHAT
    return tokenizer


def parts_tokenizer() -> Any:
    """One whose chat template takes content in parts only, and prints the date."""
    tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", "<|im_start|>"))
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m['role'] }}:\n"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
    )
    return tokenizer


def bos_tokenizer() -> Any:
    """One that begins every text with a token by itself."""
    tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", "<s>"))
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return tokenizer


@pytest.mark.parametrize(
    "make", [tiny_models.words_tokenizer, chat_tokenizer, parts_tokenizer, bos_tokenizer], ids=["plain", "chat", "parts", "bos"]
)
def test_a_dialogue_becomes_what_the_evaluator_was_trained_on(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    ours = templates(tokenizer)
    found = dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES)
    assert found is not None
    assert tokenizer.chat_template != found.chat_template, "the run's own tokenizer stays as it was"
    found.save_pretrained(tmp_path)
    stranger: Any = AutoTokenizer.from_pretrained(tmp_path)
    for question, reply, _ in (*SAMPLES, ("  padded  ", "\nreply\n", "")):
        expected = evaluator_ids(ours, (question, reply, ""), (1,))
        assert expected[-1] == 1
        asked = messages(question, reply)
        assert tuple(stranger.apply_chat_template(asked, tokenize=True, return_dict=False)) == expected
        text = stranger.apply_chat_template(asked, tokenize=False)
        assert tuple(stranger(text, add_special_tokens=False).input_ids) == expected


def test_the_own_chat_template_would_not_have_been_the_evaluators() -> None:
    tokenizer = chat_tokenizer()
    own = tuple(tokenizer.apply_chat_template(messages(*SAMPLES[0][:2]), tokenize=True, return_dict=False))
    assert own != evaluator_ids(templates(tokenizer), SAMPLES[0], (1,))
    assert own[-1] != 1, "text behind the end token, where a classifier would read its score"


def test_line_ends_and_indents_of_a_grade_template_are_kept(tmp_path: Path) -> None:
    """Chat templates trim blocks and ours do not."""
    loop = "{% for i in [1, 2] %}\n  {{ i }}\n  {% endfor %}"
    text = "{% if chat %}\n  Chat\n{% else %}\n  Plain\n  " + loop + "\n{% endif %}\n{{ question }}\n->"
    tokenizer = tiny_models.words_tokenizer()
    ours = templates(tokenizer, with_grade(tmp_path / "templates", text))
    assert dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES) is not None


def test_a_reference_answer_is_asked_for_where_the_grade_template_shows_it() -> None:
    """On the embedded model."""
    tokenizer = AutoTokenizer.from_pretrained(LAB / "word_problems")
    ours = templates(tokenizer, LAB / "word_problems" / "templates")
    found: Any = dialogue_tokenizer(ours, tokenizer, (2,), SAMPLES)
    asked = messages("Tom has 3 pens.", "3 + 2 = 5")
    ids = found.apply_chat_template(asked, reference_answer=" 2 + 2 = 4 ", tokenize=True, return_dict=False)
    assert tuple(ids) == evaluator_ids(ours, ("Tom has 3 pens.", "3 + 2 = 5", "2 + 2 = 4"), (2,))
    with pytest.raises(TemplateError, match=r"needs the greedy reply of its base.*reference_answer="):
        found.apply_chat_template(asked, tokenize=True)


@pytest.mark.parametrize("roles", [("user",), ("assistant", "user"), ("user", "assistant", "user"), ("system", "user")])
def test_other_dialogues_are_refused(roles: tuple[str, ...]) -> None:
    tokenizer = tiny_models.words_tokenizer()
    found: Any = dialogue_tokenizer(templates(tokenizer), tokenizer, (1,), SAMPLES)
    with pytest.raises(TemplateError, match="one user message"):
        found.apply_chat_template([{"role": role, "content": "text"} for role in roles], tokenize=True)


@pytest.mark.parametrize(
    "text", ['{% include "reply.jinja" %}', "{{ question | upper }}{{ question.encode('utf8') | length }}"]
)
def test_no_template_is_better_than_another_one(text: str, tmp_path: Path) -> None:
    tokenizer = tiny_models.words_tokenizer()
    ours = templates(tokenizer, with_grade(tmp_path / "templates", text))
    found = dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES)
    assert (found is None) == ("include" in text)


def test_a_tokenizer_that_cannot_reproduce_the_ids_gets_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_models.words_tokenizer()
    ours = templates(tokenizer)
    monkeypatch.setattr(Templates, "reply_ids", lambda self, text: (5, 5, 5))
    assert dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES) is None


# -- control tokens in texts --------------------------------------------------------------------------------------------

MAKERS = pytest.mark.parametrize(
    "make", [tiny_models.words_tokenizer, chat_tokenizer, bos_tokenizer], ids=["plain", "chat", "bos"]
)


@MAKERS
def test_control_tokens_in_a_question_or_a_reply_do_not_speak_for_the_prompt(make: Any) -> None:
    tokenizer = make()
    ours = templates(tokenizer)
    question = hostile(ours)[0][0]
    sample = (question, question, "")
    assert any(token in question for token in ours.control.texts)
    assert ours.clean(question) != question.strip()
    found: Any = dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES)
    asked = messages(*sample[:2])
    assert tuple(found.apply_chat_template(asked, tokenize=True, return_dict=False)) == evaluator_ids(ours, sample, (1,))
    naive = found.chat_template.replace("cleaned(said)", "said")
    ids = tuple(found.apply_chat_template(asked, chat_template=naive, tokenize=True, return_dict=False))
    assert ids != evaluator_ids(ours, sample, (1,)), "so that the line above can fail"


def test_content_in_parts_is_read_as_its_text() -> None:
    tokenizer = tiny_models.words_tokenizer()
    found: Any = dialogue_tokenizer(templates(tokenizer), tokenizer, (1,), SAMPLES)
    question, reply = SAMPLES[0][:2]
    parts = [{"role": "user", "content": [{"type": "text", "text": question}]}, {"role": "assistant", "content": reply}]
    assert found.apply_chat_template(parts, tokenize=False) == found.apply_chat_template(
        messages(question, reply), tokenize=False
    )


# -- policies -----------------------------------------------------------------------------------------------------------


def with_reply(folder: Path, text: str) -> Path:
    shutil.copytree(templates_folder("none"), folder)
    (folder / "reply.jinja").write_text(text, encoding="utf-8")
    return folder


@MAKERS
@pytest.mark.parametrize("reply", ["", "{% if chat %}\n Chat\n{% else %}Plain{% endif %}\nQ: {{ question }}\nA:"])
def test_a_chat_client_asks_a_policy_as_the_run_did(make: Any, reply: str, tmp_path: Path) -> None:
    tokenizer = make()
    ours = templates(tokenizer, with_reply(tmp_path / "templates", reply) if reply else None)
    samples = (*SAMPLES, *hostile(ours))
    found: Any = policy_tokenizer(ours, tokenizer, (1,), SAMPLES)
    found.save_pretrained(tmp_path / "saved")
    stranger: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    keeps_own = bool(tokenizer.chat_template) and not reply
    assert (stranger.chat_template == tokenizer.chat_template) == keeps_own
    for question, answer, _ in samples[: 2 if keeps_own else None]:
        asked = messages(question, answer)
        expected = ours.prompt("reply", question=question).ids
        ids = stranger.apply_chat_template(asked[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tuple(ids) == expected
        if not tokenizer.chat_template:
            ids = stranger.apply_chat_template(asked, tokenize=True, return_dict=False)
            assert tuple(ids) == (*expected, *ours.reply_ids(answer), 1)


def test_the_policy_of_the_embedded_model_is_asked_in_its_own_control_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB / "word_problems")
    ours = templates(tokenizer, LAB / "word_problems" / "templates")
    found: Any = policy_tokenizer(ours, tokenizer, (2,), SAMPLES)
    text = found.apply_chat_template(messages("How many?", "Two.")[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|question|>How many?<|reply|>"


def test_a_policy_without_a_chat_template_takes_turns_and_no_system_message() -> None:
    tokenizer = tiny_models.words_tokenizer()
    found: Any = policy_tokenizer(templates(tokenizer), tokenizer, (1,), SAMPLES)
    dialogue = [*messages("Why?", "So."), {"role": "user", "content": "How?"}]
    text = found.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert text == "Question: Why?\nAnswer: So.<eos>Question: How?\nAnswer:"
    with pytest.raises(TemplateError, match="user and assistant messages only, not system"):
        found.apply_chat_template([{"role": "system", "content": "Be kind."}, *dialogue], tokenize=False)


def test_a_policy_prompt_that_no_chat_template_can_make_gets_none(tmp_path: Path) -> None:
    tokenizer = tiny_models.words_tokenizer()
    ours = templates(tokenizer, with_reply(tmp_path / "templates", '{% include "grade.jinja" %}'))
    assert policy_tokenizer(ours, tokenizer, (1,), SAMPLES) is None


SYSTEM = "{% if chat %}{{ system() }}Be brief.{{ user() }}{% endif %}{{ question }}"


@pytest.mark.parametrize("make", [chat_tokenizer, parts_tokenizer], ids=["chat", "parts"])
def test_an_exported_policy_has_the_system_turn_of_the_run_once(make: Any, tmp_path: Path) -> None:
    folder = with_grade(tmp_path / "templates", SYSTEM)
    (folder / "reply.jinja").write_text(SYSTEM, encoding="utf-8")
    tokenizer = make()
    ours = templates(tokenizer, folder)
    policy, evaluator = policy_tokenizer(ours, tokenizer, (1,), SAMPLES), dialogue_tokenizer(ours, tokenizer, (1,), SAMPLES)
    assert policy is not None
    assert evaluator is not None
    asked = [{"role": "user", "content": "How many?"}]
    found: Any = policy
    ids = tuple(found.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False))
    assert ids == ours.prompt("reply", question="How many?").ids
    text = found.apply_chat_template([*messages("How many?", "Two."), *asked], tokenize=False)
    assert text.count("Be brief.") == 1
