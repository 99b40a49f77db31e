document.addEventListener("DOMContentLoaded", () => {
  // Code and tables that are wider than the page are scrolled sideways; let the keyboard reach them.
  for (const box of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap, .md-typeset table:not([class])")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
  // The theme gives the dialog of the search no name.
  const search = document.querySelector(".md-search");
  if (search) search.setAttribute("aria-label", search.querySelector("input").getAttribute("aria-label"));
});
