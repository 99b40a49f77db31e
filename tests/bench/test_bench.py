"""The measurements at tiny sizes: counts, agreement of the sides, and figures that follow from the times."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from processes import selfeval
from selfeval.backbone.roles import Backbone
from selfeval.bench import hugging_face
from selfeval.bench.judge import _difference, bench_judge
from selfeval.bench.limit import PlainPasses
from selfeval.bench.logprobs import bench_logprobs
from selfeval.bench.rollout import _greedy_check, _row_counts, bench_rollout, sample_ours
from selfeval.bench.step import bench_step
from selfeval.bench.workloads import (
    BenchOptions,
    Replies,
    add_random_role,
    bench_config,
    load_backbone,
    random_ids,
    replies_to,
    spread_lengths,
)
from selfeval.errors import ConfigError
from selfeval.prompt import Prompt

FEW = BenchOptions(device="cpu", precision="fp32", threads=1, rounds=1)
SIZES: dict[str, Any] = {"prompt_tokens": 6, "reply_tokens": 4}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The embedded model with a policy that differs from the base."""
    made = load_backbone(bench_config(FEW))
    add_random_role(made, "policy")
    made.loaded.eos_ids = ()
    return made


@pytest.fixture(scope="module")
def replies(backbone: Backbone) -> Replies:
    return replies_to(backbone, 8, 4, 6, 4, seed=0)


@pytest.fixture(scope="module")
def plain(backbone: Backbone) -> Any:
    return hugging_face.load_causal(bench_config(FEW), backbone)


@pytest.fixture(scope="module")
def peer(backbone: Backbone) -> Any:
    return hugging_face.with_adapter(hugging_face.load_causal(bench_config(FEW), backbone), backbone, "policy")


def _check_figures(comparison: dict[str, Any]) -> None:
    """Check that every figure follows from the recorded times."""
    ours = next(side for side in comparison["sides"] if side["side"] == "ours")
    for side in comparison["sides"]:
        median = side["cpu_seconds"]["median"]
        assert side["cpu_seconds"]["rounds"] == [median]  # one round
        assert median > 0
        assert side["rate"] == comparison["units"] / median
        assert side["ratio_to_ours"] == median / ours["cpu_seconds"]["median"]
    for group in {side["side"] for side in comparison["sides"]}:
        assert sum(side["best"] for side in comparison["sides"] if side["side"] == group) == 1


# -- workloads ----------------------------------------------------------------------------------------------------------


def test_lengths_are_spread_reproducible_and_within_their_bounds() -> None:
    lengths = spread_lengths(40, 500, seed=3)
    assert lengths == spread_lengths(40, 500, seed=3) != spread_lengths(40, 500, seed=4)
    assert 10 <= min(lengths) < 20
    assert 80 < max(lengths) <= 120
    assert min(spread_lengths(1, 500, seed=0)) == 1


def test_random_texts_have_no_control_tokens(backbone: Backbone) -> None:
    ids = random_ids(backbone, 3000, random.Random(0))
    assert len(ids) == 3000
    assert set(ids) & {*backbone.loaded.tokenizer.all_special_ids, backbone.loaded.pad_id} == set()
    assert max(ids) < len(backbone.loaded.tokenizer)


