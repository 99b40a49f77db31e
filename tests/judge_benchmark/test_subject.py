"""The identity of a judge: judgements on disk are reused under its key."""

from __future__ import annotations

from pathlib import Path

from selfeval.config import RunConfig
from selfeval.judge_benchmark.subject import Role, Subject
from selfeval.store import write_sealed


def test_a_run_with_another_evaluator_or_other_prompts_is_another_judge(tmp_path: Path) -> None:
    roles: tuple[Role, ...] = ("judge", "referee", "evaluator")
    weights = tmp_path / "roles" / "evaluator-0" / "head.safetensors"
    weights.parent.mkdir(parents=True)

    def keys(content: bytes, prompts: str) -> list[str]:
        weights.write_bytes(content)
        run = {"config": RunConfig().model_dump(mode="json"), "templates": {"judge.jinja": prompts}}
        write_sealed(tmp_path / "run.json", run)
        return [Subject(role, RunConfig(), tmp_path, 0).key for role in roles]

    first = keys(b"1", "a")
    assert keys(b"1", "a") == first
    assert [old == new for old, new in zip(first, keys(b"2", "a"), strict=True)] == [True, True, False]
    assert [old == new for old, new in zip(first, keys(b"1", "b"), strict=True)] == [False, False, False]
