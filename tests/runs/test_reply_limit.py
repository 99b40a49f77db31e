"""The limit that replies decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfeval.config import RepliesConfig
from selfeval.errors import RunFolderError
from selfeval.runs.reply_limit import LIMIT_FILE, ReplyLimit, decide_limit, read_limit, reply_limit
from selfeval.store import write_json


@pytest.mark.parametrize(
    ("finished", "replies", "tokens"),
    [
        ([*range(1, 101)], 100, 96),  # 95 of 100 have at most 95 tokens; the next multiple of 16
        ([*range(1, 101)], 200, 96),  # half of the replies reached the cap
        ([*range(1, 101)], 201, 128),  # more than half
        ([10] * 95 + [100] * 5, 100, 16),
        ([10] * 94 + [100] * 6, 100, 112),
        ([16] * 20, 20, 16),
        ([17] * 20, 20, 32),
        ([17] * 19, 19, 128),  # too few
        ([127] * 40, 40, 128),
        ([], 40, 128),
    ],
)
def test_the_limit_is_the_quantile_of_the_finished_replies(finished: list[int], replies: int, tokens: int) -> None:
    found = decide_limit(finished, replies, 128)
    assert found == ReplyLimit(tokens, 128, replies, len(finished))


def test_the_cap_need_not_be_a_multiple() -> None:
    assert decide_limit([100] * 30, 30, 101).tokens == 101


def test_the_reason_for_the_cap_is_given() -> None:
    assert "0 of 40 replies of the first shard ended, too few" in decide_limit([], 40, 128).sentence
    assert "need nearly as many" in decide_limit([127] * 40, 40, 128).sentence
    assert decide_limit([10] * 40, 40, 128).sentence.startswith("16 tokens, enough for 95% of the 40 finished replies")


def test_a_limit_is_read_where_it_was_decided(tmp_path: Path) -> None:
    assert reply_limit(RepliesConfig(max_new_tokens=7), tmp_path) == 7
    auto = RepliesConfig(max_new_tokens="auto")
    with pytest.raises(RunFolderError, match="no token limit yet"):
        reply_limit(auto, tmp_path)
    write_json(tmp_path / LIMIT_FILE, {"tokens": 32, "cap": 128, "replies": 50, "finished": 40})
    assert reply_limit(auto, tmp_path) == 32
    for damaged in ({"tokens": 0}, {"tokens": True}, {"tokens": "32"}, {"cap": -1}):
        write_json(tmp_path / LIMIT_FILE, {"tokens": 32, "cap": 128, "replies": 50, "finished": 40, **damaged})
        with pytest.raises(RunFolderError, match="damaged"):
            read_limit(tmp_path)
