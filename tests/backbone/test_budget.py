from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfeval.backbone.budget import EventKind, MemoryBudget, Phase
from selfeval.backbone.meters import CpuMeter
from selfeval.errors import MemoryLimitError

UPDATE = Phase.UPDATE
MIB = 2**20


class ToldMeter:
    """A meter that reports scripted values, because a test cannot control the free memory of the machine."""

    def __init__(self, free: int = 10**12, limit: int | None = None) -> None:
        self.limit, self.now, self.available, self.highest, self.released = limit, 0, free, 0, 0

    def used(self) -> int:
        return self.now

    def free(self) -> int:
        return self.available

    def restart(self) -> None:
        self.highest = self.now

    def peak(self) -> int:
        return self.highest

    phases = saved = 0

    def save_memory(self) -> None:
        self.saved += 1

    def between_phases(self) -> None:
        self.phases += 1

    def release(self) -> None:
        self.released += 1

    def work(self, sizes: list[int], bytes_per_unit: int) -> Callable[[list[int]], int]:
        """Work that needs this much memory while it runs; returns how much was processed at once."""

        def run(group: list[int]) -> int:
            units = len(group) * max(sizes[i] for i in group)
            self.highest = self.now + units * bytes_per_unit
            return units

        return run


def short_of(sizes: list[int], most: int) -> Callable[[list[int]], list[int]]:
    """Work with memory for this many units, padding included."""

    def run(group: list[int]) -> list[int]:
        if len(group) * max(sizes[i] for i in group) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return [10 * sizes[i] for i in group]

    return run


def limits(budget: MemoryBudget) -> list[tuple[str, int, int, int]]:
    return [(e.kind.value, e.before, e.after, e.times) for e in budget.take_events()]


# -- groups -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200), st.integers(60, 200))
@settings(max_examples=200, deadline=None)
def test_groups_cover_every_index_once_within_what_there_is(sizes: list[int], limit: int, memory: int) -> None:
    found = list(MemoryBudget(ToldMeter()).in_groups(UPDATE, sizes, limit, short_of(sizes, memory)))
    assert sorted(i for group, _ in found for i in group) == list(range(len(sizes)))
    for group, result in found:
        assert result == [10 * sizes[i] for i in group]
        assert len(group) == 1 or len(group) * max(sizes[i] for i in group) <= min(limit, memory)


def test_groups_are_of_similar_size() -> None:
    found = [group for group, _ in MemoryBudget().in_groups(UPDATE, [9, 1, 8, 2], 20, lambda group: None)]
    assert found == [[1, 3], [2, 0]]  # 2*2, then 3*8 > 20
    assert list(MemoryBudget().in_groups(UPDATE, [], 20, lambda group: None)) == []


def test_items_with_the_same_prompt_stay_together() -> None:
    sizes, prompts = [9, 1, 8, 2, 3], [7, 5, 5, 7, 5]
    found = [group for group, _ in MemoryBudget().in_groups(UPDATE, sizes, 24, lambda group: None, prompts)]
    assert found == [[1, 4, 2], [3, 0]]  # 3*8, then 2*9; the largest with prompt 5 is 8, that with prompt 7 is 9
    small = [group for group, _ in MemoryBudget().in_groups(UPDATE, sizes, 8, lambda group: None, prompts)]
    assert small == [[1, 4], [2], [3], [0]]


