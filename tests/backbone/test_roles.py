from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.errors import ModelError, RoleError, RunFolderError
from selfeval.prompt import Prompt
from token_prompts import as_prompts

FOUR = ("policy", "reference", "evaluator-0", "critic")
IDS = torch.tensor([[5, 9, 2, 17, 30], [7, 7, 3, 21, 4]])
ONES = torch.ones_like(IDS)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def logits(backbone: Backbone, role: str) -> Tensor:
    with torch.no_grad(), backbone.acting_as(role):
        return backbone.model(input_ids=IDS).logits


def four_roles(family: str = "llama", **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(family, **changes)
    backbone.roles.add("policy", seed=1)
    tiny_models.scramble(backbone, "policy")
    backbone.roles.add("reference", copy_of="policy", trainable=False)
    backbone.roles.add("evaluator-0", seed=2, head=True)
    tiny_models.scramble(backbone, "evaluator-0", seed=8)
    backbone.roles.add("critic", copy_of="evaluator-0", head=True)
    return backbone


def train_a_little(backbone: Backbone, role: str, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(list(backbone.roles.parameters(role).values()), lr=0.05)
    for _ in range(steps):
        with backbone.acting_as(role):
            torch.log_softmax(backbone.logits(backbone.hidden(IDS, ONES)), -1)[..., 3].sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


# -- acting_as ----------------------------------------------------------------------------------------------------------


def test_acting_as_nests_and_an_exception_restores_the_outer_role() -> None:
    backbone = four_roles()
    alone = {role: logits(backbone, role) for role in (*FOUR, BASE)}
    assert backbone.acting is None
    with backbone.acting_as("policy"):
        with contextlib.suppress(ZeroDivisionError), backbone.acting_as("critic"), backbone.acting_as(BASE):
            assert backbone.acting == BASE
            close(backbone.model(input_ids=IDS).logits.detach(), alone[BASE])
            raise ZeroDivisionError
        assert backbone.acting == "policy"
        close(backbone.model(input_ids=IDS).logits.detach(), alone["policy"])
        assert (alone["policy"] - alone["critic"]).abs().max() > 0.1  # else the comparison above could not fail
    assert backbone.acting is None


@pytest.mark.parametrize("with_roles", [False, True])
def test_a_pass_outside_of_a_block_is_refused(with_roles: bool) -> None:
    backbone = four_roles() if with_roles else tiny_models.backbone()
    passes: list[Callable[[], Any]] = [
        lambda: backbone.hidden(IDS, ONES),
        lambda: backbone.model(input_ids=IDS),
        lambda: backbone.model.generate(input_ids=IDS, max_new_tokens=1),
    ]
    for each in passes:
        with pytest.raises(RoleError, match="outside of"):
            each()
    with backbone.acting_as(BASE):
        pass
    with pytest.raises(RoleError, match="outside of"):  # not a lingering role either
        backbone.model(input_ids=IDS)


def test_unknown_and_duplicate_roles_are_refused_by_name() -> None:
    backbone = four_roles()
    with pytest.raises(RoleError, match=r'no role "polcy".*policy'), backbone.acting_as("polcy"):
        pass
    with pytest.raises(RoleError, match="already exists"):
        backbone.roles.add("policy")
    with pytest.raises(RoleError, match="already exists"):
        backbone.roles.add(BASE)
    with pytest.raises(RoleError, match="does not exist"):
        backbone.roles.add("judge", copy_of="jury")
    assert backbone.roles.names == FOUR


def test_switching_never_flips_requires_grad() -> None:
    backbone = four_roles()
    wanted = {"policy": True, "reference": False, "evaluator-0": True, "critic": True}

    def check() -> None:
        for role, trainable in wanted.items():
            assert {p.requires_grad for p in backbone.roles.parameters(role).values()} == {trainable}, role
        ours = {id(p) for role in FOUR for p in backbone.roles.parameters(role).values()}
        assert not any(p.requires_grad for p in backbone.model.parameters() if id(p) not in ours)

    check()
    for role in (*FOUR, BASE):
        with backbone.acting_as(role):
            check()
            with backbone.acting_as("critic"):
                check()
            check()
    check()
    backbone.roles.freeze("evaluator-0")
    wanted["evaluator-0"] = False
    check()
    with backbone.acting_as("evaluator-0"):
        check()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_loss_of_one_role_has_no_gradient_on_any_other(family: str) -> None:
    backbone = four_roles(family)
    for role in ("policy", "critic"):
        with backbone.acting_as(role):
            hidden = backbone.hidden(IDS, ONES)
            (backbone.score(role, hidden).sum() if role == "critic" else backbone.logits(hidden).square().mean()).backward()
        own = backbone.roles.parameters(role)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values()), role
        ids = {id(p) for p in own.values()}
        everything = [*backbone.model.parameters(), *(p for h in backbone.roles.heads.values() for p in h.parameters())]
        assert all(p.grad is None for p in everything if id(p) not in ids), role
        for parameter in own.values():
            parameter.grad = None


# -- snapshots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_snapshot_of_a_policy_that_is_still_the_base_is_the_base_and_costs_nothing(family: str, tmp_path: Path) -> None:
    backbone = tiny_models.backbone(family)
    backbone.roles.add("policy", seed=1)
    before = backbone.census.adapter_bytes
    backbone.roles.add_snapshot("reference", of="policy")
    assert backbone.census.adapter_bytes == before
    assert backbone.roles.names == ("policy", "reference")
    start = logits(backbone, "policy")
    train_a_little(backbone, "policy")
    assert torch.equal(logits(backbone, "reference"), start)
    assert torch.equal(logits(backbone, "reference"), logits(backbone, BASE))
    assert (logits(backbone, "policy") - start).abs().max() > 1e-3
    backbone.roles.add("second", copy_of="reference")
    assert torch.equal(logits(backbone, "second"), start)
    with pytest.raises(RoleError, match="with an adapter to save"):
        save_role(backbone, "reference", tmp_path)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_snapshot_of_a_fine_tuned_policy_is_not_the_base(family: str) -> None:
    """Here "adapter off" would be wrong: the policy starts from an adapter that changes the logits."""
    backbone = tiny_models.backbone(family)
    backbone.roles.add("policy", seed=1)
    train_a_little(backbone, "policy")
    start = logits(backbone, "policy")
    backbone.roles.add_snapshot("reference", of="policy")
    train_a_little(backbone, "policy")
    close(logits(backbone, "reference"), start)
    assert (logits(backbone, "reference") - logits(backbone, BASE)).abs().max() > 1e-3
    assert not any(p.requires_grad for p in backbone.roles.parameters("reference").values())
    with pytest.raises(RoleError, match="already exists"):
        backbone.roles.add_snapshot("reference", of="policy")
    with pytest.raises(RoleError, match="does not exist"):
        backbone.roles.add_snapshot("other", of="nobody")


# -- what each role computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_base_equals_the_untouched_model_even_after_training_a_role(family: str) -> None:
    untouched = tiny_models.model(family)(input_ids=IDS).logits.detach()
    backbone = tiny_models.backbone(family)
    close(logits(backbone, BASE), untouched)
    backbone.roles.add("policy", seed=1)
    close(logits(backbone, "policy"), untouched)  # B = 0 at the start
    train_a_little(backbone, "policy")
    assert (logits(backbone, "policy") - untouched).abs().max() > 0.1
    close(logits(backbone, BASE), untouched)


def test_a_copy_gives_equal_outputs_head_included() -> None:
    backbone = four_roles()
    batch = pad_sequences(backbone, as_prompts([(5, 9)]), [(2, 17, 30)])
    scores = {}
    for role in ("evaluator-0", "critic"):
        with backbone.acting_as(role), torch.no_grad():
            scores[role] = final_scores(backbone, role, batch)
    assert torch.equal(scores["evaluator-0"], scores["critic"])
    assert scores["critic"].abs().item() > 1e-3
    assert torch.equal(logits(backbone, "evaluator-0"), logits(backbone, "critic"))


def test_the_reference_is_the_policy_as_it_was_and_stays_so() -> None:
    backbone = four_roles()  # the policy starts trained: the reference must differ from the bare base
    start = logits(backbone, "policy")
    assert torch.equal(logits(backbone, "reference"), start)
    assert (start - logits(backbone, BASE)).abs().max() > 0.1
    before = {n: p.detach().clone() for n, p in backbone.roles.parameters("reference").items()}
    train_a_little(backbone, "policy")
    assert (logits(backbone, "policy") - start).abs().max() > 0.1
    assert torch.equal(logits(backbone, "reference"), start)
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in backbone.roles.parameters("reference").items())