def test_the_workload_counts_every_prompt_once(replies: Replies) -> None:
    assert (len(replies.prompts), len(replies.distinct)) == (8, 2)
    assert replies.prompts[:4] == (replies.prompts[0],) * 4
    assert replies.read == sum(len(prompt.ids) for prompt in replies.distinct)
    assert replies.written == sum(spread_lengths(4, 8, seed=1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 6, 4), r"--requests 10 is not a multiple of --samples 4; pass --requests 12 or --samples 2"),
        ((8, 4, 6, 0), r"--reply-tokens 0: pass 1 or more"),
        ((8, 4, 400, 200), r"more than this model's context of 512; pass smaller ones"),
    ],
)
def test_impossible_sizes_are_refused(backbone: Backbone, sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replies_to(backbone, *sizes, seed=0)


def test_other_precisions_and_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--precision nf4: pass auto, fp32, bf16, fp16"):
        bench_config(BenchOptions(precision="nf4"))
    with pytest.raises(ConfigError, match=r"--device tpu: pass auto, cpu or cuda"):
        bench_config(BenchOptions(device="tpu"))


# -- sides --------------------------------------------------------------------------------------------------------------


def test_both_sides_give_each_reply_its_own_length(backbone: Backbone, peer: Any, replies: Replies) -> None:
    assert [len(ids) for ids in sample_ours(backbone, replies, 8)] == list(replies.lengths)
    for rows in (4, 8):
        assert [len(ids) for ids in hugging_face.sample_replies(peer, backbone, replies, rows)] == list(replies.lengths)
    assert len(set(replies.lengths)) > 2


def test_greedy_replies_are_equal_under_the_same_adapter_only(
    backbone: Backbone, peer: Any, plain: Any, replies: Replies
) -> None:
    assert _greedy_check(backbone, peer, replies, 8) == {"greedy_replies": {"compared": 8, "equal": 8}}
    without: Any = _greedy_check(backbone, plain, replies, 8)["greedy_replies"]
    assert without["equal"] < 8


def test_a_bare_copy_shares_the_weights_and_has_no_adapter(backbone: Backbone) -> None:
    model = hugging_face.load_causal(bench_config(FEW), backbone)
    bare = hugging_face.bare_copy(model)
    hugging_face.with_adapter(model, backbone, "policy")
    assert not any("lora" in name for name, _ in bare.named_parameters())
    assert any("lora" in name for name, _ in model.named_parameters())
    assert {p.data_ptr() for p in bare.parameters()} <= {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("rows", [1, 3, 25])
def test_the_limit_reads_the_tokens_and_computes_the_outputs_once(plain: Any, rows: int) -> None:
    # 25 rows of 20 tokens, and logits at 100 of them.
    passes = PlainPasses(plain, tokens=500, width=20, outputs=100)
    read, written = [], []
    hooks = [
        plain.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel())),
        plain.get_output_embeddings().register_forward_hook(lambda module, inputs, output: written.append(len(inputs[0]))),
    ]
    passes.run(rows)
    for hook in hooks:
        hook.remove()
    assert (sum(read), sum(written)) == (500, 100)
    assert passes.sizes((20, 60, 1000)) == [1, 3, 25]


def test_batch_sizes_are_whole_prompts(replies: Replies) -> None:
    assert _row_counts(replies, (2, 4, 6, 32, 64)) == [4, 8]


def test_last_logits_do_not_depend_on_the_batch(backbone: Backbone, plain: Any) -> None:
    rows = [[20, 21, 22, 23], [30], [40, 41]]
    alone = torch.cat([hugging_face.last_logits(plain, backbone, [row], 1) for row in rows])
    for read in (hugging_face.last_logits, hugging_face.last_logits_by_generate):
        torch.testing.assert_close(read(plain, backbone, rows, 2), alone, rtol=1e-4, atol=1e-4)


def test_a_missing_verdict_on_one_side_is_no_agreement() -> None:
    nan = float("nan")
    assert _difference([0.5, nan], [0.25, nan]) == 0.25
    assert _difference([0.5, 0.5], [0.5, nan]) is None


# -- measurements -------------------------------------------------------------------------------------------------------


def test_rollout_counts_the_tokens_of_both_sides() -> None:
    found = bench_rollout(FEW, requests=8, samples=4, batch_sizes=(4, 8), **SIZES).as_json()
    written = sum(spread_lengths(4, 8, seed=1))
    assert found["workload"]["reply_tokens"] == written
    assert found["checks"]["reply_tokens"] == {"wanted": written, "ours": written, "hugging_face": written}
    assert found["checks"]["greedy_replies"] == {"compared": 8, "equal": 8}
    (comparison,) = found["comparisons"]
    assert comparison["units"] == written
    assert [side["side"] for side in comparison["sides"]] == ["ours", "hugging_face", "hugging_face", "limit"]
    assert (found["machine"]["device"], found["machine"]["threads"]) == ("cpu", 1)
    _check_figures(comparison)


def test_logprobs_agree_and_would_not_without_the_adapter(backbone: Backbone, plain: Any, peer: Any) -> None:
    found = bench_logprobs(FEW, requests=8, samples=4, batch_sizes=(2,), **SIZES).as_json()
    assert found["checks"]["logprobs"]["tokens"] == found["workload"]["reply_tokens"] == sum(spread_lengths(4, 8, seed=1))
    assert found["checks"]["logprobs"]["largest_difference"] < 1e-4
    _check_figures(found["comparisons"][0])
    prompts, ids = [Prompt((30, 31)), Prompt((40,))], [(50, 51, 52), (60,)]
    ours, other = (hugging_face.reply_logprobs(model, backbone, [p.ids for p in prompts], ids, 2) for model in (peer, plain))
    assert [len(row) for row in ours] == [3, 1]
    assert max(abs(a - b) for mine, yours in zip(ours, other, strict=True) for a, b in zip(mine, yours, strict=True)) > 1e-3


