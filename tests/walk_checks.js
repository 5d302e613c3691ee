/* What test_book_walk.py asks of the walk player's view: one view, as wide as a screen. */
"use strict";

const checks = (() => {
  function make(name, height = 600) {
    const view = Book.walk.view(Book.data[name], { width: 1280, height, font: 13 });
    document.body.replaceChildren(view.node);
    return view;
  }

  const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
  const shown = () => texts(".row").map((text) => text.slice(0, -1));
  const mapped = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));

  /** The files of a page after 0, 1, … items. */
  function states(name) {
    const { data, walk } = Book, counts = [...Array(data[name].items.length + 1).keys()];
    return counts.map((count) => mapped(walk.filesAfter(data[name], count), (lines) => lines.map(walk.plain)));
  }

  /** What is shown at the times 0, 1, …: [file, lines]. */
  function atRest(name) {
    const view = make(name);
    return [...Array(view.steps + 1).keys()].map((time) => {
      view.seek(time);
      return [document.querySelector(".walk-tab[aria-current=true]").firstChild.data, shown()];
    });
  }

  /** What is shown at each change while an item is written. */
  function pictures(name, step) {
    const view = make(name);
    return view.changes(step).map((share) => {
      view.seek(step + share);
      return {
        lines: shown(), struck: texts(".row.gone del"), typed: texts(".row.typed").length,
        shot: texts(".walk-shot[aria-current=true]").join(),
      };
    });
  }

  /** [what is wrong, how many pictures]: between two changes nothing moves, each change is seen, and
      in another order the pictures are the same. */
  function wrongPictures(name, steps) {
    const view = make(name), wrong = [], seen = [];
    const look = (time) => {
      view.seek(time);
      const places = [".walk-pane", ".walk-words", ".walk-tabs"].map((part) => view.node.querySelector(part).scrollTop);
      return [view.node.outerHTML, ...places].join();
    };
    for (const step of steps) {
      const changes = [...view.changes(step), 1];
      changes.slice(0, -1).forEach((change, i) => {
        const picture = look(step + change);
        if (look(step + changes[i + 1] - 1e-6) !== picture) wrong.push(`it moves after ${step + change}`);
        if (picture === seen.at(-1)?.picture) wrong.push(`nothing changes at ${step + change}`);
        seen.push({ time: step + change, picture });
      });
    }
    for (const { time, picture } of [...seen].reverse()) if (look(time) !== picture) wrong.push(`another picture of ${time}`);
    return [wrong, seen.length];
  }

  /** Moments at which what is typed is out of view, or all that is lit where nothing is typed. */
  function hidden(name) {
    const view = make(name), found = [];
    for (let step = 0; step < view.steps; step++)
      for (const share of [...view.changes(step).filter((_, turn) => turn % 6 === 0), 1]) {
        view.seek(step + share);
        const pane = view.node.querySelector(".walk-pane").getBoundingClientRect();
        const isIn = (line) => line.getBoundingClientRect().top > pane.top - 1 && line.getBoundingClientRect().bottom < pane.bottom + 1;
        const typed = view.node.querySelectorAll(".row.typed"), lit = view.node.querySelectorAll(".row.lit");
        const asked = typed.length ? typed : lit; // neither is there where a new piece is about to be typed
        if (asked.length ? ![...asked].some(isIn) : share === 1) found.push([step, share]);
      }
    return found;
  }

  /** How far a long explanation has moved when its item begins, shortly before it ends, and then. */
  function ways(name, step, height) {
    const view = make(name, height), words = view.node.querySelector(".walk-words");
    return [view.changes(step)[0], view.changes(step).at(-1), 1].map((share) => {
      view.seek(step + share);
      return Math.round(words.scrollTop) / Math.round(words.scrollHeight - words.clientHeight);
    });
  }

  return { states, atRest, pictures, wrongPictures, hidden, ways };
})();
