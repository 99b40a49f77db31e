"""The vLLM engine against a stand-in of vLLM's Python API (tests/standin_vllm.py); vLLM itself needs a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import standin_vllm
import tiny_models
from processes import python
from selfeval.backbone.adapters import BASE
from selfeval.backbone.placement import DeviceMap
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import BackboneConfig, LoraConfig, RunConfig
from selfeval.errors import ConfigError, LoopError, ModelError, RoleError
from selfeval.prompt import Image, Prompt
from selfeval.rollout.engine import count_tokens
from selfeval.rollout.engines import OwnEngine, RolloutEngine, make_engine
from selfeval.rollout.guide import Guide
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ThinkingTokens
from selfeval.rollout.vllm_engine import VLLMEngine, _seed
from selfeval.stages.preflight import check_input
from standin_vllm import LLM

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12), (5, 9, 2)]
LIMIT, POLICY, ENDS = 12, "policy", (1, 33, 34)
GREEDY = [Request(Prompt(ids), temperature=0.0) for ids in PROMPTS]
SAMPLED = [Request(Prompt(ids)) for ids in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_models.save_model(tiny_models.model("llama"), tiny_models.words_tokenizer(), path)


@pytest.fixture
def backbone() -> Backbone:
    """The model of the folder, with a policy that seems trained."""
    made = tiny_models.backbone("llama", eos=ENDS)
    made.roles.add(POLICY)
    tiny_models.scramble(made, POLICY)
    return made


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    return standin_vllm.install(monkeypatch)


def engine_of(folder: Path, **settings: Any) -> VLLMEngine:
    return VLLMEngine(str(folder), BackboneConfig(engine="vllm", lora=LoraConfig(rank=4, alpha=8.0), vllm=settings))  # type: ignore[arg-type]


def sample(
    engine: RolloutEngine, backbone: Backbone, requests: Sequence[Request], role: str = POLICY, **options: Any
) -> list[Rollout]:
    with backbone.acting_as(role):
        return engine.generate(backbone, requests, max_new_tokens=options.pop("limit", LIMIT), seed=3, **options)


def close_to(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    assert [r.ids for r in found] == [r.ids for r in expected]
    assert [r.finished for r in found] == [r.finished for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


# -- the same replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [BASE, POLICY])
def test_greedy_replies_are_those_of_the_own_engine(folder: Path, backbone: Backbone, vllm: type[LLM], role: str) -> None:
    expected = sample(OwnEngine(), backbone, GREEDY, role)
    close_to(sample(engine_of(folder), backbone, GREEDY, role), expected)
    assert {r.finished for r in expected} == {True, False}


def test_a_changed_adapter_is_swapped_and_the_old_one_removed(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    engine = engine_of(folder)
    base = sample(engine, backbone, GREEDY, BASE)
    before = sample(engine, backbone, GREEDY)
    assert sample(engine, backbone, GREEDY) == before
    tiny_models.scramble(backbone, POLICY, seed=8)
    after = sample(engine, backbone, GREEDY)
    close_to(after, sample(OwnEngine(), backbone, GREEDY))
    assert len({tuple(r.ids for r in found) for found in (base, before, after)}) == 3
    (llm,) = vllm.made
    assert [name for name, _ in llm.calls] == [None, "policy-1", "policy-1", "policy-2"]
    assert llm.llm_engine.removed == [1]
    assert [path.name for path in engine._folder.iterdir()] == ["policy-2"]


def test_two_roles_have_separate_adapters(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    backbone.roles.add("start")
    tiny_models.scramble(backbone, "start", seed=9)
    engine = engine_of(folder)
    for role in (POLICY, "start", POLICY):
        close_to(sample(engine, backbone, GREEDY, role), sample(OwnEngine(), backbone, GREEDY, role))
    assert [name for name, _ in vllm.made[0].calls] == ["policy-1", "start-2", "policy-1"]


def test_a_snapshot_of_the_base_samples_without_an_adapter(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    backbone.roles.add("bare")
    backbone.roles.add_snapshot("reference", of="bare")
    close_to(sample(engine_of(folder), backbone, GREEDY, "reference"), sample(OwnEngine(), backbone, GREEDY, BASE))
    assert vllm.made[0].calls == [(None, len(GREEDY))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_backbone_at_the_sampling_temperature(
    folder: Path, backbone: Backbone, vllm: type[LLM], temperature: float
) -> None:
    requests = [Request(Prompt(ids), temperature) for ids in PROMPTS]
    found = sample(engine_of(folder), backbone, requests)
    with backbone.acting_as(POLICY):
        expected = reply_logprobs(
            backbone, [r.prompt for r in requests], [r.ids for r in found], batch_tokens=64, temperature=temperature
        )
    for rollout, logprobs in zip(found, expected, strict=True):
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("filtered", [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.5}], ids=str)
def test_logprobs_with_filters_are_those_of_the_full_distribution(
    folder: Path, backbone: Backbone, vllm: type[LLM], filtered: dict[str, Any]
) -> None:
    requests = [Request(Prompt(ids), 0.5 + i / 10, stream=i, **filtered) for i, ids in enumerate(PROMPTS)]
    found = sample(engine_of(folder), backbone, requests)
    with backbone.acting_as(POLICY), torch.no_grad():
        for request, rollout in zip(requests, found, strict=True):
            (expected,) = reply_logprobs(
                backbone, [request.prompt], [rollout.ids], batch_tokens=64, temperature=request.temperature
            )
            assert rollout.logprobs == pytest.approx(expected, abs=1e-5)


def test_samples_follow_the_policys_distribution(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    """First tokens of 400 replies against the exact probabilities, by Pearson's statistic over the five likeliest tokens."""
    requests = [Request(Prompt((5, 9, 2))) for _ in range(400)]
    first = torch.tensor([r.ids[0] for r in sample(engine_of(folder), backbone, requests, limit=1)])
    with backbone.acting_as(POLICY):
        probs_V = tiny_models.full_logprobs(backbone.model, (5, 9, 2))[-1].exp()
    likely = probs_V.topk(5).indices
    expected = torch.cat([probs_V[likely], (1 - probs_V[likely].sum())[None]]) * 400
    counts = torch.stack([(first == token).sum() for token in likely])
    seen = torch.cat([counts, (400 - counts.sum())[None]])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < 20.5  # the 0.999 quantile of chi-square with 5 degrees of freedom


