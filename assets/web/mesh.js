/* The mesh of ranks: the place of a rank, its groups along each axis, and what it holds of a matrix,
   of the tokens, of the batch and of the layers. The model comes from numbers_mesh.py. */
"use strict";

(() => {
  const AXES = ["pp", "dp", "cp", "tp"]; // slowest first
  const COLOURS = { tp: "rank-0", cp: "rank-2", dp: "rank-1", pp: "rank-5" };
  const LARGEST = 64;
  const model = () => Book.data.mesh;
  const sizesOf = ({ pp, dp, cp, tp }) => ({ pp, dp, cp, tp });
  const product = (sizes, axes = AXES) => axes.reduce((all, axis) => all * sizes[axis], 1);

  // --- formulas -----------------------------------------------------------------------------------

  /** {pp, dp, cp, tp} of a rank: tp varies fastest. */
  function placeOf(rank, sizes) {
    const place = {};
    for (const axis of [...AXES].reverse()) {
      place[axis] = rank % sizes[axis];
      rank = Math.floor(rank / sizes[axis]);
    }
    return place;
  }

  function rankAt(place, sizes) {
    return AXES.reduce((rank, axis) => rank * sizes[axis] + place[axis], 0);
  }

  /** The ranks that differ from this one along some axes only, in order. */
  function group(rank, axes, sizes) {
    const own = placeOf(rank, sizes);
    const same = (place) => AXES.every((axis) => axes.includes(axis) || place[axis] === own[axis]);
    return Array.from({ length: product(sizes) }, (_, r) => r).filter((r) => same(placeOf(r, sizes)));
  }

  /** All groups along some axes, by their first ranks. */
  function groups(axes, sizes) {
    const all = Array.from({ length: product(sizes) }, (_, rank) => group(rank, axes, sizes));
    return all.filter(([first], rank) => first === rank);
  }

  /** [start, stop) of a dim that tp ranks share. */
  function part(length, ranks, place) {
    return [Math.floor((length * place) / ranks), Math.floor((length * (place + 1)) / ranks)];
  }

  /** The two chunks of a sequence that a cp rank has, each [start, stop): one from each end. */
  function chunks(length, ranks, place) {
    const count = 2 * ranks, least = Math.floor(length / count), larger = length % count;
    const begin = (chunk) => chunk * least + Math.min(chunk, larger);
    return [place, count - 1 - place].map((chunk) => [begin(chunk), begin(chunk + 1)]);
  }

  /** Which sequences of a batch a dp rank has, with micro-batches of one. */
  function sequences(count, ranks, place) {
    return Array.from({ length: count }, (_, i) => i).filter((i) => i % ranks === place);
  }

  Book.formulas.mesh = { placeOf, rankAt, group, groups, part, chunks, sequences };

  // --- words --------------------------------------------------------------------------------------

  const count = (number) => number.toLocaleString("en-US");
  const range = ([start, stop]) => (stop - start === 1 ? `${start}` : `${count(start)} – ${count(stop - 1)}`);
  const placeWords = (place, axes) => axes.map((axis) => `${axis} ${place[axis]}`).join(", ");
  const list = (ranks) => `rank${ranks.length > 1 ? "s" : ""} ${ranks.length > 8 ? `${ranks.slice(0, 6).join(", ")}, …, ${ranks.at(-1)}` : ranks.join(", ")}`;

  /** What a rank holds along an axis: words, and which of the pieces of a bar. */
  function holding(axis, place, sizes) {
    const m = model(), n = sizes[axis], at = place[axis];
    if (axis === "tp") {
      const heads = part(m.heads, n, at);
      return { words: `q_proj: rows ${range(part(m.rows, n, at))} of ${count(m.rows)}, heads ${range(heads)}`, pieces: n, mine: [at] };
    }
    if (axis === "cp") {
      const [early, late] = chunks(m.seq_len, n, at), whole = n === 1;
      return { words: whole ? `all ${count(m.seq_len)} tokens of a sequence` : `tokens ${range(early)} and ${range(late)}`, pieces: 2 * n, mine: [at, 2 * n - 1 - at] };
    }
    if (axis === "dp") {
      const mine = sequences(m.sequences, n, at), some = mine.length > 4 ? [...mine.slice(0, 3), "…", mine.at(-1)] : mine;
      return { words: `${n === 1 ? "all " + mine.length : ""} sequences ${n === 1 ? "" : some.join(", ") + " "}of a batch`.trim(), pieces: m.sequences, mine };
    }
    const [start, stop] = m.stages[n][at], words = [`layers ${range([start, stop])} of ${m.layers}`];
    if (at === 0) words.push("the embedding");
    if (at === n - 1) words.push("the head");
    return { words: words.join(", "), pieces: m.layers, mine: Array.from({ length: stop - start }, (_, i) => start + i) };
  }

  const WHY = {
    tp: "Together they have all rows of each matrix.",
    cp: "Together they have all tokens of a sequence. Each has an early chunk and a late one.",
    dp: "Together they have all sequences of a batch.",
    pp: "Together they have all layers.",
    "dp cp": "They have the same weights and see other tokens. So their gradients are added up.",
    "pp dp cp": "The loss is added up over them.",
    "pp tp": "They have other weights of the model. So the squares of their gradients are added up for the norm.",
  };

  /** The moments: the rank with its groups, then each group that is larger than one rank. */
  function momentsOf(sizes) {
    const split = (axes) => axes.every((axis) => sizes[axis] > 1);
    return [[], ...Object.keys(WHY).map((key) => key.split(" ")).filter(split)];
  }

  function captionOf(axes, rank, sizes) {
    const place = placeOf(rank, sizes);
    if (!axes.length) return `Rank ${rank} stands at ${placeWords(place, AXES)}. It is in one group along each axis. In a group only one of these numbers changes.`;
    const mine = group(rank, axes, sizes), count = product(sizes) / mine.length;
    const other = count === 1 ? "All ranks are one group." : count <= 8 ? "Ranks of one colour and letter are a group." : `There are ${count} groups along these axes.`;
    return `${other} That of rank ${rank} has ${list(mine)}. ${WHY[axes.join(" ")]}`;
  }

  // --- where the ranks stand ----------------------------------------------------------------------

  /** Where the ranks stand: for each pp a panel, in it for each dp a block of cp × tp cells. Blocks fill
      lines, and so do panels. The cells are as large as fits; of all ways the lowest is taken. */
  function layout(sizes, wide, across) {
    const tallest = wide ? 340 : 300, tried = (wide ? [58, 50, 43, 37] : [44, 37, 31]).map((size) => lowest(sizes, across, size, wide ? 40 : 30));
    return tried.find((found) => found && found.height <= tallest) ?? tried.at(-1);
  }

  /** The lowest layout with cells of a size; null where the area is not wide enough. */
  function lowest(sizes, across, size, name) {
    const tried = [];
    for (let k = 1; k <= sizes.dp; k++) tried.push(layoutOf(sizes, across, size, name, k));
    return tried.filter(({ columns }) => columns > 0).reduce((a, b) => (a && a.height <= b.height ? a : b), null);
  }

  /** A layout with k blocks in a line. With one block in a line its dp stands at the left. */
  function layoutOf(sizes, across, size, name, k) {
    const step = size + 4, pad = sizes.pp > 1 ? 8 : 0, beside = k === 1 && sizes.dp > 1;
    const left = (beside ? name : 0) + (sizes.cp > 1 ? name : 0), names = { pp: sizes.pp > 1 ? 22 : 0, dp: sizes.dp > 1 && !beside ? 18 : 0, tp: sizes.tp > 1 ? 20 : 0 };
    const gapX = sizes.tp > 1 ? 14 : 4, gapY = !beside || sizes.cp > 1 ? 12 : 4, block = { w: sizes.tp * step - 4, h: sizes.cp * step - 4 };
    // The names of tp stand above each line of blocks, or only above the first one.
    const line = block.h + names.dp + (beside ? 0 : names.tp) + gapY, above = pad + names.pp + (beside ? names.tp : 0);
    const w = 2 * pad + left + k * (block.w + gapX) - gapX, h = above + Math.ceil(sizes.dp / k) * line - gapY + pad;
    const columns = Math.min(sizes.pp, Math.floor((across + 12) / (w + 12))), height = Math.ceil(sizes.pp / columns) * (h + 12) - 12;
    const panel = (pp) => ({ x: (pp % columns) * (w + 12), y: Math.floor(pp / columns) * (h + 12), w, h });
    const corner = (pp, dp) => ({ x: panel(pp).x + pad + left + (dp % k) * (block.w + gapX), y: panel(pp).y + above + Math.floor(dp / k) * line + names.dp + (beside ? 0 : names.tp) });
    const cell = ({ pp, dp, cp, tp }) => ({ x: corner(pp, dp).x + tp * step, y: corner(pp, dp).y + cp * step, w: size, h: size });
    return { size, step, name, names, k, beside, block, columns, height, panel, corner, cell };
  }

  /** The frames and the names of places along each axis. */
  function frame(sizes, at, small) {
    const shapes = [], words = (id, x, y, more) => shapes.push({ id, kind: "text", x, y, text: id.split(",")[0], size: small, fill: "dim", ...more });
    for (let pp = 0; pp < sizes.pp; pp++) {
      const { x, y, w, h } = at.panel(pp);
      if (sizes.pp > 1) {
        shapes.push({ id: `panel ${pp}`, kind: "rect", x, y, w, h, round: 6, stroke: "line" });
        words(`pp ${pp}`, x + w / 2, y + 16, { bold: true, fill: "ink" });
      }
      for (let dp = 0; dp < sizes.dp; dp++) {
        const { x: left, y: top } = at.corner(pp, dp), middle = top + at.block.h / 2, where = `${pp} ${dp}`;
        if (at.beside) words(`dp ${dp},${where}`, left - 6 - (sizes.cp > 1 ? at.name : 0), middle, { anchor: "end", fill: "ink" });
        else if (sizes.dp > 1) words(`dp ${dp},${where}`, left + at.block.w / 2, top - at.names.tp - 9, { fill: "ink" });
        for (let tp = 0; tp < sizes.tp && sizes.tp > 1 && !(at.beside && dp); tp++) words(`tp ${tp},${where}`, left + tp * at.step + at.size / 2, top - 10);
        for (let cp = 0; cp < sizes.cp && sizes.cp > 1 && dp % at.k === 0; cp++) words(`cp ${cp},${where}`, left - 6, top + cp * at.step + at.size / 2, { anchor: "end" });
      }
    }
    return shapes;
  }

  /** How each rank looks at a moment. */
  function looks(own, axes, sizes) {
    const all = Array.from({ length: product(sizes) }, (_, rank) => ({ fill: "quiet", text: rank }));
    if (axes.length) {
      // The own group has the colour of its axis; the others, if they are few, have the rest.
      // Their letters say the same to those who see no colours.
      const every = groups(axes, sizes), few = every.length <= 8, colour = COLOURS[axes.at(-1)];
      const rest = Array.from({ length: 8 }, (_, i) => `rank-${i}`).filter((name) => name !== colour);
      every.forEach((ranks, i) => {
        const mine = ranks.includes(own);
        if (few || mine) for (const rank of ranks) all[rank] = { fill: mine ? colour : rest[0], text: `${rank}\n${few ? "ABCDEFGH"[i] : "own"}` };
        if (!mine) rest.shift();
      });
      Object.assign(all[own], { stroke: "ink", thick: 4 });
    } else {
      for (const axis of AXES) for (const rank of group(own, [axis], sizes)) all[rank] = { fill: COLOURS[axis], text: `${rank}\n${axis}` };
      all[own] = { fill: "ink", ink: "paper", text: own };
    }
    return all;
  }

  // --- what the rank holds ------------------------------------------------------------------------

  /** For each axis its place, its group and a bar of which the rank's pieces are lit. */
  function held(rank, sizes, axes, { x, y, w, size }) {
    const place = placeOf(rank, sizes), shapes = [];
    let top = y;
    for (const axis of ["tp", "cp", "dp", "pp"]) {
      const { words, pieces, mine } = holding(axis, place, sizes), opacity = !axes.length || axes.includes(axis) ? 1 : 0.4;
      const text = { kind: "text", anchor: "start", size, opacity }, down = axis === "tp"; // a matrix is cut into rows
      shapes.push({ id: `tag ${axis}`, kind: "rect", x, y: top, w: 46, h: 22, fill: COLOURS[axis], text: `${axis} ${place[axis]}`, size, bold: true, opacity });
      shapes.push({ ...text, id: `group ${axis}`, x: x + 54, y: top + 11, text: `group: ${group(rank, [axis], sizes).join(", ")}` });
      shapes.push({ ...text, id: `words ${axis}`, x, y: top + 34, text: words, fill: "dim" });
      const h = down ? 42 : 22, length = (down ? h : w) / pieces;
      for (let piece = 0; piece < pieces; piece++) {
        const where = down ? { x, y: top + 46 + piece * length, w, h: length - 1 } : { x: x + piece * length, y: top + 46, w: length - 1, h };
        const lit = mine.includes(piece) ? COLOURS[axis] : "quiet";
        shapes.push({ id: `${axis} piece ${piece}`, kind: "rect", ...where, round: 0, fill: lit, opacity, size, text: axis === "cp" ? piece : undefined });
      }
      top += 62 + h;
    }
    return shapes;
  }
  const HELD = 4 * 62 + 42 + 3 * 22 - 16; // its height

  function scene(state, width) {
    const sizes = sizesOf(state), wide = width > 500, { rank } = state, moments = momentsOf(sizes), top = 30;
    const spot = layout(sizes, wide, wide ? 430 : 352), left = wide ? 0 : 4;
    const side = wide ? { x: 452, y: top, w: 308, size: 12 } : { x: 4, y: top + spot.height + 24, w: 352, size: 11 };
    const moved = (shape) => ({ ...shape, x: shape.x + left, y: shape.y + top });

    function at(step) {
      const axes = moments[step], heading = { kind: "text", y: 12, anchor: "start", size: wide ? 14 : 12 };
      const title = axes.length ? `group(${axes.map((axis) => `"${axis}"`).join(", ")})` : `rank ${rank} and its groups`;
      const ranks = looks(rank, axes, sizes).map((look, r) => ({
        id: `rank ${r}`, kind: "rect", ...spot.cell(placeOf(r, sizes)), size: wide ? 13 : 11, ...look,
        choose: { rank: r }, tab: r === rank, pressed: r === rank, label: `rank ${r}: ${placeWords(placeOf(r, sizes), AXES)}`,
      }));
      const shapes = [{ ...heading, id: "title", x: left, text: title, mono: axes.length > 0 }, ...[...frame(sizes, spot, wide ? 12 : 11), ...ranks].map(moved)];
      if (wide) shapes.push({ ...heading, id: "held", x: side.x, text: `what rank ${rank} holds of ${model().model}` });
      return { shapes: [...shapes, ...held(rank, sizes, axes, side)], caption: captionOf(axes, rank, sizes) };
    }
    return { height: Math.max(top + spot.height, side.y + HELD) + 4, steps: moments.length, at, numbers: figures(rank, sizes) };
  }

  function figures(rank, sizes) {
    const place = placeOf(rank, sizes), [first, ...rest] = AXES;
    const sum = rest.reduce((words, axis, i) => `${i ? `(${words})` : words} · ${sizes[axis]} + ${place[axis]}`, String(place[first]));
    return [
      { name: "ranks", label: "ranks", text: product(sizes) },
      { name: "place", label: `rank ${rank} stands at`, text: placeWords(place, AXES) },
      { name: "formula", label: "its number, as tp varies fastest", text: `${sum} = ${rank}` },
    ];
  }

  // --- options ------------------------------------------------------------------------------------

  /** As long as there are more than 64 ranks, make the largest other axis smaller. */
  function settle(state, changed) {
    while (product(state) > LARGEST) {
      const others = AXES.filter((axis) => axis !== changed).sort((a, b) => state[b] - state[a]);
      state[others[0]] = model().sizes[others[0]].filter((size) => size < state[others[0]]).at(-1);
    }
    state.rank = Math.min(state.rank, product(state) - 1);
  }
  const axis = (name, value) => ({ label: name, get values() { return model().sizes[name]; }, value });

  Book.define("mesh", {
    title: "The mesh",
    data: ["mesh"],
    options: {
      tp: axis("tp", 2), cp: axis("cp", 2), dp: axis("dp", 2), pp: axis("pp", 1),
      rank: { label: "rank", min: 0, max: (state) => product(state) - 1, value: 5 },
    },
    seconds: () => 3,
    settle,
    scene,
  });
})();
