/* What all widgets of the book share: controls, play and pause, the state in the address. A widget
   says what it shows at each moment; this file and pictures.js do the rest. Plain scripts, because
   browsers load no modules from disk. */
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

  /** The signs on buttons, drawn in a square of 24. */
  const ICONS = {
    play: "M8 5.2v13.6a.8.8 0 0 0 1.2.7l11-6.8a.8.8 0 0 0 0-1.4l-11-6.8A.8.8 0 0 0 8 5.2z",
    pause: "M7 5h3.2v14H7zM13.8 5H17v14h-3.2z",
    back: "M5 5h2.8v14H5zM19 5.6v12.8a.7.7 0 0 1-1.1.6l-8.6-6.4a.7.7 0 0 1 0-1.2L17.9 5a.7.7 0 0 1 1.1.6z",
    on: "M16.2 5H19v14h-2.8zM5 5.6v12.8a.7.7 0 0 0 1.1.6l8.6-6.4a.7.7 0 0 0 0-1.2L6.1 5A.7.7 0 0 0 5 5.6z",
    sound: "M3 9.2v5.6h3.6l5 4.4V4.8l-5 4.4zM14 8.2v7.6a4.4 4.4 0 0 0 0-7.6zM14 3.8v2.1a6.5 6.5 0 0 1 0 12.2v2.1a8.5 8.5 0 0 0 0-16.4z",
    mute: "M3 9.2v5.6h3.6l5 4.4V4.8l-5 4.4zM15.4 8.2 14 9.6l2.4 2.4-2.4 2.4 1.4 1.4 2.4-2.4 2.4 2.4 1.4-1.4-2.4-2.4 2.4-2.4-1.4-1.4-2.4 2.4z",
  };
  function icon(name, more = "") {
    return svg("svg", { class: `icon ${more}`, viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
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
  // {label, choices, names?}: one of several; {label, values, show?}: a slider over given numbers;
  // {label, min, max, step?, show?}: a slider. max may be a function of the state. when(state): whether
  // the control means anything.

  /** What an option makes of a value that somebody wrote: the choice or number nearest to it. */
  function allowed(option, value, state) {
    if (option.choices) return option.choices.find((choice) => String(choice) === String(value));
    const number = String(value).trim() === "" ? NaN : Number(value);
    if (!Number.isFinite(number)) return undefined;
    if (option.values) return option.values.reduce((best, v) => (Math.abs(v - number) < Math.abs(best - number) ? v : best));
    const { min, step = 1 } = option, steps = Math.round((number - min) / step);
    return Number(Math.min(most(option, state), Math.max(min, min + steps * step)).toFixed(10));
  }
  const most = ({ max }, state) => (typeof max === "function" ? max(state) : max);

  /** The values that a widget begins with: its own, then those of the page, then the address. */
  function begin(options, ...given) {
    const state = {};
    for (const [name, option] of Object.entries(options)) {
      state[name] = option.value;
      for (const values of given) {
        const value = values?.[name];
        if (value !== undefined && value !== null) state[name] = allowed(option, value, state) ?? state[name];
      }
    }
    return state;
  }

  /** A labelled control for each option; `changed(name, value, last)` is called when it is used; last
      is false while a slider is still being dragged. */
  function controls(id, options, state, changed) {
    const inputs = {};
    const nodes = Object.entries(options).map(([name, option]) => {
      const key = `${id}-${name}`;
      const show = option.show ?? String;
      if (option.choices) {
        const input = el("select", { id: key, onchange: () => changed(name, allowed(option, input.value, state), true) },
          ...option.choices.map((c) => el("option", { value: c }, option.names?.[c] ?? String(c))));
        inputs[name] = (value) => { input.value = value; };
        return el("label", { class: "control", for: key }, el("span", {}, option.label), input);
      }
      const output = el("output", { for: key });
      const { values, min = 0, step = 1 } = option, value = () => (values ? values[input.valueAsNumber] : input.valueAsNumber);
      const say = (now) => { output.value = show(now); input.setAttribute("aria-valuetext", show(now)); };
      const use = (last) => () => { say(value()); changed(name, value(), last); };
      const input = el("input", { id: key, type: "range", min, step, oninput: use(false), onchange: use(true) });
      inputs[name] = (now) => {
        input.max = values ? values.length - 1 : most(option, state);
        input.value = values ? values.indexOf(now) : now;
        say(now);
      };
      return el("label", { class: "control", for: key }, el("span", {}, option.label), input, output);
    });
    const renew = () => Object.entries(inputs).forEach(([name, set], i) => {
      set(state[name]);
      nodes[i].hidden = !(options[name].when?.(state) ?? true);
    });
    renew();
    return { nodes, renew };
  }

  // --- play, pause, step, speed -------------------------------------------------------------------

  /** Buttons and a clock for moments 0 to steps - 1. `moved(time, runs, last)` is called with each new
      time; last is false while the slider is being dragged. With `seconds(step)` the pause at a moment
      has its own length. With `ends`, moments are where things end that take the time before them: a
      pause may stand between two, and at 0 nothing is. */
  function transport(id, moved, seconds = () => 1.4, { ends = false } = {}) {
    let steps = 1, time = 0, speed = 1, running = 0, before = 0;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const button = (name, label, onclick, ...icons) => el("button", { type: "button", class: `do ${name}`, "aria-label": label, title: label, onclick }, ...icons);
    const play = button("play", "play", () => (running ? pause() : start()), icon("play", "go"), icon("pause", "pause"));
    const slider = el("input", { type: "range", min: 0, step: 1, value: 0, class: "time", "aria-label": "moment",
      oninput: () => go(slider.valueAsNumber, false), onchange: () => go(slider.valueAsNumber) });
    const place = el("output", { class: "place" });
    const faster = el("select", { "aria-label": "speed", class: "speed", onchange: () => { speed = Number(faster.value); } },
      ...[0.5, 1, 1.5, 2, 4].map((v) => el("option", { value: v, ...(v === 1 ? { selected: "" } : {}) }, `${v} ×`)));
    const node = el("div", { class: "transport", role: "group", "aria-label": "play" },
      button("back", "one moment back", () => go(Math.ceil(time) - 1), icon("back")), play,
      button("on", "one moment on", () => go(Math.floor(time) + 1), icon("on")), slider, place, faster);

    function show(last = true) {
      const moment = ends ? Math.ceil(time) : Math.floor(time + 1e-6), verb = running ? "pause" : "play";
      slider.value = moment;
      place.value = ends ? `${moment} / ${steps - 1}` : `${moment + 1} / ${steps}`;
      slider.setAttribute("aria-valuetext", `moment ${place.value}`);
      play.classList.toggle("runs", Boolean(running));
      play.setAttribute("aria-label", verb);
      play.title = verb;
      moved(time, Boolean(running), last);
    }
    function go(to, last = true) {
      stop();
      time = Math.min(steps - 1, Math.max(0, Number.isFinite(to) ? to : 0));
      show(last);
    }
    function pause() { if (running) go(ends ? time : Math.round(time)); }
    function stop() {
      cancelAnimationFrame(running);
      running = 0;
    }
    function start() {
      stop();
      if (time >= steps - 1) time = 0;
      before = performance.now();
      running = requestAnimationFrame(tick);
      show();
    }
    function tick(now) {
      time += (Math.max(0, now - before) / 1000) * (speed / seconds(Math.floor(time)));
      before = now;
      if (time >= steps - 1) { go(steps - 1); return; }
      running = requestAnimationFrame(tick);
      if (calm && !ends) { const at = time; time = Math.floor(time); show(); time = at; } else show();
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
      const uses = (what) => event.target.closest(`select, textarea, .scroll, ${what}`);
      if (uses(event.key === " " ? "input:not([type=range]), button, summary, a, [role=button]" : "input") || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = { " ": clock.toggle, ArrowLeft: () => clock.go(Math.ceil(clock.time) - 1), ArrowRight: () => clock.go(Math.floor(clock.time) + 1) }[event.key];
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
    let shown = null, moment = null, used = false, later = 0;

    const clock = transport(id, (time, runs, last) => {
      if (!shown) return;
      const before = moment;
      moment = shown.seek(time);
      if (moment !== before) {
        if (caption.textContent !== moment.caption) caption.textContent = moment.caption;
        numbers.replaceChildren(...figures(moment.numbers ?? shown.scene.numbers ?? []));
      }
      if (used && !runs) remember(last);
    }, widget.seconds);
    /** Put the state into the address: later, while a slider moves, or browsers refuse. */
    const remember = (last = true) => {
      clearTimeout(later);
      if (last) writeAddress(id, { ...state, step: Math.round(clock.time) });
      else later = setTimeout(remember, 300);
    };
    const change = (changes, last = true) => {
      Object.assign(state, changes);
      used = false; // until it is drawn anew
      Book.keepingFocus(stage, () => renew(Object.keys(changes)[0]));
      used = true;
      remember(last);
    };
    const inputs = controls(id, widget.options, state, (option, value, last) => change({ [option]: value }, last));

    function renew(changed) {
      widget.settle?.(state, changed); // options that depend on each other
      const width = root.clientWidth < NARROW ? 360 : 760;
      shown = Book.picture(name, state, width, change);
      stage.replaceChildren(shown.node);
      more.replaceChildren(...(shown.scene.tables ?? []).map(table));
      inputs.renew();
      clock.steps = shown.scene.steps;
    }
    root.replaceChildren(el("div", { class: "controls" }, ...inputs.nodes), stage, clock.node, caption, numbers, more);
    for (const act of ["input", "click", "keydown"]) root.addEventListener(act, () => { used = true; }, true);
    keys(root, clock);
    renew();
    let wide = root.clientWidth < NARROW;
    new ResizeObserver(() => { if (wide !== root.clientWidth < NARROW) { wide = !wide; Book.keepingFocus(stage, () => renew()); } }).observe(root);
    clock.go(Number(address?.step ?? given.step ?? 0));
    if (address) root.scrollIntoView();
    return (said) => { // a link in the page leads here
      Object.assign(state, begin(widget.options, given, said));
      renew();
      clock.go(Number(said.step ?? 0));
      root.scrollIntoView();
    };
  }

  /** Make the widgets of this page: <div data-widget="ring" data-options='{"cp": 4}'>. */
  function start() {
    for (const [i, root] of [...document.querySelectorAll("[data-widget]")].entries()) {
      const name = root.dataset.widget, id = root.id || `${name}${i || ""}`;
      let take = null;
      const make = async () => {
        if (take) return take(readAddress(id));
        take = () => {}; // it is being made
        try {
          await load(`${name}.js`);
          await Promise.all((widgets[name].data ?? []).map((file) => load(`data/${file}.js`)));
          take = (await mount(root, name, JSON.parse(root.dataset.options ?? "{}"), id)) ?? take;
          root.dataset.ready = "yes";
        } catch (error) {
          root.append(el("p", { class: "failed" }, `This could not be shown: ${error.message}`));
          console.error(error);
        }
      };
      root.classList.add("widget");
      addEventListener("hashchange", () => { if (readAddress(id)) make(); });
      if (readAddress(id)) make();
      else new IntersectionObserver((seen, watch) => { if (seen.some((s) => s.isIntersecting)) { watch.disconnect(); make(); } }, { rootMargin: "400px" }).observe(root);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();

  return { base, data, formulas, widgets, define: (name, widget) => { widgets[name] = widget; }, el, svg, icon, load, begin, controls, transport, keys, nice, figures, table, readAddress, writeAddress, mount };
})();
