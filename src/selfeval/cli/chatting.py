"""Chat with the policy of a run on the terminal, or question by question through a pipe.

On a terminal, Ctrl-C ends a reply and Ctrl-D the chat. Elsewhere each line of standard input is a question or a command, and
nothing but replies is written to standard output.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from selfeval.cli.failures import end_signals
from selfeval.errors import InputError
from selfeval.texts import has_half_character, nearest, safe_json, visible

if TYPE_CHECKING:
    from selfeval.runs.chat import Conversation, Exchange, Speaker, StreamedReply
    from selfeval.runs.comparison import Comparison
    from selfeval.runs.evaluator import Evaluator

__all__ = ["ROLES", "Chat", "Settings", "chat"]

ROLES = ("policy", "base")
_SEEDS = Path("chat_seeds.jsonl")
"""Default file of /save, in the working directory."""
_PROMPT = "> "


@dataclass(frozen=True)
class Settings:
    """Options of the command; numbers that are None are those of the run.

    Attributes:
        role: `policy` or `base`.
        compare: let both reply, and the evaluator compare.
        temperature, top_p, seed, max_new_tokens: how replies are sampled (`sampling_of`).
        system: system message; empty for none.
        sure: confidence below which the comparison is unsure; None for the evaluator's own.
        as_json: print a JSON object per reply or comparison, when it is complete.
    """

    role: str = "policy"
    compare: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    system: str = ""
    sure: float | None = None
    as_json: bool = False


def chat(folder: Path, settings: Settings, *, trust_remote_code: bool = False) -> None:
    """Load the models of a run, and chat until the input ends.

    Raises:
        InputError: an option is wrong, or the run has no such model yet.
    """
    if settings.role not in ROLES:
        raise InputError(f'there is no role "{settings.role}"{nearest(settings.role, ROLES)}')
    is_live = sys.stdin.isatty() and sys.stdout.isatty() and not settings.as_json
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a character that the terminal lacks
    made = _load(folder, settings, is_live=is_live, trust_remote_code=trust_remote_code)
    for number in end_signals():
        signal.signal(number, _leave)
    made.run(_typed() if is_live else _piped())


def _leave(*arguments: Any) -> NoReturn:
    """End the command; Ctrl-C, which signals usually stand for, ends a reply only."""
    raise typer.Exit(130)


def _load(folder: Path, settings: Settings, *, is_live: bool, trust_remote_code: bool) -> Chat:
    from selfeval.runs.chat import Conversation, Speaker, sampling_of
    from selfeval.runs.comparison import check_sure
    from selfeval.runs.evaluator import Evaluator
    from selfeval.runs.model import RunModel
    from selfeval.runs.policy import Policy
    from selfeval.runs.reader import RunReader
    from selfeval.stages.terminal import Terminal

    reader, roles = RunReader(folder), ROLES[::-1] if settings.compare else (settings.role,)
    if settings.sure is not None:
        check_sure(settings.sure)
    # Before the base is loaded, which may take minutes.
    if "policy" in roles:
        Policy.check(reader)
    if settings.compare:
        Evaluator.check(reader)
    with Terminal(quiet=not is_live).waiting(f"loading {reader.config.model}"):
        model = RunModel.load(reader, trust_remote_code=trust_remote_code)
        sampling = sampling_of(model, settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed)
        speakers = [Speaker(model, role, sampling) for role in roles]
        evaluator = Evaluator(model) if settings.compare else None
    remembers = model.templates.uses_chat
    if settings.system and not remembers:
        raise InputError("--system: this model has no chat template, so it has no system message; omit it")
    conversation = Conversation(settings.system, remembers)
    return Chat(folder, speakers, evaluator, conversation, settings, is_live=is_live)


# -- input --------------------------------------------------------------------------------------------------------------


def _typed() -> Iterator[str]:
    """Yield the lines that are typed. Ctrl-C discards one, Ctrl-D ends the chat."""
    _with_editing()
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            _write("\n")
            return
        except KeyboardInterrupt:
            _write("\n(Ctrl-D or /exit leaves)\n")


def _with_editing() -> None:
    """Let `input` edit lines and recall earlier ones, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _piped() -> Iterator[str]:
    # Otherwise a broken line would end the command with a traceback.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    for number, line in enumerate(sys.stdin, start=1):
        if has_half_character(line):
            raise InputError(f"standard input, line {number}: not valid UTF-8")
        yield line


