// Refresh the part of a page that changes. <div data-live="2"> is fetched again every 2 seconds: the same address with the
// header X-Fragment, which the server answers with that element alone, or with 304 if the ETag shows that nothing changed.
// Only nodes that differ are touched, so that focus, selection, scroll and open <details> stay as they are. An element with
// an id may come back without data-live: it is complete, and is not fetched again. One other element, with an id and
// data-follows, is updated from the same answer: the filters of a table. Without this script the pages work too, and are
// refreshed by the browser's reload.
"use strict";

(() => {
  const part = document.querySelector("[data-live]");
  if (!part) return;
  const follower = document.querySelector("[data-follows]");
  const line = document.querySelector("[data-live-line]");
  const status = line?.querySelector("[role=status]");
  const button = line?.querySelector("button");
  const LONGEST_WAIT = 30;
  const TIME_LIMIT = 60_000;
  let tag = "", latest = null, timer = 0, failures = 0, isPaused = false, isAsking = false;

  // -- replace what differs ----------------------------------------------------------------------------------------------

  const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null);
  const isSameKind = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);

  function sync(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    syncAttributes(old, fresh);
    syncChildren(old, fresh);
  }

  function syncAttributes(old, fresh) {
    // Opened and closed by the reader, not by the server.
    const isKept = (name) => name === "open" && old.nodeName === "DETAILS";
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !isKept(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value && !isKept(name)) old.setAttribute(name, value);
    }
  }

  function syncChildren(old, fresh) {
    const wantedKeys = new Set([...fresh.children].map(keyOf));
    // Removed rows first: they would make every row after them seem to have moved, and moving a node loses its focus.
    for (const child of [...old.children]) if (keyOf(child) !== null && !wantedKeys.has(keyOf(child))) child.remove();
    const keyed = new Map([...old.children].map((child) => [keyOf(child), child]));
    let at = old.firstChild;
    for (const wanted of [...fresh.childNodes]) {
      const key = keyOf(wanted);
      let found = key === null ? null : keyed.get(key) ?? null;
      if (key === null && at && isSameKind(at, wanted)) found = at;
      if (found && !isSameKind(found, wanted)) found = null;
      if (!found) {
        old.insertBefore(wanted, at);
        continue;
      }
      if (found === at) at = at.nextSibling;
      else old.insertBefore(found, at);
      sync(found, wanted);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  function replace(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const fresh = part.id ? page.getElementById(part.id) : page.querySelector("[data-live]");
    if (!fresh) throw new Error("the answer is another page");
    sync(part, fresh);
    if (follower) latest = page.getElementById(follower.id);
    follow();
  }

  function follow() {
    // Not while a field of it has the focus: a list that is open would be closed.
    if (!latest || follower.contains(document.activeElement)) return;
    sync(follower, latest);
    latest = null;
  }

  // -- ask ---------------------------------------------------------------------------------------------------------------

  async function ask() {
    const headers = { "X-Fragment": "1" };
    if (tag) headers["If-None-Match"] = tag;
    const answer = await fetch(location.href, { headers, cache: "no-store", signal: AbortSignal.timeout(TIME_LIMIT) });
    if (answer.status === 304) return;
    if (!answer.ok) throw Object.assign(new Error(), { status: answer.status });
    replace(await answer.text());
    tag = answer.headers.get("ETag") ?? "";
  }

  async function refresh() {
    clearTimeout(timer);
    if (isAsking || isPaused || isComplete() || document.hidden) return;
    isAsking = true;
    try {
      await ask();
      failures = 0;
      tell();
    } catch (error) {
      failures += 1;
      tell(error.status);
    } finally {
      isAsking = false;
      schedule();
    }
  }

  const isComplete = () => part.dataset.live === undefined;
  const seconds = () => Math.max(1, Number(part.dataset.live) || 15);
  const wait = () => (failures ? Math.min(LONGEST_WAIT, seconds() * 2 ** Math.min(failures - 1, 5)) : seconds());

  function schedule() {
    clearTimeout(timer);
    if (!isPaused && !isComplete() && !document.hidden) timer = setTimeout(refresh, wait() * 1000);
  }

  // -- say ---------------------------------------------------------------------------------------------------------------

  function problem(code) {
    if (code === 401) return "The server was restarted: open the link that it printed.";
    if (code === 404) return "The run is not there any more.";
    if (code === undefined) return "The server does not answer. This page shows the last known state and tries again.";
    return "The server answers with an error. This page shows the last known state and tries again.";
  }

  function tell(code) {
    if (!status) return;
    const words = failures ? problem(code) : isPaused ? "Not refreshed: paused." : part.dataset.announce;
    // A screen reader reads every change of this element, so it changes only with the words.
    if (status.textContent !== words) status.textContent = words;
    line.classList.toggle("failing", failures > 0);
    line.classList.toggle("paused", isPaused);
  }

  button?.addEventListener("click", () => {
    isPaused = !isPaused;
    button.textContent = isPaused ? "Resume refreshing" : "Pause refreshing";
    tell();
    if (isPaused) clearTimeout(timer);
    else refresh();
  });
  document.addEventListener("visibilitychange", refresh);
  // Later: during the event, no element has the focus, also if it moves to another field.
  follower?.addEventListener("focusout", () => setTimeout(follow));
  if (button) button.hidden = false;
  tell();
  schedule();
})();
