from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import tiny_models
from selfeval.backbone.adapters import BASE, _adapted
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import LoraConfig
from selfeval.errors import ConfigError, ModelError, RoleError
from selfeval.prompt import Prompt
from selfeval.rollout.beams import beam_search
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from token_prompts import as_prompts

ROLES = ("policy", "reference", "evaluator-0", "evaluator-1", "critic")


def all_roles(family: str = "llama") -> Backbone:
    backbone = tiny_models.backbone(family)
    for number, role in enumerate(ROLES):
        backbone.roles.add(role, seed=number, head=role.startswith(("evaluator", "critic")), trainable=role != "reference")
        tiny_models.scramble(backbone, role, seed=number)
    return backbone


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, 40, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return ids, mask


def real(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[mask.bool()]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rows_of_several_roles_get_what_passes_of_their_own_give(family: str) -> None:
    backbone = all_roles(family)
    names = ["policy", "policy", BASE, "critic", "evaluator-0", "evaluator-1", "reference", "policy"]
    ids, mask = rows(len(names))
    with torch.no_grad():
        with backbone.acting_as(names):
            together = backbone.hidden(ids, mask)
        for row, name in enumerate(names):
            with backbone.acting_as(name):
                alone = backbone.hidden(ids[row : row + 1], mask[row : row + 1])
            torch.testing.assert_close(
                real(together[row : row + 1], mask[row : row + 1]), real(alone, mask[row : row + 1]), rtol=0, atol=1e-5
            )
        with backbone.acting_as(BASE):
            assert (backbone.hidden(ids, mask)[0] - together[0]).abs().max() > 1e-3  # else the comparison could not fail


def test_an_adapter_is_added_in_place_without_gradients_and_to_a_copy_with_them() -> None:
    """y = W x + scaling · B A x in both cases; in place only where nothing needs the output of the base layer again."""
    backbone = all_roles()
    layer = next(m for m in backbone.model.modules() if isinstance(m, BaseTunerLayer))
    weight, scaling = layer.get_base_layer().weight, layer.scaling["policy"]
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    base = x @ weight.T
    expected = base + scaling * (x @ layer.lora_A["policy"].weight.T @ layer.lora_B["policy"].weight.T)
    assert (expected - base).abs().max() > 1e-3, "the adapter does something"
    with torch.no_grad():
        output = base.clone()
        added = _adapted(layer, "policy", x, output)
        assert added.data_ptr() == output.data_ptr(), "no second tensor of the output's size"
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output = base.clone()
    added = _adapted(layer, "policy", x, output)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)
    assert torch.equal(output, base), "with gradients the output of the base layer stays"
    # By the chain rule: dΣy/dB = scaling · Σ_n 1 (A x_n)^T.
    added.sum().backward()
    rows_NR = (x @ layer.lora_A["policy"].weight.T).reshape(-1, layer.lora_A["policy"].weight.shape[0])
    gradient = (scaling * rows_NR.sum(0)).expand_as(layer.lora_B["policy"].weight)
    torch.testing.assert_close(layer.lora_B["policy"].weight.grad, gradient, rtol=0, atol=1e-5)


def test_gradients_of_a_shared_pass_are_those_of_separate_passes() -> None:
    backbone = all_roles()
    names = ["policy"] * 3 + ["critic"] * 2 + ["reference"]
    ids, mask = rows(len(names))
    weights = torch.randn(backbone.loaded.hidden_size, generator=torch.Generator().manual_seed(0))
    with backbone.acting_as(names):
        ((backbone.hidden(ids, mask) @ weights) * mask).square().mean().backward()
    shared = {(r, n): p.grad for r in ROLES for n, p in backbone.roles.parameters(r).items()}
    backbone.model.zero_grad()
    for name in ("policy", "critic"):
        at = [i for i, n in enumerate(names) if n == name]
        with backbone.acting_as(name):
            ((backbone.hidden(ids[at], mask[at]) @ weights) * mask[at]).square().sum().div(mask.numel()).backward()
    for role in ROLES:
        for name, parameter in backbone.roles.parameters(role).items():
            theirs = shared[role, name]
            if parameter.grad is None:
                assert theirs is None, name
            else:
                torch.testing.assert_close(theirs, parameter.grad, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for p in backbone.roles.parameters("reference").values())


