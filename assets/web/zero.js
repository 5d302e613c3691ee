/* A step of data parallelism: what each rank keeps, gets and drops. All of it was recorded by
   running the engines of step 6; see numbers_zero.py. */
"use strict";

(() => {
  const ENGINES = ["naive", "bucket", "zero1", "zero2", "zero3"];
  const COLLECTIVES = { all_reduce: "all-reduce", reduce_scatter: "reduce-scatter", all_gather: "all-gather" };
  const COLUMNS = { weights: "w", own: "g", sum: "Σg", moments: "m v" };
  const AREAS = [["moments", "quiet", 1], ["weights", "dim", 0.5], ["gradients", "accent", 0.8]]; // from below
  const HEIGHTS = { embedding: 16, norms: 14, head: 16 }; // and 28 for a layer
  const GAP = 4; // between rows and between columns
  const LOSS = 8; // bytes: its sum over the ranks is one of the all-reduces
  const MOST = 16.6; // bytes a weight at the upper end of the curve

  const runOf = (state) => Book.data.zero.runs[`${state.engine} ${state.ranks} ${state.micro}`];
  const inN = (bytes) => `${((4 * bytes) / Book.data.zero.bytes).toFixed(2)} N`; // 4 bytes a weight
  const count = (number) => Math.round(number).toLocaleString("en");
  const the = (row) => ({ embedding: "the embedding", head: "the head", norms: "the norms" }[row] ?? row);
  const list = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  const few = (names) => (names.length === Book.data.zero.rows.length ? "all parts" : list(names.map(the)));
  /** The rows whose letters before and now are among those given. */
  const rowsThat = (before, now, from, to) => Book.data.zero.rows.filter((_, i) => from.includes(before[i]) && to.includes(now[i]));

  // --- where things are ---------------------------------------------------------------------------

  function layout(width, ranks) {
    const narrow = width < 500, left = narrow ? 42 : 74, gap = narrow ? 12 : 18;
    const abreast = narrow ? 2 : ranks;
    const panel = (width - left - gap * (abreast - 1)) / abreast, unit = (panel - 3 * GAP) / 5;
    const rows = Book.data.zero.rows, tops = [];
    let high = 0;
    for (const row of rows) {
      tops.push(high);
      high += (HEIGHTS[row] ?? 28) + GAP;
    }
    const line = high + 60, top = 76, lines = ranks / abreast;
    const below = top + lines * line - 46;
    const starts = Object.fromEntries(Object.keys(COLUMNS).map((column, i) => [column, i * (unit + GAP)]));
    /** The corner of a rank's panel. */
    const corner = (rank) => ({ x: left + (rank % abreast) * (panel + gap), y: top + Math.floor(rank / abreast) * line });
    /** A cell, or the strip of it that belongs to a rank. */
    const cell = (rank, row, column, strip) => {
      const { x, y } = corner(rank), whole = column === "moments" ? 2 * unit : unit;
      const box = { x: x + starts[column], y: y + tops[row], w: whole, h: HEIGHTS[rows[row]] ?? 28 };
      return strip === undefined ? box : { ...box, x: box.x + (strip * whole) / ranks, w: whole / ranks };
    };
    return { narrow, left, width, ranks, lines, unit, corner, cell, below, starts, bottom: high - GAP };
  }

  // --- what a rank keeps --------------------------------------------------------------------------

  const SHARD = { opacity: 1, round: 0 }, OTHERS = { opacity: 0.5, round: 0 };

  function contents(place, moment) {
    const shapes = [];
    Book.data.zero.rows.forEach((_, row) => {
      for (let rank = 0; rank < place.ranks; rank++) shapes.push(...ofRank(place, moment, row, rank));
    });
    return shapes;
  }

  function ofRank(place, moment, row, rank) {
    const dealt = moment.moments[row] === "s", key = `${row}.${rank}`, colour = `rank-${rank}`, shapes = [];
    const whole = (column) => shapes.push({ id: `${column}.${key}`, kind: "rect", ...place.cell(rank, row, column), fill: "rank-6", round: 2 });
    const strip = (column, owner, look) => shapes.push({ id: `${column}.${key}.${owner}`, kind: "rect", ...place.cell(rank, row, column, owner), fill: `rank-${owner}`, ...look });
    for (const column of Object.keys(COLUMNS))
      shapes.push({ id: `slot ${column}.${key}`, kind: "rect", ...place.cell(rank, row, column), stroke: "line", round: 2 });
    if (dealt) {
      const letter = moment.weights[row];
      for (let owner = 0; owner < place.ranks; owner++) {
        if (owner === rank || letter === "w") strip("weights", owner, owner === rank ? SHARD : OTHERS);
        else if (letter === "o") strip("weights", owner, { ...SHARD, fill: "quiet" });
        else if (letter === "c") strip("weights", owner, { round: 0, fill: null, stroke: `rank-${owner}`, dashed: true });
      }
      strip("moments", rank, SHARD);
    } else {
      whole("weights");
      whole("moments");
    }
    if (moment.own[row] !== "n") {
      const leaving = moment.own[row] === "l";
      shapes.push({ id: `own.${key}`, kind: "rect", ...place.cell(rank, row, "own"), fill: colour, stroke: colour, opacity: leaving ? 0.22 : 0.5, dashed: leaving, round: 2 });
    }
    if (moment.sum[row] === "w") whole("sum");
    if (moment.sum[row] === "s") strip("sum", rank, SHARD);
    if (moment.sum[row] === "z") {
      const box = place.cell(rank, row, "sum", rank);
      shapes.push({ id: `zeros.${key}`, kind: "rect", ...box, stroke: colour, round: 0 });
      shapes.push({ id: `zero.${key}`, kind: "text", x: box.x + box.w / 2, y: box.y + box.h / 2, text: "0", size: 12 });
    }
    return shapes;
  }

  // --- what moves between two moments -------------------------------------------------------------

  /** [{id, fill, from, to, opacities}], from and to boxes, of what goes from one place to another. It
      lies below what is kept, and is hidden at the ends. */
  function flights(place, before, now, name) {
    const found = [], every = Array.from({ length: place.ranks }, (_, rank) => rank);
    const fly = (key, fill, from, to, opacities) => found.push({ id: `${name} ${key}`, fill, from, to, opacities });
    Book.data.zero.rows.forEach((_, row) => {
      const dealt = now.moments[row] === "s", cell = (rank, column, strip) => place.cell(rank, row, column, strip);
      const fetched = "so".includes(before.weights[row]) && "cw".includes(now.weights[row]);
      const summed = before.own[row] !== "n" && now.own[row] === "n";
      for (const rank of every)
        for (const other of every) {
          const key = `${row} ${rank} ${other}`;
          if (fetched && rank !== other) fly(`gather ${key}`, `rank-${other}`, cell(other, "weights", other), cell(rank, "weights", other), [0.8, 0.3]);
          if (summed && dealt) fly(`scatter ${key}`, `rank-${rank}`, cell(rank, "own", other), cell(other, "sum", other), [0.01, 0.8]);
          if (summed && !dealt) fly(`reduce ${key}`, `rank-${rank}`, cell(rank, "own"), cell(other, "sum"), [0.01, 0.8]);
          if (now.what === "update" && rank === other)
            for (const column of ["moments", "weights"]) {
              const shard = dealt ? rank : undefined;
              fly(`update ${column} ${key}`, dealt ? `rank-${rank}` : "rank-6", cell(rank, "sum", shard), cell(rank, column, shard), [0.8, 0.01]);
            }
        }
    });
    return found;
  }

  const drawn = ({ id, fill, from, to, opacities }, end) => ({ id, kind: "rect", ...[from, to][end], fill, opacity: opacities[end], round: 0 });

  // --- words --------------------------------------------------------------------------------------

  function headline(moment) {
    const { what, row } = moment;
    if (what === "forward" || what === "backward") return `${what === "forward" ? "Forward" : "Backward"}: ${the(row)}`;
    if (what === "summed") return `All-reduce: ${the(row)}`;
    return { zero_grad: "The step begins", "all summed": "The last sums", update: "The update", ends: "All-gather: the new weights" }[what];
  }

  const BEGIN = {
    naive: "Each rank keeps everything: weights w, moments m and v, and soon gradients g.",
    bucket: "Each rank keeps everything: weights w, moments m and v, and soon gradients g.",
    zero1: "Each rank keeps all weights w. Of the moments m and v it keeps its shard. Its shard of the sum Σg is zero.",
    zero2: "Each rank keeps all weights w. Of the moments m and v it keeps its shard. Its shard of the sum Σg is zero.",
    zero3: "Each rank keeps its shard of the weights w, of the sum Σg and of the moments m and v, and nothing else.",
  };

  function caption(state, moment, before) {
    const said = [], dealt = state.engine.startsWith("zero"), say = (rows, text) => rows.length && said.push(text(few(rows)));
    if (moment.what === "zero_grad") return BEGIN[state.engine];
    if (moment.what === "forward") said.push(`Each rank computes ${the(moment.row)} with its own sequences${moment.row === "head" ? ", and the loss" : ""}.`);
    if (moment.what === "backward") said.push(`Each rank computes its own gradients of ${the(moment.row)}.`);
    if (moment.what === "update")
      said.push(dealt ? "Each rank updates its shard of the moments and of the weights, with its shard of the sum." : "Each rank updates all moments and all weights, in the same way.",
        { zero1: "What it has of the other shards is old now.", zero2: "What it has of the other shards is old now.", zero3: "The next forward pass gathers the new weights." }[state.engine] ?? "");
    if (moment.what === "ends") said.push("Each rank sends its new weights to all others. Now all have the same again.");
    const coming = moment.what === "ends" ? [] : rowsThat(before.weights, moment.weights, "s", "c");
    const leaving = rowsThat(before.own, moment.own, "nh", "l");
    const under = [...(coming.length ? [`the weights of ${few(coming)}`] : []), ...(leaving.length ? [`the gradients of ${few(leaving)}`] : [])];
    if (under.length) said.push(`${capital(list(under))} are on their way.`);
    say(rowsThat(before.weights, moment.weights, "wc", "s"), (rows) => `The weights of ${rows} are dropped.`);
    say(rowsThat(before.own, moment.own, "hl", "n"), (rows) => (dealt ? `Each rank has its shard of the sum for ${rows}.` : `Each rank has the sum for ${rows}.`));
    return said.filter(Boolean).join(" ");
  }

  // --- the curve ----------------------------------------------------------------------------------

  function curve(place, run, step) {
    const { left, width, below, narrow } = place, top = below + (narrow ? 116 : 88), high = narrow ? 96 : 104, foot = top + high;
    const right = width - 4, n = Book.data.zero.bytes / 4, size = narrow ? 11 : 12;
    const x = (time) => left + (time / (run.moments.length - 1)) * (right - left), y = (bytes) => foot - (bytes / (MOST * n)) * high;
    const shapes = [0, 4, 8, 12, 16].flatMap((bytes) => [
      { id: `grid ${bytes}`, kind: "line", x: left, x2: right, y: y(bytes * n), y2: y(bytes * n), stroke: "line", thick: 0.7 },
      { id: `tick ${bytes}`, kind: "text", x: left - 6, y: y(bytes * n), anchor: "end", text: bytes ? `${bytes} N` : "0", size, fill: "dim" },
    ]);
    // Kinds in the order of AREAS; a point of the curve has weights, gradients, moments.
    const stacked = run.curve.map(([time, weights, gradients, moments]) => [time, moments, moments + weights, moments + weights + gradients]);
    AREAS.forEach(([name, fill, opacity], i) => {
      const edge = (which) => stacked.flatMap((point, p) => [[point[0], point[which]], ...(stacked[p + 1] ? [[stacked[p + 1][0], point[which]]] : [])]);
      const under = i ? edge(i).reverse() : [[stacked.at(-1)[0], 0], [0, 0]];
      const path = [...edge(i + 1), ...under].map(([time, bytes]) => `${x(time).toFixed(1)} ${y(bytes).toFixed(1)}`).join("L");
      shapes.push({ id: `area ${name}`, kind: "path", d: `M${path}Z`, fill, opacity });
    });
    const now = stacked.filter(([time]) => time <= step).at(-1);
    shapes.push({ id: "cursor", kind: "line", x: x(step), x2: x(step), y: top - 2, y2: foot, stroke: "ink" });
    shapes.push({ id: "now", kind: "circle", x: x(step), y: y(now[3]), r: 4.5, fill: "ink" });
    shapes.push(...keyOf(place, now, top - (narrow ? 50 : 22), size), ...phases(place, run, x, foot, size));
    return { shapes, foot: foot + 22 };
  }

  /** What the areas of the curve are, and how much that is now. */
  function keyOf(place, now, y, size) {
    const { left, narrow } = place, x0 = narrow ? 0 : left;
    const shapes = [{ id: "key", kind: "text", anchor: "start", x: x0, y, text: `A rank keeps ${inN(now[3])} bytes`, size: size + 1, bold: true }];
    [...AREAS].reverse().forEach(([name, fill, opacity], i) => {
      const x = narrow ? i * 122 : left + 232 + i * 156, line = narrow ? y + 24 : y, which = 3 - i;
      shapes.push({ id: `key ${name}`, kind: "rect", x, y: line - 6, w: 12, h: 12, fill, opacity, round: 2 });
      shapes.push({ id: `key text ${name}`, kind: "text", anchor: "start", x: x + 18, y: line, text: `${name} ${inN(now[which] - (which > 1 ? now[which - 1] : 0))}`, size });
    });
    return shapes;
  }

  /** Names of what goes on, under the curve. */
  function phases(place, run, x, foot, size) {
    const names = { forward: "forward", backward: "backward", summed: "all-reduce" }, found = [];
    run.moments.forEach(({ what, micro }, step) => {
      const last = found.at(-1);
      if (last && last.what === what && last.micro === micro) last.end = step;
      else found.push({ what, micro, begin: step, end: step });
    });
    return found.filter(({ what }) => names[what]).flatMap(({ what, micro, begin, end }) => [
      { id: `phase ${what} ${micro}`, kind: "line", x: x(begin - 0.35), x2: x(end + 0.35), y: foot + 6, y2: foot + 6, stroke: "dim", thick: 2 },
      { id: `phase name ${what} ${micro}`, kind: "text", x: x((begin + end) / 2), y: foot + 16, text: names[what], size, fill: "dim" },
    ]);
  }

  // --- heads and the legend -----------------------------------------------------------------------

  function heads(place, state, moment) {
    const size = place.narrow ? 11 : 12, shapes = [];
    shapes.push({ id: "headline", kind: "text", anchor: "start", x: 0, y: 12, text: headline(moment), size: place.narrow ? 15 : 17, bold: true });
    if (moment.micro >= 0 && ["forward", "backward"].includes(moment.what))
      shapes.push({ id: "micro", kind: "text", anchor: "end", x: place.width, y: 12, text: `micro-batch ${moment.micro + 1} of ${state.micro}`, size, fill: "dim" });
    for (let rank = 0; rank < place.ranks; rank++) {
      const { x, y } = place.corner(rank);
      shapes.push({ id: `rank ${rank}`, kind: "rect", x, y: y - 40, w: 12, h: 12, fill: `rank-${rank}`, round: 2 });
      shapes.push({ id: `rank name ${rank}`, kind: "text", anchor: "start", x: x + 18, y: y - 34, text: `rank ${rank}`, size: size + 1, bold: true });
      for (const [column, text] of Object.entries(COLUMNS)) {
        const box = place.cell(rank, 0, column);
        shapes.push({ id: `head ${column} ${rank}`, kind: "text", x: box.x + box.w / 2, y: y - 12, text, size: size + 1, fill: "dim" });
      }
    }
    for (let line = 0; line < place.lines; line++)
      Book.data.zero.rows.forEach((row, i) => {
        const box = place.cell(line * 2, i, "weights"), text = place.narrow ? row.replace("embedding", "embed") : row;
        const active = row === moment.row;
        shapes.push({ id: `row ${line} ${i}`, kind: "text", anchor: "end", x: place.left - 8, y: box.y + box.h / 2, text, size, fill: active ? "ink" : "dim", bold: active });
      });
    return shapes;
  }

  /** A frame around the row that the ranks compute, or around all of them. */
  function frames(place, moment) {
    if (moment.what === "zero_grad") return [];
    const rows = Book.data.zero.rows, row = rows.indexOf(moment.row), last = rows.length - 1;
    return Array.from({ length: place.lines }, (_, line) => {
      const first = place.cell(line * 2, row < 0 ? 0 : row, "weights"), end = place.cell(line * 2, row < 0 ? last : row, "weights");
      return { id: `frame ${line}`, kind: "rect", x: place.left - 3, y: first.y - 3, w: place.width - place.left + 3, h: end.y + end.h - first.y + 6, stroke: "accent", round: 5 };
    });
  }

  function legend(place, dealt) {
    const { narrow, below } = place, size = narrow ? 11 : 12;
    const words = narrow ? ["w weights · g gradients of own sequences", "Σg their sum over all ranks · m v moments"]
      : ["w weights · g gradients of the rank's own sequences · Σg their sum over all ranks · m v the optimizer's moments"];
    const shapes = words.map((text, i) => ({ id: `words ${i}`, kind: "text", anchor: "start", x: narrow ? 0 : place.left, y: below + 10 + 16 * i, text, size, fill: "dim" }));
    const own = ["its own gradients", { fill: "rank-0", stroke: "rank-0", opacity: 0.5 }], way = ["on its way", { stroke: "rank-0", dashed: true }];
    const marks = dealt ? [["the rank's shard", { fill: "rank-0" }], ["another's", { fill: "rank-1", opacity: 0.5 }], own, way]
      : [["the same on all ranks", { fill: "rank-6" }], own, way];
    let x = narrow ? 0 : place.left;
    for (const [text, look] of marks) {
      const y = below + (narrow ? 44 : 32);
      shapes.push({ id: `mark ${text}`, kind: "rect", x, y: y - 6, w: 12, h: 12, round: 2, ...look });
      shapes.push({ id: `mark text ${text}`, kind: "text", anchor: "start", x: x + 17, y, text, size, fill: "dim" });
      x += 17 + text.length * (narrow ? 5.2 : 6) + (narrow ? 8 : 26);
    }
    return shapes;
  }

  // --- numbers and tables -------------------------------------------------------------------------

  function numbers(run, step) {
    const { sent } = run.moments[step], now = run.curve.filter(([time]) => time <= step);
    const kept = ([, ...kinds]) => kinds.reduce((a, b) => a + b);
    const collectives = Object.keys(COLLECTIVES).filter((kind) => run.predicted[kind]);
    const through = collectives.reduce((sum, kind) => sum + ((sent[kind]?.[1] ?? 0) * run.predicted[kind][2]) / run.predicted[kind][1], 0);
    return [
      { name: "kept", label: "bytes kept now", text: count(kept(now.at(-1))) },
      { name: "most", label: "most so far", text: inN(Math.max(...now.map(kept))) },
      ...collectives.filter((kind) => run.predicted[kind][1] > LOSS).map((kind) => (
        { name: kind, label: `${COLLECTIVES[kind]}, of ${count(run.predicted[kind][1])}`, text: count(sent[kind]?.[1] ?? 0) })),
      { name: "sent", label: "bytes that a rank has sent", text: count(through) },
    ];
  }

  function tables(state, run) {
    const whole = (engine) => runOf({ ...state, engine });
    return [
      {
        title: "The ledger of this step beside the formulas of traffic_data.py",
        head: ["collective", "calls", "by formula", "bytes", "by formula", "a rank sends in a ring"],
        rows: Object.keys(COLLECTIVES).filter((kind) => run.predicted[kind]).map((kind) => {
          const [seen, due] = [run.counted[kind] ?? [0, 0, 0], run.predicted[kind]];
          const name = due[1] > LOSS ? COLLECTIVES[kind] : `${COLLECTIVES[kind]} (loss)`;
          return [name, ...[seen[0], due[0], seen[1], due[1], seen[2]].map(count)];
        }),
      },
      {
        title: "All engines",
        head: ["engine", "most bytes kept", "kept after the step", "bytes that a rank sends"],
        rows: ENGINES.map((engine) => {
          const { curve, counted } = whole(engine), kept = ([, ...kinds]) => kinds.reduce((a, b) => a + b);
          const sent = Object.values(counted).reduce((sum, row) => sum + row[2], 0);
          return [engine === state.engine ? `▸\u00a0${engine}` : engine, inN(Math.max(...curve.map(kept))), inN(kept(curve.at(-1))), count(sent)];
        }),
      },
    ];
  }

  Book.define("zero", {
    title: "What each rank keeps in a step",
    data: ["zero"],
    options: {
      engine: { label: "engine", choices: ENGINES, value: "zero3" },
      ranks: { label: "ranks", choices: [2, 4], value: "4" },
      micro: { label: "micro-batches", choices: [1, 2], value: "1" },
    },
    seconds: () => 1.8,
    scene(state, width) {
      const run = runOf(state), place = layout(width, Number(state.ranks)), { moments } = run;
      const between = moments.slice(1).map((now, i) => flights(place, moments[i], now, `${i}`));
      const at = (step) => {
        const moment = moments[step];
        return {
          caption: caption(state, moment, moments[Math.max(0, step - 1)]),
          numbers: numbers(run, step),
          shapes: [
            ...(between[step - 1] ?? []).map((flight) => drawn(flight, 1)),
            ...(between[step] ?? []).map((flight) => drawn(flight, 0)),
            ...contents(place, moment),
            ...frames(place, moment), ...heads(place, state, moment), ...legend(place, state.engine.startsWith("zero")), ...curve(place, run, step).shapes,
          ],
        };
      };
      return { height: curve(place, run, 0).foot, steps: moments.length, at, tables: tables(state, run) };
    },
  });
})();
