"""One role merged into a copy of the base: an ordinary language model, or a sequence classifier that scores.

W' = W + s B A for every adapted matrix, summed in fp32 and only then stored in the wanted precision. The copy is built from the
live base and shares no tensor with it, so that a merge can never change what the other roles stand on.

Known failures elsewhere, and the checks against them: a scalar head that is lost or reinitialised (every weight of the
classifier is taken from the role or refused); a head read at the wrong token, because padding and end of sequence are one
id (the classifier gets a padding token that ends nothing); tied embeddings that a merge unties or changes (they stay tied: no
role adapts them, and rows of new tokens are the same in both).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from selfeval.backbone.adapters import BASE
from selfeval.backbone.depth import shortened_config
from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import Backbone
from selfeval.backbone.tokens import NEW_PAD, ControlTokens
from selfeval.config import Pooling
from selfeval.errors import ExportError, RoleError

__all__ = [
    "classifier_class",
    "is_quantised",
    "merged_classifier",
    "merged_language_model",
    "padding_tokenizer",
    "plain_config",
    "refuse_pooled",
]

_QUANTISED = ("Params4bit", "Int8Params")
"""Weight classes of bitsandbytes: codes, not numbers."""

_DECODED_ROWS = 1024


def merged_language_model(backbone: Backbone, role: str, dtype: torch.dtype | None = None) -> Any:
    """A language model that computes what `role` computes, without adapters.

    Args:
        backbone: is not changed.
        role: any role, or the bare base; a head is no part of a language model.
        dtype: of all floating-point weights; None keeps each in the base's own.

    Returns:
        A Hugging Face model of the base's class on the CPU, to be saved (buffers that are not saved are not filled).

    Raises:
        RoleError: there is no such role.
    """
    live: Any = backbone.model
    config = plain_config(live)
    merged = _empty(type(live), config)
    _fill(merged, backbone, role, dtype, skip=())
    return merged


def merged_classifier(backbone: Backbone, role: str, pad_id: int, dtype: torch.dtype | None = None) -> Any:
    """A `...ForSequenceClassification` with one label whose logit is the role's score, without adapters.

    The head reads the last token that is not `pad_id`: the last token of prompt and reply, whatever the padding side. Most of
    these classes have no bias in their head. The role's bias is then left out: a constant that moves all scores alike and
    no comparison. Either way `config.score_bias` is what has to be added to a logit to get the role's score.

    For a role that reads an earlier layer it has only the layers up to this one.

    Args:
        backbone: is not changed.
        role: a role with a head.
        pad_id: a token that never ends a sequence (`padding_tokenizer`); where the base has no row for it, it gets one.
        dtype: of all floating-point weights, the head's too; None keeps each in the base's own.

    Raises:
        RoleError: there is no such role, or it has no head.
        ExportError: transformers has no such class for this family, or not one that fits its weights; or the role scores the
            mean over the reply.
    """
    live: Any = backbone.model
    if role not in backbone.roles.heads:
        raise RoleError(f'role "{role}" has no head, so it cannot become a classifier')
    refuse_pooled(role, backbone.roles.poolings.get(role, "last"))
    config = plain_config(live)
    if (depth := backbone.roles.depths.get(role)) is not None:
        config = shortened_config(config, depth)
    config.num_labels, config.id2label, config.label2id = 1, {0: "score"}, {"score": 0}
    kind = classifier_class(config)
    if kind is None:
        raise ExportError(_no_classifier(config))
    merged = _empty(kind, config)
    if not isinstance(getattr(merged, "score", None), nn.Linear):
        raise ExportError(_no_classifier(config))
    _fill(merged, backbone, role, dtype, skip=("score.weight", "score.bias"))
    _set_head(merged, backbone.roles.heads[role])
    _make_room(merged, pad_id)
    merged.config.get_text_config().pad_token_id = merged.config.pad_token_id = pad_id
    return merged


def refuse_pooled(role: str, pooling: Pooling) -> None:
    """Refuse to merge a role that scores the mean over the reply.

    Raises:
        ExportError: the pooling is not that of a classifier of transformers, which reads the last token.
    """
    if pooling != "last":
        raise ExportError(
            f'{role} scores the {pooling} of the hidden states over the reply (pooling = "{pooling}" in evaluator.inputs), and '
            "the sequence classifiers of transformers read the last token only, so it cannot be merged into one; export it "
            "without --merge, which writes the adapter and the head as files"
        )


def classifier_class(config: Any) -> Any:
    """The family's `...ForSequenceClassification`, or None where transformers has none."""
    kinds: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return kinds.get(type(config), None)