def test_a_prompt_is_not_cut_in_two_groups_if_it_fits_one() -> None:
    sizes, prompts = [4] * 9, [1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = [group for group, _ in MemoryBudget().in_groups(UPDATE, sizes, 20, lambda group: None, prompts)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # five items would fit
    found = [group for group, _ in MemoryBudget().in_groups(UPDATE, sizes, 28, lambda group: None, prompts)]
    assert found == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    found = [group for group, _ in MemoryBudget().in_groups(UPDATE, sizes, 8, lambda group: None, prompts)]
    assert found == [[0, 1], [2], [3, 4], [5], [6, 7], [8]]


def test_passes_without_gradients_have_a_limit_of_their_own() -> None:
    budget = MemoryBudget(pass_tokens=8)
    for phase, expected in ((Phase.SCORE, [2, 2, 2]), (UPDATE, [6]), (Phase.ROLLOUT, [6])):
        assert [len(group) for group, _ in budget.in_groups(phase, [4] * 6, 100, lambda group: None)] == expected
    assert [len(group) for group, _ in budget.in_groups(Phase.SCORE, [4] * 6, 4, lambda group: None)] == [1] * 6


def test_the_group_that_failed_is_made_again_in_halves_and_the_next_begin_there() -> None:
    sizes = [4] * 64
    budget = MemoryBudget(ToldMeter(free=77))
    found = [len(group) for group, _ in budget.in_groups(UPDATE, sizes, 128, short_of(sizes, 40))]
    assert found == [8] * 8  # 128 and 64 units were too many; 32 are 8 items
    assert [e.as_json() for e in budget.take_events()] == [
        {"phase": "update", "kind": "out_of_memory", "unit": "tokens", "from": 128, "to": 64, "free_bytes": 77, "times": 1},
        {"phase": "update", "kind": "out_of_memory", "unit": "tokens", "from": 64, "to": 32, "free_bytes": 77, "times": 1},
    ]
    assert budget.take_events() == []
    # The next call of this phase starts at the learned size; a call of another phase does not.
    again = [len(group) for group, _ in budget.in_groups(UPDATE, sizes[:16], 128, short_of(sizes, 40))]
    assert again == [8, 8]
    assert [len(group) for group, _ in budget.in_groups(Phase.SCORE, sizes[:32], 128, lambda group: None)] == [32]


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__} {e}"[:60])
def test_every_way_of_running_out_of_memory_is_known(error: Exception) -> None:
    def work(group: list[int]) -> None:
        if len(group) > 2:
            raise error

    budget = MemoryBudget()
    assert [group for group, _ in budget.in_groups(Phase.ROLLOUT, [1] * 4, 4, work)] == [[0, 1], [2, 3]]
    assert limits(budget) == [("out_of_memory", 4, 2, 1)]


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("can't allocate memory")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    def work(group: list[int]) -> None:
        raise error

    budget = MemoryBudget()
    with pytest.raises(type(error), match=str(error)):
        list(budget.in_groups(UPDATE, [1] * 4, 4, work))
    assert limits(budget) == []


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (Phase.ROLLOUT, r"sampling one reply alone does not fit: .*--memory-budget.*lower max_new_tokens"),
        (Phase.BEAMS, r"beam search for one reply .*replies\.beams"),
        (Phase.SCORE, r"scoring one sequence of 7 tokens .*replies\.max_new_tokens"),
        (Phase.UPDATE, r"one sequence or pair \(7 tokens\) .*lower replies\.max_new_tokens or lower backbone\.lora\.rank"),
    ],
)
def test_one_item_that_does_not_fit_is_an_error_that_says_what_to_change(phase: Phase, told: str) -> None:
    sizes = [7, 7, 7]
    with pytest.raises(MemoryLimitError, match=told) as caught:
        list(MemoryBudget().in_groups(phase, sizes, 100, short_of(sizes, 6)))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("phase", [Phase.SCORE, Phase.CURVATURE, Phase.UPDATE])
def test_a_command_with_other_sequences_names_its_own_remedy(phase: Phase) -> None:
    budget = MemoryBudget()
    budget.shorter = "lower --length"
    with pytest.raises(MemoryLimitError, match=r"if you gave one, lower --length[ ,]") as caught:
        list(budget.in_groups(phase, [7], 100, short_of([7], 6)))
    assert "max_new_tokens" not in str(caught.value)


def test_what_the_failed_group_held_is_free_when_it_is_tried_again() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def work(group: list[int]) -> None:
        alive.append(sum(reference() is not None for reference in held))
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if len(group) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    list(MemoryBudget().in_groups(UPDATE, [1] * 4, 4, work))
    assert alive == [0] * 6  # 4, 2, then one at a time
    assert len(held) == 6


# -- growing back -------------------------------------------------------------------------------------------------------


def run(budget: MemoryBudget, count: int, memory: int, limit: int = 8) -> list[int]:
    """Return the group sizes of this many items of one unit each."""
    sizes = [1] * count
    return [len(group) for group, _ in budget.in_groups(UPDATE, sizes, limit, short_of(sizes, memory))]


