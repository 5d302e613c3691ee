/* The walk player: a step's code, written item by item as its lesson explains it.

   What a film may rely on. Load core.js, this file, and the data of a page: data/walk_5_README.js.

     const view = Book.walk.view(Book.data.walk_5_README, { width: 1920, height: 1000, font: 20 });
     document.querySelector(".widget.walk").append(view.node);
     view.seek(2.5);

   view.node         tabs and code, `height` pixels high, and beside it the caption (under it, as high
                     as it needs, where `width` is less than 960; nowhere with `caption: "none"`).
                     `font` is the size of the code's letters in pixels. It needs the style sheets
                     book.css and walk.css, and stands in an element of the classes `widget walk`.
   view.steps        how many items the page has
   view.item(step)   item `step`, counted from 0: {number, title, milestone, milestone_title (HTML all
                     three texts), explanation (HTML), shots: [{file, names, lit}], edits}. A shot is
                     what one looks at together: neighbouring pieces of one file.
   view.seconds(step)  how long this item should take where nobody speaks
   view.changes(step)  the shares of an item's time, ascending from just above 0 and below 1, at which
                     the picture changes: from one to the next it stays as it is
   view.seek(time)   show a moment; time goes from 0 to `steps`. At step + share, item `step` is being
                     written: shot by shot, its lines lit, and typed in the first two thirds of the
                     shot's time. At step + 1 sharp it is written, all its lines are lit, and one
                     looks at its first shot, as a reader does who steps. At 0 the code is that of the
                     step before; on a later page, that of the milestones before.

   The picture depends on data, size and time alone. */
"use strict";

