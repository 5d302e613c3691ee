/* What the book's pages do themselves: lines that the address names are lit, all folds open at once,
   and all can be reached by keyboard. (The theme opens a fold that the address leads into.) */
"use strict";

(() => {
  const anchor = () => decodeURIComponent(location.hash.slice(1));

  /** On a page of code: #L13 and #L13-L20 light lines. */
  function light() {
    const lines = [...document.querySelectorAll(".source code > span")];
    const found = anchor().match(/^L(\d+)(?:-L(\d+))?$/);
    const [first, last] = found ? [Number(found[1]), Number(found[2] ?? found[1])] : [0, 0];
    lines.forEach((line, i) => line.classList.toggle("lit", i + 1 >= first && i + 1 <= last));
    if (found && lines[first - 1]) {
      const shown = (last - first) * lines[0].offsetHeight < innerHeight / 2;
      lines[first - 1].scrollIntoView({ block: shown ? "center" : "start" });
    }
  }

  /** A number is a link to its line; with shift, to all lines from the lit one on. */
  function number(event) {
    const line = event.target.closest(".source code > span");
    if (!line || event.clientX - line.getBoundingClientRect().left > 44) return;
    const lit = document.querySelector(".source .lit");
    const [from, to] = event.shiftKey && lit ? [lit, line].sort((a, b) => a.offsetTop - b.offsetTop) : [line, line];
    history.replaceState(history.state, "", `#${from.id}${to === from ? "" : `-${to.id}`}`);
    const top = scrollY;
    light();
    scrollTo(0, top);
  }

  /** A button that opens all folds of the page, and closes them. */
  function openAll(button) {
    const folds = [...document.querySelectorAll("details.change")];
    button.hidden = folds.length < 2;
    button.onclick = () => {
      const open = folds.some((fold) => !fold.open);
      folds.forEach((fold) => { fold.open = open; });
      button.textContent = open ? "Close all" : "Open all";
    };
  }

  /** What is wider than the page scrolls by keyboard, too. */
  function reach(part = document) {
    for (const box of part.querySelectorAll(".table, pre > code")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else if (box.tabIndex === 0) box.removeAttribute("tabindex");
    }
  }

  /** On a narrow page the theme's signs for lists and search answer to the mouse alone. */
  function press() {
    const names = { __drawer: "list of pages", __search: "search", __toc: "contents of this page" };
    for (const label of document.querySelectorAll(".md-header__button[for], .md-sidebar-button[for]")) {
      const name = names[label.htmlFor];
      if (!name) continue;
      label.tabIndex = 0;
      label.setAttribute("role", "button");
      label.setAttribute("aria-label", name);
      label.addEventListener("keydown", (event) => { // the theme itself knows Enter
        if (event.key !== " ") return;
        event.preventDefault();
        label.click();
      });
    }
  }

  /** Paper is light, whatever the screen is. */
  function paper() {
    const look = document.body.dataset;
    let own = look.mdColorScheme;
    addEventListener("beforeprint", () => { own = look.mdColorScheme; look.mdColorScheme = "default"; });
    addEventListener("afterprint", () => { look.mdColorScheme = own; });
  }

  function begin() {
    press();
    paper();
    document.querySelectorAll("button.open-all").forEach(openAll);
    document.querySelector(".source")?.addEventListener("click", number);
    light();
    reach();
    addEventListener("hashchange", light);
    addEventListener("resize", () => reach());
    document.addEventListener("toggle", (event) => reach(event.target), true);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
