"""The page on which people label: answers, undo, several raters, keys, and access."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from labelled_run import write_run
from selfeval.labelling.label_file import LabelFile
from selfeval.labelling.threshold_file import has_threshold
from selfeval.runs.labelling import LabelTask
from selfeval.serve.gate import Access
from selfeval.serve.process import Application, listen
from selfeval.view.app import make_view
from selfeval.view.label_desk import LabelDesk
from selfeval.view.opened import OpenedRuns
from slow import slow

ADDRESS = "/view/run/mine/label"
ORIGIN = {"origin": "http://localhost"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine")


def app_of(run: Path, desk: LabelDesk | None = None) -> Application:
    return make_view(OpenedRuns([run]), Access(None, loopback=True), desk)


def client_of(run: Path, desk: LabelDesk | None = None) -> TestClient:
    return TestClient(app_of(run, desk), base_url="http://localhost", headers=ORIGIN)


def hidden(page: str) -> dict[str, str]:
    """The hidden fields of the form of the answers."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


def post(client: TestClient, choice: str, **fields: str) -> str:
    """Answer the pair that is shown to the rater; return the next page."""
    shown = client.get(ADDRESS, params={"rater": fields.get("rater", "ann")}).text
    return client.post(ADDRESS, data={**hidden(shown), "choice": choice, **fields}).text


def choices(run: Path) -> list[tuple[str, str]]:
    return [(label.rater, label.choice.value) for label in LabelFile(run).read()]


def test_a_name_is_asked_before_a_pair_is_shown(run: Path) -> None:
    page = client_of(run).get(ADDRESS).text
    assert "Your name" in page
    assert "Reply 1" not in page
    # The name of the person who started the server is proposed, not assumed: it may be another one's browser.
    page = client_of(run, LabelDesk(rater="ann")).get(ADDRESS).text
    assert "Reply 1" not in page
    assert 'name="rater" value="ann"' in page


def test_the_pair_is_blind_and_escaped(run: Path) -> None:
    page = client_of(run).get(ADDRESS, params={"rater": "ann"}).text
    assert "+ &lt;b&gt;1&lt;/b&gt;?" in page
    pair = page[page.index("Question</h2>") : page.index("<form")]
    for revealing in ("0.9", "1.5", "kept", "score", "%"):
        assert revealing not in pair


def test_an_answer_is_saved_and_the_next_pair_follows(run: Path) -> None:
    client = client_of(run)
    first = client.get(ADDRESS, params={"rater": "ann"}).text
    second = post(client, "first")
    assert hidden(second)["question_id"] != hidden(first)["question_id"]
    assert "Pair 2 of 6" in second
    assert "Estimated for all 6 judged test pairs from 1 with a preference" in second
    label = LabelFile(run).read()[0]
    assert (label.question_id, label.first, label.second) == tuple(
        hidden(first)[name] for name in ("question_id", "first", "second")
    )


def test_undo_shows_the_pair_again(run: Path) -> None:
    client = client_of(run)
    first = hidden(client.get(ADDRESS, params={"rater": "ann"}).text)
    post(client, "second")
    page = post(client, "undo")
    assert hidden(page) == first
    assert choices(run) == [("ann", "second"), ("ann", "undo")]


def better(page: str) -> str:
    """The choice of the reply that ends with `-r0`, wherever it is shown."""
    return "first" if hidden(page)["first"].endswith("-r0") else "second"


def test_raters_see_all_pairs_each_and_their_kappa(run: Path) -> None:
    client = client_of(run)
    for rater, ties in (("ann", 0), ("bob", 2)):
        for turn in range(6):
            shown = client.get(ADDRESS, params={"rater": rater}).text
            page = post(client, "tie" if turn < ties else better(shown), rater=rater)
        assert f"No pair is left for {rater}" in page
    # Both prefer the reply that the evaluator prefers, of the 4 pairs without a tie; on the others people have no majority.
    assert "from 4 with a preference" in page
    # κ = 0: ann always prefers the same reply, so 4 of 6 equal answers are what chance gives.
    assert re.search(r"Kappa of 2 raters</th><td[^>]*>0</td>", page)
    assert [rater for rater, _ in choices(run)] == ["ann"] * 6 + ["bob"] * 6


def test_a_session_of_two_pairs_ends_after_two(run: Path) -> None:
    client = client_of(run, LabelDesk(rater="ann", most=2))
    assert "Pair 2 of 6" in post(client, "skip")
    assert "in this session of 2" in post(client, "skip")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": "third"}, "there is no answer &#x27;third&#x27;|there is no answer &quot;third&quot;"),
        ({"first": "q0-r9"}, "are not among the pairs to label"),
        ({"rater": " "}, "the form has no rater"),
        ({"rater": "a" * 101}, "is not a name of 1 to 100 printable characters"),
    ],
)
def test_a_wrong_form_saves_nothing(run: Path, fields: dict[str, str], message: str) -> None:
    client = client_of(run)
    form = {**hidden(client.get(ADDRESS, params={"rater": "ann"}).text), "choice": "first", **fields}
    answer = client.post(ADDRESS, data=form)
    assert answer.status_code == 400
    assert re.search(message, answer.text)
    assert choices(run) == []


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": ""}])
def test_another_site_cannot_answer(run: Path, headers: dict[str, str]) -> None:
    client = client_of(run)
    form = {**hidden(client.get(ADDRESS, params={"rater": "ann"}).text), "choice": "first"}
    assert client.post(ADDRESS, data=form, headers=headers).status_code == 403
    assert choices(run) == []