def test_adapters_start_from_their_seed_and_leave_the_global_generator_alone() -> None:
    backbone = tiny_models.backbone()
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    for role, seed in (("one", 1), ("same", 1), ("other", 2)):
        backbone.roles.add(role, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (list(backbone.roles.parameters(role).values()) for role in ("one", "same", "other"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_adapters_and_heads_are_fp32_on_a_bf16_base() -> None:
    backbone = tiny_models.backbone(dtype=torch.bfloat16)
    backbone.roles.add("evaluator-0", head=True)
    assert {p.dtype for p in backbone.roles.parameters("evaluator-0").values()} == {torch.float32}
    with backbone.acting_as("evaluator-0"):
        hidden = backbone.hidden(IDS, ONES)
        assert hidden.dtype == torch.bfloat16
        assert backbone.score("evaluator-0", hidden).dtype == backbone.logits(hidden).dtype == torch.float32


# -- memory -------------------------------------------------------------------------------------------------------------


def test_four_roles_hold_one_copy_of_the_weights_and_a_second_one_is_counted() -> None:
    sizes = {"hidden_size": 56, "intermediate_size": 88}  # unique shapes, so models of other tests are not counted
    backbone = four_roles("llama", **sizes)
    assert backbone.census.weight_copies() == 1
    expected = sum(p.numel() * 4 for p in tiny_models.model("llama", **sizes).parameters())
    assert backbone.census.base_bytes == expected
    second = copy.deepcopy(backbone.model)
    assert backbone.census.weight_copies() == 2
    in_half = copy.deepcopy(backbone.model).to(torch.bfloat16)  # a copy in another precision is a copy
    assert backbone.census.weight_copies() == 3
    del second, in_half
    gc.collect()
    assert backbone.census.weight_copies() == 1


def test_adapter_bytes_are_counted_by_hand() -> None:
    backbone = tiny_models.backbone("gpt2", rank=4)
    backbone.roles.add("policy")
    backbone.roles.add("evaluator-0", head=True)
    # Per layer LoRA on c_attn 32->96, c_proj 32->32, c_fc 32->128, c_proj 128->32: rank * (in + out) fp32 numbers each.
    adapter = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)) * 4
    assert backbone.census.adapter_bytes == 2 * adapter + (32 + 1) * 4
    assert backbone.census.parameter_count * 4 == backbone.census.base_bytes


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_saved_role_scores_the_same_when_loaded(family: str, tmp_path: Path) -> None:
    backbone = four_roles(family)
    save_role(backbone, "evaluator-0", tmp_path / "role")
    assert {p.name for p in (tmp_path / "role").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "role.json",
    }  # fmt: skip
    fresh = tiny_models.backbone(family)
    load_role(fresh, "evaluator-0", tmp_path / "role")
    batch = pad_sequences(backbone, as_prompts([(5, 9), (4,)]), [(2, 17, 30), (8, 8)])
    scores = []
    for each in (backbone, fresh):
        with each.acting_as("evaluator-0"), torch.no_grad():
            scores.append(final_scores(each, "evaluator-0", batch))
    close(scores[0], scores[1], 1e-5)
    assert scores[0].abs().min() > 1e-3
    assert not any(p.requires_grad for p in fresh.roles.parameters("evaluator-0").values())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft and transformers among themselves
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_peft_loads_a_saved_role_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    backbone = four_roles(family)
    save_role(backbone, "policy", tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    theirs = PeftModel.from_pretrained(tiny_models.model(family), str(tmp_path)).eval()
    close(theirs(input_ids=IDS).logits.detach(), logits(backbone, "policy"), 1e-5)


def test_a_role_of_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    save_role(four_roles(), "policy", tmp_path)
    other = tiny_models.backbone(seed=5)  # same shapes, other weights
    with pytest.raises(RunFolderError, match=r"tiny-llama-0.*tiny-llama-5"):
        load_role(other, "policy", tmp_path)
    assert other.roles.names == ()


def test_saving_a_role_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RoleError, match='no role "policy"'):
        save_role(tiny_models.backbone(), "policy", tmp_path)


def test_a_family_whose_logits_are_made_in_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.backbone.output_head.logit_scale", lambda config: 0.5)
    with pytest.raises(ModelError, match="models of type llama compute their logits"):
        tiny_models.backbone()


def test_recomputed_layers_give_the_same_gradients_and_keep_the_cache() -> None:
    from selfeval.rollout.engine import generate
    from selfeval.rollout.requests import Request

    kept, recomputed = tiny_models.backbone(), tiny_models.backbone()
    recomputed.recompute_layers()
    ids = torch.tensor([[5, 9, 2, 7], [3, 4, 8, 6]])
    found = []
    for made in (kept, recomputed):
        made.roles.add("policy")
        tiny_models.scramble(made, "policy")
        with made.acting_as("policy"):
            made.hidden(ids, torch.ones_like(ids)).square().sum().backward()
            replies = generate(made, [Request(Prompt((5, 9, 2)), temperature=0.0)], max_new_tokens=6, seed=0)
        found.append(([p.grad for p in made.roles.parameters("policy").values()], replies[0].ids))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("saved", "asked"), [("all-linear", ("q_proj",)), (("q_proj",), "all-linear")])
def test_a_role_on_other_layers_is_refused(saved: Any, asked: Any, tmp_path: Path) -> None:
    """Fewer would be skipped silently, more would be missing."""
    first, second = tiny_models.backbone(), tiny_models.backbone()
    first.roles.lora = first.roles.lora.model_copy(update={"targets": saved})
    second.roles.lora = second.roles.lora.model_copy(update={"targets": asked})
    first.roles.add("policy")
    save_role(first, "policy", tmp_path)
    with pytest.raises(RunFolderError, match="other layers"):
        load_role(second, "policy", tmp_path)
    assert second.roles.names == ()  # it is not partly loaded either
    second.roles.add("policy")
