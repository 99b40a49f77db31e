"""Drafts: lookup of the last tokens, and when a draft is worth its tokens."""

from __future__ import annotations

from selfeval.rollout.drafts import Drafts, EarlierReplies


def test_the_longest_match_and_its_latest_place_are_continued() -> None:
    # (2, 3) occurs at two places; the later one is continued by 8.
    assert Drafts((1, 2, 3, 7, 5, 2, 3, 8, 9, 2, 3)).next((), 16) == [8, 9, 2, 3]
    # (1, 2, 3) was continued by 7, and three tokens are looked up before two.
    assert Drafts((1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3)).next((), 2) == [7, 5]
    # A single equal token is no match.
    assert Drafts((1, 2, 3, 4, 9, 2)).next((), 16) == []
    assert Drafts((1, 2, 3, 1, 2)).next((), 0) == []


def test_the_reply_is_searched_as_well() -> None:
    drafts = Drafts((1, 2))
    assert drafts.next((5, 6, 7), 16) == []
    assert drafts.next((5, 6, 7, 8, 5, 6), 16) == [7, 8, 5, 6]


def test_earlier_replies_to_the_prompt_are_continued_from_their_first_token() -> None:
    earlier = [(5, 6, 7), (5, 9, 9)]
    # The end of the prompt was followed by both; the later one counts.
    assert Drafts((1, 2, 3), earlier).next((), 16) == [5, 9, 9]
    # The own text has no place for (6, 7); the first reply has one, at its end, which nothing follows.
    assert Drafts((1, 2, 3), [(5, 6, 7, 8)]).next((4, 6, 7), 16) == [8]
    assert Drafts((1, 2, 3), earlier).next((4, 6, 7), 16) == []


def test_the_length_follows_the_correct_tokens() -> None:
    text = tuple(range(100, 140))
    drafts = Drafts(text, always=True)
    assert drafts.next((100, 101), 16) == [102, 103, 104, 105]
    # All four are correct, so the next draft is twice as long; then one of eight is correct, and the next one has two.
    reply = (100, 101, 102, 103, 104, 105)
    assert drafts.next(reply, 16) == list(range(106, 114))
    assert drafts.next((*reply, 106, 120, 121), 16) == [122, 123]


def test_drafts_pause_while_they_are_wrong_and_resume_when_they_are_correct() -> None:
    """The mean of correct tokens is 1 at first, each draft has a weight of 0.2, and a mean of 0.5 or less is a pause."""
    # Each pair (0, 1), (2, 3), ... of the prompt is followed by 99.
    prompt = tuple(token for start in range(0, 20, 2) for token in (start, start + 1, 99))
    # In the reply it is not, four times: 0.8, 0.64, 0.512, 0.41. Then it is, twice, and the mean is 0.41 + 0.2 (2 - 0.41).
    reply = (0, 1, 200, 2, 3, 201, 4, 5, 202, 6, 7, 203, 8, 9, 99, 10, 11)

    def returned(drafts: Drafts) -> dict[int, list[int]]:
        found = {end: drafts.next(reply[:end], 16) for end in range(len(reply) + 1)}
        return {end: draft for end, draft in found.items() if draft}

    wrong = {2: [99, 2, 3, 99], 5: [99, 4], 8: [99, 6], 11: [99, 8]}
    assert returned(Drafts(prompt)) == {**wrong, 16: [11, 99, 12, 13]}
    assert returned(Drafts(prompt, always=True)) == {**wrong, 14: [99, 10], 16: [11, 99, 12, 13]}


def test_the_oldest_replies_and_prompts_are_forgotten() -> None:
    replies = EarlierReplies()
    for number in range(5):
        replies.add((1, 2), (number,))
    assert replies.to((1, 2)) == ((1,), (2,), (3,), (4,))
    for number in range(63):
        replies.add((3, number), (0,))
    assert replies.to((1, 2))
    replies.add((4,), (0,))
    assert replies.to((1, 2)) == ()
    assert replies.to((3, 0)) == ((0,),)
