/* Step 5's ring, forward and backward: who holds which keys and values, and what each rank computes
   with them. Who sends what, and who attends to what, comes from the code of step 5
   (assets/numbers_ring.py); this file counts and draws. */
"use strict";

(() => {
  // --- what has happened up to a moment -----------------------------------------------------------

  /** Moments 0 to n - 1 are the steps forward, n to 2n - 1 those backward; then all is done. */
  const stepsOf = (rank) => [...rank.forward, ...rank.backward];
  const ofStep = (moment, count) => ({ backward: moment >= count, step: moment % count, done: moment === 2 * count });

  /** The squares (chunks of queries × chunks of keys) of one step, half of them on the diagonal. */
  function squares(ring, rank, does) {
    const keys = does.keys.map((i) => ring[does.block].chunks[i]);
    return does.queries.flatMap((i) => keys.map((key) => [ring[rank].chunks[i], key]))
      .filter(([query, key]) => !does.causal || key <= query);
  }

  const workOf = (cells) => cells.reduce((sum, [query, key]) => sum + (query === key ? 0.5 : 1), 0);

  /** The work of each rank in a pass, up to and with a step. */
  function work(ring, pass, step) {
    return ring.map((rank, r) => rank[pass].slice(0, step + 1).reduce((sum, does) => sum + workOf(squares(ring, r, does)), 0));
  }

  /** Blocks and shares of gradients that a rank has sent up to a moment, and their bytes. */
  function sent(rank, moment, blockBytes) {
    const found = { blocks: 0, shares: 0, bytes: 0 };
    for (const does of stepsOf(rank).slice(0, moment + 1)) {
      if (does.block_to !== null) { found.blocks += 1; found.bytes += blockBytes; }
      if (does.gradients_to !== null) { found.shares += 1; found.bytes += (blockBytes * does.keys.length) / 2; }
    }
    return found;
  }

  const rounded = (value) => String(Math.round(value * 1000) / 1000);
  const grouped = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

  // --- words --------------------------------------------------------------------------------------

  function caption(ring, moment, chosen) {
    const count = ring.length, { backward, step, done } = ofStep(moment, count);
    if (done) return "The last shares are home. Each rank has added up the gradients of its own keys and values.";
    const does = ring[chosen][backward ? "backward" : "forward"][step], kv = `kv ${does.block}`;
    const begin = `${backward ? "Backward" : "Forward"}, step ${step}.`;
    const what = does.block === chosen
      ? `Rank ${chosen} computes with its own block, under the causal mask.`
      : does.keys.length === 0
        ? `Rank ${chosen} skips ${kv}: all its keys come after the queries of rank ${chosen}.`
        : does.keys.length === 1
          ? `Rank ${chosen} has ${kv}. Its queries attend only to the early half of these keys.`
          : does.queries.length === 1
            ? `Rank ${chosen} has ${kv}. Only the late half of its queries attends to these keys.`
            : `Rank ${chosen} has ${kv}. All its queries attend to all these keys.`;
    const block = does.block_to !== null ? ` Meanwhile it sends ${kv} to rank ${does.block_to}.` : "";
    const home = does.gradients_to !== null ? ` Its share of the gradient then goes straight to rank ${does.gradients_to}.` : "";
    const first = backward && step === 0 ? " This block came last, so it is still there." : "";
    const own = backward && step === count - 1 ? " It has kept this block, so no message is needed." : "";
    return `${begin} ${what}${first}${own}${block}${home}`;
  }

  function figures(ring, moment, chosen, blockBytes) {
    const count = ring.length, { backward, step, done } = ofStep(moment, count);
    const pass = backward ? "backward" : "forward", whole = work(ring, pass, count);
    const mine = work(ring, pass, done ? count : step)[chosen], total = sent(ring[chosen], moment, blockBytes);
    return [
      { name: "ratio", label: "busiest rank ÷ mean", text: rounded((Math.max(...whole) * count) / whole.reduce((a, b) => a + b)) },
      { name: "work", label: `squares of rank ${chosen}, this pass`, text: `${rounded(mine)} of ${rounded(whole[chosen])}` },
      { name: "messages", label: `messages of rank ${chosen}`, text: `${total.blocks} kv` + (backward ? `, ${total.shares} ∇` : "") },
      { name: "bytes", label: "their bytes, one layer", text: grouped(total.bytes) },
    ];
  }

  // --- the ring -----------------------------------------------------------------------------------

  const NODE = { w: 58, h: 46 };

  /** Ranks on a circle with their blocks; arrows to where blocks go; shares on their way home. */
  function circle(ring, moment, chosen, middle, radius) {
    const count = ring.length, { backward, step, done } = ofStep(moment, count), shapes = [], ways = [];
    const point = (rank, r) => ({ x: middle.x + r * Math.sin((2 * Math.PI * rank) / count), y: middle.y - r * Math.cos((2 * Math.PI * rank) / count) });
    const now = ring.map((rank) => (done ? null : rank[backward ? "backward" : "forward"][step]));

    ring.forEach((rank, r) => {
      if (now[r] && now[r].block_to !== null) shapes.push(hop(r, now[r].block_to, backward));
    });
    // The share of each step is computed in that step, travels in the next, and is home after it.
    ring.forEach((rank, r) => rank.backward.forEach((does, k) => {
      const age = moment - count - k;
      if (does.gradients_to === null || age < 0 || age > 2) return;
      const start = point(r, radius - 42), end = point(does.gradients_to, radius - 42), at = age === 0 ? point(r, radius) : age === 2 ? point(does.gradients_to, radius) : { x: start.x + 0.8 * (end.x - start.x), y: start.y + 0.8 * (end.y - start.y) };
      if (age === 1) ways.push({ id: `way-${r}-${k}`, kind: "line", x: start.x, y: start.y, x2: end.x, y2: end.y, stroke: "line", thick: 1.5 });
      const half = does.keys.length === 1;
      shapes.push({ id: `share-${r}-${k}`, kind: "rect", x: at.x - 15, y: at.y - 9, w: 30, h: 18, round: 9, fill: `rank-${does.block}`, text: `${half ? "½" : ""}∇${does.block}`, size: 12 });
    }));
    ring.forEach((rank, r) => shapes.push(...node(r)));
    ring.forEach((rank, r) => { if (now[r]) shapes.push(block(r)); });
    return [...ways, ...shapes];

    /** An arrow from a rank to its neighbour, from edge to edge. */
    function hop(from, to, back) {
      const a = point(from, radius), b = point(to, radius), length = Math.hypot(b.x - a.x, b.y - a.y);
      const ux = (b.x - a.x) / length, uy = (b.y - a.y) / length;
      const edge = 4 + Math.min(NODE.w / 2 / Math.abs(ux), NODE.h / 2 / Math.abs(uy));
      const aside = count === 2 ? 12 : 0; // two ranks send to each other on two lines
      return { id: `hop-${from}-${back}`, kind: "arrow", x: a.x + ux * edge - uy * aside, y: a.y + uy * edge + ux * aside, x2: b.x - ux * edge - uy * aside, y2: b.y - uy * edge + ux * aside, stroke: "ink", thick: 1.5 };
    }

    function node(r) {
      const { x, y } = point(r, radius), mine = r === chosen, shapes = [
        { id: `node-${r}`, kind: "rect", x: x - NODE.w / 2, y: y - NODE.h / 2, w: NODE.w, h: NODE.h, round: 8, fill: "paper", stroke: mine ? "ink" : `rank-${r}`, thick: mine ? 3 : 2,
          choose: { rank: r }, label: `look at rank ${r}`, pressed: mine },
        { id: `node-name-${r}`, kind: "text", x, y: y - 13, text: `rank ${r}`, size: 12, bold: mine },
      ];
      if (backward) { // a dot for each share of this rank's gradient, filled when it is there
        const due = ring.flatMap((rank) => rank.backward.map((does, k) => ({ does, k }))).filter(({ does }) => does.block === r && does.keys.length);
        const home = due.filter(({ does, k }) => (does.gradients_to === null ? done || k < step : moment - count - k >= 2)).length;
        due.forEach((_, i) => shapes.push({ id: `dot-${r}-${i}`, kind: "circle", x: x + (i - (due.length - 1) / 2) * 6.5, y: y + 17.5, r: 2.2, fill: i < home ? "ink" : "paper", stroke: i < home ? "ink" : "dim" }));
      }
      return shapes;
    }

    /** The block that a rank has now; dashed where the rank skips it. */
    function block(r) {
      const { x, y } = point(r, radius), does = now[r], skipped = does.keys.length === 0;
      // At the end of backward a rank takes the block that it has kept: another one than the traveller.
      const id = backward && step === count - 1 ? `own-${r}` : `kv-${does.block}`;
      return { id, kind: "rect", x: x - 20, y: y - 5 + (backward ? 0 : 3), w: 40, h: 17, round: 4, fill: skipped ? "paper" : `rank-${does.block}`, stroke: skipped ? `rank-${does.block}` : null, dashed: skipped, text: `kv ${does.block}`, size: 12 };
    }
  }

  // --- queries × keys -----------------------------------------------------------------------------

  /** The square of all queries and keys, below its diagonal; what is computed now stands out. */
  function square(ring, moment, chosen, corner, side) {
    const count = ring.length, { backward, step, done } = ofStep(moment, count), pass = backward ? "backward" : "forward";
    const cell = side / (2 * count), state = new Map(), shapes = [];
    ring.forEach((rank, r) => rank[pass].slice(0, done ? count : step + 1).forEach((does, k) =>
      squares(ring, r, does).forEach(([query, key]) => state.set(`${query} ${key}`, { rank: r, now: k === step && !done }))));
    ring.forEach((rank, r) => rank.chunks.forEach((chunk) => {
      const middle = (chunk + 0.5) * cell, label = { kind: "rect", w: 16, h: 15, fill: `rank-${r}`, text: r, size: 12, round: 3 };
      shapes.push({ ...label, id: `row-${chunk}`, x: corner.x - 20, y: corner.y + middle - 7.5 });
      shapes.push({ ...label, id: `column-${chunk}`, x: corner.x + middle - 8, y: corner.y - 19 });
    }));
    for (let query = 0; query < 2 * count; query++) for (let key = 0; key <= query; key++) {
      const found = state.get(`${query} ${key}`), x = corner.x + key * cell, y = corner.y + query * cell;
      const looked = found?.now && found.rank === chosen;
      const look = { id: `cell-${query}-${key}`, fill: found ? `rank-${found.rank}` : "quiet", opacity: found && !found.now ? 0.4 : 1, stroke: looked ? "ink" : null, thick: looked ? 2 : null };
      if (query === key) shapes.push({ ...look, kind: "path", d: `M${x + 0.5} ${y + 1} V${y + cell - 0.5} H${x + cell - 1} z` });
      else shapes.push({ ...look, kind: "rect", x: x + 0.5, y: y + 0.5, w: cell - 1, h: cell - 1, round: 1 });
      if (found?.now) shapes.push({ id: `digit-${query}-${key}`, kind: "text", x: x + cell * (query === key ? 0.32 : 0.5), y: y + cell * (query === key ? 0.68 : 0.5), text: found.rank, size: 12, fill: `on-rank-${found.rank}`, bold: found.rank === chosen });
    }
    return shapes;
  }

  // --- bars ---------------------------------------------------------------------------------------

  /** The work of each rank so far, in a frame as long as that of the whole pass; a line at the mean. */
  function bars(ring, moment, chosen, corner, wide, high) {
    const count = ring.length, { backward, step, done } = ofStep(moment, count), pass = backward ? "backward" : "forward";
    const whole = work(ring, pass, count), now = work(ring, pass, done ? count : step), most = 4 * count - 2;
    const mean = whole.reduce((a, b) => a + b) / count, narrow = wide > 200, start = narrow ? corner.x + 56 : corner.x, long = narrow ? wide - 96 : wide;
    const shapes = ring.flatMap((_, r) => {
      const top = corner.y + r * high, y = narrow ? top + 2 : top + 17, label = narrow ? y + 6 : top + 8;
      return [
        { id: `bar-name-${r}`, kind: "text", x: corner.x, y: label, anchor: "start", text: `rank ${r}`, size: 12, bold: r === chosen },
        { id: `bar-value-${r}`, kind: "text", x: corner.x + wide, y: label, anchor: "end", text: rounded(now[r]), size: 12, bold: r === chosen },
        { id: `bar-frame-${r}`, kind: "rect", x: start, y, w: (long * whole[r]) / most, h: 12, round: 2, stroke: "line" },
        { id: `bar-${r}`, kind: "rect", x: start, y, w: (long * now[r]) / most, h: 12, round: 2, fill: `rank-${r}` },
      ];
    });
    const x = start + (long * mean) / most, top = corner.y + (narrow ? -2 : 14), bottom = corner.y + count * high - (narrow ? 2 : 4);
    shapes.push({ id: "mean", kind: "line", x, y: top, x2: x, y2: bottom, stroke: "ink", thick: 1.5, dashed: true });
    shapes.push({ id: "mean-name", kind: "text", x, y: bottom + 9, text: "mean", size: 12, fill: "dim" });
    return shapes;
  }

  // --- all of it ----------------------------------------------------------------------------------

  function scene(state, width) {
    const { block_bytes: blockBytes, ...dealings } = Book.data.ring, ring = dealings[state.dealing][state.cp];
    const count = ring.length, chosen = state.rank, wide = width > 500;
    const title = (id, x, y, text, anchor = "middle") => ({ id, kind: "text", x, y, text, anchor, size: 13, bold: true });
    const place = wide
      ? { circle: { x: 142, y: 182 }, square: { x: 338, y: 54 }, bars: { x: 640, y: 36 }, side: 280, bar: 112, high: Math.min(56, 296 / count), height: 372 }
      : { circle: { x: 180, y: 170 }, square: { x: 40, y: 430 }, bars: { x: 12, y: 790 }, side: 308, bar: 336, high: 22, height: 812 + 22 * count };

    /** What stands below the ring, in two lines. */
    function legend({ backward }) {
      const lines = backward
        ? ["∇3: a share of the gradient of kv 3", "½: of half its keys; full dots: shares at home"]
        : ["kv 3: the keys and values of rank 3", "dashed: a block that the rank skips"].slice(0, state.dealing === "zigzag" ? 1 : 2);
      return lines.map((text, i) => ({ id: `legend-${text}`, kind: "text", x: place.circle.x, y: place.circle.y + (wide ? 156 : 160) + 17 * i, text, size: wide ? 12 : 11, fill: "dim" }));
    }

    function at(moment) {
      const now = ofStep(moment, count), pass = now.backward ? "backward" : "forward";
      const shapes = [
        title("title-ring", place.circle.x, 12, now.done ? "all gradients are home" : `${pass}, step ${now.step}: who has what`),
        ...circle(ring, moment, chosen, place.circle, wide ? 112 : 116),
        ...legend(now),
        title("title-square", place.square.x + place.side / 2, place.square.y - 42, "queries (down) × keys (across)"),
        { id: "side-rank", kind: "text", x: place.square.x - 36, y: place.square.y - 11, text: "rank", size: 12, fill: "dim", anchor: "start" },
        ...square(ring, moment, chosen, place.square, place.side),
        title("title-bars", place.bars.x, place.bars.y - (wide ? 24 : 20), "squares of work", "start"),
        ...bars(ring, moment, chosen, place.bars, place.bar, place.high),
      ];
      return { shapes, caption: caption(ring, moment, chosen), numbers: figures(ring, moment, chosen, blockBytes) };
    }
    return { height: place.height, steps: 2 * count + 1, at };
  }

  Book.define("ring", {
    title: "The ring",
    data: ["ring"],
    options: {
      cp: { label: "ranks (cp)", min: 2, max: 8, value: 4 },
      dealing: { label: "chunks", choices: ["zigzag", "contiguous"], value: "zigzag" },
      rank: { label: "look at rank", min: 0, max: 7, value: 0 },
    },
    settle: (state) => { state.rank = Math.min(state.rank, state.cp - 1); },
    seconds: () => 3,
    scene,
  });
})();
