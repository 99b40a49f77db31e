from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compared_runs import QUESTIONS, begin_run, compared, finish_run
from processes import environment
from selfeval.errors import InputError
from selfeval.runs.reader import round_folder
from selfeval.store import RunStore
from selfeval.view.opened import OpenedRuns
from view_server import FRAGMENT, client


def _names(html: str) -> list[str]:
    return re.findall(r'<tr role="row" data-key="([^"]+)"', html)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, one in progress, one whose process was killed, and one that is damaged."""
    done = begin_run(tmp_path / "shop-a")
    finish_run(done, [compared(n) for n in range(QUESTIONS)])
    done.close()
    begin_run(tmp_path / "group" / "shop-b", model="org/other").close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    return tmp_path


def test_runs_have_status_stage_model_figures_and_problems(folder: Path) -> None:
    store = begin_run(folder / "shop-live")
    html = client(folder).get("/view/").text
    store.close()
    assert set(_names(html)) == {"shop-a", "group~shop-b", "broken", "shop-live"}
    rows = {name: html[html.index(f'data-key="{name}"') :].partition("</tr>")[0] for name in _names(html)}
    assert 'class="pill finished"' in rows["shop-a"]
    assert "93.1%" in rows["shop-a"]
    assert "(91.5% to 94.5%)" in rows["shop-a"]
    assert "win rate" in rows["shop-a"]
    assert 'class="pill running"' in rows["shop-live"]
    assert "questions" in rows["shop-live"]
    assert "org/other" in rows["group~shop-b"]
    assert "run.json is damaged" in rows["broken"]
    assert "disabled" in rows["broken"], "a run that cannot be read cannot be compared"


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="this system does not list its locks")
def test_a_run_whose_process_was_killed_is_not_shown_as_running(folder: Path) -> None:
    html = client(folder).get("/view/").text
    row = html[html.index('data-key="group~shop-b"') :].partition("</tr>")[0]
    assert 'class="pill stopped"' in row


@pytest.mark.parametrize(
    ("query", "names"),
    [("q=SHOP&sort=name", ["group~shop-b", "shop-a"]), ("q=org/other", ["group~shop-b"]), ("q=damaged", ["broken"]),
     ("q=nothing", [])],
)  # fmt: skip
def test_the_filter_reads_every_cell(query: str, names: list[str], folder: Path) -> None:
    html = client(folder).get(f"/view/?{query}").text
    assert _names(html) == names
    assert ("contains “nothing”" in html) == (not names)


def test_rows_are_sorted(folder: Path) -> None:
    os.utime(folder / "shop-a" / "run.json", (1_700_000_000, 1_700_000_000))
    os.utime(folder / "group" / "shop-b" / "run.json", (1_700_000_100, 1_700_000_100))
    asked = client(folder)
    assert _names(asked.get("/view/?sort=changed").text) == ["group~shop-b", "shop-a", "broken"]
    assert _names(asked.get("/view/?sort=gold_after").text)[0] == "shop-a"
    assert _names(asked.get("/view/?sort=accuracy").text)[0] == "shop-a"
    assert _names(asked.get("/view/?sort=name").text) == ["broken", "group~shop-b", "shop-a"]
    assert _names(asked.get("/view/?sort=status").text)[0] == "broken"
    assert _names(asked.get("/view/?sort=odd").text) == ["group~shop-b", "shop-a", "broken"]


def test_text_of_a_query_is_escaped(folder: Path) -> None:
    html = client(folder).get('/view/?q="><script>alert(1)</script>').text
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_a_changed_run_is_read_again(folder: Path) -> None:
    asked = client(folder)
    assert "finished" in asked.get("/view/?q=shop-a").text
    (folder / "shop-a" / "run.json").write_text("{")
    assert "run.json is damaged" in asked.get("/view/?q=shop-a").text


def test_the_stage_of_a_later_round_is_read_again(folder: Path) -> None:
    asked = client(folder)
    later = RunStore(round_folder(folder / "shop-a", 2))
    config = json.loads((folder / "shop-a" / "run.json").read_text())
    for stage in ("questions", "replies"):
        later.update_run(**{**config, "round": 2, "stages": {stage: {"state": "running"}}})
        assert f"round 2, {stage}" in asked.get("/view/?q=shop-a").text
    later.close()


def test_a_name_that_is_not_utf_8_hides_no_run_and_has_an_address(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    (folder / "shop-a").rename(odd / "shop")
    (folder / "broken").rename(odd / "broken")
    asked = client(folder)
    html = asked.get("/view/").text
    assert set(_names(html)) == {"caf\\xe9~shop", "caf\\xe9~broken", "group~shop-b"}
    for name, status in (("shop", 200), ("broken", 400)):
        (link,) = re.findall(rf'href="([^"]*~{name})"', html)
        assert asked.get(link).status_code == status
    (link,) = re.findall(r'href="([^"]*~shop)"', html)
    for page in ("/questions", "/report", "/question/t1"):
        assert asked.get(link + page).status_code == 200


def test_without_runs_the_page_says_how_to_start_one_and_shows_it_when_it_begins(tmp_path: Path) -> None:
    asked = client(tmp_path)
    html = asked.get("/view/").text
    assert "No runs yet" in html
    assert "selfeval run" in html
    assert str(tmp_path) in html
    begin_run(tmp_path / "first").close()
    assert _names(asked.get("/view/", headers=FRAGMENT).text) == ["first"]


def test_a_fragment_is_sent_only_if_it_changed(folder: Path) -> None:
    asked = client(folder)
    first = asked.get("/view/", headers=FRAGMENT)
    assert first.text.startswith("<div data-live=")
    assert "<html" not in first.text
    tag = {**FRAGMENT, "If-None-Match": first.headers["etag"]}
    again = asked.get("/view/", headers=tag)
    assert (again.status_code, again.text) == (304, "")
    begin_run(folder / "new").close()
    changed = asked.get("/view/", headers=tag)
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]
    assert changed.text in asked.get("/view/").text


def test_a_missing_folder_is_refused_unless_it_may_appear_later(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a folder; pass a run folder"):
        OpenedRuns([tmp_path / "none"])
    later = OpenedRuns([tmp_path / "runs"], may_be_missing=True)
    assert later.named() == {}
    begin_run(tmp_path / "runs" / "first").close()
    assert list(later.named()) == ["first"]


def test_pages_are_served_without_torch(tmp_path: Path) -> None:
    store = begin_run(tmp_path / "a")
    finish_run(store, [compared(0)])
    store.close()
    code = f"""
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from selfeval.serve.gate import Access
from selfeval.view.app import make_view
from selfeval.view.opened import OpenedRuns
asked = TestClient(make_view(OpenedRuns([Path({str(tmp_path)!r})]), Access(None, True)), base_url="http://127.0.0.1")
found = [asked.get(path).status_code for path in ("/view/", "/view/run/a", "/view/compare?run=a&run=a@1")]
print(found, sorted({{"torch", "transformers", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True, timeout=300
    )
    assert done.stdout.strip() == "[200, 200, 200] []"