def test_the_limit_doubles_after_sixteen_groups_until_it_is_the_callers_again() -> None:
    budget = MemoryBudget(ToldMeter())
    assert run(budget, 8, memory=2) == [2] * 4
    found = run(budget, 13 * 2 + 16 * 4 + 3 * 8, memory=1000)  # 13 more make 16: a last group is small for another reason
    assert found == [2] * 13 + [4] * 16 + [8] * 3
    expected = [("out_of_memory", 8, 4, 1), ("out_of_memory", 4, 2, 1), ("grown", 2, 4, 1), ("grown", 4, 8, 1)]
    assert limits(budget) == expected
    assert run(budget, 64, memory=1000, limit=64) == [64]  # nothing is left of it


def test_growing_back_too_early_makes_it_more_patient() -> None:
    budget = MemoryBudget(ToldMeter())
    found = run(budget, 4 * (16 + 32 + 64), memory=4)
    assert found == [4] * (16 + 32 + 64)
    # 8 failed at the start, after 16 groups, and after 32 more; in the 64 after that nothing was tried.
    assert limits(budget) == [("out_of_memory", 8, 4, 3), ("grown", 4, 8, 2)]


# -- free memory --------------------------------------------------------------------------------------------------------


def test_a_phase_begins_smaller_when_less_is_free_than_it_needed() -> None:
    meter, sizes = ToldMeter(free=10_000), [2] * 64
    budget = MemoryBudget(meter)
    work = meter.work(sizes, bytes_per_unit=100)
    assert [units for _, units in budget.in_groups(UPDATE, sizes, 64, work)] == [64, 64]  # each takes 6400 bytes
    meter.available = 2000
    assert [units for _, units in budget.in_groups(UPDATE, sizes, 64, work)] == [16] * 8
    assert limits(budget) == [("little_free", 64, 16, 1)]
    # A phase without measurements is not limited, and a group is never smaller than one item.
    assert [units for _, units in budget.in_groups(Phase.SCORE, sizes, 64, work)] == [64, 64]
    meter.available = 1
    assert [units for _, units in budget.in_groups(UPDATE, sizes[:4], 64, work)] == [2] * 4
    # It does not grow into memory that others hold, but does once they release it.
    assert {units for _, units in budget.in_groups(UPDATE, sizes, 64, work)} == {2}
    meter.available = 10_000
    assert max(units for _, units in budget.in_groups(UPDATE, [2] * 200, 64, meter.work([2] * 200, 100))) > 2


# -- a budget that the system does not hold -------------------------------------------------------------------------------


def test_under_a_budget_a_phase_feels_its_way_up_and_stays_below_it() -> None:
    sizes = [1] * 64
    meter = ToldMeter(limit=1000)
    meter.now = 200
    budget = MemoryBudget(meter)
    meter.available = 800
    found = [units for _, units in budget.in_groups(Phase.ROLLOUT, sizes, 64, meter.work(sizes, 100))]
    assert found == [4] + [8] * 7 + [4]  # a sixteenth of 64 first; 8 rows take 800 bytes of the 800 that are left, 16 would not
    assert limits(budget) == [("over_budget", 16, 8, 1)]
    # Something else in the process grew: a batch that fitted before is now over budget, and is halved.
    meter.now, meter.available = 500, 10_000
    found = [units for _, units in budget.in_groups(Phase.ROLLOUT, sizes[:28], 64, meter.work(sizes, 100))]
    assert found == [8] + [4] * 5
    assert limits(budget) == [("over_budget", 8, 4, 1)]