def is_quantised(model: nn.Module) -> bool:
    """Whether some weights are 8-bit or 4-bit codes: its passes then round more than a merged copy's do."""
    return any(type(p).__name__ in _QUANTISED for p in model.parameters())


def padding_tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that pads on the right with a token that ends nothing and stands in no text.

    Its own padding token, unless that is also an end-of-sequence or another control token, or a word of texts (a classifier
    would then take the real last token for padding, and read its score too early); else one that it holds for padding; else a
    new one, `<|pad|>`.
    """
    tokenizer: Any = copy.deepcopy(loaded.tokenizer)
    others = (tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id)
    taken = {*loaded.eos_ids, tokenizer.eos_token_id, *others}
    control = ControlTokens(tokenizer)
    if tokenizer.pad_token_id in taken or tokenizer.pad_token_id not in control.special_ids:
        held = [t for t, i in tokenizer.get_added_vocab().items() if "pad" in t.lower() and i in control.ids - taken]
        tokenizer.add_special_tokens({"pad_token": held[0] if held else NEW_PAD})
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # tools pass on whatever a tokenizer returns
    padded: PreTrainedTokenizerBase = tokenizer
    return padded


def _no_classifier(config: Any) -> str:
    return (
        f"transformers has no sequence classifier that fits models of type {config.model_type}, so this evaluator cannot be "
        "merged into one; export it without --merge, which writes the adapter and the head as files"
    )


def plain_config(live: Any) -> Any:
    """The base's config, without the traces of how it was loaded."""
    config = copy.deepcopy(live.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _empty(kind: Any, config: Any) -> Any:
    """A model without storage, to be filled."""
    with torch.device("meta"):
        model = kind(config)
    return model.eval().requires_grad_(False)


def _fill(merged: Any, backbone: Backbone, role: str, dtype: torch.dtype | None, skip: tuple[str, ...]) -> None:
    """Give every weight of `merged` but those in `skip` the role's value, found on the live base under the same name."""
    if role not in (BASE, *backbone.roles.names):
        raise RoleError(f'there is no role "{role}" to merge; roles: {", ".join(backbone.roles.names)}')
    names = [name for name in merged.state_dict() if name not in skip]
    weights = {name: _laid_out(_merged_weight(backbone, name, role, dtype), merged, name, backbone) for name in names}
    # assign=True replaces the meta tensors, which unties tied weights until tie_weights. strict=False allows for `skip`.
    merged.load_state_dict(weights, strict=False, assign=True)
    merged.tie_weights()


def _laid_out(weight: Tensor, merged: Any, name: str, backbone: Backbone) -> Tensor:
    """The weight as its class holds it: GPT-2's layers keep `[I, O]`, and bitsandbytes turned them when it coded them.

    Determined by the layer type, because the shape of a square weight is ambiguous.
    """
    path, _, leaf = name.rpartition(".")
    if leaf != "weight" or not isinstance(merged.get_submodule(path), Conv1D):
        return weight
    live = backbone.model.get_submodule(path)
    base = live.get_base_layer() if isinstance(live, BaseTunerLayer) else live
    return weight.T.contiguous() if is_quantised(base) else weight


@torch.no_grad()
def _merged_weight(backbone: Backbone, name: str, role: str, dtype: torch.dtype | None) -> Tensor:
    """Return a weight or buffer of the live base with the role's update applied, as a separate CPU tensor."""
    live, (path, _, leaf) = backbone.model, name.rpartition(".")
    try:
        module = live.get_submodule(path)
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight: Tensor = getattr(base, leaf)
    except AttributeError as error:  # only a classifier can be laid out in another way than its base
        raise ExportError(_no_classifier(live.config)) from error
    if weight.device.type == "meta":
        raise ExportError(
            f"{path} is not in memory; load the base on one device (backbone.placement.mode = single) to merge a role"
        )
    stored = weight.dtype
    if type(weight).__name__ in _QUANTISED:
        weight, stored = _decoded(base, live.dtype), live.dtype
    weight = _with_new_rows(backbone, module, leaf, role, weight)
    update = _update(module, leaf, role)
    if update is not None:
        weight = weight.float() + update.to(weight.device)
    wanted = (dtype or stored) if weight.is_floating_point() else weight.dtype
    # copy=True, because a weight on the CPU in the wanted precision would otherwise be shared with the base.
    return weight.detach().to("cpu", wanted, copy=True).contiguous()


def _with_new_rows(backbone: Backbone, module: Any, leaf: str, role: str, weight: Tensor) -> Tensor:
    """Add what the role learnt about new tokens to the rows of the embedding or of the output layer."""
    rows = backbone.roles.rows.get(role)
    if rows is None or leaf != "weight":
        return weight
    is_input = module is backbone.model.get_input_embeddings()
    if not is_input and module is not backbone.model.get_output_embeddings():
        return weight
    added = (rows.input if is_input else rows.head.weight).detach().to(weight.device)
    return torch.cat([weight[: rows.first], weight[rows.first :][: len(added)].float() + added, weight[rows.head.stop :]])


def _update(module: Any, leaf: str, role: str) -> Tensor | None:
    """`s B A` in fp32 and in the layout of the weight; None where the role adapts nothing there."""
    if isinstance(module, ParamWrapper):
        return _expert_update(module, leaf, role)
    if leaf == "weight" and isinstance(module, BaseTunerLayer) and role in module.lora_A:
        update: Tensor = module.get_delta_weight(role).float()
        return update
    return None


def _expert_update(module: Any, leaf: str, role: str) -> Tensor | None:
    """The update `[E, I, O]`, or `[E, O, I]` as the weight has it, of E experts that are one parameter: s B_e A_e for each.

    PEFT holds A as `[E r, I]` and B as `[O, r E]`, and nests the wrappers of the parameters of one module. Its own
    `get_delta_weight` would round the update to the precision of the base before it is added.
    """
    while isinstance(module, ParamWrapper) and module.parameter_name != leaf:
        module = module.base_layer
    if not isinstance(module, ParamWrapper) or role not in module.lora_A:
        return None
    down, up = module.lora_A[role].weight.float(), module.lora_B[role].weight.float()
    if module.get_param().ndim == 2:
        flat: Tensor = module.scaling[role] * up @ down
        return flat
    down_ErI = down.reshape(module.num_experts, -1, down.shape[-1])
    up_OrE = up.reshape(up.shape[0], -1, module.num_experts)
    order = "ore,eri->eoi" if module._did_swap_in_out_features else "ore,eri->eio"
    update: Tensor = module.scaling[role] * torch.einsum(order, up_OrE, down_ErI)
    return update


def _decoded(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix that a layer with coded weights multiplies by, read off by passing the identity through it.

    How codes are laid out depends on the device and on whether a pass was made; reading them wrongly returns plausible numbers.
    """
    bare: Any = copy.copy(layer)  # the same weight, and no bias in the sum
    bare._parameters = {**layer._parameters, "bias": None}
    weight = layer.get_parameter("weight")
    ones = torch.eye(int(bare.in_features), dtype=dtype, device=weight.device)
    return torch.cat([bare(rows) for rows in ones.split(_DECODED_ROWS)]).T


def _set_head(merged: Any, head: nn.Linear) -> None:
    """The role's head in the classifier; the bias goes where the class has one, else into the config."""
    dtype = next(p.dtype for p in merged.parameters() if p.is_floating_point() and p.device.type != "meta")
    weight, bias = (p.detach().to("cpu", dtype, copy=True) for p in (head.weight, head.bias))
    merged.score.weight = nn.Parameter(weight, requires_grad=False)
    has_bias = merged.score.bias is not None
    if has_bias:
        merged.score.bias = nn.Parameter(bias, requires_grad=False)
    merged.config.score_bias = 0.0 if has_bias else float(head.bias.detach().item())


def _make_room(merged: Any, pad_id: int) -> None:
    """Rows of zeros in the embedding up to the padding token, which no real token ever attends to."""
    rows = merged.get_input_embeddings().weight.shape[0]
    if pad_id < rows:
        return
    # resize_token_embeddings initialises the new rows randomly: keep that from moving the caller's random state.
    with torch.random.fork_rng(devices=[]):
        merged.resize_token_embeddings(pad_id + 1, mean_resizing=False)
    with torch.no_grad():
        merged.get_input_embeddings().weight[rows:].zero_()
