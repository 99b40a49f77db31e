"""Score replies with the evaluator in this folder: as a reward function for TRL, or on lists of texts.

This file is a copy from the package self-evaluator and needs only torch and transformers (and peft, if the folder contains an
adapter). `selfeval export` writes it into the folder of an evaluator:

    import sys
    sys.path.insert(0, "exported/evaluator")
    from reward import Evaluator

    evaluator = Evaluator()
    evaluator.scores(["QUESTION"], ["REPLY"])           # higher is better
    GRPOTrainer(reward_funcs=evaluator, ...)            # prompts and completions as messages or as plain text

Some evaluators read the base's own greedy reply to the question before the reply that they score. It is generated here, once
per question: by the base under the adapter, or by the copy of the base in `reference/`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

__all__ = ["Evaluator", "Text", "content_of", "messages", "question_of", "text_of", "without_thinking"]

Text = str | list[dict[str, Any]]
"""Plain text, or messages."""

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
"""Names of the turns in the text of a conversation."""

_FACTS: dict[str, tuple[str, tuple[type, ...]]] = {
    "role": ("a text", (str,)),
    "layout": ("a text", (str,)),
    "precision": ("a text", (str,)),
    "positions": ("a text or null", (str, type(None))),
    "bias": ("a number or null", (float, int, type(None))),
    "reference_answer": ("true or false", (bool,)),
    "reply_prompt": ("an array or null", (list, type(None))),
    "control": ("an array", (list,)),
    "end": ("an array", (list,)),
    "thinking_ends": ("an array", (list,)),
    "max_new_tokens": ("a whole number", (int,)),
}
"""Values of export.json that are read here, with their kinds. Checked by hand, because this file needs no further package."""


class Evaluator:
    """The evaluator of an exported folder. Calling it makes it a reward function of TRL.

    Args:
        folder: Optional. The exported folder. Default: the folder of this file.
        base: Optional. Folder or hub id of the base of an adapter. Default: the one named in adapter_config.json.
        device: Optional. Device to compute on. Default: a GPU if there is one.
        batch_size: replies per forward pass, and questions per generation.

    Raises:
        FileNotFoundError: the folder is not an exported one.
        ValueError: export.json is damaged or of another version, or the role is not an evaluator.
    """

    def __init__(
        self, folder: str | Path | None = None, *, base: str | None = None, device: str | None = None, batch_size: int = 16
    ) -> None:
        self.folder = Path(folder or Path(__file__).parent)
        self.facts = _read_facts(self.folder / "export.json")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        # Its chat template builds the evaluator's whole input, the reply and the end token included.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.__name__ = self.facts["role"]  # the name under which TRL logs the reward
        self._reference_answers: dict[str, str] = {}
        if self.facts["layout"] == "classifier":
            self.model = self._load(AutoModelForSequenceClassification, self.folder)
        else:
            self.model, self.head = self._load_adapter(base)
        if self.facts["reference_answer"]:
            # Left padding, so generation continues directly after each prompt.
            self.reference_tokenizer: Any = AutoTokenizer.from_pretrained(self.folder / "reference", padding_side="left")
            self.reference = self._reference()

    # -- scores ---------------------------------------------------------------------------------------------------------

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **others: Any) -> list[float]:
        """Score completions of prompts, with the signature of a TRL reward function.

        Args:
            prompts: each a conversation that ends with a message of the user, or plain text: the question itself, or the
                policy's full prompt.
            completions: each one assistant message, or plain text.
            others: further columns of the data set; ignored.

        Raises:
            ValueError: a prompt has control tokens that are not those of the policy's prompt, or messages that the evaluator
                was not trained on; or it has several messages, and this evaluator reads a reference answer, which it can ask
                for single questions only.
        """
        if self.facts["reference_answer"] and any(not isinstance(prompt, str) and len(prompt) > 1 for prompt in prompts):
            raise ValueError(
                "this evaluator reads a reference answer, which it asks for single questions only; pass one message of the "
                "user per prompt, or use Evaluator.load(RUN).as_reward_fn() of self-evaluator"
            )
        around, control = self.facts["reply_prompt"], self.facts["control"]
        questions = [question_of(prompt, around, control) for prompt in prompts]
        return self.scores(questions, [content_of(completion, "assistant") for completion in completions])

    @torch.no_grad()
    def scores(self, questions: Sequence[str], replies: Sequence[str]) -> list[float]:
        """Score each reply to its question, on the scale of `selfeval score`. Do not compare scores of different questions."""
        visible = [without_thinking(reply, self.facts["thinking_ends"]) for reply in replies]
        texts = [
            self.tokenizer.apply_chat_template(messages(question, reply), tokenize=False, reference_answer=answer)
            for question, reply, answer in zip(questions, visible, self.reference_answers(questions), strict=True)
        ]
        found: list[float] = []
        for part in _batches(texts, self.batch_size):
            # Right padding: the adapter's score is read at the last token, whose position is counted from the left.
            batch = self.tokenizer(part, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
            found += self._scores(batch.input_ids.to(self.device), batch.attention_mask.to(self.device)).tolist()
        return found

    def reference_answers(self, questions: Sequence[str]) -> list[str]:
        """Return the base's greedy reply to each question, or empty texts if this evaluator reads none."""
        if not self.facts["reference_answer"]:
            return [""] * len(questions)
        for part in _batches([q for q in dict.fromkeys(questions) if q not in self._reference_answers], self.batch_size):
            self._reference_answers.update(zip(part, self._greedy(part), strict=True))
        return [self._reference_answers[question] for question in questions]

    def conversations(self, rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        """Turn texts of prompt, chosen and rejected into messages that TRL's RewardTrainer tokenizes as this run did.

        For `Dataset.map(evaluator.conversations, batched=True)`. The reasoning of replies is removed: it is not scored.
        """
        ends = self.facts["thinking_ends"]
        return {
            "prompt": [messages(question) for question in rows["prompt"]],
            "chosen": [messages(None, without_thinking(reply, ends)) for reply in rows["chosen"]],
            "rejected": [messages(None, without_thinking(reply, ends)) for reply in rows["rejected"]],
            "chat_template_kwargs": [{"reference_answer": answer} for answer in self.reference_answers(rows["prompt"])],
        }

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _load(self, kind: Any, source: str | Path, **options: Any) -> Any:
        # The precision of the run; quantised runs have none of these and take that of the base's files.
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(self.facts["precision"], "auto")
        dtype = precision if self.facts["layout"] != "classifier" else "auto"
        model = kind.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
        return model.to(self.device).eval().requires_grad_(False)

    def _load_adapter(self, base: str | None) -> tuple[Any, dict[str, Tensor]]:
        """Return the base as a language model with the adapter, and the head: one copy of the weights for both uses."""
        from peft import PeftConfig, PeftModel

        config: Any = PeftConfig.from_pretrained(self.folder)
        found = base or config.base_model_name_or_path
        if not found:
            raise ValueError(f"the adapter in {self.folder} does not record its base; pass base=FOLDER to Evaluator")
        config.modules_to_save, config.task_type = None, None  # the head is read from its own file
        options = {"config": AutoConfig.from_pretrained(self.folder)} if self.facts["positions"] else {}
        model = PeftModel.from_pretrained(self._load(AutoModelForCausalLM, found, **options), self.folder, config=config)
        head = {name: tensor.to(self.device) for name, tensor in load_file(self.folder / "head.safetensors").items()}
        return model.eval().requires_grad_(False), head

    def _reference(self) -> Any:
        is_merged = self.facts["layout"] == "classifier"
        model = self._load(AutoModelForCausalLM, self.folder / "reference") if is_merged else self.model.get_base_model()
        # The base's own generation_config may have a temperature or a repetition penalty; the run used neither.
        pad = self.reference_tokenizer.pad_token_id
        ends = self.facts["end"]
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.facts["max_new_tokens"],
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else (ends or [0])[0],
        )
        if self.reference_tokenizer.pad_token is None:
            self.reference_tokenizer.pad_token_id = model.generation_config.pad_token_id
        return model

    def _scores(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Return scores `[B]` of right-padded sequences, read at their last token."""
        if self.facts["layout"] == "classifier":
            logits_B1 = self.model(input_ids=ids_BT, attention_mask=attention_BT).logits
            scores_B: Tensor = logits_B1[:, 0].float() + float(self.model.config.score_bias)
            return scores_B
        # The layers without the language model's head; the adapter is injected into them, so it stays active.
        body = self.model.get_base_model().base_model
        options = {}
        if "position_ids" in inspect.signature(body.forward).parameters:
            options["position_ids"] = (attention_BT.cumsum(-1) - 1).clamp_min(0)
        hidden_BTD = body(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False, **options).last_hidden_state
        last_BD = hidden_BTD[torch.arange(len(ids_BT), device=self.device), attention_BT.sum(-1) - 1]
        scores_B = (last_BD.float() @ self.head["weight"].T + self.head["bias"]).squeeze(-1)
        return scores_B

    def _greedy(self, questions: list[str]) -> list[str]:
        tokenizer = self.reference_tokenizer
        texts = [tokenizer.apply_chat_template(messages(q), tokenize=False, add_generation_prompt=True) for q in questions]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.device)
        with self._bare():
            ids_BT = self.reference.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        replies = ids_BT[:, batch.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
        return [without_thinking(text, self.facts["thinking_ends"]).strip() for text in texts]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Disable the adapter within the context."""
        if self.facts["layout"] == "classifier":
            yield
        else:
            with self.model.disable_adapter():
                yield


def _read_facts(path: Path) -> dict[str, Any]:
    """Read export.json and check every value that is used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another version, or is of a role without scores.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no export.json; pass a folder written by `selfeval export`")
    again = "export the evaluator again: selfeval export DIR --role evaluator --to OUT"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is not a JSON object; {again}")
    for name, (expected, kinds) in _FACTS.items():
        if name not in facts:
            raise ValueError(
                f'{path} has no "{name}": another version of self-evaluator wrote it; use the reward.py in that folder, or '
                f"{again}"
            )
        # True is an int in Python.
        if not isinstance(facts[name], kinds) or (isinstance(facts[name], bool) and bool not in kinds):
            raise ValueError(f'{path} is damaged: "{name}" is {json.dumps(facts[name])[:80]}, expected {expected}; {again}')
    if facts["bias"] is None:
        raise ValueError(f"{path.parent} has the role {facts['role']}, which scores no replies; {again}")
    return facts


def question_of(prompt: Text, around: Sequence[str] | None, control: Sequence[str]) -> str:
    """Return the question in a prompt: the text of its messages, or the text between the parts of the policy's prompt.

    Args:
        prompt: messages or plain text.
        around: Optional. Text before and after the question in the policy's prompt; None if it is not known.
        control: control tokens, which a plain question must not contain.

    Raises:
        ValueError: messages that do not end with the user's, or plain text with control tokens that is not the policy's prompt.
    """
    if not isinstance(prompt, str):
        return _conversation_text(prompt)
    if around is None:
        return prompt
    text, (before, after) = prompt, around
    # The policy's full prompt, as a trainer passes it: the evaluator needs the question in it.
    if before + after and text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
        return text[len(before) : len(text) - len(after)]
    found = [token for token in control if token in text]
    if found:
        raise ValueError(
            f"a plain-text prompt contains the control token {found[0]!r}, but is not the policy's prompt "
            f"({before!r} + question + {after!r}); pass the question alone, or messages: "
            '[{"role": "user", "content": question}]'
        )
    return text


def _conversation_text(turns: Sequence[dict[str, Any]]) -> str:
    """Return a conversation as this evaluator was trained on it: one text, in which each turn begins with its name.

    Raises:
        ValueError: a role other than user, assistant and a system turn at the beginning, or a last turn that is not the user's.
    """
    roles = [str(turn.get("role")) for turn in turns]
    if not roles or roles[-1] != "user" or "system" in roles[1:] or not {*roles} <= {*_NAMES}:
        raise ValueError(
            "this evaluator scores replies to messages of user and assistant, after an optional system message, that end with "
            f"a message of the user; got: {', '.join(roles) or 'none'}"
        )
    texts = [text_of(turn).strip() for turn in turns]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{_NAMES[role]}: {text}" for role, text in zip(roles, texts, strict=True))


def messages(question: str | None, reply: str | None = None) -> list[dict[str, str]]:
    """Return a question, a reply, or both as chat messages."""
    asked = [] if question is None else [{"role": "user", "content": question}]
    return asked if reply is None else [*asked, {"role": "assistant", "content": reply}]


def content_of(text: Text, role: str) -> str:
    """Return the text of a single message of this role; plain text is returned unchanged.

    Raises:
        ValueError: there are several messages, or one of another role.
    """
    if isinstance(text, str):
        return text
    if len(text) != 1 or text[0].get("role") != role:
        roles = ", ".join(str(message.get("role")) for message in text)
        raise ValueError(f"this evaluator scores one reply at a time; expected one message of the {role}, got: {roles}")
    return text_of(text[0])


def text_of(message: Mapping[str, Any]) -> str:
    """Return the content of a message: a text, or the texts of its parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def without_thinking(reply: str, ends: Sequence[str]) -> str:
    """Return the part of a reply after its thinking, which is all that this evaluator was trained on.

    Args:
        reply: text of the reply.
        ends: markers that end a chain of thought.

    Example:
        >>> without_thinking("<think>2 + 3?</think>Five.", ["</think>"])
        'Five.'
    """
    found = [reply.rfind(end) + len(end) for end in ends if end in reply]
    return reply[max(found) :].strip() if found else reply


def _batches(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
