/* A page that shows one scene of a video at a time, at any moment of it. What it shows depends on the
   scene and the time alone: there is no clock here. assets/video.py calls

     Film.begin({step, title, chapters})       what stands at the head of each picture
     await Film.needs(scenes)                  the numbers that have to be there: data/NAME.js
     await Film.load(scenes)                   loads everything that these scenes show
     Film.captions(content)                    what a widget says at each of its moments
     Film.show(scene)                          shows it at its beginning; returns the times, from 0 on,
                                               at which its picture changes
     Film.seek(time)                           shows another moment of it

   A scene: {kind, chapter, content, duration, begins}, times in seconds. `begins`: when each sentence
   begins; of a widget, when each moment does. Contents: {title, lines} of title and card; {parts} of
   words; {picture}; {widget, options} of widget, and of still with {moment}; {walk, item} of item. */
"use strict";

window.Film = (() => {
  const { el } = Book;
  const RATE = 25; // pictures a second where something moves
  const MOTION = 0.6; // seconds from one moment of a widget to the next
  const WIDTH = 1800, HEIGHT = 880, UNITS = 760; // pixels, and the units of a widget
  const LETTERS = { most: 50, least: 22 };
  const main = document.querySelector("main");
  let seek = () => {}, chapters = [];

  function begin(film) {
    chapters = film.chapters;
    document.querySelector("header .step").textContent = film.step;
    document.querySelector("header .chapters").replaceChildren(...chapters.map(() => el("li")));
  }

  const namesIn = (scenes, kind) => [...new Set(scenes.map(({ content }) => content[kind]).filter(Boolean))];

  /** The names of the numbers that the scenes draw. */
  async function needs(scenes) {
    const widgets = namesIn(scenes, "widget");
    await Promise.all(widgets.map((name) => Book.load(`${name}.js`)));
    return [...new Set([...namesIn(scenes, "walk"), ...widgets.flatMap((name) => Book.widgets[name].data ?? [])])];
  }

  async function load(scenes) {
    await Promise.all((await needs(scenes)).map((name) => Book.load(`data/${name}.js`)));
    await Promise.all(namesIn(scenes, "picture").map((name) => imageOf(name).decode()));
  }

  const imageOf = (name) => Object.assign(new Image(), { src: `../assets/${name}` });

  // --- a scene ------------------------------------------------------------------------------------

  function show(scene) {
    const place = chapters.indexOf(scene.chapter);
    document.querySelector("header .chapter").textContent = scene.kind === "title" ? "" : scene.chapter;
    document.querySelectorAll("header li").forEach((item, i) => { item.className = i < place ? "done" : i === place ? "now" : ""; });
    const [node, changes, at] = KINDS[scene.kind](scene);
    if (node) main.replaceChildren(node);
    seek = at;
    seek(0);
    return changes;
  }

  const middle = (kind, ...children) => el("div", { class: `middle ${kind}` }, ...children);
  const nothing = () => {};

  function card(kind) {
    return ({ content }) => [middle(kind, el("h1", {}, content.title), ...content.lines.map((line) => el("p", {}, line))), [0], nothing];
  }

  /** Prose: the sentence that is spoken stands out. */
  function words({ content, begins }) {
    const box = el("div", { class: "words" });
    let list = null;
    for (const part of content.parts) {
      const node = el({ code: "pre", item: "li", table: "table" }[part.kind] ?? "p");
      node.innerHTML = part.html;
      if (part.kind !== "item") list = null;
      else if (!list) box.append((list = el("ul")));
      (list ?? box).append(node);
    }
    const node = middle("", box), spans = [...box.querySelectorAll("[data-sentence]")];
    main.replaceChildren(node);
    fit(box);
    return [null, begins.length ? [0, ...begins.slice(1)] : [0], (time) => {
      const now = Math.max(0, begins.findLastIndex((start) => start <= time + 1e-6));
      spans.forEach((span, i) => span.classList.toggle("now", i === now));
    }];
  }

  /** The largest letters with which all fits. */
  function fit(box) {
    let size = LETTERS.most;
    const wide = () => [...box.querySelectorAll("pre, table")].some((part) => part.scrollWidth > box.clientWidth);
    do box.style.fontSize = `${size--}px`;
    while (size >= LETTERS.least && (box.offsetHeight > HEIGHT - 60 || wide()));
  }

  function picture({ content }) {
    const image = imageOf(content.picture);
    return [middle("shown", image), [0], () => {
      const scale = Math.min(WIDTH / image.naturalWidth, (HEIGHT - 50) / image.naturalHeight, 1.7);
      image.width = image.naturalWidth * scale;
    }];
  }

  // --- widgets ------------------------------------------------------------------------------------

  function stateOf({ widget, options }) {
    const made = Book.widgets[widget], state = Book.begin(made.options, options);
    made.settle?.(state);
    return state;
  }

  function captions(content) {
    const scene = Book.widgets[content.widget].scene(stateOf(content), UNITS);
    return Array.from({ length: scene.steps }, (_, step) => scene.at(step).caption);
  }

  /** A widget and its numbers, as large as they can be. */
  function widgetOf(content) {
    const shown = Book.picture(content.widget, stateOf(content), UNITS);
    const numbers = el("dl", { class: "numbers" });
    const has = (shown.scene.at(0).numbers ?? shown.scene.numbers ?? []).length;
    const scale = Math.min(WIDTH / UNITS, (HEIGHT - (has ? 160 : 60)) / shown.scene.height);
    shown.node.style.width = `${UNITS * scale}px`;
    return { node: middle("shown widget-film", shown.node, numbers), steps: shown.scene.steps, seek(time) {
      const moment = shown.seek(time);
      numbers.replaceChildren(...Book.figures(moment.numbers ?? shown.scene.numbers ?? []));
    } };
  }

  function still({ content }) {
    const made = widgetOf(content), time = content.moment === "last" ? made.steps - 1 : Number(content.options.step ?? 0);
    return [made.node, [0], () => made.seek(time)];
  }

  /** A widget that plays: it moves just before each moment begins. */
  function widget({ content, begins, duration }) {
    const made = widgetOf(content), changes = [0];
    for (const start of begins.slice(1)) {
      const length = motion(begins, start);
      for (let time = start - length; time < start; time += 1 / RATE) changes.push(time);
      changes.push(start);
    }
    const last = begins.length - 1;
    return [made.node, changes.filter((time) => time < duration), (time) => {
      const step = Math.max(0, begins.findLastIndex((start) => start <= time + 1e-6));
      if (step === last) return made.seek(last);
      const left = begins[step + 1] - time, length = motion(begins, begins[step + 1]);
      // Book.picture moves in the last third of a moment.
      return made.seek(left < length ? step + 1 - left / length / 3 : step);
    }];
  }

  /** How long the way to a moment takes: not more than half of the one before. */
  function motion(begins, start) {
    return Math.min(MOTION, (start - begins[begins.indexOf(start) - 1]) / 2);
  }

  // --- the walk -----------------------------------------------------------------------------------

  const ALL = 0.999; // the share of an item's time at which all is written
  const PANEL = { most: 26, least: 16, height: 360 };

  const viewOf = (walk, height) => Book.walk.view(Book.data[walk], { width: 1920, height, font: 21 });

  /** The code as it is typed, beside it the words; what needs width, under both. */
  function item({ content, duration }) {
    const panel = panelOf(Book.data[content.walk].items[content.item].explanation);
    const node = el("div", { class: "widget walk" }, panel);
    main.replaceChildren(node);
    const view = viewOf(content.walk, HEIGHT - heightOf(panel));
    node.prepend(view.node);
    return [null, [0, ...view.changes(content.item).map((share) => (share / ALL) * duration)], (time) =>
      view.seek(content.item + Math.max(1e-6, Math.min(ALL, (time / duration) * ALL)))];
  }

  /** The blocks of code and the tables of an explanation, null if it has none. */
  function panelOf(explanation) {
    const read = el("div");
    read.innerHTML = explanation;
    const blocks = [...read.querySelectorAll("pre, table")];
    return blocks.length ? el("div", { class: "panel" }, ...blocks) : null;
  }

  function heightOf(panel) {
    if (!panel) return 0;
    let size = PANEL.most;
    const wide = () => [...panel.children].some((block) => block.scrollWidth > panel.clientWidth);
    do panel.style.fontSize = `${size--}px`;
    while (size >= PANEL.least && (panel.offsetHeight > PANEL.height || wide()));
    return panel.offsetHeight;
  }

  /** How long the code of an item should be looked at where few words are said. */
  const seconds = ({ walk, item }) => viewOf(walk, HEIGHT).seconds(item);

  /** Nothing but a widget, as wide as the window. Returns its height; `seek` then takes its moments. */
  function loop(content) {
    const shown = Book.picture(content.widget, stateOf(content), UNITS);
    document.body.className = "loop";
    document.body.replaceChildren(shown.node);
    seek = shown.seek;
    seek(0);
    return Math.ceil(document.body.getBoundingClientRect().height);
  }

  const KINDS = { title: card("card"), card: card("card milestone"), words, picture, still, widget, item };
  return { begin, needs, load, captions, seconds, show, loop, seek: (time) => seek(time) };
})();
