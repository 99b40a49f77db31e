"""The chat on a terminal and through a pipe. How replies are sampled: tests/runs/test_chat.py."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML
from processes import Process, selfeval, start_python
from selfeval.cli.chatting import Chat, Settings
from selfeval.errors import InputError
from selfeval.records import Seed
from selfeval.runs.chat import Conversation, Sampling, Speaker
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.model import RunModel
from selfeval.stages.seeds import read_seeds
from selfeval.texts import visible
from tiny_runs import random_roles
from toy import ToyRun

QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunModel:
    return random_roles(tmp_path_factory.mktemp("run"), CHATML)


def _chat(model: RunModel, *, limit: int = 8, is_live: bool = True, **settings: Any) -> Chat:
    chosen = Settings(**settings)
    roles, evaluator = (("base", "policy"), Evaluator(model)) if chosen.compare else (("policy",), None)
    speakers = [Speaker(model, role, Sampling(1.0, 1.0, limit)) for role in roles]
    return Chat(model.reader.folder, speakers, evaluator, Conversation(), chosen, is_live=is_live)


def _exchanges(chat: Chat) -> list[tuple[str, str]]:
    return [(exchange.question, exchange.reply) for exchange in chat._conversation.exchanges]


# -- commands -----------------------------------------------------------------------------------------------------------


def test_retry_undo_and_reset_change_the_conversation(model: RunModel) -> None:
    chat = _chat(model)
    chat.run(["Why?", "How?"])
    (first, second) = _exchanges(chat)
    chat.run(["/retry"])
    assert _exchanges(chat)[0] == first
    assert _exchanges(chat)[1][0] == "How?"
    assert _exchanges(chat)[1] != second, "another sample"
    chat.run(["/undo"])
    assert _exchanges(chat) == [first]
    chat.run(["/reset"])
    assert _exchanges(chat) == []


def test_a_comparison_that_was_stopped_before_the_policy_replied_is_not_part_of_the_conversation(
    model: RunModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = _chat(model, compare=True)
    chat.run(["Why?"])
    monkeypatch.setattr(Chat, "_show", lambda self, role, reply: bool(list(reply)) and role != "base")
    chat.run(["How?"])
    assert [question for question, _ in _exchanges(chat)] == ["Why?"]
    assert "not part of the conversation" in capsys.readouterr().out


def test_ctrl_c_while_the_evaluator_compares_keeps_the_chat(
    model: RunModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: Evaluator, *arguments: Any) -> None:
        raise KeyboardInterrupt

    chat = _chat(model, compare=True)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "compare", stopped)
        chat.run(["Why?"])
    assert _exchanges(chat) == []
    chat.run(["How?"])
    assert [question for question, _ in _exchanges(chat)] == ["How?"]


def test_a_line_with_two_slashes_is_a_question(model: RunModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = _chat(model)
    chat.run(["//etc?", "  ", "/exit", "never asked"])
    assert [question for question, _ in _exchanges(chat)] == ["/etc?"]
    assert "/help lists the commands" in capsys.readouterr().out


def test_a_wrong_command_ends_no_chat_of_a_person_but_one_of_a_program(
    model: RunModel, capsys: pytest.CaptureFixture[str]
) -> None:
    _chat(model).run(["/undone", "/undo", "/save", "/help"])
    shown = capsys.readouterr().out
    assert 'Error: there is no command "/undone"; did you mean "/undo"?' in shown
    assert shown.count("Error: there is no question yet; ask one first") == 2
    assert all(name in shown for name in ("/save ", "/save-reply", "/retry", "/undo", "/reset", "/help", "/exit"))
    with pytest.raises(InputError, match="did you mean"):
        _chat(model, is_live=False).run(["/undone"])


def test_questions_and_replies_are_saved_as_seeds(model: RunModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, file = _chat(model), tmp_path / "my seeds.jsonl"
    file.write_text('{"question": "Old?"}')  # without a newline at its end
    chat.run(["Why?", f'/save "{file}"', "How?", "/save-reply"])
    (_, (_, reply)) = _exchanges(chat)
    assert read_seeds(str(file)) == [Seed("Old?"), Seed("Why?"), Seed("How?", reply)]
    chat.run([f"/save {model.reader.folder}/seeds.jsonl"])
    assert "is in a run folder, whose files belong to the run" in capsys.readouterr().out


def test_what_the_model_writes_cannot_control_the_terminal(model: RunModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = _chat(model, limit=100)
    chat.run([f"Question {number}?" for number in range(4)])
    shown = capsys.readouterr().out
    replies = "".join(reply for _, reply in _exchanges(chat))
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", replies), "a random model writes some"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert all(visible(reply, keep="\n\t") in shown for _, reply in _exchanges(chat))


def test_a_comparison_shows_the_scores_of_the_evaluator(model: RunModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = _chat(model, compare=True)
    chat.run(["Why?"])
    shown = capsys.readouterr().out
    replies = {role: "".join(Speaker(model, role, Sampling(1.0, 1.0, 8)).reply("Why?")) for role in ("base", "policy")}
    assert _exchanges(chat) == [("Why?", replies["policy"])]
    found = Evaluator(model).compare("Why?", replies["base"], replies["policy"])
    assert found.scores is not None
    preferred = {"a": "base", "b": "policy", "unsure": "unsure"}[found.preferred]
    scores = f"scores: base {found.scores[0]:+.3f}, policy {found.scores[1]:+.3f}; preferred: {preferred} (confidence"
    assert scores in shown
    for role, reply in replies.items():
        assert f"{role}: {visible(reply, keep=chr(10) + chr(9))}" in shown


@pytest.mark.parametrize("sure", [0.5, 1.0])
def test_a_comparison_in_json(model: RunModel, capsys: pytest.CaptureFixture[str], sure: float) -> None:
    _chat(model, compare=True, as_json=True, is_live=False, sure=sure).run(["Why?"])
    found = json.loads(capsys.readouterr().out)
    expected = Evaluator(model).compare("Why?", found["base"]["reply"], found["policy"]["reply"], sure)
    assert found["scores"] == pytest.approx(dict(zip(("base", "policy"), expected.scores or (), strict=True)), abs=1e-5)
    assert found["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    better = max(found["scores"], key=found["scores"].get)
    assert found["preferred"] == ("unsure" if sure == 1.0 else better)
    assert found["policy"]["tokens"] <= 8


# -- the command --------------------------------------------------------------------------------------------------------


def test_through_a_pipe_each_line_is_a_question(toy_run: ToyRun, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    given = f"{QUESTION}\n\n/save {seeds}\n{QUESTION} \U0001f642\n"
    plain = selfeval("chat", str(toy_run.folder), "--seed", "5", given=given)
    assert plain.returncode == 0, plain.stderr
    found = selfeval("chat", str(toy_run.folder), "--seed", "5", "--json", given=given)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, f"{QUESTION} \U0001f642"]
    assert plain.stdout.splitlines() == [row["reply"] for row in rows]
    assert read_seeds(str(seeds)) == [Seed(QUESTION)] * 2
    assert plain.stderr == f"saved to {seeds}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--role", "polisy"], 'there is no role "polisy"; did you mean "policy"?'),
        (["--system", "Be brief."], "--system: this model has no chat template"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1.0"),
    ],
)
def test_wrong_options(toy_run: ToyRun, options: list[str], said: str) -> None:
    found = selfeval("chat", str(toy_run.folder), *options, given="Why?\n")
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr


ON_A_TERMINAL = """
import fcntl, os, runpy, signal, struct, sys, termios

