"""Who may open the pages: the token in the link and in the cookie, other sites, other hosts, and the real command."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from compared_runs import begin_run
from processes import TIMEOUT, Process, selfeval
from selfeval.cli import server_options
from selfeval.cli.app import _watch
from selfeval.serve.page_access import PageAccess
from served import wait_for
from view_server import client

TOKEN = "a-token-for-tests"


def test_the_link_sets_a_cookie_and_the_token_leaves_the_address(tmp_path: Path) -> None:
    asked = client(tmp_path, TOKEN)
    first = asked.get(f"/view/?q=a%20b&token={TOKEN}&sort=name", follow_redirects=False)
    assert first.status_code == 303
    assert first.headers["location"] == "/view/?q=a+b&sort=name"
    cookie = first.headers["set-cookie"]
    assert cookie.startswith("selfeval-pages-8000=")
    assert TOKEN not in cookie, "browsers send it to other servers of this machine"
    assert {"HttpOnly", "Path=/view", "SameSite=lax"} <= {part.strip() for part in cookie.split(";")}
    assert asked.get("/view/").status_code == 200, "the cookie is enough"
    assert TOKEN not in asked.get("/view/").text


def test_the_link_leads_to_a_run_with_any_name(tmp_path: Path) -> None:
    first = client(tmp_path, TOKEN).get(f"/view/run/a%231%25?token={TOKEN}", follow_redirects=False)
    assert first.headers["location"] == "/view/run/a%231%25"


def test_the_root_leads_to_the_pages(tmp_path: Path) -> None:
    assert client(tmp_path, TOKEN).get("/", follow_redirects=False).headers["location"] == "/view/"


@pytest.mark.parametrize("query", ["", "?token=", "?token=a-token-for-test", f"?token={TOKEN}x", f"?Token={TOKEN}"])
def test_without_the_whole_token_nothing_is_shown(query: str, tmp_path: Path) -> None:
    begin_run(tmp_path / "secret-run").close()
    asked = client(tmp_path, TOKEN)
    answer = asked.get(f"/view/{query}", follow_redirects=False)
    assert answer.status_code == 401
    assert "secret-run" not in answer.text
    assert "set-cookie" not in answer.headers
    assert asked.get(f"/view/run/secret-run{query}", headers={"X-Fragment": "1"}).status_code == 401
    assert asked.get("/view/", headers={"Cookie": "selfeval-pages-8000=wrong"}).status_code == 401
    assert asked.get("/view/", headers={"Cookie": f"selfeval-pages-8000={TOKEN}"}).status_code == 401, (
        "the token itself is no cookie"
    )


def test_the_style_of_a_refusal_needs_no_token_and_no_other_file_is_served(tmp_path: Path) -> None:
    asked = client(tmp_path, TOKEN)
    for name, kind in (
        ("report.css", "text/css"),
        ("view.css", "text/css"),
        ("runs.css", "text/css"),
        ("live.js", "javascript"),
    ):
        answer = asked.get(f"/view/static/{name}")
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
    for name in ("app.py", "..%2Fapp.py", "../app.py", "%2e%2e/app.py"):
        assert asked.get(f"/view/static/{name}").status_code in (401, 404)


def test_two_servers_on_two_ports_keep_their_cookies(tmp_path: Path) -> None:
    found = []
    for port, token in ((8000, "one"), (8001, "two")):
        scope = {"type": "http", "method": "GET", "path": "/view/", "query_string": f"token={token}".encode()}
        answer = PageAccess(token).respond(scope, Headers({"host": f"127.0.0.1:{port}"}))
        assert answer is not None
        found.append(answer.headers["set-cookie"].partition(";")[0])
    assert [cookie.partition("=")[0] for cookie in found] == ["selfeval-pages-8000", "selfeval-pages-8001"]
    both = Headers({"host": "127.0.0.1:8001", "cookie": "; ".join(found)})
    scope = {"type": "http", "method": "GET", "path": "/view/", "query_string": b""}
    assert PageAccess("two").respond(scope, both) is None
    other = PageAccess("one").respond(scope, both)
    assert other is not None
    assert other.status_code == 401


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [("http://127.0.0.1:8000", True), ("http://127.0.0.1:8001", False), ("http://evil.example", False), ("null", False),
     ("", False), ("file://127.0.0.1:8000", False)],
)  # fmt: skip
def test_another_site_cannot_change_anything(origin: str, admitted: bool, tmp_path: Path) -> None:
    asked = client(tmp_path, TOKEN)
    asked.get(f"/view/?token={TOKEN}")
    answer = asked.post("/view/", headers={"Origin": origin} if origin else {})
    assert answer.status_code == (405 if admitted else 403), "the list of runs has nothing to change"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", ""])
def test_a_name_that_was_pointed_at_this_machine_is_refused(host: str, tmp_path: Path) -> None:
    answer = client(tmp_path).get("/view/", headers={"Host": host})
    assert answer.status_code == 403
    assert "the header Host does not name this machine" in answer.text


def test_pages_forbid_scripts_frames_and_requests_to_other_servers(tmp_path: Path) -> None:
    begin_run(tmp_path / "a").close()
    asked = client(tmp_path)
    for path in ("/view/", "/view/run/a", "/view/run/none", "/view/compare", "/view/static/live.js"):
        headers = asked.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        html = asked.get(path).text
        assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=|https?://(?!127)", html), (
            "nothing inline, and no network"
        )


def _link(process: Process) -> str:
    assert process.returncode is None, process.communicate()[1]
    found = re.search(r"at (http://\S+)", process.written())
    return found[1] if found else ""


def test_the_command_prints_a_link_that_opens_and_ends_by_a_signal(tmp_path: Path) -> None:
    begin_run(tmp_path / "runs" / "first").close()
    process = Process(["-m", "selfeval", "view", "--port", "0", "--no-browser"], cwd=tmp_path)
    try:
        link = wait_for(lambda: _link(process), TIMEOUT)
        assert process.written().startswith("Showing 1 run at http://127.0.0.1:")
        with httpx.Client(follow_redirects=True, trust_env=False) as http:
            assert "first" in http.get(link).text
            assert http.get(link.partition("?")[0]).status_code == 200, "with the cookie"
        assert httpx.get(link.partition("?")[0], trust_env=False).status_code == 401
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode in (0, 130)
    finally:
        process.kill()


def test_without_a_folder_of_runs_the_page_says_how_to_start_one(tmp_path: Path) -> None:
    process = Process(["-m", "selfeval", "view", "--port", "0", "--no-browser", "--no-token"], cwd=tmp_path)
    try:
        link = wait_for(lambda: _link(process), TIMEOUT)
        assert link.endswith("/view/")
        assert "No runs yet" in httpx.get(link, trust_env=False).text
        begin_run(tmp_path / "runs" / "first").close()
        assert "No runs yet" not in httpx.get(link, trust_env=False).text
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_is_named_and_missing_is_refused(tmp_path: Path) -> None:
    found = selfeval("view", str(tmp_path / "none"))
    assert found.returncode == 2
    assert "none is not a folder; pass a run folder, or a folder that contains some (default: runs)" in found.stderr


def test_the_help_names_the_defaults() -> None:
    found = selfeval("view", "--help")
    assert found.returncode == 0
    for said in ("Browse runs in a web browser", "[default: runs]", "--no-token", "0 picks a free one", "Needs the extra"):
        assert said in " ".join(found.stdout.split())


def test_a_run_says_how_to_watch_it_if_the_extra_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _watch(Path("runs/my run")) == "watch it: selfeval view 'runs/my run'"
    monkeypatch.setattr(server_options, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert _watch(Path("runs/mine")) == ""