def test_judge_measures_verdicts_and_scores_that_agree() -> None:
    found = bench_judge(FEW, requests=4, batch_sizes=(4,), **SIZES).as_json()
    verdicts, scores = found["comparisons"]
    assert found["checks"]["verdicts"]["pairs"] == verdicts["units"] == 4
    assert max(found["checks"]["verdicts"]["largest_difference"].values()) < 1e-5
    assert found["checks"]["scores"]["replies"] == 8
    assert 0 < found["checks"]["scores"]["largest_difference"] < 1e-4
    settings = [side["setting"] for side in verdicts["sides"] if side["side"] == "hugging_face"]
    assert settings == ["forward, batch 4", "generate, batch 4"]
    for comparison in (verdicts, scores):
        _check_figures(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["ppo", "grpo", "rloo"])
def test_step_measures_the_same_learning_with_and_without_shared_prompts(learner: str) -> None:
    found = bench_step(FEW, learner=learner, requests=8, samples=4, **SIZES).as_json()
    assert found["checks"]["prompts_shared"] is True
    assert found["checks"]["metrics"]["compared"] > 8
    assert found["checks"]["metrics"]["largest_difference"] < 1e-3
    (comparison,) = found["comparisons"]
    assert [side["side"] for side in comparison["sides"]] == ["ours", "separate", "limit"]
    assert comparison["units"] == 8 * 4
    _check_figures(comparison)


def test_an_unknown_learner_is_refused() -> None:
    with pytest.raises(ConfigError, match="--learner dpo: pass ppo, grpo or rloo"):
        bench_step(FEW, learner="dpo")


# -- the command --------------------------------------------------------------------------------------------------------


def test_json_is_the_only_output() -> None:
    sizes = ("--requests", "4", "--rounds", "1", "--reply-tokens", "4", "--prompt-tokens", "4", "--threads", "1")
    done = selfeval("bench", "logprobs", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["command"], found["model"]) == ("logprobs", "word_problems")
    assert found["workload"]["requests"] == found["workload"]["samples"] == 4
    assert found["checks"]["logprobs"]["tokens"] == sum(spread_lengths(4, 4, seed=1))
    assert "bench logprobs: round 1 of 1: ours" in done.stderr


def test_the_table_has_every_side() -> None:
    sizes = ("--requests", "4", "--rounds", "1", "--reply-tokens", "4", "--prompt-tokens", "4", "--threads", "1")
    done = selfeval("bench", "rollout", *sizes, "--quiet")
    assert done.returncode == 0, done.stderr
    for text in ("ours, batch 4", "Hugging Face, batch 4", "limit, ", "check: greedy replies: compared 4, equal 4"):
        assert text in done.stdout
    assert "round 1" not in done.stderr


@pytest.mark.slow
def test_memory_is_measured_in_new_processes(tmp_path: Path) -> None:
    tokenizer = tiny_models.words_tokenizer()
    wide = tiny_models.model("llama", len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    folder = tiny_models.save_model(wide, tokenizer, tmp_path)
    sizes = ("--requests", "8", "--samples", "4", "--reply-tokens", "16", "--prompt-tokens", "16", "--threads", "1")
    done = selfeval("bench", "memory", "--model", str(folder), *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [phase["phase"] for phase in found["phases"]] == ["rollout", "score", "update"]
    weights = found["weights"]
    assert weights > 25e6
    # The process may fill memory that the allocator kept from the warm-up, a few MiB at most.
    kept = 6 << 20
    for phase in found["phases"]:
        # One copy of the weights at least, and not the libraries, which take hundreds of MiB.
        assert weights - kept < phase["ours"] < 2 * weights + (100 << 20)
        assert weights < phase["planned"]
        assert weights - kept < phase["hugging_face"]
        assert phase["planned_over_measured"] == phase["planned"] / phase["ours"]
    update = found["phases"][-1]
    # PPO on separate models: reference, evaluator and critic have copies of their own.
    assert update["is_computed"]
    assert update["hugging_face"] == update["ours"] + 3 * weights
