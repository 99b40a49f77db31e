from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from selfeval.judging.sources import fixed_text
from selfeval.judging.templates import templates_folder
from selfeval.quality.question_filters import QuestionFilters, is_repetitive, script_shares
from slow import slow

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SEEDS = ["How many apples are left?", "Tom has 3 pens. How many does he have now?"]
INSTRUCTION = fixed_text(templates_folder("no such model"), "ask")


def reason(text: str, seeds: list[str] | None = None) -> str | None:
    return QuestionFilters.of(seeds or SEEDS, INSTRUCTION).reason(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wie heißt die Straß\ufffd?", "broken_characters"),
        ("How many\x00 apples are left?", "broken_characters"),
        ("How many \ud83d apples are left?", "broken_characters"),
        ("apples " * 30, "repetition"),
        ("How many " * 8 + "apples?", "repetition"),
        (
            "How many pens are there? How many pens are there? How many pens are there? How many pens are there? Yes",
            "repetition",
        ),
        ("ha" * 20, "repetition"),
        ("pens and pens or pens with pens by pens in pens of pens", "repetition"),
        ("??? !!! ... --- 1 2 3 4 5 6 7 8", "no_words"),
        ("Write one new question of the same kind. Write the question only.", "instruction"),
        ("write one new question of the same kind", "instruction"),
        ("Here are some questions:", "instruction"),
        ("小明有三个苹果，送给朋友两个，还剩几个？", "other_script"),
        ("Сколько яблок осталось у Тома?", "other_script"),
        ("The answer is five.", "reply"),
        ("So the final answer is 5.", "reply"),
        ("Answer: 5 apples.", "reply"),
    ],
)
def test_junk_is_dropped_with_its_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "How many pears are left?",
        "Tom has 3 apples, Ann has 3 apples, Ben has 3 apples. How many apples are there?",
        "What is 1111111111 + 1?",
        "Is the sentence 'Buffalo buffalo Buffalo buffalo buffalo' correct English, and who bullies whom in it?",
        "Write one sentence about the same kind of apples.",
        "Answering a question takes 3 minutes. How long do 5 take?",
        "Which word means 'apple' in German, Apfel or Pferd?",
        "What does 苹果 mean?",
        "What is α + β if α = 3?",
        "How many 🍎 are left?",
        "What is e\u0301?",
    ],
)
def test_good_questions_stay(text: str) -> None:
    assert reason(text) is None


def test_filters_follow_the_seeds() -> None:
    assert reason("12 + 7 =", ["3 + 5 =", "8 - 2 ="]) is None, "questions without words, as the seeds are"
    chinese = ["小明有三个苹果，送给朋友两个，还剩几个？", "树上有5只鸟，飞走2只，还剩几只？"]
    assert reason("小红有五支铅笔，又买了三支，现在有几支？", chinese) is None
    assert reason("How many apples are left?", chinese) == "other_script"
    assert reason("How many apples are left?", [*chinese, *SEEDS]) is None
    assert reason("りんごはいくつ残っていますか", chinese) == "other_script"


def test_scripts_by_hand() -> None:
    assert script_shares(["abc 123 !?"]) == {"LATIN": 1.0}
    assert script_shares(["ａｂ", "аб"]) == {"LATIN": 0.5, "CYRILLIC": 0.5}
    assert script_shares(["𝒙² 5"]) == {}
    assert script_shares([]) == {}


def test_long_texts_are_filtered_in_no_time() -> None:
    rng = random.Random(0)
    assert not is_repetitive("".join(rng.choice("abcd ") for _ in range(20_000)))


FOREIGN = {
    "es": [
        "¿Cuántas manzanas tiene María ahora?",
        "¿Cómo puedo cambiar mi contraseña?",
        "Escribe un poema corto sobre el mar.",
    ],
    "fr": [
        "Combien de pommes reste-t-il à Marie ?",
        "Quelle est la capitale de l'Italie ?",
        "Écris un court poème sur la mer.",
    ],
    "de": ["Wie viele Äpfel hat Zoë?", "Wie kann ich mein Passwort ändern?", "Schreibe ein kurzes Gedicht über das Meer."],
    "it": ["Quante mele ha Maria adesso?", "Come posso cambiare la mia password?", "Qual è la capitale della Francia?"],
    "pt": ["Quantas maçãs a Maria tem agora?", "Como posso mudar a minha senha?", "Qual é a capital da França?"],
    "nl": ["Hoeveel appels heeft Maria nu?", "Hoe kan ik mijn wachtwoord wijzigen?", "Wat is de hoofdstad van Frankrijk?"],
    "pl": ["Ile jabłek ma teraz Maria?", "Jak mogę zmienić hasło?", "Napisz krótki wiersz o morzu."],
    "tr": ["Maria'nın şimdi kaç elması var?", "Şifremi nasıl değiştirebilirim?"],
    "id": ["Berapa apel yang dimiliki Maria sekarang?", "Bagaimana cara mengganti kata sandi saya?"],
    "sv": ["Hur många äpplen har Maria nu?", "Hur kan jag byta mitt lösenord?"],
}


@pytest.mark.parametrize("language", FOREIGN)
def test_another_language_with_the_same_script_is_noticed(language: str) -> None:
    for text in FOREIGN[language]:
        assert reason(text) == "other_language", text
        assert reason(text, [*SEEDS, *FOREIGN[language]]) is None, text


def test_questions_in_the_language_of_foreign_seeds_stay_and_english_ones_do_not() -> None:
    for language, texts in FOREIGN.items():
        seeds = [text for text in texts if text != texts[0]]
        assert reason("How many apples does Mary have now?", seeds) == "other_language", language


# -- real questions -----------------------------------------------------------------------------------------------------


def questions(name: str, key: str) -> list[str]:
    path = DATA / name
    if not path.exists():
        pytest.skip("shared/data is not next to the repository")
    text = lzma.decompress(path.read_bytes()).decode()
    rows: list[Any] = json.loads(text) if name.endswith(".json.xz") else [json.loads(line) for line in text.splitlines()]
    return [str(row[key]) for row in rows]


@pytest.mark.parametrize(
    ("name", "key", "most"),
    [
        slow("math/gsm8k_train.jsonl.xz", "question", 0),
        ("math/cmath_dev.jsonl.xz", "input", 0),
        ("math/svamp.json.xz", "Body", 0),
        ("instruct/seed_tasks_175.jsonl.xz", "instruction", 0),
        ("instruct/user_oriented_instructions_252.jsonl.xz", "instruction", 0),
    ],
)
def test_how_many_real_questions_are_lost(name: str, key: str, most: int) -> None:
    """With three draws of eight seeds from the same file: a good filter loses none of what people wrote."""
    texts = questions(name, key)[:800]
    lost = set()
    for draw in range(3):
        filters = QuestionFilters.of(random.Random(draw).sample(texts, 8), INSTRUCTION)
        lost |= {(text, why) for text in texts if (why := filters.reason(text))}
    assert len(lost) <= most, sorted(lost)[:10]