os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the children of a command that ended with &
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to this process
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
for number in range(3):
    os.dup2(terminal, number)
sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
os.environ["TERM"] = "xterm"
os.environ.pop("COLUMNS", None)
sys.argv = ["selfeval", *sys.argv[2:]]
runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
"""


class Person:
    """Types at a terminal and reads it."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self._screen, child = pty.openpty()
        self.process = start_python(ON_A_TERMINAL, os.ttyname(child), *arguments)
        self._child, self._unread = child, ""

    def types(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def presses(self, key: str, until: str) -> None:
        """Press a key until it has an effect: Python handles a signal that arrives just before it waits for a line later."""
        for _ in range(12):
            self.types(key)
            # Not pressed again while it may still have an effect.
            while until not in self._unread and select.select([self._screen], [], [], 10)[0]:
                self._read(f"{until!r} was not shown")
            if until in self._unread:
                break
        self.reads(until)

    def reads(self, until: str) -> str:
        """Read to the end of `until`, and return what was shown."""
        while until not in self._unread:
            self._read(f"{until!r} was not shown")
        shown, _, self._unread = self._unread.partition(until)
        return shown + until

    def reads_some(self, characters: int) -> None:
        """Read until at least so many characters were shown."""
        while len(self._unread) < characters:
            self._read(f"{characters} characters were not shown")
        self._unread = ""

    def _read(self, problem: str) -> None:
        if not select.select([self._screen], [], [], 120)[0]:
            pytest.fail(f"{problem}; shown: {self._unread!r}")
        self._unread += os.read(self._screen, 65536).decode("utf-8", "replace")

    def close(self) -> None:
        if isinstance(self.process, Process) and self.process.poll() is None:
            self.process.kill()
        os.close(self._child)
        os.close(self._screen)


@pytest.fixture
def person(toy_run: ToyRun) -> Iterator[Person]:
    pytest.importorskip("pty")
    # A hot policy writes on up to the limit.
    made = Person("chat", str(toy_run.folder), "--temperature", "50", "--max-new-tokens", "400", "--seed", "1")
    yield made
    made.close()


def test_on_a_terminal_ctrl_c_ends_a_reply_and_ctrl_d_the_chat(person: Person) -> None:
    person.reads("/help lists the commands.")
    person.reads("> ")
    person.presses("\x03", "(Ctrl-D or /exit leaves)")
    person.reads("> ")
    person.types(f"{QUESTION}\n")
    person.reads("now?")
    person.reads_some(20)
    person.types("\x03")
    person.reads(" (stopped)")
    person.reads("> ")
    person.types("/undo\n")
    person.reads("removed: Tom has 3 pens.")
    person.reads("> ")
    person.types("\x04")
    person.process.communicate()
    assert person.process.returncode == 0


def test_sigterm_leaves(person: Person) -> None:
    person.reads("> ")
    # Sent again until it is noticed: one that arrives just before Python waits for a line is handled when the line is typed.
    for tenth in range(1200):
        if person.process.poll() is not None:
            break
        if tenth % 100 == 0:
            person.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert person.process.returncode == 130
