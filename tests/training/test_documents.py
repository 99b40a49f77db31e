from __future__ import annotations

import random

import pytest

from selfeval.training.documents import Document, fit_documents, hold_out, pack_documents, whole_text


def asked(prompt: tuple[int, ...], reply: tuple[int, ...]) -> Document:
    return Document((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply))


def test_the_first_token_never_counts() -> None:
    assert whole_text([5, 6]).trained == (False, True)
    assert whole_text([5]).trained_tokens == 0
    assert asked((5, 6), (7, 8)).prompt == (5, 6)
    with pytest.raises(ValueError, match="3 tokens has a mask of 2"):
        Document((1, 2, 3), (True, True))


def test_no_document_is_cut_or_lost_by_packing() -> None:
    rng = random.Random(0)
    documents = [whole_text([number] * rng.randrange(2, 60)) for number in range(200)]
    rows = pack_documents(documents, 64)
    assert sorted(d.ids for row in rows for d in row) == sorted(d.ids for d in documents)
    assert max(sum(map(len, row)) for row in rows) <= 64
    fewest = -(-sum(map(len, documents)) // 64)
    assert fewest <= len(rows) <= 1.05 * fewest  # 11/9 of the optimum at worst


def test_a_document_goes_where_it_leaves_the_least_space() -> None:
    documents = [whole_text(range(n)) for n in (6, 7, 3, 4)]
    # 7 and 6 begin rows of 3 and 4 free tokens. 4 fits the second only, and fills it; 3 then fills the first.
    assert [[len(d) for d in row] for row in pack_documents(documents, 10)] == [[7, 3], [6, 4]]


def test_long_documents_are_cut_or_dropped_and_counted() -> None:
    short, long, silent = asked((1, 2), (3,)), asked((1, 2), (3, 4, 5)), asked((1, 2, 3, 4), (5,))
    assert fit_documents([short, long, silent], 4, cut=False) == ([short], 2)
    # The loss of the third one is behind the cut.
    assert fit_documents([short, long, silent], 4, cut=True) == ([short, asked((1, 2), (3, 4))], 2)
    assert fit_documents([short, long, silent], 5, cut=False) == ([short, long, silent], 0)


def test_documents_with_the_same_prompt_are_held_out_together() -> None:
    documents = [asked((number // 2,), (9, number)) for number in range(40)]
    train, held = hold_out(documents, 0.2, "seed")
    assert len(held) == 8
    assert not {d.prompt for d in train} & {d.prompt for d in held}
    assert sorted(d.ids for d in (*train, *held)) == sorted(d.ids for d in documents)
    assert hold_out(documents, 0.2, "seed") == (train, held)
    assert hold_out(documents, 0.2, "other seed") != (train, held)
    assert hold_out(documents, 0.0, "seed") == (documents, [])
    assert [len(part) for part in hold_out(documents, 0.001, "seed")] == [38, 2]
    assert hold_out(documents[:2], 0.5, "seed") == (documents[:2], [])