def test_the_real_process_stays_within_its_budget() -> None:
    """Each item takes 4 MiB for a moment; without a budget 64 of them are held at once."""
    sizes = [1] * 96

    def work(group: list[int]) -> int:
        held = [np.ones(4 * MIB, dtype=np.uint8) for _ in group]
        return sum(int(part[-1]) for part in held)

    meter = CpuMeter()
    meter.release()  # what other tests freed and the allocator kept would hide what is taken here
    peaks = []
    for group, _ in MemoryBudget(meter).in_groups(Phase.SCORE, sizes, 64, work):
        peaks.append((len(group), meter.peak()))
    meter.release()
    free = meter.used()
    assert max(peaks)[0] == 64
    assert max(peaks)[1] > free + 200 * MIB
    held = CpuMeter(limit=free + 80 * MIB)
    budget = MemoryBudget(held)
    groups = []
    for group, total in budget.in_groups(Phase.SCORE, sizes, 64, work):
        assert total == len(group)
        assert held.peak() <= free + 80 * MIB
        groups.append(len(group))
    assert sum(groups) == 96
    assert 8 <= max(groups) <= 16
    assert [kind for kind, *_ in limits(budget)] == [EventKind.OVER_BUDGET]


def test_one_item_beyond_the_budget_is_an_error_that_names_both() -> None:
    meter = CpuMeter(limit=CpuMeter().used() + 20 * MIB)

    def work(group: list[int]) -> None:
        np.ones(200 * MIB, dtype=np.uint8)

    with pytest.raises(
        MemoryLimitError, match=r"this process then uses [\d.,]+ [KMG]iB, and backbone\.memory_budget is [\d.,]+ [KMG]iB"
    ):
        list(MemoryBudget(meter).in_groups(UPDATE, [5] * 3, 100, work))


def test_a_sentence_is_told_once_for_each_thing_that_happens() -> None:
    told: list[str] = []
    budget = MemoryBudget(ToldMeter(), told.append)
    run(budget, 4 * (16 + 32), memory=4)
    assert told == ["update: out of memory; continuing with 4 tokens at a time instead of 8"]


def test_what_is_kept_goes_back_when_the_phase_changes_and_not_at_every_call() -> None:
    meter = ToldMeter()
    budget = MemoryBudget(meter)
    counts = []
    for phase in (Phase.ROLLOUT, Phase.SCORE, Phase.SCORE, Phase.UPDATE, Phase.UPDATE, Phase.ROLLOUT):
        list(budget.in_groups(phase, [1], 4, lambda group: None))
        counts.append(meter.phases)
    assert counts == [1, 2, 2, 3, 3, 4]


def test_a_group_of_several_turns_shrinks_by_what_is_in_memory_at_a_time() -> None:
    budget, places = MemoryBudget(ToldMeter()), []

    def work(group: list[int]) -> int:
        places.append((len(group), budget.within(Phase.ROLLOUT, 8)))
        if places[-1][1] > 3:
            raise torch.OutOfMemoryError
        return len(group)

    found = list(budget.in_groups(Phase.ROLLOUT, [1] * 30, 8, work, turns=4))
    # 8 and 4 rows at a time do not fit; groups have four times the 2 rows that do.
    assert places == [(30, 8), (16, 4), (8, 2), (8, 2), (8, 2), (6, 2)]
    assert [i for group, _ in found for i in group] == list(range(30))
    assert [(event.before, event.after) for event in budget.take_events()] == [(8, 4), (4, 2)]


def test_a_group_of_several_turns_fails_where_one_row_does_not_fit() -> None:
    def work(group: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(MemoryLimitError, match="sampling one reply alone does not fit"):
        list(MemoryBudget(ToldMeter()).in_groups(Phase.ROLLOUT, [1] * 9, 8, work, turns=4))


def test_a_memory_budget_lets_groups_of_several_turns_grow() -> None:
    budget = MemoryBudget(ToldMeter(limit=1 << 30))
    seen = []
    for _ in range(6):
        for group, places in budget.in_groups(
            Phase.ROLLOUT, [1] * 256, 256, lambda group: budget.within(Phase.ROLLOUT, 256), turns=8
        ):
            seen.append((len(group), places))
    # 16 rows at first, to measure; the limit doubles after each group, and is gone at the caller's.
    assert seen[:5] == [(16, 16), (32, 32), (64, 64), (128, 128), (16, 256)]
    assert seen[-1] == (256, 256)


def test_no_items_leave_no_limit_behind() -> None:
    budget = MemoryBudget(ToldMeter(limit=1 << 30))
    assert list(budget.in_groups(Phase.SCORE, [], 0, lambda group: None)) == []
    assert next(len(group) for group, _ in budget.in_groups(Phase.SCORE, [4] * 64, 256, lambda group: None)) == 4