Book.walk = (() => {
  const { el } = Book;
  const END = 0xe000;
  const FEW = 8; // so many lines of a shot are typed word by word, more of them line by line
  const TYPED = 2 / 3; // the share of a shot's time in which it is typed
  const WIDE = 960;

  // --- the code at a moment -----------------------------------------------------------------------

  /** The files after some items: {name: lines}, each line with its marks. */
  function filesAfter(data, count) {
    const files = Object.fromEntries(Object.entries(data.files).map(([name, file]) => [name, [...file.lines]]));
    for (const item of data.items.slice(0, count))
      for (const edit of [...item.edits].reverse()) files[edit.file].splice(edit.at, edit.remove, ...edit.add);
    return files;
  }

  /** Without the marks of colours. */
  const plain = (line) => line.replace(/[\ue000-\ue00f]/g, "");

  /** Where words of a line end, counted in letters. */
  function wordEnds(line) {
    const text = plain(line), ends = [...text.matchAll(/\S+\s*/g)].map((word) => word.index + word[0].length);
    return ends.length ? ends : [text.length];
  }

  /** An item with all its lines: for each file those that are there before, during or after it, and
      for each shot how many times something is typed. A line that changes has the number of its shot
      (-1: at once), and the turn of that shot at which it appears or goes. */
  function score(data, step) {
    const item = data.items[step], before = filesAfter(data, step), files = {};
    const turns = item.shots.map((_, shot) => (item.edits.some((edit) => edit.shot === shot) ? 1 : 0));
    const few = item.shots.map((_, shot) => item.edits.filter((e) => e.shot === shot).flatMap((e) => e.add).length <= FEW);
    for (const [name, old] of Object.entries(before)) {
      const lines = [];
      let at = 0, number = 0;
      const keep = (end) => { while (at < end) lines.push({ text: old[at++], number: ++number }); };
      for (const { at: place, remove, add, shot = -1 } of item.edits.filter((edit) => edit.file === name)) {
        keep(place);
        for (const text of old.slice(at, at + remove)) lines.push({ text, goes: true, shot, turn: turns[shot] });
        at += remove;
        for (const text of add) {
          const ends = few[shot] ? wordEnds(text) : [Infinity];
          lines.push({ text, comes: true, shot, turn: turns[shot], ends, number: ++number });
          if (shot >= 0 && plain(text).trim()) turns[shot] += ends.length;
        }
        if (shot >= 0 && !add.length) turns[shot] += 1;
      }
      keep(old.length);
      files[name] = lines;
    }
    return { item, files, turns, few, times: times(item, turns, few) };
  }

  /** When each shot of an item begins, as shares of its time, and how many seconds it all takes. */
  function times(item, turns, few) {
    const lit = (shot) => shot.lit.reduce((sum, [first, last]) => sum + last - first + 1, 0);
    const parts = item.shots.map((shot, i) => 1.5 + 0.05 * lit(shot) + (turns[i] * (few[i] ? 0.1 : 0.2)) / TYPED);
    const all = parts.reduce((sum, part) => sum + part, 0);
    const words = item.explanation.replace(/<[^>]*>/g, " ").split(/\s+/).length;
    let begun = 0;
    return { seconds: Math.max(all, 2 + words / 2.8), begins: parts.map((part) => (begun += part) - part).map((start) => start / all) };
  }

  /** The state of an item at a share of its time: {shot, turn}; shot is -1 when all of it is done. */
  function placeAt({ turns, times: { begins } }, share) {
    if (share >= 1) return { shot: -1, turn: 0 };
    const shot = begins.findLastIndex((start) => start <= share + 1e-9);
    const length = (begins[shot + 1] ?? 1) - begins[shot];
    const part = (share + 1e-9 - begins[shot]) / length / TYPED;
    return { shot, turn: Math.min(turns[shot], Math.floor(part * (turns[shot] + 1))) };
  }

  /** How much of a line there is: letters, or 0 for a line that is not there. */
  function shown(line, { shot, turn }) {
    if (!line.goes && !line.comes) return Infinity;
    const past = line.shot < 0 || shot < 0 || line.shot < shot;
    const now = line.shot === shot ? turn - line.turn : -1; // turns since this line's
    if (line.goes) return past || now >= 0 ? 0 : Infinity;
    if (past) return Infinity;
    return now < 0 ? 0 : line.ends[Math.min(now, line.ends.length - 1)] || Infinity;
  }

  // --- the picture --------------------------------------------------------------------------------

  /** The first `count` letters of a line; its marks say which of the colours each has. */
  function coloured(line, count, colours) {
    const nodes = [];
    let colour = "", text = "", left = count;
    const put = () => { if (text) nodes.push(colour ? el("span", { class: colour }, text) : text); text = ""; };
    for (const letter of line) {
      const mark = letter.codePointAt(0) - END;
      if (mark >= 0 && mark < colours.length) { put(); colour = colours[mark]; }
      else if (left-- > 0) text += letter;
      else break;
    }
    put();
    return nodes;
  }

  /** An element of the HTML that the data holds. */
  function html(tag, attributes, text) {
    const made = el(tag, attributes);
    made.innerHTML = text;
    return made;
  }

  const isIn = (ranges, number) => ranges.some(([first, last]) => first <= number && number <= last);

  function view(data, { width, height, font, caption = width < WIDE ? "under" : "beside" }) {
    const steps = data.items.length, scores = [];
    const scoreOf = (step) => (scores[step] ??= score(data, step));
    const row = Math.round(font * 1.55), bar = Math.round(font * 2.8), rows = Math.floor((height - bar) / row);
    const columns = Math.round(font * 64.6 + 20); // pixels of 100 columns, numbers and signs before them
    const tabs = el("div", { class: "walk-tabs", role: "group", "aria-label": "files" });
    const code = el("code", { class: "highlight" }), pane = el("div", { class: "walk-pane", role: "region", tabindex: 0 }, code);
    const head = el("div", { "aria-live": "polite" }), told = el("div"), words = el("div", { class: "walk-words" }, head, told);
    const node = el("div", { class: `walk-view ${caption}`, style: `--walk-font: ${font}px; --walk-row: ${row}px; --walk-bar: ${bar}px; --walk-height: ${height}px; --walk-columns: ${columns}px` },
      el("div", { class: "walk-code" }, tabs, pane), caption === "none" ? null : words);
    let drawn = "", said = null, now = null;

    /** Where the code stands at a time: the item, and the place in it. Before the first: its files. */
    function momentOf(time) {
      const step = Math.min(steps - 1, Math.max(0, Math.ceil(time - 1e-9) - 1)), begun = time > 1e-9;
      const place = begun ? placeAt(scoreOf(step), time - step > 1 - 1e-9 ? 1 : time - step) : { shot: -2, turn: 0 };
      const shots = scoreOf(step).item.shots;
      return { step, begun, place, shot: shots[Math.max(0, place.shot)] };
    }

    /** The lines of a file at a moment: [{line, count, lit}]. */
    function linesOf(name, { step, begun, place }) {
      const { item, files } = scoreOf(step);
      if (!begun) return files[name].filter((line) => !line.comes).map((line) => ({ line: { text: line.text }, count: Infinity }));
      const mine = item.shots.map((shot, i) => ({ ...shot, i })).filter((shot) => shot.file === name && (place.shot < 0 || shot.i === place.shot));
      const lit = (line) => mine.some((shot) => (line.goes ? line.shot === shot.i : isIn(shot.lit, line.number)));
      return files[name].map((line) => ({ line, count: shown(line, place), lit: lit(line) }));
    }

    function draw(name) {
      let number = 0;
      const all = linesOf(name, now), there = all.filter(({ count }) => count > 0);
      const typed = all.findLast(({ line, count }) => line.comes && count > 0 && line.shot === now.place.shot && now.place.turn < line.turn + line.ends.length);
      const nodes = there.map((entry) => {
        const { line, count, lit } = entry;
        const kind = [lit && "lit", line.goes && "gone", line.comes && (lit || plain(line.text).trim()) && "new", entry === typed && "typed"].filter(Boolean).join(" ");
        const text = plain(line.text), indent = text.match(/^ */)[0];
        const parts = line.goes ? [indent, el("del", {}, text.slice(indent.length))] : lit ? coloured(line.text, count, data.colours) : [text];
        return el("span", { class: `row ${kind}`, "data-n": line.goes ? "" : ++number }, el("span", {}, ...parts), "\n");
      });
      code.replaceChildren(...nodes);
      if (!there.length) code.replaceChildren(el("span", { class: "nothing" }, "This file is not there yet."));
      pane.setAttribute("aria-label", `the code of ${name}`);
      scroll(all, all.indexOf(typed));
    }

    /** The lit lines come into view; those that are too many are followed as they are typed. */
    function scroll(all, typed) {
      const above = (end) => all.slice(0, end).filter(({ count }) => count > 0).length;
      const first = all.findIndex(({ lit }) => lit), last = all.findLastIndex(({ lit }) => lit);
      if (first < 0) { pane.scrollTop = 0; return; }
      const top = above(first), count = last - first + 1, free = rows - count;
      const start = Math.max(0, top - (free > 4 ? Math.floor(free / 3) : 1));
      const end = now.place.shot < 0 ? 0 : above(typed < 0 ? (now.place.turn ? last : 0) : typed) + 3 - rows;
      pane.scrollTop = row * (free >= 2 ? start : Math.max(start, end));
      pane.scrollLeft = 0;
    }

    function drawTabs(name) {
      const lit = new Set(now.begun ? scoreOf(now.step).item.shots.map((shot) => shot.file) : []);
      const there = Object.keys(data.files).filter((file) => file === name || linesOf(file, now).some(({ count }) => count > 0));
      tabs.replaceChildren(...there.map((file) => el("button", { type: "button", class: `walk-tab${lit.has(file) ? " touched" : ""}`, "aria-current": String(file === name), onclick: () => look(file) },
        file, el("small", {}, data.files[file].what))));
      tabs.scrollLeft = tabs.querySelector("[aria-current=true]").offsetLeft - 40;
    }

    function tell() {
      const item = now.begun ? scoreOf(now.step).item : null;
      if (said !== (item ?? data)) {
        said = item ?? data;
        const { title, milestone, text } = item ? { title: `${item.number}. ${item.title}`, milestone: `Milestone ${item.milestone}: ${item.milestone_title}`, text: item.explanation } : beginning(data);
        head.replaceChildren(html("p", { class: "walk-milestone" }, milestone), html("p", { class: "walk-title" }, title));
        const shots = (item?.shots ?? []).map((shot) => el("button", { type: "button", class: "walk-shot", onclick: () => look(shot.file, shot) }, el("b", {}, shot.file), ` ${shot.names.join(", ")}`));
        told.replaceChildren(el("div", { class: "walk-shots" }, ...shots), html("div", { class: "walk-text" }, text));
        told.querySelectorAll("pre").forEach(fit);
      }
      told.querySelectorAll(".walk-shot").forEach((shot, i) => shot.setAttribute("aria-current", String(i === now.place.shot)));
    }

    /** A block of code in the explanation gets smaller letters where its lines are long. */
    function fit(block) {
      const letters = Math.max(...block.textContent.split("\n").map((line) => line.length));
      const free = (caption === "beside" ? width - columns : width) - 70, least = font < 16 ? 11 : 9; // a film can't scroll
      block.style.fontSize = `${Math.max(least, Math.min(font * 0.95, free / letters / 0.605))}px`;
      block.tabIndex = 0;
    }

    /** Show a file, or a shot's lines in it, until the next `seek` that changes the picture. */
    function look(name, shot = null) {
      draw(name);
      drawTabs(name);
      if (shot) pane.scrollTop = row * Math.max(0, shot.lit[0][0] - 2);
    }

    function seek(time) {
      now = momentOf(time);
      const key = JSON.stringify([now.begun && now.step, now.place]);
      if (key !== drawn) {
        drawn = key;
        draw(now.shot.file);
        drawTabs(now.shot.file);
        if (caption !== "none") tell();
        follow(time - now.step);
      }
    }

    /** An explanation that is longer than its box moves on with the code. */
    function follow(share) {
      const reached = now.place.shot < 0 ? 0 : changes(now.step).findLast((change) => change <= share + 1e-9);
      words.scrollTop = (words.scrollHeight - words.clientHeight) * Math.min(1, Math.max(0, (reached - 0.2) / 0.4));
    }

    function changes(step) {
      const { turns, times: { begins } } = scoreOf(step);
      return begins.flatMap((start, shot) => {
        const length = ((begins[shot + 1] ?? 1) - start) * TYPED;
        return Array.from({ length: turns[shot] + 1 }, (_, turn) => Math.max(1e-6, start + (length * turn) / (turns[shot] + 1)));
      });
    }

    return { node, told, steps, item: (step) => data.items[step], seek, changes, seconds: (step) => scoreOf(step).times.seconds };
  }

  /** What is said before the first item. */
  function beginning({ step, before, first }) {
    const there = first ? (before ? `The code is that of step ${step - 1}, in the files that the items change. New files are not there yet.` : "Nothing is written yet.")
      : "The code is as the milestones before this page leave it.";
    return { title: "Before the first item", milestone: `Step ${step}`, text: `<p>${there}</p><p>Play, and the items write the code. Or take one step after the other.</p>` };
  }

  return { view, filesAfter, plain, html, WIDE };
})();

