// Keys 1, 2, 0, s and u press the button that shows them. Without this script the buttons work as usual.
"use strict";
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (button === null) return;
  event.preventDefault();
  button.click();
});
// A pair is answered once: a second click, before the next pair has arrived, would answer nothing new.
document.addEventListener("submit", (event) => {
  if (event.target.dataset.sent) event.preventDefault();
  event.target.dataset.sent = "yes";
});
// Back in the history shows the pair as it was; load it anew.
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
