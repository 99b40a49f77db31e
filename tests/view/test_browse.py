"""Pages of records, of a question, and the download."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from processes import TIMEOUT
from selfeval.serve.gate import Access
from selfeval.view import browse
from selfeval.view import index as indexing
from selfeval.view.app import make_view
from selfeval.view.kinds import KINDS
from selfeval.view.opened import OpenedRuns
from selfeval.view.shown import COLUMNS
from view_runs import ViewRun, make_view_run

ATTACK = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViewRun]:
    folder = tmp_path_factory.mktemp("view") / "shop"
    return folder, make_view_run(folder)


@pytest.fixture(scope="module")
def client(run: tuple[Path, ViewRun]) -> TestClient:
    return opened(run[0])


def opened(folder: Path) -> TestClient:
    return TestClient(make_view(OpenedRuns([folder]), Access(None, loopback=True)), base_url="http://127.0.0.1")


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def get(client: TestClient, path: str, status: int = 200) -> str:
    response = client.get(f"/view/run/shop{path}")
    assert response.status_code == status, words(response.text)
    return response.text


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_has_a_table_with_its_records(client: TestClient, run: tuple[Path, ViewRun], kind: str) -> None:
    html = get(client, f"/{kind}")
    elements = Elements(html)
    drops = len(run[1].dropped_questions) + len(run[1].dropped_verdicts)
    total = drops if kind == "dropped" else len(getattr(run[1], kind))
    assert f"{total} records" in words(html)
    assert len(elements.of("tr")) == 1 + min(total, 50)
    assert len(elements.of("h1")) == 1
    assert all(cell["scope"] == "col" for cell in elements.of("th"))
    assert len(elements.of("caption")) == 1
    labelled = {label["for"] for label in elements.of("label")}
    for field in [*elements.of("input"), *elements.of("select")]:
        assert field.get("type") == "hidden" or field.get("id") in labelled or field.get("aria-label")


def test_each_column_can_be_sorted_and_says_so(client: TestClient) -> None:
    for kind, columns in COLUMNS.items():
        assert {column.sort for column in columns} - {""} <= set(KINDS[kind].columns), kind
        for column in columns:
            if column.sort:
                assert 'aria-sort="descending"' in get(client, f"/{kind}?sort=-{column.sort}"), (kind, column.sort)


def test_every_link_of_a_record_leads_to_it(client: TestClient) -> None:
    for kind in KINDS:
        for link in Elements(get(client, f"/{kind}")).of("a"):
            if "/question/" in link["href"]:
                path, anchor = link["href"].split("#")
                page = client.get(path)
                assert page.status_code == 200
                expected = "questions" if kind in ("seeds", "questions") else anchor
                if kind not in ("seeds", "questions") and not is_twin(kind, page.text):
                    assert f'id="{expected}"' in page.text, link["href"]


def is_twin(kind: str, html: str) -> bool:
    """Whether a dropped record links to the question that it nearly equals, which has no place for it."""
    return kind == "dropped" and 'id="dropped-title"' not in html


def test_the_address_holds_the_whole_state(client: TestClient) -> None:
    html = get(client, "/verdicts?state=tie&split=train&sort=-tie&q=plus")
    elements = Elements(html)
    chosen = [option["value"] for option in elements.of("option") if "selected" in option]
    assert chosen == ["train", "tie"]
    values = {field["name"]: field["value"] for field in elements.of("input")}
    assert (values["q"], values["sort"]) == ("plus", "-tie")
    download = next(link["href"] for link in elements.of("a") if "download" in link)
    rows = [json.loads(line) for line in client.get(download).text.splitlines()]
    assert {(row["state"], row["split"]) for row in rows} == {("tie", "train")}


def test_a_download_has_the_lines_of_the_files(client: TestClient, run: tuple[Path, ViewRun]) -> None:
    response = client.get("/view/run/shop/replies.jsonl")
    files = sorted((run[0] / "replies").glob("shard-*.jsonl"))
    assert response.text == "".join(path.read_text() for path in files)
    assert response.headers["content-disposition"] == 'attachment; filename="replies.jsonl"'
    assert response.headers["content-type"].startswith("application/jsonl")


def test_a_download_with_missing_records_is_refused(tmp_path: Path) -> None:
    make_view_run(tmp_path / "shop")
    damaged = tmp_path / "shop" / "replies" / "shard-00001.jsonl"
    damaged.write_text(damaged.read_text().replace("answer", "Answer"))
    client = opened(tmp_path / "shop")
    for path in ("/replies.jsonl", "/verdicts.jsonl?q=answer"):
        said = words(get(client, path, 400))
        assert "The download would be incomplete" in said
        assert "shard-00001.jsonl is damaged" in said
    verdicts = sorted((tmp_path / "shop" / "verdicts").glob("shard-*.jsonl"))
    assert get(client, "/verdicts.jsonl") == "".join(path.read_text() for path in verdicts), "no reply matters to them"


def test_a_download_is_refused_if_the_index_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_view_run(tmp_path / "shop")
    chunks, may_read = indexing._chunks, threading.Event()
    monkeypatch.setattr(indexing, "_chunks", lambda path, file: may_read.wait(TIMEOUT) and chunks(path, file))
    monkeypatch.setattr(browse, "_DOWNLOAD_SECONDS", 0.1)
    client = opened(tmp_path / "shop")
    said = words(get(client, "/replies.jsonl", 400))
    may_read.set()
    assert re.search("incomplete: 0 of [0-9,]+ bytes are indexed; try again later", said)


def test_filters_without_a_result_are_named_and_can_be_cleared(client: TestClient) -> None:
    html = get(client, "/verdicts?state=tie&confidence_min=0.9&q=zebra")
    assert "No record has search “zebra”; State: tie; Confidence ≥ 0.9. Clear all filters" in words(html)
    assert len([link for link in Elements(html).of("a") if link["href"] == "?"]) == 2
    remove = [link["href"] for link in Elements(html).of("a") if link["href"].startswith("?") and link["href"] != "?"]
    assert remove == ["?state=tie&confidence_min=0.9", "?q=zebra&confidence_min=0.9", "?q=zebra&state=tie"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/verdicts?stat=tie", "Verdicts have no filter 'stat'; did you mean"),
        ("/verdicts?confidence_min=high", "confidence_min is 'high', expected a number such as 0.5"),
        ("/verdicts?confidence_min=nan", "expected a number"),
        ("/sampled?step=x", "step is 'x'"),
        ("/verdicts?sort=text", "cannot be sorted by 'text'"),
        ("/verdicts?page=0", "page is '0', expected a number from 1"),
        ("/verdicts?page=99999999999999", "page is"),
        ("/verdicts?q=" + "x" * 1001, "the search has 1,001 characters"),
        (f"/verdicts?q={'+'.join(map(str, range(21)))}", "the search has 21 different words, the limit is 20; remove some"),
        ("/verdicts?cause=" + "x" * 60_000, f"cause is '{'x' * 40}…', expected one of cut, loop,"),
        ("/question/q0?show=100000000000000000000", "show: Input should be less than 9223372036854775808"),
        ("/question/q0?show=-2", "show: Input should be greater than or equal to -1"),
    ],
)
def test_a_wrong_address_says_what_is_allowed(client: TestClient, address: str, message: str) -> None:
    assert message in words(get(client, address, 400)).replace("&#x27;", "'")


def test_the_largest_values_of_an_address_are_no_error(client: TestClient) -> None:
    get(client, f"/question/q0?show={2**63 - 1}")
    get(client, f"/verdicts?q={'x+y+' * 200}{'+'.join(map(str, range(18)))}")


def test_a_page_behind_the_last_one_leads_back(client: TestClient) -> None:
    html = get(client, "/verdicts?page=7&state=tie")
    assert "There are only 1 pages" in words(html)
    assert [link for link in Elements(html).of("a") if link["href"] == "?state=tie"]


def test_a_question_has_everything_about_it(client: TestClient, run: tuple[Path, ViewRun]) -> None:
    said = words(get(client, "/question/q3"))
    verdict = next(v for v in run[1].verdicts if v.question_id == "q3")
    assert verdict.state == "unsure"
    for expected in (
        "What is 3 plus 3?",
        "It is 6.",
        "The answer is 7.",
        "The judge&#39;s probability stayed below verdicts.keep",
        "In order: the first reply is shown first first reply better 55.0%",
        "Swapped: the second reply is shown first first reply better 20.0%",
        "Judge says 3 [B]",
        "unsure by the stage verdicts",
        "Test scores",
        "The evaluator prefers q3-r1 ✗ wrong by gold",
        "Before and after training",
        "After training: 1.",
    ):
        assert expected in said, expected


def test_causes_are_in_words(client: TestClient, run: tuple[Path, ViewRun]) -> None:
    verdict = next(v for v in run[1].verdicts if v.state == "unparsable" and v.question_id == "q9")
    assert verdict.evidence is not None
    assert verdict.evidence.causes == (None, "cut")
    said = words(get(client, "/question/q9"))
    assert said.count("The output was one cut off at the token limit before a verdict.") == 1
    assert "The judge&#39;s answer could not be read; it never counts as a preference." in said


def test_an_unknown_question_or_run_is_not_found(client: TestClient) -> None:
    assert "There is no question" in get(client, "/question/q999", 404)
    assert client.get("/view/run/other/verdicts").status_code == 404


def test_text_of_models_and_people_is_never_markup(tmp_path: Path) -> None:
    make_view_run(tmp_path / "shop", questions=6, text=ATTACK)
    client = opened(tmp_path / "shop")
    pages = [*(f"/{kind}?q={ATTACK}" for kind in KINDS), *(f"/{kind}" for kind in KINDS), "/question/q0", "/report"]
    for path in pages:
        html = client.get(f"/view/run/shop{path}").text
        elements = Elements(html)
        scripts = ["live.js", "map.js"] if path == "/report" else ["live.js"]
        assert [script.get("src") for script in elements.of("script")] == [f"/view/static/{name}" for name in scripts]
        assert not elements.of("img")
        assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "&lt;script&gt;" in html


def test_a_kind_that_is_not_written_yet_says_which_stage_writes_it(tmp_path: Path) -> None:
    make_view_run(tmp_path / "shop", questions=3)
    for name in ("manifest.json", "scored.jsonl", "compared.jsonl"):
        (tmp_path / "shop" / "evaluation" / name).unlink()
    client = opened(tmp_path / "shop")
    assert "The stage evaluation has not written any." in get(client, "/scored")
    (tmp_path / "shop" / "report.json").unlink()
    assert "has no report yet" in get(client, "/report")


def test_the_pages_import_no_torch(run: tuple[Path, ViewRun]) -> None:
    script = (
        "import sys; from pathlib import Path; from fastapi.testclient import TestClient\n"
        "from selfeval.serve.gate import Access; from selfeval.view.app import make_view\n"
        "from selfeval.view.opened import OpenedRuns\n"
        f"view = make_view(OpenedRuns([Path({str(run[0])!r})]), Access(None, loopback=True))\n"
        "client = TestClient(view, base_url='http://127.0.0.1')\n"
        "for page in ('verdicts', 'question/q3', 'report'):\n"
        "    assert client.get(f'/view/run/shop/{page}').status_code == 200, page\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    # Not by `processes.python`: its processes have imported torch before.
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert found.stdout.strip() == "[]"