// --- the player on a page -------------------------------------------------------------------------

Book.define("walk", {
  async mount(root, given, id) {
    const { el } = Book, { html } = Book.walk;
    await Promise.all([Book.load(`data/${given.data}.js`), Book.load("speaker.js")]);
    const data = Book.data[given.data], address = Book.readAddress(id), calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const stage = el("div", { class: "walk-stage" });
    let view = null, filled = false, used = false, now = { item: -1, runs: false };

    const speaker = Book.speaker(() => now.runs && speak());
    const clock = Book.transport(id, moved, (step) => (speaker.speaks && clock.time - step > 0.97 ? Infinity : view.seconds(step)), { ends: true });
    const fillButton = el("button", { type: "button", class: "walk-button", title: "F fills the window, Esc leaves", onclick: () => fill(!filled) }, "Fill window");
    const list = itemList();
    
    root.tabIndex = -1;
    root.replaceChildren(el("div", { class: "walk-bar" }, clock.node, speaker.node, list.node, fillButton), stage);

    function moved(time, runs) {
      if (!view) return;
      view.seek(calm && runs ? Math.ceil(time) : time);
      const item = Math.min(data.items.length, runs ? Math.floor(time) + 1 : Math.ceil(time));
      if (item === now.item && runs === now.runs) return;
      now = { item, runs };
      list.mark(item);
      place(item);
      if (runs) speak();
      else speaker.stop();
      remember();
    }

    /** Speak the item that is written: its title, and its explanation without code and tables. */
    function speak() {
      const { title, explanation } = data.items[now.item - 1];
      const said = [...html("div", {}, `<p>${title}.</p>${explanation}`).querySelectorAll("p, li")];
      speaker.say(said.map((part) => part.textContent.replaceAll("_", " ")), clock.speed);
    }

    function remember() {
      if (used) Book.writeAddress(id, { item: now.item, ...(clock.speed !== 1 && { speed: clock.speed }), ...(now.runs && { play: "yes" }), ...(filled && { fill: "yes" }) });
    }

    /** Below the explanation: where the item stands in the lesson. */
    function place(item) {
      const number = data.items[item - 1]?.number;
      const heading = [...document.querySelectorAll("h4[id]")].find((h) => h.textContent.startsWith(`${number}. `));
      view.told.querySelector(".walk-place")?.remove();
      if (heading) view.told.append(el("a", { class: "walk-place", href: `#${heading.id}`, onclick: () => fill(false) }, "Its place in the lesson"));
    }

    function itemList() {
      const groups = new Map(), panel = el("ul", { id: `${id}-items`, hidden: "" });
      const buttons = data.items.map((item, i) => {
        const button = html("button", { type: "button", onclick: () => { open(false); clock.go(i + 1); } }, `${item.number}. ${item.title}`);
        if (!groups.has(item.milestone)) {
          groups.set(item.milestone, el("ul"));
          panel.append(el("li", {}, html("p", {}, `Milestone ${item.milestone}: ${item.milestone_title}`), groups.get(item.milestone)));
        }
        groups.get(item.milestone).append(el("li", {}, button));
        return button;
      });
      const button = el("button", { type: "button", class: "walk-button", "aria-expanded": "false", "aria-controls": panel.id, onclick: () => open(panel.hidden) }, "Items");
      const open = (on) => { panel.hidden = !on; button.setAttribute("aria-expanded", String(on)); };
      const mark = (current) => buttons.forEach((one, i) => {
        one.classList.toggle("done", i + 1 < current);
        one.setAttribute("aria-current", i + 1 === current ? "step" : "false");
      });
      return { node: el("div", { class: "walk-list" }, button, panel), mark, open, isOpen: () => !panel.hidden };
    }

    function renew() {
      const width = stage.clientWidth, free = innerHeight - stage.getBoundingClientRect().top;
      const font = Math.min(filled && width > 1700 ? 16 : 13, Math.max(12, Math.floor((width - 20) / 32.3) / 2));
      const height = filled ? (width < Book.walk.WIDE ? 0.55 : 1) * free : Math.min(460, 0.7 * innerHeight);
      view = Book.walk.view(data, { width, height: Math.round(height), font });
      stage.replaceChildren(view.node);
      now = { item: -1, runs: now.runs };
      clock.steps = view.steps + 1;
    }

    function fill(on) {
      if (on === filled) return;
      filled = on;
      root.classList.toggle("filled", on);
      document.documentElement.classList.toggle("walk-fills", on);
      fillButton.textContent = on ? "Leave" : "Fill window";
      // What lies behind is out of reach of the keyboard.
      for (let node = root; node !== document.body; node = node.parentNode)
        for (const other of node.parentNode.children) if (other !== node) other.inert = on;
      renew();
      remember();
      if (!on) root.scrollIntoView();
    }

    function obey({ item, speed, play, fill: fills }) {
      const number = Math.round(Number(item)) || 0;
      if ([0.5, 1, 1.5, 2, 4].includes(Number(speed))) clock.speed = Number(speed);
      fill(fills === "yes");
      clock.go(play === "yes" ? number - 1 : number);
      if (play === "yes") clock.start();
      root.scrollIntoView();
    }

    const leave = (event) => {
      if (event.key === "Escape" && list.isOpen()) list.open(false);
      else if (event.key === "Escape" && filled) fill(false);
      else if (event.key === "f" && root.contains(event.target) && !event.ctrlKey && !event.metaKey) fill(!filled);
    };
    for (const kind of ["click", "keydown", "input"])
      root.addEventListener(kind, (event) => {
        // The first item lies there to be looked at; who plays first wants to see it written.
        if (!used && !address && (event.key === " " || event.target.closest(".play"))) clock.go(0);
        used = true;
      }, true);
    root.addEventListener("change", remember);
    document.addEventListener("keydown", leave);
    document.addEventListener("click", (event) => { if (!list.node.contains(event.target)) list.open(false); });
    addEventListener("hashchange", () => { const address = Book.readAddress(id); if (address) obey(address); });
    Book.keys(root, clock);
    renew();
    let size = "";
    new ResizeObserver(() => { const seen = `${stage.clientWidth} ${filled && innerHeight}`; if (size && size !== seen) renew(); size = seen; }).observe(root);
    if (address) obey(address);
    else clock.go(1);
  },
});
