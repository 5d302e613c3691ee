/* What all widgets of the book share: controls, play and pause, the state in the address, and
   pictures that move. A widget says what it shows at each moment; this file does the rest.
   Plain scripts, because browsers load no modules from disk. */
"use strict";

window.Book = (() => {
  const base = (document.currentScript?.src ?? "").replace(/[^/]*$/, "");
  const widgets = {}, data = {}, formulas = {}, waiting = {};
  const SVG = "http://www.w3.org/2000/svg";
  const NARROW = 560; // pixels; a picture in less than that is drawn for 360

  // --- pieces of a page ---------------------------------------------------------------------------

  /** An HTML element: el("p", {class: "caption"}, "text", child). */
  function el(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  /** An SVG element. */
  function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** Load a script of the book once. */
  function load(path) {
    waiting[path] ??= new Promise((done, failed) => {
      const node = el("script", { src: base + path });
      node.onload = done;
      node.onerror = () => failed(new Error(`the book lacks ${path}`));
      document.head.append(node);
    });
    return waiting[path];
  }

  // --- the address: #ring?cp=4&step=2 -------------------------------------------------------------

  /** What the address says of a widget, {option: text}; null if it says nothing of it. */
  function readAddress(id) {
    const [name, rest] = location.hash.slice(1).split("?");
    return name === id && rest !== undefined ? Object.fromEntries(new URLSearchParams(rest)) : null;
  }

  function writeAddress(id, state) {
    history.replaceState(history.state, "", `#${id}?${new URLSearchParams(state)}`);
  }

  // --- options ------------------------------------------------------------------------------------

  /** The values that a widget begins with: its own, then those of the page, then the address. */
  function begin(options, ...given) {
    const state = {};
    for (const [name, option] of Object.entries(options)) {
      state[name] = option.value;
      for (const values of given) {
        const value = values?.[name];
        if (value === undefined || value === null) continue;
        const chosen = option.choices ? String(value) : Number(value);
        if (option.choices ? option.choices.map(String).includes(chosen) : Number.isFinite(chosen))
          state[name] = option.choices ? chosen : Math.min(option.max, Math.max(option.min, chosen));
      }
    }
    return state;
  }

  /** A labelled control for each option; `changed(name, value)` is called when it is used. */
  function controls(id, options, state, changed) {
    const inputs = {};
    const nodes = Object.entries(options).map(([name, option]) => {
      const key = `${id}-${name}`;
      const show = option.show ?? String;
      if (option.choices) {
        const input = el("select", { id: key, onchange: () => changed(name, input.value) },
          ...option.choices.map((c) => el("option", { value: c }, option.names?.[c] ?? String(c))));
        inputs[name] = (value) => { input.value = value; };
        return el("label", { class: "control", for: key }, el("span", {}, option.label), input);
      }
      const output = el("output", { for: key });
      const { min, max, step = 1 } = option;
      const input = el("input", { id: key, type: "range", min, max, step,
        oninput: () => { output.value = show(input.valueAsNumber); changed(name, input.valueAsNumber); } });
      inputs[name] = (value) => { input.value = value; output.value = show(value); };
      return el("label", { class: "control", for: key }, el("span", {}, option.label), input, output);
    });
    const renew = () => Object.entries(inputs).forEach(([name, set]) => set(state[name]));
    renew();
    return { nodes, renew };
  }

  // --- play, pause, step, speed -------------------------------------------------------------------

  /** Buttons and a clock for moments 0 to steps - 1. `moved(time)` is called with each new time.
      With `seconds(step)` the pause at a moment has its own length. */
  function transport(id, moved, seconds = () => 1.4) {
    let steps = 1, time = 0, speed = 1, running = 0, before = 0;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const button = (name, label, onclick) => el("button", { type: "button", class: `do ${name}`, "aria-label": label, title: label, onclick });
    const play = button("play", "play", () => (running ? pause() : start()));
    const slider = el("input", { type: "range", min: 0, step: 1, value: 0, class: "time", "aria-label": "moment",
      oninput: () => go(slider.valueAsNumber) });
    const place = el("output", { class: "place" });
    const faster = el("select", { "aria-label": "speed", class: "speed", onchange: () => { speed = Number(faster.value); } },
      ...[0.5, 1, 1.5, 2, 4].map((v) => el("option", { value: v, ...(v === 1 ? { selected: "" } : {}) }, `${v} ×`)));
    const node = el("div", { class: "transport", role: "group", "aria-label": "play" },
      button("back", "one moment back", () => go(Math.ceil(time) - 1)), play,
      button("on", "one moment on", () => go(Math.floor(time) + 1)), slider, place, faster);

    function show() {
      slider.value = Math.round(time);
      place.value = `${Math.floor(time + 1e-6) + 1} / ${steps}`;
      slider.setAttribute("aria-valuetext", `moment ${place.value}`);
      play.classList.toggle("runs", Boolean(running));
      play.setAttribute("aria-label", running ? "pause" : "play");
      moved(time, Boolean(running));
    }
    function go(to) { pause(); time = Math.min(steps - 1, Math.max(0, to)); show(); }
    function pause() {
      if (!running) return;
      cancelAnimationFrame(running);
      running = 0;
      time = Math.round(time);
      show();
    }
    function start() {
      if (time >= steps - 1) time = 0;
      before = performance.now();
      running = requestAnimationFrame(tick);
      show();
    }
    function tick(now) {
      time += ((now - before) / 1000) * (speed / seconds(Math.floor(time)));
      before = now;
      if (time >= steps - 1) { time = steps - 1; pause(); return; }
      running = requestAnimationFrame(tick);
      if (calm) { const at = time; time = Math.floor(time); show(); time = at; } else show();
    }
    return {
      node, go, pause, start, toggle: () => (running ? pause() : start()),
      get time() { return time; },
      get speed() { return speed; },
      set speed(value) { speed = value; faster.value = value; },
      set steps(count) { steps = count; slider.max = count - 1; time = Math.min(time, count - 1); node.hidden = count < 2; show(); },
    };
  }

  /** Space plays, arrows step, wherever the focus in the widget is and has no use for the key. */
  function keys(root, clock) {
    root.addEventListener("keydown", (event) => {
      if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = { ArrowLeft: () => clock.go(Math.ceil(clock.time) - 1), ArrowRight: () => clock.go(Math.floor(clock.time) + 1) }[event.key]
        ?? (event.key === " " && !event.target.closest("button, summary, a, [role=button]") ? clock.toggle : null);
      if (!action) return;
      event.preventDefault();
      event.stopPropagation();
      action();
    });
  }

  /** 1, 2 or 5 times a power of ten: the smallest step that cuts a length into at most `most` parts. */
  function nice(length, most) {
    const power = 10 ** Math.floor(Math.log10(length / most));
    const digit = [1, 2, 5].find((digit) => digit * power * most >= length * (1 - 1e-9)) ?? 10;
    return Number((digit * power).toPrecision(1));
  }

  // --- pictures -----------------------------------------------------------------------------------

  const MOVING = ["x", "y", "w", "h", "x2", "y2", "r", "opacity", "size"];

  /** The shapes between two moments: what has the same id moves, what is new or gone fades. */
  function between(from, to, share) {
    if (share <= 0) return from;
    if (share >= 1) return to;
    const old = new Map(from.map((shape) => [shape.id, shape]));
    const fresh = new Map(to.map((shape) => [shape.id, shape]));
    const ease = share < 0.5 ? 2 * share * share : 1 - 2 * (1 - share) ** 2;
    const shapes = to.map((shape) => {
      const was = old.get(shape.id);
      if (!was) return { ...shape, opacity: (shape.opacity ?? 1) * ease };
      const now = { ...(ease < 0.5 ? was : shape) };
      for (const key of MOVING)
        if (typeof was[key] === "number" && typeof shape[key] === "number") now[key] = was[key] + (shape[key] - was[key]) * ease;
      return now;
    });
    const gone = from.filter((shape) => !fresh.has(shape.id));
    return [...shapes, ...gone.map((shape) => ({ ...shape, opacity: (shape.opacity ?? 1) * (1 - ease) }))];
  }

  /** Draw a shape. Kinds: rect, text, line, arrow, circle, path. `fill` and `stroke` name colours of
      book.css: rank-0 to rank-7, quiet, paper, ink, good, bad, accent. */
  function draw(shape, chosen) {
    const colour = (name) => (name ? `var(--${name})` : "none");
    const look = { opacity: shape.opacity ?? 1, "data-id": shape.id };
    const parts = [];
    if (shape.kind === "text") parts.push(words(shape, shape.x, shape.y, shape.anchor ?? "middle", colour(shape.fill ?? "ink")));
    if (shape.kind === "rect") {
      parts.push(svg("rect", { x: shape.x, y: shape.y, width: Math.max(0, shape.w), height: Math.max(0, shape.h), rx: shape.round ?? 3,
        fill: colour(shape.fill), stroke: colour(shape.stroke), "stroke-dasharray": shape.dashed ? "4 3" : null }));
      if (shape.text !== undefined) parts.push(words(shape, shape.x + shape.w / 2, shape.y + shape.h / 2, "middle", colour(shape.ink ?? (shape.fill ? `on-${shape.fill}` : "ink"))));
    }
    if (shape.kind === "circle") {
      parts.push(svg("circle", { cx: shape.x, cy: shape.y, r: shape.r, fill: colour(shape.fill), stroke: colour(shape.stroke) }));
      if (shape.text !== undefined) parts.push(words(shape, shape.x, shape.y, "middle", colour(shape.ink ?? `on-${shape.fill}`)));
    }
    if (shape.kind === "line" || shape.kind === "arrow")
      parts.push(svg("line", { x1: shape.x, y1: shape.y, x2: shape.x2, y2: shape.y2, stroke: colour(shape.stroke ?? "ink"), "stroke-width": shape.thick ?? 1.5,
        "stroke-dasharray": shape.dashed ? "4 3" : null, "marker-end": shape.kind === "arrow" ? "url(#book-arrow)" : null }));
    if (shape.kind === "path") parts.push(svg("path", { d: shape.d, fill: colour(shape.fill), stroke: colour(shape.stroke), "stroke-width": shape.thick ?? 1.5, "stroke-dasharray": shape.dashed ? "4 3" : null }));
    if (!shape.choose) return svg("g", look, ...parts);
    const choose = () => chosen(shape.choose);
    const press = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); choose(); } };
    return svg("g", { ...look, role: "button", tabindex: 0, class: "choice", "aria-label": shape.label, "aria-pressed": shape.pressed === undefined ? null : String(shape.pressed), onclick: choose, onkeydown: press }, ...parts);
  }

  function words(shape, x, y, anchor, fill) {
    const lines = String(shape.text).split("\n"), size = shape.size ?? 13;
    const spans = lines.map((line, i) => svg("tspan", { x, y: y + (i - (lines.length - 1) / 2) * size * 1.2 }, line));
    return svg("text", { "font-size": size, "text-anchor": anchor, "dominant-baseline": "central", fill,
      "font-weight": shape.bold ? 700 : null, class: shape.mono ? "mono" : null }, ...spans);
  }

  function arrowHead() {
    return svg("defs", {}, svg("marker", { id: "book-arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" },
      svg("path", { d: "M0 0 L8 4 L0 8 z", fill: "context-stroke" })));
  }

  /** A picture of a widget in `width` units: {node, scene, seek(time)}. A film uses it alone. */
  function picture(name, state, width, chosen = () => {}) {
    const scene = widgets[name].scene(state, width);
    const content = svg("g"), root = svg("svg", { viewBox: `0 0 ${width} ${scene.height}`, class: "picture" }, arrowHead(), content);
    const clickable = () => content.querySelector("[role=button]") !== null;
    return {
      node: root, scene,
      seek(time) {
        const first = Math.min(scene.steps - 1, Math.floor(time + 1e-6)), share = time - first;
        const from = scene.at(first), to = share > 1e-6 ? scene.at(first + 1) : from;
        // A moment is looked at before it moves on: the last third of its time is the movement.
        const shapes = between(from.shapes, to.shapes, Math.max(0, 3 * share - 2));
        const focus = content.contains(document.activeElement) ? document.activeElement.getAttribute("data-id") : null;
        content.replaceChildren(...shapes.map((shape) => draw(shape, chosen)));
        if (focus) content.querySelector(`[data-id="${CSS.escape(focus)}"]`)?.focus();
        root.setAttribute("role", clickable() ? "group" : "img");
        root.setAttribute("aria-label", from.caption);
        return from;
      },
    };
  }

  // --- a widget on a page -------------------------------------------------------------------------

  /** Numbers of a scene, [{name, label, text}], as a row of figures. */
  function figures(numbers) {
    return numbers.map(({ name, label, text }) => el("div", { class: "number" }, el("dt", {}, label), el("dd", { "data-number": name }, String(text))));
  }

  /** A table; a cell is a text, or a number {name, text}. */
  function table({ head, rows, title }) {
    const row = (cells, tag) => el("tr", {}, ...cells.map((cell) => el(tag, { scope: tag === "th" ? "col" : null, "data-number": cell.name }, String(cell.text ?? cell))));
    return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title ?? "table" }, el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, ...rows.map((cells) => row(cells, "td")))));
  }

  function mount(root, name, given, id) {
    const widget = widgets[name];
    if (widget.mount) return widget.mount(root, given, id);
    const address = readAddress(id), state = begin(widget.options, given, address);
    const stage = el("div", { class: "stage" }), caption = el("p", { class: "caption", "aria-live": "polite" });
    const numbers = el("dl", { class: "numbers" }), more = el("div", { class: "more" });
    let shown = null, used = false;

    const clock = transport(id, (time, runs) => {
      if (!shown) return;
      const moment = shown.seek(time);
      if (!runs || caption.textContent !== moment.caption) caption.textContent = moment.caption;
      numbers.replaceChildren(...figures(moment.numbers ?? shown.scene.numbers ?? []));
      if (used && !runs) remember();
    }, widget.seconds);
    const remember = () => writeAddress(id, { ...state, step: Math.round(clock.time) });
    const change = (changes) => {
      Object.assign(state, changes);
      used = true;
      renew();
      remember();
    };
    const inputs = controls(id, widget.options, state, (option, value) => change({ [option]: value }));

    function renew() {
      widget.settle?.(state); // options that depend on each other
      const width = root.clientWidth < NARROW ? 360 : 760;
      shown = picture(name, state, width, change);
      stage.replaceChildren(shown.node);
      more.replaceChildren(...(shown.scene.tables ?? []).map(table));
      inputs.renew();
      clock.steps = shown.scene.steps;
    }
    root.replaceChildren(el("div", { class: "controls" }, ...inputs.nodes), stage, clock.node, caption, numbers, more);
    root.addEventListener("input", () => { used = true; });
    root.addEventListener("click", () => { used = true; });
    keys(root, clock);
    renew();
    let wide = root.clientWidth < NARROW;
    new ResizeObserver(() => { if (wide !== root.clientWidth < NARROW) { wide = !wide; renew(); } }).observe(root);
    clock.go(Number(address?.step ?? given.step ?? 0));
    if (address) root.scrollIntoView();
  }

  /** Make the widgets of this page: <div data-widget="ring" data-options='{"cp": 4}'>. */
  function start() {
    for (const [i, root] of [...document.querySelectorAll("[data-widget]")].entries()) {
      const name = root.dataset.widget, id = root.id || `${name}${i || ""}`;
      const make = async () => {
        try {
          await load(`${name}.js`);
          await Promise.all((widgets[name].data ?? []).map((file) => load(`data/${file}.js`)));
          mount(root, name, JSON.parse(root.dataset.options ?? "{}"), id);
          root.dataset.ready = "yes";
        } catch (error) {
          root.append(el("p", { class: "failed" }, `This could not be shown: ${error.message}`));
          console.error(error);
        }
      };
      root.classList.add("widget");
      if (readAddress(id)) make();
      else new IntersectionObserver((seen, watch) => { if (seen.some((s) => s.isIntersecting)) { watch.disconnect(); make(); } }, { rootMargin: "400px" }).observe(root);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();

  return { base, data, formulas, widgets, define: (name, widget) => { widgets[name] = widget; }, el, svg, load, begin, controls, transport, keys, picture, between, nice, figures, table, readAddress, writeAddress, mount };
})();
