// What scrolls sideways can be reached with the keyboard.
function reachable() {
  for (const part of document.querySelectorAll("pre, table, figure.wide, .cell_output, .math-block")) {
    if (part.scrollWidth > part.clientWidth + 1) part.tabIndex = 0;
  }
}
window.addEventListener("load", reachable);
window.addEventListener("resize", reachable);
