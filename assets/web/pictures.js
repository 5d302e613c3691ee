/* Pictures of widgets: shapes that move from one moment to the next. */
"use strict";

Object.assign(Book, (() => {
  const { svg } = Book;
  const MOVING = ["x", "y", "w", "h", "x2", "y2", "r", "size"];

  /** The shapes between two moments: what has the same id moves, what is new or gone fades. A shape
      takes its new text and colour half way, or at the share `turns` of the way, where a new one comes. */
  function between(from, to, share) {
    if (share <= 0) return from;
    if (share >= 1) return to;
    const old = new Map(from.map((shape) => [shape.id, shape]));
    const fresh = new Map(to.map((shape) => [shape.id, shape]));
    const ease = share < 0.5 ? 2 * share * share : 1 - 2 * (1 - share) ** 2;
    const shapes = to.map((shape) => {
      const was = old.get(shape.id);
      if (!was) return { ...shape, opacity: (shape.opacity ?? 1) * (shape.turns === undefined ? ease : Number(ease >= shape.turns)) };
      const now = { ...(ease < (shape.turns ?? 0.5) ? was : shape) };
      for (const key of MOVING)
        if (typeof was[key] === "number" && typeof shape[key] === "number") now[key] = was[key] + (shape[key] - was[key]) * ease;
      if (was.opacity !== shape.opacity) now.opacity = (was.opacity ?? 1) + ((shape.opacity ?? 1) - (was.opacity ?? 1)) * ease;
      return now;
    });
    const gone = from.filter((shape) => !fresh.has(shape.id));
    return [...shapes, ...gone.map((shape) => ({ ...shape, opacity: (shape.opacity ?? 1) * (1 - ease) }))];
  }

  /** Draw a shape. Kinds: rect, text, line, arrow, circle, path. `fill` and `stroke` name colours of
      book.css: rank-0 to rank-7, quiet, paper, ink, good, bad, accent. `head`: a path ends in an arrow.
      `choose`: changes to the state that a click makes. `tab`: of all choices with it, only those where
      it is true are in the way of the tab key; the arrow keys lead to the others. */
  function draw(shape, chosen) {
    const colour = (name) => (name ? `var(--${name})` : "none");
    const look = { opacity: shape.opacity ?? 1, "data-id": shape.id, "pointer-events": shape.choose ? null : "none" };
    const parts = [];
    if (shape.kind === "text") parts.push(words(shape, shape.x, shape.y, shape.anchor ?? "middle", colour(shape.fill ?? "ink")));
    if (shape.kind === "rect") {
      parts.push(svg("rect", { x: shape.x, y: shape.y, width: Math.max(0, shape.w), height: Math.max(0, shape.h), rx: shape.round ?? 3,
        fill: colour(shape.fill), stroke: colour(shape.stroke), "stroke-width": shape.thick, "stroke-dasharray": shape.dashed ? "4 3" : null }));
      if (shape.text !== undefined) parts.push(words(shape, shape.x + shape.w / 2, shape.y + shape.h / 2, "middle", colour(shape.ink ?? (shape.fill ? `on-${shape.fill}` : "ink"))));
    }
    if (shape.kind === "circle") {
      parts.push(svg("circle", { cx: shape.x, cy: shape.y, r: shape.r, fill: colour(shape.fill), stroke: colour(shape.stroke) }));
      if (shape.text !== undefined) parts.push(words(shape, shape.x, shape.y, "middle", colour(shape.ink ?? `on-${shape.fill}`)));
    }
    if (shape.kind === "line" || shape.kind === "arrow")
      parts.push(svg("line", { x1: shape.x, y1: shape.y, x2: shape.x2, y2: shape.y2, stroke: colour(shape.stroke ?? "ink"), "stroke-width": shape.thick ?? 1.5,
        "stroke-dasharray": shape.dashed ? "4 3" : null, "marker-end": shape.kind === "arrow" ? "url(#book-arrow)" : null }));
    if (shape.kind === "path") parts.push(svg("path", { d: shape.d, fill: colour(shape.fill), stroke: colour(shape.stroke), "stroke-width": shape.thick ?? 1.5, "stroke-dasharray": shape.dashed ? "4 3" : null, "marker-end": shape.head ? "url(#book-arrow)" : null }));
    if (!shape.choose) return svg("g", look, ...parts);
    const choose = () => chosen(shape.choose);
    const press = (event) => {
      const way = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") choose();
      else if (way && shape.tab !== undefined) neighbour(event.currentTarget, way).focus();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    return svg("g", { ...look, role: "button", tabindex: shape.tab === false ? -1 : 0, class: "choice", "aria-label": shape.label, "aria-pressed": shape.pressed === undefined ? null : String(shape.pressed), onclick: choose, onkeydown: press }, ...parts);
  }

  /** The choice before (way -1) or after (1) one of them; after the last comes the first. */
  function neighbour(choice, way) {
    const all = [...choice.parentNode.querySelectorAll(".choice")];
    return all.at((all.indexOf(choice) + way) % all.length);
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

  /** Draw something anew. The shape that had the focus has it again. */
  function keepingFocus(parent, work) {
    const id = parent.contains(document.activeElement) ? document.activeElement.getAttribute("data-id") : null;
    work();
    if (id && !parent.contains(document.activeElement)) parent.querySelector(`[data-id="${CSS.escape(id)}"]`)?.focus({ preventScroll: true });
  }

  /** A picture of a widget in `width` units: {node, scene, seek(time)}. A film uses it alone. */
  function picture(name, state, width, chosen = () => {}) {
    const scene = Book.widgets[name].scene(state, width), moments = [];
    const at = (step) => (moments[step] ??= scene.at(step));
    const content = svg("g"), root = svg("svg", { viewBox: `0 0 ${width} ${scene.height}`, class: "picture" }, arrowHead(), content);
    const clickable = () => content.querySelector("[role=button]") !== null;
    let drawn = new Map(); // look: node

    /** Draw only what has changed: what is being clicked on stays. */
    function show(shapes) {
      const before = drawn, looks = shapes.map((shape) => JSON.stringify(shape));
      drawn = new Map(looks.map((look, i) => [look, before.get(look) ?? draw(shapes[i], chosen)]));
      before.forEach((node, look) => drawn.has(look) || node.remove());
      let next = content.firstChild;
      for (const node of drawn.values()) {
        if (node === next) next = next.nextSibling;
        else content.insertBefore(node, next);
      }
    }
    return {
      node: root, scene,
      seek(time) {
        const first = Math.min(scene.steps - 1, Math.floor(time + 1e-6)), share = time - first;
        const from = at(first), to = share > 1e-6 ? at(first + 1) : from;
        // A moment is looked at before it moves on: the last third of its time is the movement.
        keepingFocus(content, () => show(between(from.shapes, to.shapes, Math.max(0, 3 * share - 2))));
        root.setAttribute("role", clickable() ? "group" : "img");
        root.setAttribute("aria-label", from.caption);
        return from;
      },
    };
  }

  return { picture, between, keepingFocus };
})());
