"""The judge: compares two replies, with abstention; from a model, or as a run used it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig, VerdictsConfig, load_config
from selfeval.errors import InputError
from selfeval.judging import protocol
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import UNFITTED, JudgeFit, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, VerdictState
from selfeval.runs.comparison import Comparison, Preferred, check_sure
from selfeval.runs.conversations import AnyQuestion, check_conversations, question_from
from selfeval.runs.judge_fit import read_fit
from selfeval.runs.model import RunModel, described
from selfeval.runs.model_defaults import model_defaults
from selfeval.runs.reader import RunReader, round_seed
from selfeval.runs.servers import with_judge_server
from selfeval.store.remote.places import is_url, local_run

__all__ = ["Judge", "Precision"]

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"]


class Judge:
    """The judge of a run, or the default judge of a model, loaded once for any number of comparisons. Use `Judge.load`.

    The judge abstains if it is not sure, calls a tie, or gives no parsable verdict. The default judge, `pairwise`, is the base
    model prompted to compare two replies in both orders; it combines the two, which removes the position bias.

    Example:
        >>> judge = Judge.load("runs/first")
        >>> question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
        >>> judge.compare(question, "The answer is 5.", "The answer is 5.").preferred
        'unsure'
    """

    def __init__(
        self,
        backbone: Backbone,
        templates: Templates,
        config: RunConfig,
        source: str | Path,
        seed: int | None = None,
        fit: JudgeFit = UNFITTED,
    ) -> None:
        self._backbone, self._templates, self._config, self._source = backbone, templates, config, source
        self._seed, self._fit = config.seed if seed is None else seed, fit

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        precision: Precision = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        trust_remote_code: bool = False,
        servers: Sequence[str] = (),
    ) -> Judge:
        """Load a judge.

        Args:
            source: a model folder or hub id, with its own prompts or the package's; or the folder or URL of a run, for its
                base with the run's prompts, precision and device.
            precision: precision of a model's weights; not allowed for a run. Default: chosen by device and free memory.
            device: device of a model; not allowed for a run. Default: a GPU if there is one.
            trust_remote_code: run code that comes with the model. Default: False.
            servers: Optional. `key=value` strings for `url` and `key_variable` of the server that judged the run. A server
                that only run.json names is not asked, because a run folder may come from somebody else.

        Raises:
            ModelError: the model or its templates cannot be used.
            RunFolderError: the run or its prompts cannot be read, or its judge is a server that is not named in `servers`.
            InputError: a precision or a device is given for a run, or servers for a model.
        """
        source = local_run(source) if is_url(source) else source
        if (Path(source) / "run.json").exists():
            if (precision, device) != ("auto", "auto"):
                raise InputError(
                    f"{source} is a run, which has its own precision and device; omit them, or pass the run's model"
                )
            reader = RunReader(source)
            with_judge_server(reader.folder, reader.config, servers)  # before the model is loaded
            return cls.of_run(RunModel.load(reader, trust_remote_code=trust_remote_code), servers=servers)
        if servers:
            raise InputError(f"{source} is a model, whose judge asks no server; remove servers, or pass the folder of a run")
        # Through the loader, so a model judge has the same defaults and checks as a run.
        given = {"model": str(source), "backbone.precision": precision, "backbone.device": device}
        made = model_defaults(str(source), trust_remote_code=trust_remote_code)
        config = load_config(None, given, (), None if made is None else made.values)
        backbone = Backbone.load(config.model, config.backbone, trust_remote_code=trust_remote_code)
        kinds = config.verdicts.kinds()
        templates = Templates.load(
            templates_folder(config.model), backbone.loaded.tokenizer, kinds=kinds, arguments=config.chat.arguments
        )
        return cls(backbone, templates, config, source)

    @classmethod
    def of_run(cls, model: RunModel, *, servers: Sequence[str] = ()) -> Judge:
        """Return the judge of a run whose base is already loaded; see `load`."""
        config = with_judge_server(model.reader.folder, model.config, servers)
        seed, folder = round_seed(config.seed, model.reader.round), model.reader.folder
        fit = read_fit(config.verdicts, folder)
        return cls(model.backbone, model.templates, config, folder, seed, fit)

    def __repr__(self) -> str:
        return described("Judge", self._source, self._backbone)

    def compare(self, question: AnyQuestion, a: str, b: str, sure: float | None = None) -> Comparison:
        """Compare two replies to a question.

        Args:
            question: the question: a text, or a conversation (a list of messages with `role` and `content` that ends with a
                message of the user).
            a: a reply to it.
            b: another reply.
            sure: Optional. Confidence below which neither is preferred (default: `verdicts.keep`, 0.8 unless a run sets it).

        Raises:
            InputError: a text is empty, or a conversation is malformed or cannot be formatted by the model's chat template.
        """
        return self.compare_all([(question, a, b)], sure)[0]

    def compare_all(self, cases: Sequence[tuple[AnyQuestion, str, str]], sure: float | None = None) -> list[Comparison]:
        """Compare two replies to each of many questions, batched.

        Args:
            cases: question, reply a and reply b of each comparison.
            sure: Optional. See `compare`.

        Raises:
            InputError: see `compare`; or `sure` is not between 0.5 and 1.

        Example:
            >>> Judge.load("runs/first").compare_all([])
            []
        """
        if sure is not None:
            check_sure(sure)
        if any(not text.strip() for _, *replies in cases for text in replies):
            raise InputError("both replies must not be empty")
        questions = [question_from(question) for question, _, _ in cases]
        # Others read the text of a conversation, and need no chat template.
        if "reply" in self._config.verdicts.kinds():
            check_conversations(self._templates, questions)
        config = self._config.verdicts if sure is None else self._config.verdicts.model_copy(update={"keep": sure})
        size = self._config.backbone.rollout_batch_size
        judge = make_judge(*(self._backbone, self._templates, config), batch_size=size, seed=self._seed, fit=self._fit)
        with self._backbone.acting_as(BASE):
            judgements = judge.judge(
                [self._shown(question, a, b) for question, (_, a, b) in zip(questions, cases, strict=True)]
            )
        return [_comparison(judgement, config) for judgement in judgements]

    def _shown(self, question: Question, a: str, b: str) -> protocol.Comparison:
        first, second = (self._templates.without_thinking(reply) for reply in (a, b))
        return protocol.Comparison(question.text, first, second, messages=question.messages)


def _comparison(judgement: Judgement, config: VerdictsConfig) -> Comparison:
    state, probability = protocol.state_of(judgement, config), judgement.probability
    preferred: Preferred = "unsure"
    if state == VerdictState.KEPT and probability is not None:
        preferred = "a" if probability > 0.5 else "b"
    return Comparison(probability, preferred, state, judgement=judgement)
