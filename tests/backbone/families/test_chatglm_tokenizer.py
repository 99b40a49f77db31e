"""Compare the tokenizers with recorded outputs of the published ones.

The published SentencePiece files are not included. A stand-in has the same number of pieces and, at the ids that the golden
cases use, their texts; all other pieces are characters that do not occur in practice. The tests cover everything around
SentencePiece: control tokens and their ids, prompt formats, text that is encoded separately, white space, padding. They do not
cover how the published file segments a text, which is up to SentencePiece.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import chatglm
from selfeval.backbone.families.chatglm_tokenizer import (
    ChatGLM1Tokenizer,
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLMTokenizer,
)
from selfeval.errors import ModelError
from selfeval.judging.templates import Templates, templates_folder

PIECES_23 = {
    30910: "▁", 36474: "▁你", 54591: "好", 39701: "你好", 1266: "▁What", 5011: "What", 323: "▁is", 30943: "2", 31011: "+",
    30987: "?", 55172: "写", 38572: "一首", 55475: "诗", 31696: "要求", 56783: "押", 56788: "韵", 265: "▁▁", 769: "▁two",
    1457: "sp", 1854: "aces", 13678: "tab", 884: "▁def", 3059: "def", 279: "▁f", 30946: "(", 30948: "x", 1528: "):", 296: "▁▁▁",
    3793: "▁return", 1994: "▁x", 790: "▁[", 30995: "[", 30951: "R", 517: "ound", 30939: "1", 30996: "]", 54761: "问",
    31211: "：", 55437: "答", 31404: "！", 33277: "有什么", 41230: "可以帮助", 54622: "你", 31514: "？", 40637: "再见",
    906: "▁<", 31007: "|", 4865: "user", 30994: ">", 809: "▁You", 383: "▁are", 6483: "▁helpful", 30930: ".",
}  # fmt: skip

PIECES_1 = {
    4: "<n>", 5: "▁", 53: "▁[", 52: "[", 6945: "Round", 8: "0", 9: "1", 42: "]", 64286: "问", 12: "：", 67342: "答",
    74874: "你好", 35: "！", 65806: "我是", 68241: "人工智能", 75890: "助手", 14132: "▁Chat", 5388: "GL", 340: "M", 11: "-",
    21: "6", 222: "B", 6: "，", 76693: "很高兴", 66877: "见到", 63852: "你", 66430: "欢迎", 68747: "问我", 102501: "任何问题",
    63823: "。", 65450: "晚上", 83400: "睡不着", 64213: "应该", 66846: "怎么办", 1616: "▁def", 594: "▁main", 125936: "():",
    2274: "print", 89: "('", 7283: "hello", 398: "▁world", 125686: "')", 61: "#", 25672: "▁greeting",
    3: "<pad>", 130000: "[MASK]", 130001: "[gMASK]", 130002: "[sMASK]", 130004: "<sop>", 130005: "<eop>", 130008: "<|tab|>",
} | {130007 + n: f"<|blank_{n}|>" for n in range(2, 81)}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("pieces")
    controls = {0: "<unk>", 1: "<s>", 2: "</s>"}
    # "▁你" "好" at a beginning, "你好" inside a text: the cut that the published file makes.
    scores = {"▁": -3.0, "你好": -1.1, "▁你": -0.2, "好": -0.2}
    late = chatglm.sentencepiece_file(
        PIECES_23, 64789, folder / "tokenizer.model", first_byte=3, controls=controls, scores=scores
    )
    early = chatglm.sentencepiece_file(PIECES_1, 130344, folder / "ice_text.model", first_byte=130088, controls=controls)
    return {1: str(early), 2: str(late), 3: str(late)}


@pytest.fixture(scope="module")
def one(files: dict[int, str]) -> ChatGLMTokenizer:
    return ChatGLM1Tokenizer(files[1])


@pytest.fixture(scope="module")
def two(files: dict[int, str]) -> ChatGLMTokenizer:
    return ChatGLM2Tokenizer(files[2])


@pytest.fixture(scope="module")
def three(files: dict[int, str]) -> ChatGLMTokenizer:
    return ChatGLM3Tokenizer(files[3])


def chat(tokenizer: ChatGLMTokenizer, *turns: str, **options: Any) -> Any:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, return_dict=False, **{"add_generation_prompt": True, **options})


# -- generation 1 -------------------------------------------------------------------------------------------------------


def test_texts_of_1(one: ChatGLMTokenizer) -> None:
    cases = chatglm.tokenizer_cases("1")["encode"]
    assert len(cases) == 3
    for case in cases:
        assert one.encode(case["text"]) == case["ids"]
        assert one.decode(case["ids"], skip_special_tokens=True) == case["text"]


def test_control_tokens_of_1(one: ChatGLMTokenizer) -> None:
    special = chatglm.tokenizer_cases("1")["special"]
    assert {text: one.convert_tokens_to_ids(text) for text in special} == special
    assert {text: one.get_added_vocab()[text] for text in special} == special
    assert (one.pad_token_id, one.bos_token_id, one.eos_token_id, one.mask_token_id) == (3, 130004, 130005, 130000)
    assert one.stop_ids == ()


def test_chats_of_1(one: ChatGLMTokenizer) -> None:
    first, history, _ = chatglm.tokenizer_cases("1")["encode"]
    assert chat(one, "你好") == first["ids"]
    question, answer, last = "你好", history["text"].split("答：")[1].split("\n")[0], "晚上睡不着应该怎么办"
    assert chat(one, question, answer, last) == history["ids"]
    assert chat(one, question, answer, last, tokenize=False) == history["text"]
    answered = chat(one, "你好", "你好", add_generation_prompt=False)
    assert answered == [*first["ids"], 5, 74874, 130005]
    assert answered == one.encode("你好", "你好")


@pytest.mark.parametrize("blanks", [1, 2, 79, 80, 81, 83, 161])
def test_white_space_of_1_comes_back(one: ChatGLMTokenizer, blanks: int) -> None:
    text = "print" + " " * blanks + "hello\n\n\thello"
    ids = one.encode(text, add_special_tokens=False)
    assert one.decode(ids) == text
    longest, rest = divmod(blanks, 80)
    expected = [130007 + 80] * longest + ([130007 + rest] if rest > 1 else [5] * rest)
    assert ids == [5, 2274, *expected, 7283, 4, 4, 130008, 7283]


# -- generations 2 and 3 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [2, 3])
def test_control_tokens(generation: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue({2: "two", 3: "three"}[generation])
    golden = chatglm.tokenizer_cases("23")[f"v{generation}"]
    special = {text: i for text, i in golden["special"].items() if i > 2}
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in special} == special
    added = {text: i for text, i in tokenizer.get_added_vocab().items() if i > 2}
    assert added == {text: i for text, i in special.items() if text not in ("sop", "eop")}
    assert len(tokenizer) == tokenizer.vocab_size == golden["vocab_size"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.stop_ids == ((64795, 64797) if generation == 3 else ())


@pytest.mark.parametrize("generation", [2, 3])
def test_plain_texts(generation: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue({2: "two", 3: "three"}[generation])
    for case in chatglm.tokenizer_cases("23")[f"v{generation}"]["encode_plain"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"][2:]


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_cleaning_a_text_leaves_its_words(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    templates = Templates.load(templates_folder("no such model"), tokenizer)
    assert templates.clean("philosophy, sop [gMASK]and</s> <|n|>") == (
        "philosophy, sop  and</s> <|n|>" if name == "one" else "philosophy, sop  and  <|n|>"
    )
    assert templates.uses_chat


def test_prompts_of_2(two: ChatGLMTokenizer) -> None:
    golden = chatglm.tokenizer_cases("23")["v2"]
    for case in golden["prompt_single"]:
        assert chat(two, case["query"], tokenize=False) == case["prompt"]
        assert chat(two, case["query"]) == case["ids"]
    case = golden["prompt_history"]
    turns = [*case["history"][0], case["query"]]
    assert chat(two, *turns, tokenize=False) == case["prompt"]
    assert chat(two, *turns) == case["ids"]
    answered = chat(two, "你好", "你好", add_generation_prompt=False)
    assert answered == [*golden["prompt_single"][0]["ids"], 36474, 54591, 2]  # the answer is encoded apart


def test_decoding_of_2(two: ChatGLMTokenizer) -> None:
    cases = chatglm.tokenizer_cases("23")["v2"]["decode"]
    assert len(cases) == 5
    for case in cases:
        assert two.decode(case["ids"]) == case["text"]
        assert two.decode([64790, 64792, *case["ids"], 2, 0, 64800], skip_special_tokens=True) == case["text"]
    assert two.decode([64790, 64792, 36474, 54591, 2]) == "[gMASK]sop你好</s>"


def test_left_padding_of_2(two: ChatGLMTokenizer) -> None:
    case = chatglm.tokenizer_cases("23")["v2"]["batch_padding"]
    batch = two(case["texts"], padding=True)
    assert batch["input_ids"] == case["input_ids"]
    assert batch["attention_mask"] == case["attention_mask"]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_roles_of_3_are_numbers_and_their_names_are_text(three: ChatGLMTokenizer) -> None:
    golden = chatglm.tokenizer_cases("23")["v3"]
    assert len(golden["chat_input"]) == 6
    for case in golden["chat_input"]:
        messages = [*case["history"], {"role": "user", "content": case["query"]}]
        assert three.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == case["ids"]
        assert three.apply_chat_template(messages, add_generation_prompt=True)["attention_mask"] == [1] * len(case["ids"])
    plain = golden["encode_role_text_as_plain"]
    assert three.encode(plain["text"], add_special_tokens=False) == plain["ids"]
    ids = chat(three, plain["text"])
    assert ids == [64790, 64792, 64795, 30910, 13, *plain["ids"], 64796]


def test_a_chat_of_3_as_text_and_answered(three: ChatGLMTokenizer) -> None:
    assert chat(three, "a", "b", "c", tokenize=False) == "<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>"
    answered = chat(three, "你好", "再见", add_generation_prompt=False)
    assert answered == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796, 30910, 13, 30910, 40637, 2]


def test_several_chats_at_once(three: ChatGLMTokenizer) -> None:
    chats = [[{"role": "user", "content": "你好"}], [{"role": "user", "content": "What is 2+2?"}]]
    batch = three.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    short, long = (chat(three, *(message["content"] for message in messages)) for messages in chats)
    assert batch["input_ids"].tolist() == [[0] * 5 + short, long]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 8, [1] * 13]


# -- what cannot be used --------------------------------------------------------------------------------------------------


def test_roles_that_are_not_known(one: ChatGLMTokenizer, two: ChatGLMTokenizer, three: ChatGLMTokenizer) -> None:
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    for tokenizer in (one, two):
        with pytest.raises(Exception, match="user and assistant only"):
            tokenizer.apply_chat_template(system)
    with pytest.raises(ValueError, match="no role tool"):
        three.apply_chat_template([{"role": "tool", "content": "Hello"}])
    with pytest.raises(ValueError, match="does not support tools"):
        chat(three, "你好", tools=[{"name": "clock"}])


def test_files_that_are_none(tmp_path: Path, files: dict[int, str]) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a SentencePiece file"):
        ChatGLM2Tokenizer(str(broken))
    with pytest.raises(ModelError, match=r"no piece \[gMASK\]"):
        ChatGLM1Tokenizer(files[2])


def test_without_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ModelError, match=r"self-evaluator\[sentencepiece\]"):
        ChatGLM2Tokenizer("tokenizer.model")