def _write(text: str) -> None:
    """Write a piece of text at once. It is ours, or was made `visible`."""
    sys.stdout.write(text)
    sys.stdout.flush()


# -- the chat -----------------------------------------------------------------------------------------------------------


class Chat:
    """A chat: speakers, a conversation, and the commands that begin with a slash.

    Args:
        folder: run folder.
        speakers: the role that replies; or the base and the policy, whose replies are compared.
        evaluator: Optional. Compares the replies of two speakers.
        conversation: the turns so far.
        settings: options of the command.
        is_live: whether a person is at the terminal.
    """

    def __init__(
        self,
        folder: Path,
        speakers: list[Speaker],
        evaluator: Evaluator | None,
        conversation: Conversation,
        settings: Settings,
        *,
        is_live: bool,
    ) -> None:
        self._folder, self._speakers, self._evaluator, self._conversation = folder, speakers, evaluator, conversation
        self._settings, self._is_live = settings, is_live
        self._replies, self._seeds, self._left = 0, _SEEDS, False
        self._last: Exchange | None = None
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/save": (self._save, "append the last question to a seeds file: /save [FILE]"),
            "/save-reply": (self._save_reply, "append the last question with its reply: /save-reply [FILE]"),
            "/retry": (self._retry, "sample another reply to the last question"),
            "/undo": (self._undo, "remove the last question and its reply"),
            "/reset": (self._reset, "begin a new conversation"),
            "/help": (self._help, "list the commands"),
            "/exit": (self._exit, "leave; so does Ctrl-D"),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Reply to each line, or run it as a command if it begins with a slash; two slashes begin a question with one."""
        if self._is_live:
            self._greet()
        for line in lines:
            text = line.strip()
            if not text:
                continue
            try:
                self._take(text)
            except InputError as error:
                if not self._is_live:
                    raise
                self._say(f"Error: {error}")
            except KeyboardInterrupt:  # while the evaluator compares, for example
                if not self._is_live:
                    raise
                self._say("(stopped; the question is not part of the conversation)")
            if self._left:
                return

    def _take(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if not text.startswith("/") or text.startswith("//"):
            self._ask(text[1:] if text.startswith("//") else text)
        elif name in self._commands:
            self._commands[name][0](rest.strip())
        else:
            raise InputError(f'there is no command "{name}"{nearest(name, list(self._commands))}')

    def _greet(self) -> None:
        roles = " and ".join(speaker.role for speaker in self._speakers)
        alone = "" if self._conversation.remembers else " Without a chat template, every question is asked alone."
        self._say(f"{self._folder}: {roles}.{alone} Ctrl-C ends a reply, Ctrl-D the chat; /help lists the commands.")

    def _say(self, text: str) -> None:
        """Print a line that is no reply: to standard error where a program reads the replies."""
        typer.echo(visible(text, keep="\n"), err=not self._is_live)

    # -- replies --------------------------------------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        asked = self._conversation.asked(question)
        replies: dict[str, StreamedReply] = {}
        for speaker in self._speakers:
            # The same random numbers for both roles of a comparison, and others for each new reply.
            replies[speaker.role] = reply = speaker.reply(asked, self._replies)
            if not self._show(speaker.role, reply):
                break
        self._replies += 1
        is_complete = len(replies) == len(self._speakers)
        compared = self._compare(asked, replies) if self._evaluator and is_complete else None
        if self._settings.as_json:
            typer.echo(safe_json(_as_json(question, replies, compared)))
        # The conversation continues after the reply of the last speaker: of a comparison, the policy's, which does not exist if
        # that of the base was stopped.
        last = replies.get(self._speakers[-1].role)
        self._keep(question, last.text if last else "")

    def _keep(self, question: str, reply: str) -> None:
        from selfeval.runs.chat import Exchange

        self._last = Exchange(question, reply)
        # Chat templates have no turns without text.
        if reply:
            self._conversation.exchanges.append(self._last)
        else:
            self._say("(no reply, so the question is not part of the conversation)")

    def _show(self, role: str, reply: StreamedReply) -> bool:
        """Print a reply while it is sampled; return False if it was stopped by Ctrl-C."""
        shows, is_stopped, has_thought = not self._settings.as_json, False, False
        if shows and len(self._speakers) > 1:
            _write(f"{role}: ")
        try:
            with closing(iter(reply)) as pieces:
                for piece in pieces:
                    if self._is_live and reply.is_thinking and not has_thought:
                        _write("(thinking) ")
                        has_thought = True
                    if shows:
                        _write(visible(piece, keep="\n\t"))
        except KeyboardInterrupt:
            if not self._is_live:
                raise
            is_stopped = True
        if shows:
            _write(f"{' ' * bool(reply.text)}(stopped)\n" if is_stopped else "\n")
        return not is_stopped

    def _compare(self, asked: Any, replies: dict[str, StreamedReply]) -> Comparison | None:
        assert self._evaluator is not None
        base, policy = (replies[role].text for role in ROLES[::-1])
        if not base or not policy:
            self._say("(an empty reply has no score)")
            return None
        found = self._evaluator.compare(asked, base, policy, self._settings.sure)
        if not self._settings.as_json:
            _write(f"{_verdict(found)}\n")
        return found

    # -- commands -------------------------------------------------------------------------------------------------------

    def _latest(self) -> Exchange:
        if self._last is None:
            raise InputError("there is no question yet; ask one first")
        return self._last

    def _save(self, file: str) -> None:
        self._append(file, self._latest().question, None)

    def _save_reply(self, file: str) -> None:
        self._append(file, self._latest().question, self._latest().reply)

    def _append(self, file: str, question: str, reply: str | None) -> None:
        from selfeval.stages.seeds import append_seed

        path = _path(file) if file else self._seeds
        around = path.resolve().parents
        # The folder of a round is in that of its run.
        if self._folder.resolve() in around or any((folder / "run.json").exists() for folder in around):
            raise InputError(f"{path} is in a run folder, whose files belong to the run; pass another file")
        append_seed(path, question, reply)
        self._seeds = path
        self._say(f"saved to {path}")

    def _remove(self) -> Exchange:
        """Remove the last question and its reply from the conversation, and return them."""
        last, exchanges = self._latest(), self._conversation.exchanges
        if exchanges and exchanges[-1] is last:
            exchanges.pop()
        self._last = exchanges[-1] if exchanges else None
        return last

    def _retry(self, rest: str) -> None:
        before, last = list(self._conversation.exchanges), self._remove()
        try:
            self._ask(last.question)
        except BaseException:
            self._conversation.exchanges[:], self._last = before, last
            raise

    def _undo(self, rest: str) -> None:
        self._say(f"removed: {self._remove().question}")

    def _reset(self, rest: str) -> None:
        self._conversation.exchanges.clear()
        self._last = None
        self._say("a new conversation")

    def _help(self, rest: str) -> None:
        self._say("\n".join(f"{name:<12} {what}" for name, (_, what) in self._commands.items()))
        self._say("//text       ask a question that begins with a slash")

    def _exit(self, rest: str) -> None:
        self._left = True


def _path(file: str) -> Path:
    """Return the file that a command names, which may be quoted and begin with ~."""
    try:
        words = shlex.split(file)
    except ValueError:
        words = [file]
    return Path(os.path.expanduser(words[0] if len(words) == 1 else file))


def _preferred(comparison: Comparison) -> str:
    return {"a": "base", "b": "policy"}.get(comparison.preferred, "unsure")


def _verdict(comparison: Comparison) -> str:
    assert comparison.scores is not None
    assert comparison.confidence is not None
    base, policy = comparison.scores
    calibration = "" if comparison.calibrated else ", not calibrated: too few held-out pairs to fit a temperature"
    return (
        f"scores: base {base:+.3f}, policy {policy:+.3f}; preferred: {_preferred(comparison)} "
        f"(confidence {comparison.confidence:.2f}{calibration})"
    )


def _as_json(question: str, replies: dict[str, StreamedReply], comparison: Comparison | None) -> dict[str, Any]:
    shown = {role: {"reply": r.text, "finished": r.finished, "tokens": r.tokens} for role, r in replies.items()}
    if len(shown) == 1:
        ((role, only),) = shown.items()
        return {"question": question, "role": role, **only}
    found = {"question": question, **shown}
    if comparison is None or comparison.scores is None or comparison.confidence is None:
        return {**found, "scores": None, "preferred": None, "confidence": None, "calibrated": None}
    return {
        **found,
        "scores": {role: round(score, 6) for role, score in zip(ROLES[::-1], comparison.scores, strict=True)},
        "preferred": _preferred(comparison),
        "confidence": round(comparison.confidence, 6),
        "calibrated": comparison.calibrated,
    }