def test_a_reply_depends_on_its_seed_and_stream_alone(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    engine = engine_of(folder)
    whole = sample(engine, backbone, SAMPLED)
    assert sample(engine, backbone, SAMPLED[3:], first=3) == whole[3:]
    named = [Request(request.prompt, stream=i) for i, request in enumerate(SAMPLED)]
    assert sample(engine, backbone, named[::-1]) == whole[::-1]
    assert whole[0] != whole[4]  # the same prompt with other streams
    assert len({_seed(seed, stream) for seed in range(20) for stream in range(20)}) == 400
    assert max(_seed(2**48, stream) for stream in range(1000)) < 2**63


# -- limits -------------------------------------------------------------------------------------------------------------


def test_greedy_replies_with_a_penalty_and_stop_strings_are_those_of_the_own_engine(
    folder: Path, backbone: Backbone, vllm: type[LLM]
) -> None:
    (free,) = sample(OwnEngine(), backbone, [Request(Prompt(PROMPTS[0]), 0.0)])
    text = backbone.loaded.tokenizer.decode(list(free.ids[2:4]))
    requests = [Request(Prompt(ids), 0.0, repetition_penalty=1.3) for ids in PROMPTS]
    requests += [Request(Prompt(PROMPTS[0]), 0.0, stop_strings=("no such text", text))]
    expected = sample(OwnEngine(), backbone, requests)
    close_to(sample(engine_of(folder), backbone, requests), expected)
    assert expected[-1].finished
    assert len(expected[-1].ids) < len(free.ids)


def test_a_further_stop_token_ends_a_reply(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    expected = sample(OwnEngine(), backbone, GREEDY)
    stop = expected[0].ids[1]
    close_to(sample(engine_of(folder), backbone, GREEDY, stop=(stop,)), sample(OwnEngine(), backbone, GREEDY, stop=(stop,)))


@pytest.mark.parametrize("limit", [None, 3])
def test_thinking_is_found_and_limited_as_by_the_own_engine(
    folder: Path, backbone: Backbone, vllm: type[LLM], limit: int | None
) -> None:
    thinking = ThinkingTokens(frozenset(range(2, 9)), frozenset(range(9, 22)), limit)
    expected = sample(OwnEngine(), backbone, GREEDY, limit=6, thinking=thinking)
    found = sample(engine_of(folder), backbone, GREEDY, limit=6, thinking=thinking)
    close_to(found, expected)
    assert [r.hidden for r in found] == [r.hidden for r in expected]
    assert any(r.hidden for r in found)


def test_replies_end_at_the_context(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    engine = engine_of(folder, max_length=8)
    found = sample(engine, backbone, GREEDY, limit=30)
    assert max(len(request.prompt.ids) + len(r.ids) for request, r in zip(GREEDY, found, strict=True)) == 8
    with pytest.raises(LoopError, match=r"a prompt of 8 tokens leaves no room for a reply in backbone.vllm.max_length = 8"):
        sample(engine, backbone, [Request(Prompt((5,) * 8))])


def test_tokens_are_counted_and_progress_is_told(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    advanced: list[int] = []
    with count_tokens() as tally:
        found = sample(engine_of(folder), backbone, SAMPLED, advance=advanced.append)
    assert advanced == [len(SAMPLED)]
    # The first and the last prompt are the same.
    assert (tally.read, tally.written) == (sum(map(len, PROMPTS[:-1])), sum(len(r.ids) for r in found))
    assert sample(engine_of(folder), backbone, []) == []


# -- what the log-probs say ---------------------------------------------------------------------------------------------


def test_log_probs_that_are_off_stop_the_sampling(folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    standin_vllm.install(monkeypatch, misreported=0.25)
    message = r'differ by 0\.25 nats per token on average for the role "policy", more than backbone.vllm.max_difference = 0\.1'
    with pytest.raises(LoopError, match=message):
        sample(engine_of(folder), backbone, SAMPLED)
    assert len(sample(engine_of(folder, max_difference=0.3), backbone, SAMPLED)) == len(SAMPLED)


def test_another_distribution_stops_the_sampling(folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    standin_vllm.install(monkeypatch, noise=2.0)
    with pytest.raises(LoopError, match="they compute different distributions"):
        sample(engine_of(folder), backbone, SAMPLED)


def test_log_probs_are_compared_again_after_a_change(folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, engine = standin_vllm.install(monkeypatch), engine_of(folder)
    sample(engine, backbone, SAMPLED)
    monkeypatch.setattr(vllm, "misreported", 0.25)
    sample(engine, backbone, SAMPLED)  # the same weights were compared
    tiny_models.scramble(backbone, POLICY, seed=8)
    with pytest.raises(LoopError, match="differ by"):
        sample(engine, backbone, SAMPLED)


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sleep", [True, False])
def test_it_sleeps_between_two_calls_if_configured(folder: Path, backbone: Backbone, vllm: type[LLM], sleep: bool) -> None:
    engine = engine_of(folder, sleep=sleep)
    for _ in range(2):
        sample(engine, backbone, SAMPLED)
    (llm,) = vllm.made
    assert (llm.asleep, llm.naps) == ((True, 2) if sleep else (False, 0))
    files = engine._folder
    assert files.is_dir()
    engine.close()
    assert not files.exists()


def test_nothing_is_loaded_before_the_first_reply(folder: Path, vllm: type[LLM]) -> None:
    engine_of(folder)
    assert vllm.made == []


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_vllm_is_imported_only_where_it_is_selected() -> None:
    code = (
        "import sys, selfeval.cli, selfeval.stages.pipeline\n"
        "from selfeval.rollout.engines import make_engine\n"
        "from selfeval.config import BackboneConfig\n"
        "make_engine('model', BackboneConfig())\n"
        "print([name for name in sys.modules if 'vllm' in name and name.startswith(('vllm', 'selfeval.rollout'))])\n"
    )
    found = python(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[]\n"


def test_a_missing_vllm_is_named_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = r'backbone\.engine = "vllm" needs the package vllm .*pip install vllm'
    with pytest.raises(ConfigError, match=message):
        make_engine(str(folder), BackboneConfig(engine="vllm"))
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("What is 2 + 3?\n", encoding="utf-8")
    config = RunConfig(model=str(folder), seeds=str(seeds), backbone=BackboneConfig(engine="vllm"))
    with pytest.raises(ConfigError, match=message):
        check_input(config)


def test_a_machine_without_a_gpu_is_refused(folder: Path, vllm: type[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.rollout.vllm_engine.pick_device", lambda wanted: torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs a GPU, and torch sees none here"):
        make_engine(str(folder), BackboneConfig(engine="vllm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "nf4"}, "this base is in nf4"),
        ({"placement": DeviceMap("cuda:0", (), ("0", "1"), ("cuda:0", "cpu"), {})}, "spread over several devices"),
    ],
)
def test_a_base_without_an_equal_copy_is_refused(
    folder: Path, backbone: Backbone, vllm: type[LLM], changes: dict[str, Any], message: str
) -> None:
    for name, value in changes.items():
        object.__setattr__(backbone.loaded, name, value)
    engine = engine_of(folder)
    with pytest.raises(ConfigError, match=message):
        engine.check(backbone)
    with pytest.raises(ConfigError, match=message):
        sample(engine, backbone, SAMPLED)
    assert vllm.made == []


@pytest.mark.parametrize("options", [{"watch": (3,)}, {"guide": Guide(("q",), 1.0)}])
def test_calls_that_need_logits_are_refused(folder: Path, backbone: Backbone, vllm: type[LLM], options: dict[str, Any]) -> None:
    with pytest.raises(LoopError, match="vLLM returns no logits"):
        sample(engine_of(folder), backbone, SAMPLED, **options)


def test_stop_strings_of_models_that_think_are_refused(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    thinking = ThinkingTokens(frozenset({5}), frozenset({6}))
    with pytest.raises(LoopError, match=r"unset replies\.stop_strings"):
        sample(engine_of(folder), backbone, [Request(Prompt((7,)), stop_strings=("x",))], thinking=thinking)


def test_images_and_missing_or_mixed_roles_are_refused(folder: Path, backbone: Backbone, vllm: type[LLM]) -> None:
    engine = engine_of(folder)
    with pytest.raises(ModelError, match="image"):
        sample(engine, backbone, [Request(Prompt((5, 9), (Image(b"x"),)))])
    with pytest.raises(RoleError, match="outside of"):
        engine.generate(backbone, SAMPLED, max_new_tokens=2, seed=0)
    with backbone.acting_as([BASE, POLICY]), pytest.raises(RoleError, match="one role at a time"):
        engine.generate(backbone, SAMPLED[:2], max_new_tokens=2, seed=0)