def test_a_pass_with_other_rows_than_were_named_is_refused() -> None:
    backbone = all_roles()
    ids, mask = rows(3)
    with (
        backbone.acting_as(["policy", "critic"]),
        pytest.raises(RoleError, match="roles for 2 rows, but this forward pass has 3"),
    ):
        backbone.hidden(ids, mask)
    ids, mask = rows(4)
    with backbone.acting_as(["policy", "critic"]), pytest.raises(RoleError, match="got roles for 2 rows"):
        backbone.hidden(ids, mask)
    with pytest.raises(RoleError, match='no role "jury"'), backbone.acting_as(["policy", "jury"]):
        pass


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_checkpointed_layers_run_again_under_the_role_that_they_had(family: str) -> None:
    """Both losses go backward together, outside of any block: a lingering or a missing role would change the gradients."""

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        backbone = all_roles(family)
        if checkpointed:
            backbone.recompute_layers()
        ids, mask = rows(4)
        losses = []
        for role in ("policy", "critic"):
            with backbone.acting_as(role):
                losses.append((backbone.hidden(ids, mask) * mask[..., None]).square().sum())
        with backbone.acting_as(["policy", "critic", BASE, "evaluator-0"]):
            losses.append((backbone.hidden(ids, mask) * mask[..., None]).square().sum())
        torch.stack(losses).sum().backward()
        return {f"{r}/{n}": p.grad for r in ROLES for n, p in backbone.roles.parameters(r).items() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert any(name.startswith("evaluator-0") for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-5)


def test_checkpointing_keeps_fewer_activations() -> None:
    backbone = all_roles()
    ids, mask = rows(8)

    def kept() -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backbone.acting_as("policy"):
            backbone.hidden(ids, mask)
        return sum(sizes)

    without = kept()
    backbone.recompute_layers()
    assert kept() < without / 2


def test_dropout_stays_off_under_checkpointing() -> None:
    backbone = tiny_models.backbone("gpt2")  # its configuration has dropout at 0.1
    backbone.roles.add("policy")
    backbone.recompute_layers()
    ids, mask = rows(4)
    with backbone.acting_as("policy"):
        first, second = backbone.hidden(ids, mask), backbone.hidden(ids, mask)
    assert torch.equal(first, second)


def test_members_of_an_ensemble_cost_an_adapter_each() -> None:
    backbone = tiny_models.backbone()
    base = backbone.census.base_bytes
    backbone.roles.add("evaluator-0", head=True)
    one = backbone.census.adapter_bytes
    for member in (1, 2, 3):
        backbone.roles.add(f"evaluator-{member}", seed=member, head=True)
    assert backbone.census.adapter_bytes == 4 * one
    assert backbone.census.base_bytes == base


def test_an_adapter_on_an_embedding_is_refused() -> None:
    backbone = tiny_models.backbone()
    backbone.roles.lora = LoraConfig(targets=("embed_tokens",))
    with pytest.raises(ModelError, match="embedding"):
        backbone.roles.add("policy")


def test_one_misspelled_target_among_good_ones_is_refused() -> None:
    """PEFT leaves such a name out, and the role would be smaller than what was asked for."""
    backbone = tiny_models.backbone()
    backbone.roles.lora = LoraConfig(targets=("q_proj", "v_projj"))
    with pytest.raises(ConfigError, match=r'no module of this model is called "v_projj"; did you mean "v_proj"\?'):
        backbone.roles.add("policy")
    backbone.roles.lora = LoraConfig(targets=("self_attn.q_proj", "v_proj"))
    backbone.roles.add("policy")
    assert len(backbone.roles.parameters("policy")) == 2 * 2 * backbone.model.config.num_hidden_layers


REFUSED = {
    "output layer": ("q_proj", "lm_head"),
    "embedding": ("embed_tokens", "q_proj"),
    "no linear layer": ("q_proj", "post_attention_layernorm"),  # PEFT stops in the middle: q_proj has its adapter by then
    "no such layer": ("query",),
}
EXPERTS = ("q_proj", "gate_proj", "up_proj", "down_proj")


def said(backbone: Backbone, role: str) -> Tensor:
    """Logits of the role, and its scores where it has a head."""
    ids, mask = rows(3)
    with torch.no_grad(), backbone.acting_as(role):
        hidden = backbone.hidden(ids, mask)
        scores = [backbone.score(role, hidden)[..., None]] if role in backbone.roles.heads else []
        return torch.cat([backbone.logits(hidden), *scores], -1)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")  # peft, about what is refused here
@pytest.mark.parametrize("why", [*REFUSED, "experts"])
def test_a_refused_first_role_leaves_the_backbone_as_it_was(why: str) -> None:
    family, good = ("qwen3_moe", EXPERTS) if why == "experts" else ("llama", "all-linear")
    bad = (*EXPERTS, "lm_head") if why == "experts" else REFUSED[why]
    backbone, fresh = (tiny_models.backbone(family) for _ in range(2))
    before = {name: id(module) for name, module in backbone.model.named_modules()}
    backbone.roles.lora = LoraConfig(rank=4, alpha=8.0, targets=bad)
    with pytest.raises((ConfigError, ModelError)):
        backbone.roles.add("policy", head=True)
    assert {name: id(module) for name, module in backbone.model.named_modules()} == before
    assert backbone.roles.names == ()
    assert torch.equal(said(backbone, BASE), said(fresh, BASE))
    for each in (backbone, fresh):
        each.roles.lora = LoraConfig(rank=4, alpha=8.0, targets=good)
        each.roles.add("policy", seed=1, head=True)
        tiny_models.scramble(each, "policy")
    assert backbone.roles.parameters("policy").keys() == fresh.roles.parameters("policy").keys()
    assert torch.equal(said(backbone, "policy"), said(fresh, "policy"))
    assert (said(fresh, "policy")[..., :-1] - said(fresh, BASE)).abs().max() > 1e-2  # else the comparison could not fail
    assert all(p.requires_grad for p in backbone.roles.parameters("policy").values())


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_further_role_leaves_the_others_alone(why: str) -> None:
    backbone = all_roles()
    before = {name: id(module) for name, module in backbone.model.named_modules()}
    expected = {role: said(backbone, role) for role in ROLES}
    trained = {role: [p.requires_grad for p in backbone.roles.parameters(role).values()] for role in ROLES}
    good, backbone.roles.lora = backbone.roles.lora, LoraConfig(targets=REFUSED[why])
    with pytest.raises((ConfigError, ModelError)):
        backbone.roles.add("judge")
    assert {name: id(module) for name, module in backbone.model.named_modules()} == before
    assert {role: [p.requires_grad for p in backbone.roles.parameters(role).values()] for role in ROLES} == trained
    assert all(torch.equal(said(backbone, role), expected[role]) for role in ROLES)
    backbone.roles.lora = good
    backbone.roles.add("judge", copy_of="policy")
    assert torch.equal(said(backbone, "judge"), expected["policy"])


def test_work_that_sorts_its_rows_refuses_a_role_for_each_row() -> None:
    """Roles are bound to rows by their place, and these put rows of similar length together."""
    backbone = all_roles()
    prompts, replies = [(5, 6), (5, 6)], [(7, 8, 9), (7,)]
    with backbone.acting_as(["policy", "reference"]):
        with pytest.raises(RoleError, match="reorders its rows"):
            reply_logprobs(backbone, as_prompts(prompts), replies, batch_tokens=100)
        with pytest.raises(RoleError, match="reorders its rows"):
            generate(backbone, [Request(Prompt(p)) for p in prompts], max_new_tokens=2, seed=0)
        with pytest.raises(RoleError, match="reorders its rows"):
            beam_search(backbone, as_prompts(prompts), beams=2, max_new_tokens=2, batch_size=4, batch_tokens=100)
