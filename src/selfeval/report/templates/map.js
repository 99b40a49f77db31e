// The map of the domain: show the text of the point under the pointer, and of the points that a slider walks through with the
// keyboard, and open its question. Without this script the texts are tooltips of the points, and the table of the clusters has
// an example of each.
"use strict";

(() => {
  for (const map of document.querySelectorAll("[data-map]")) {
    const picture = map.querySelector("svg");
    if (!picture) continue;
    const points = [...picture.querySelectorAll(".m-point")];
    const walk = map.querySelector(".map-walk");
    const slider = walk.querySelector("input");
    const text = map.querySelector(".map-text");
    const open = map.querySelector(".map-open");
    const link = open?.querySelector("a");
    const NEAR = 14;
    let chosen = null;

    const textOf = (point) => point.querySelector("title").textContent;

    function choose(point) {
      chosen?.classList.remove("chosen");
      chosen = point;
      point.classList.add("chosen");
      text.textContent = textOf(point);
      // A screen reader reads the text as the value of the slider.
      slider.setAttribute("aria-valuetext", textOf(point));
      if (!link) return;
      // The next stop of the Tab key after the slider. A point without a page or a sample has no link.
      link.hidden = !point.dataset.href;
      if (point.dataset.href) link.setAttribute("href", point.dataset.href);
    }

    function nearest(x, y) {
      let found = null, least = NEAR;
      for (const point of points) {
        const box = point.getBoundingClientRect();
        const distance = Math.hypot((box.left + box.right) / 2 - x, (box.top + box.bottom) / 2 - y);
        if (distance < least) [found, least] = [point, distance];
      }
      return found;
    }

    function follow(event) {
      const point = nearest(event.clientX, event.clientY);
      if (!point || point === chosen) return;
      slider.value = String(points.indexOf(point));
      choose(point);
    }

    function openQuestion(event) {
      const point = nearest(event.clientX, event.clientY);
      // A touch shows the text, and the link is under it. With the event's own keys, Ctrl opens another tab.
      if (event.pointerType === "mouse" && point?.dataset.href) link.dispatchEvent(new MouseEvent("click", event));
    }

    slider.addEventListener("input", () => choose(points[Number(slider.value)]));
    picture.addEventListener("pointermove", follow);
    picture.addEventListener("pointerdown", follow);
    picture.addEventListener("click", openQuestion);
    walk.hidden = text.hidden = false;
    if (open) open.hidden = false;
    slider.value = "0";
    slider.setAttribute("aria-valuetext", textOf(points[0]));
    text.textContent = "Point at the map, or move the slider with the arrow keys.";
  }
})();