def test_a_run_without_judged_test_pairs_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    (run / "evaluation" / "scored.jsonl").unlink()
    page = client_of(run).get(ADDRESS, params={"rater": "ann"})
    assert page.status_code == 200
    assert "has no scored pairs yet" in page.text


def test_pairs_of_a_rerun_are_read_anew(run: Path) -> None:
    desk = LabelDesk(rater="ann")
    client = client_of(run, desk)
    assert "of 6" in client.get(ADDRESS, params={"rater": "ann"}).text
    write_run(run, pairs=8)
    assert "of 8" in client.get(ADDRESS, params={"rater": "ann"}).text


def test_an_answer_goes_to_the_person_of_the_browser(run: Path) -> None:
    desk = LabelDesk(rater="ann")
    bob = client_of(run, desk)
    post(bob, "first", rater="bob")
    bob.post(ADDRESS, data={**hidden(bob.get(ADDRESS).text), "choice": "tie"})
    assert choices(run) == [("bob", "first"), ("bob", "tie")]


def test_an_answer_about_texts_that_have_changed_is_not_saved(run: Path) -> None:
    client = client_of(run)
    form = {**hidden(client.get(ADDRESS, params={"rater": "ann"}).text), "choice": "first"}
    write_run(run, better="fine")
    answer = client.post(ADDRESS, data=form)
    assert answer.status_code == 400
    assert "have changed since they were shown; reload the page" in answer.text
    assert choices(run) == []
    post(client, "first")
    assert choices(run) == [("ann", "first")]


@pytest.mark.slow
def test_people_who_answer_at_the_same_time_lose_nothing(run: Path) -> None:
    """Eight raters, a thread each: every answer is saved, and the threshold is that of all labels."""
    write_run(run, pairs=60)
    desk = LabelDesk()

    def answer_all(rater: str) -> None:
        session = desk.session(run, rater)
        while (shown := session.next_pair()) is not None:
            session.answer(shown, "first" if shown.first.endswith("-r0") else "second")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(answer_all, [f"rater {n}" for n in range(8)]))
    assert len(choices(run)) == 8 * 60
    threshold = LabelTask(run).threshold()
    assert threshold.value is not None
    assert has_threshold(run, threshold)


def test_sessions_belong_to_the_current_task_and_are_limited(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.view.label_desk._MOST_SESSIONS", 2)
    desk = LabelDesk()
    ann = desk.session(run, "ann")
    desk.session(run, "bob")
    assert desk.session(run, "ann") is ann
    desk.session(run, "cid")
    assert desk.session(run, "ann") is ann, "bob was the one who had not answered for the longest time"
    write_run(run, pairs=8)
    assert desk.session(run, "ann").task is desk.task(run) is not ann.task


# -- in a browser -------------------------------------------------------------------------------------------------------


@contextmanager
def served(app: Application) -> Iterator[str]:
    """Serve an application in a thread; yield its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_keys_answer_and_a_name_is_remembered(run: Path, browser: Any) -> None:
    with served(app_of(run)) as address:
        page = browser.new_page()
        page.goto(address + ADDRESS)
        page.get_by_label("Your name").fill("ann s")  # keys in a field are text
        for key in ("Enter", "1", "2", "0", "s", "u", "S"):
            with page.expect_navigation():
                page.keyboard.press(key)
        page.goto(address + ADDRESS)
        assert "rater ann s" in page.inner_text("main")
        page.close()
    assert choices(run) == [("ann s", choice) for choice in ("first", "second", "tie", "skip", "undo", "skip")]


def test_the_page_works_without_scripts(run: Path, browser: Any) -> None:
    with served(app_of(run, LabelDesk(rater="ann"))) as address:
        page = browser.new_context(java_script_enabled=False).new_page()
        page.goto(f"{address}{ADDRESS}?rater=ann")
        page.get_by_role("button", name="Reply 2 is better").click()
        assert "Pair 2 of 6" in page.inner_text("main")
        page.close()
    assert choices(run) == [("ann", "second")]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), slow(1280, "dark"), slow(360, "light"), (360, "dark")])
def test_the_page_breaks_no_rule_of_accessibility(run: Path, browser: Any, scheme: str, width: int) -> None:
    from test_browser import axe_core

    script = axe_core()
    desk = LabelDesk(rater="ann")
    client = client_of(run, desk)
    post(client, "first")
    with served(app_of(run, desk)) as address:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(f"{address}{ADDRESS}?rater=ann")
        page.evaluate(script)  # evaluated by the debugger, which the policy of the page does not bind
        tags = ["wcag2a", "wcag2aa", "best-practice"]
        found = page.evaluate("tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})", tags)
        assert [(one["id"], one["nodes"][0]["html"][:160]) for one in found["violations"]] == []
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.close()
