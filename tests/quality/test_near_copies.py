from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selfeval.quality.dedupe import jaccard, normalise, shingles
from selfeval.quality.near_copies import copied, copy_groups

WORDS = [f"w{number}" for number in range(40)]
# Windows of a sequence of words: neighbouring ones share most of their shingles.
TEXTS = st.lists(st.integers(0, 19).map(lambda at: " ".join(WORDS[at : at + 20])), min_size=1, max_size=8)


def near(a: str, b: str) -> bool:
    return normalise(a) == normalise(b) or jaccard(shingles(a), shingles(b)) >= 0.8


def component(texts: list[str], start: int) -> set[int]:
    """All texts that a chain of near-copies reaches, by comparing all pairs."""
    found = {start}
    while new := {n for n in range(len(texts)) if n not in found and any(near(texts[n], texts[k]) for k in found)}:
        found |= new
    return found


@given(texts=TEXTS, data=st.data())
def test_groups_are_the_components_of_all_pairs(texts: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(texts))), unique=True))
    groups = copy_groups(texts, chosen)
    assert {frozenset(group) for group in groups} == {frozenset(component(texts, number)) for number in chosen}
    assert len({number for group in groups for number in group}) == sum(map(len, groups))


@given(texts=TEXTS, others=TEXTS)
def test_copied_texts_are_those_of_all_pairs(texts: list[str], others: list[str]) -> None:
    assert copied(texts, others) == {n for n, text in enumerate(texts) if any(near(text, other) for other in others)}


def test_texts_with_the_same_key_are_in_one_group() -> None:
    texts = ["a b c d", "e f g h", "i j k l", "E, F, G, H"]
    assert copy_groups(texts, [0], ["p", "p", "q", "r"]) == [[0, 1, 3]]
    assert copy_groups(texts, [2], ["p", "p", "q", "r"]) == [[2]]
