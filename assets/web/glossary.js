/* A link to a term of the glossary shows its entry in a card, under the mouse and on focus. */
"use strict";

(() => {
  const card = Book.el("div", { id: "glossary-card", role: "tooltip", hidden: "" });
  let shown = null, timer = 0;

  const term = (link) => link.hash.slice(1);

  async function show(link) {
    await Book.load("data/glossary.js");
    const entry = Book.data.glossary[term(link)];
    if (!entry || shown !== link) return;
    card.replaceChildren(Book.el("strong", {}, entry.term), Book.el("span"));
    card.lastChild.innerHTML = entry.html;
    card.hidden = false;
    link.setAttribute("aria-describedby", card.id);
    place(link.getClientRects()[0], card.getBoundingClientRect());
  }

  /** Under the link, or above it where there is no room; never over an edge. */
  function place(at, size) {
    const above = at.bottom + size.height + 12 > innerHeight && at.top > size.height + 12;
    const left = Math.min(Math.max(8, at.left - 8), document.documentElement.clientWidth - size.width - 8);
    card.style.left = `${left + scrollX}px`;
    card.style.top = `${(above ? at.top - size.height - 8 : at.bottom + 8) + scrollY}px`;
  }

  function hide() {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    shown = null;
    card.hidden = true;
  }

  /** The card stays while the mouse is on its way to it, or on it. */
  const soon = (what, wait) => { clearTimeout(timer); timer = setTimeout(what, wait); };
  const ask = (link, wait) => {
    if (shown === link) return clearTimeout(timer);
    soon(() => { hide(); shown = link; show(link); }, wait);
  };

  function begin() {
    document.body.append(card);
    const own = location.pathname.endsWith("/GLOSSARY.html");
    const links = own ? '.md-typeset a[href^="#"]:not(.headerlink)' : '.md-typeset a[href*="GLOSSARY.html#"]';
    const on = (kind, act) => document.addEventListener(kind, (event) => {
      const link = event.target.closest?.(links); // links of the walk player come and go
      if (link) act(link);
    });
    on("mouseover", (link) => ask(link, 150));
    on("mouseout", () => soon(hide, 250));
    on("focusin", (link) => link.matches(":focus-visible") && ask(link, 0));
    on("focusout", hide);
    card.addEventListener("mouseenter", () => clearTimeout(timer));
    card.addEventListener("mouseleave", () => soon(hide, 250));
    document.addEventListener("keydown", (event) => { if (event.key === "Escape" && shown) hide(); });
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
