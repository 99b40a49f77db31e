from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from process_groups import in_processes
from selfeval.backbone.budget import MemoryBudget, Phase
from selfeval.backbone.process_group import ProcessGroup, by_first, shares, sum_in_place
from selfeval.errors import LoopError, ProcessGroupError


def test_shares_are_contiguous_and_about_equal() -> None:
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for count in (1, 2, 3, 5):
        parts = shares(order, sizes, count)
        assert [i for part in parts for i in part] == order
        assert len(parts) == count
        # 52 tokens in total. The middle of an item decides, so a part is off by at most half an item at either end.
        assert all(abs(sum(sizes[i] for i in part) - 52 / count) <= 9 for part in parts)


def test_with_fewer_items_than_processes_some_have_none() -> None:
    # The middles of the items are at 2.5 and 7.5 of 10; parts end at 2.5, 5, 7.5 and 10.
    assert shares([1, 0], [5, 5], 4) == [[], [1], [], [0]]
    assert shares([], [], 2) == [[], []]


def _exchange(group: ProcessGroup) -> dict[str, Any]:
    whole = torch.arange(1000.0)
    sent = {"rank": group.rank, "view": whole[group.rank : group.rank + 2]}
    first, second = torch.full((2, 2), float(group.rank)), torch.tensor([1.0 + group.rank], dtype=torch.float64)
    sum_in_place(group, [first, second])
    return {
        "gathered": group.gather(sent),
        "broadcast": group.broadcast(f"of {group.rank}"),
        "by_first": by_first(group, "name", lambda: f"computed by {group.rank}"),
        "sums": (first, second),
    }


def test_processes_exchange_objects_and_sums(tmp_path: Path) -> None:
    for found in in_processes(3, tmp_path, _exchange):
        assert [each["rank"] for each in found["gathered"]] == [0, 1, 2]
        assert [each["view"].tolist() for each in found["gathered"]] == [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
        # Not the thousand numbers that the view is a part of.
        assert all(each["view"].untyped_storage().nbytes() == 8 for each in found["gathered"])
        assert found["broadcast"] == "of 0"
        assert found["by_first"] == "computed by 0"
        assert found["sums"][0].tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert found["sums"][1].tolist() == [6.0]


def _squares(group: ProcessGroup) -> tuple[list[tuple[list[int], Tensor]], list[int]]:
    budget, mine = MemoryBudget(), list[int]()
    budget.processes = group

    def work(items: list[int]) -> Tensor:
        mine.extend(items)
        return torch.tensor([float(i * i) for i in items])

    return list(budget.in_groups(Phase.SCORE, [7, 3, 3, 2, 9, 4], 9, work)), mine


def test_a_budget_divides_items_and_returns_all_results_in_one_order(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, _squares)
    assert [items for items, _ in first[0]] == [items for items, _ in second[0]]
    assert sorted(first[1] + second[1]) == [0, 1, 2, 3, 4, 5]
    assert sum(range(6)) > len(first[1]) > 0
    for items, squares in second[0]:
        assert squares.tolist() == [i * i for i in items]


def _fails_in_one(group: ProcessGroup) -> str:
    budget = MemoryBudget()
    budget.processes = group

    def work(items: list[int]) -> None:
        if group.rank == 1:
            raise LoopError("the second half is broken")

    try:
        list(budget.in_groups(Phase.SCORE, [1, 1, 1, 1], 1, work))
    except LoopError as error:
        return "".join([str(error), *error.__notes__])
    return ""


def test_an_error_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    for found in in_processes(2, tmp_path, _fails_in_one):
        assert found.startswith("the second half is broken")
        assert re.search(r"in process 1 of 2:\nTraceback .*in work\n", found, re.DOTALL)


def _different_work(group: ProcessGroup) -> str:
    budget = MemoryBudget()
    budget.processes = group
    with pytest.raises(ProcessGroupError) as caught:
        list(budget.in_groups(Phase.SCORE, [1] * (4 + group.rank), 2, len))
    return str(caught.value)


def test_processes_that_disagree_are_refused(tmp_path: Path) -> None:
    for found in in_processes(2, tmp_path, _different_work):
        assert "score of 4 items, 4 tokens; score of 5 items, 5 tokens" in found


def _different_order(group: ProcessGroup) -> str:
    budget = MemoryBudget()
    budget.processes = group
    prompts = [0, 1, 0, 1] if group.rank else None
    with pytest.raises(ProcessGroupError) as caught:
        list(budget.in_groups(Phase.SCORE, [1, 2, 3, 4], 10, len, prompts))
    return str(caught.value)


def test_items_that_were_computed_twice_are_refused(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, _different_order)
    assert all("the processes of this training disagree" in message for message in found)


def _first_fails(group: ProcessGroup) -> str:
    def compute() -> str:
        raise LoopError("no checkpoint")

    with pytest.raises(LoopError) as caught:
        by_first(group, "reading", compute)
    return str(caught.value)


def test_an_error_of_the_first_process_is_raised_in_all(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path, _first_fails) == ["no checkpoint"] * 2


def test_a_single_process_computes_as_before() -> None:
    backbone = tiny_models.backbone("llama")
    assert (backbone.budget.processes.rank, backbone.budget.processes.size) == (0, 1)
    found = list(backbone.budget.in_groups(Phase.SCORE, [1, 1, 1], 2, list))
    assert found == [([0, 1], [0, 1]), ([2], [2])]


def _other_sizes(group: ProcessGroup) -> str:
    with pytest.raises(ProcessGroupError) as caught:
        sum_in_place(group, [torch.ones(2 + group.rank), torch.ones(1)])
    return str(caught.value)


def test_tensors_of_other_sizes_are_not_summed(tmp_path: Path) -> None:
    for found in in_processes(2, tmp_path, _other_sizes):
        assert "sum of 3 numbers; sum of 4 numbers" in found


def _other_collective(group: ProcessGroup) -> str:
    def work() -> None:
        if group.rank == 0:
            sum_in_place(group, [torch.ones(3)])
        else:
            by_first(group, "reading the last checkpoint", lambda: None)

    with pytest.raises(ProcessGroupError) as caught:
        work()
    return str(caught.value)


def test_a_sum_that_meets_other_work_is_an_error_instead_of_a_long_wait(tmp_path: Path) -> None:
    for found in in_processes(2, tmp_path, _other_collective):
        assert "sum of 3 numbers; reading the last checkpoint" in found
