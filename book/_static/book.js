// What scrolls sideways can be reached with the keyboard.
function reachable() {
  for (const part of document.querySelectorAll("pre, table, figure.wide, .cell_output, .math-block")) {
    part.classList.remove("scrolled", "scrolled-far");  // they widen it
    const beyond = part.scrollWidth - part.clientWidth;
    if (beyond > 1) part.tabIndex = 0;
    part.classList.toggle("scrolled", beyond > 1);
    part.classList.toggle("scrolled-far", beyond > 60);
  }
}
// What can be read on the theme's buttons is their name.
function named() {
  for (const button of document.querySelectorAll("summary[aria-label], .search-button-field")) {
    button.removeAttribute("aria-label");
  }
  for (const button of document.querySelectorAll(".theme-switch-button")) {
    button.setAttribute("aria-label", "Color mode: Light, Dark or System Settings");
  }
}
window.addEventListener("load", () => { reachable(); named(); });
window.addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);  // a fold that opens

// Figures have a second file on dark paper.
function themed() {
  const dark = document.documentElement.dataset.theme === "dark";
  for (const figure of document.querySelectorAll("img.picture")) {
    figure.dataset.light ??= figure.getAttribute("src");
    const src = dark ? figure.dataset.light.replace(/_images\//, "_images/dark-") : figure.dataset.light;
    if (figure.getAttribute("src") !== src) figure.src = src;
  }
}
new MutationObserver(themed).observe(document.documentElement, { attributeFilter: ["data-theme"] });
document.addEventListener("DOMContentLoaded", themed);

// On a phone a figure is wider than the screen: its caption stands below as text, too.
function captioned() {
  for (const figure of document.querySelectorAll(".cell_output img.picture")) {
    if (figure.closest("figure") || /^Figure under/.test(figure.alt)) continue;
    if (figure.nextElementSibling?.className === "drawing-caption") continue;
    const caption = document.createElement("p");
    caption.className = "caption-below";
    caption.setAttribute("aria-hidden", "true");  // the figure's alternative text says it
    caption.textContent = figure.alt;
    figure.after(caption);
  }
}
document.addEventListener("DOMContentLoaded", captioned);

// Names in tables and beside the page break behind an underscore, long words of a table's head in
// their middle, and dates nowhere; long names of rows are marked.
function broken() {
  for (const head of document.querySelectorAll(".bd-article thead :is(th, p):not(:has(*))")) {
    head.textContent = head.textContent.replace(/\b(auto|inde|inter|super)(?=[a-z]{5})/gi, "$1\u00ad");
  }
  for (const cell of document.querySelectorAll(".bd-article table td")) {
    cell.classList.toggle("date", /^\d{4}-\d\d-\d\d$/.test(cell.textContent.trim()));
    cell.classList.toggle("long-name", !cell.cellIndex && cell.textContent.length > 24);
  }
  for (const name of document.querySelectorAll(":is(.bd-article table, .bd-sidebar-secondary) code .pre")) {
    if (name.textContent.includes("_")) {
      name.replaceChildren(...name.textContent.split(/(?<=_)/).flatMap((part) => [part, document.createElement("wbr")]));
    }
  }
}
document.addEventListener("DOMContentLoaded", broken);

// A paragraph all in italics is a note; one with some words in italics is not.
function noted() {
  for (const words of document.querySelectorAll(".bd-article p > em:only-child")) {
    words.parentNode.classList.toggle("note", words.textContent === words.parentNode.textContent.trim());
  }
}
document.addEventListener("DOMContentLoaded", noted);
