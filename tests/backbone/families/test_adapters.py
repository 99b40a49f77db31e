from __future__ import annotations

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

import tiny_models
from selfeval.backbone.families.adapters import adapter_targets
from selfeval.backbone.roles import Backbone
from selfeval.errors import ConfigError, ModelError


def adapted(backbone: Backbone) -> list[str]:
    return [name for name, module in backbone.model.named_modules() if isinstance(module, BaseTunerLayer)]


def test_names_and_patterns_are_passed_on_as_they_are() -> None:
    model = tiny_models.model("mixtral")
    assert adapter_targets(model, ("q_proj", "w1")) == {"target_modules": ["q_proj", "w1"]}
    assert adapter_targets(model, r".*\.q_proj") == {"target_modules": r".*\.q_proj"}


def test_a_name_of_no_module_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r'no module of this model is called "query"; allowed: down_proj, gate_proj, k_proj'):
        tiny_models.backbone("llama", targets=("query",)).roles.add("policy")


def test_most_families_leave_the_choice_to_peft() -> None:
    assert adapter_targets(tiny_models.model("llama"), "all-linear") == {
        "target_modules": "all-linear",
        "exclude_modules": None,
    }


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma3_vision", "mamba"])
def test_a_second_role_has_the_same_modules(family: str) -> None:
    """The same names are found on a model that already has adapters."""
    backbone = tiny_models.backbone(family)
    backbone.roles.add("policy")
    first = adapted(backbone)
    backbone.roles.add("evaluator-0")
    assert adapted(backbone) == first
    assert len(backbone.roles.parameters("policy")) == len(backbone.roles.parameters("evaluator-0")) == 2 * len(first)


def test_routers_that_are_linear_layers_get_no_adapter() -> None:
    backbone = tiny_models.backbone("granitemoe")
    assert any("router" in name for name, _ in backbone.model.named_modules())
    backbone.roles.add("policy")
    names = adapted(backbone)
    assert len(names) == 8
    assert not any("router" in name for name in names)


def test_only_the_part_that_reads_text_gets_adapters() -> None:
    backbone = tiny_models.backbone("gemma3_vision")
    backbone.roles.add("policy")
    names = adapted(backbone)
    assert len(names) == 14
    assert all(".language_model." in name for name in names)


@pytest.mark.parametrize(
    ("family", "targets", "reason"),
    [("mamba", ("in_proj", "out_proj"), "out_proj"), ("mixtral", ("w1",), "w3")],
)
def test_targets_that_cannot_be_had_are_refused_with_a_sentence(family: str, targets: tuple[str, ...], reason: str) -> None:
    backbone = tiny_models.backbone(family, targets=targets)
    with pytest.raises(ModelError, match=rf"tiny-{family}-0 cannot have adapters on backbone.lora.targets = .*{reason}"):
        backbone.roles.add("policy")
