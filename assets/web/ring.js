/* Step 5's ring, forward and backward: who holds which keys and values, and what each rank computes
   with them. Who sends what, and who attends to what, comes from the code of step 5
   (assets/numbers_ring.py); this file counts and draws. */
"use strict";

(() => {
  // --- what has happened up to a moment -----------------------------------------------------------

  /** Moments 0 to n - 1 are the steps forward, n to 2n - 1 those backward; then all is done. */
  function when(moment, count) {
    const pass = moment < count ? "forward" : "backward", done = moment === 2 * count;
    return { pass, backward: pass === "backward", step: moment % count, done, until: done ? count : (moment % count) + 1 };
  }

  /** The squares (chunks of queries × chunks of keys) of one step, half of them on the diagonal. */
  function squares(ring, rank, does) {
    const keys = does.keys.map((i) => ring[does.block].chunks[i]);
    return does.queries.flatMap((i) => keys.map((key) => [ring[rank].chunks[i], key]))
      .filter(([query, key]) => !does.causal || key <= query);
  }

  const sumOf = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const workOf = (cells) => sumOf(cells.map(([query, key]) => (query === key ? 0.5 : 1)));

  /** The work of each rank in the first steps of a pass. */
  function work(ring, pass, steps) {
    return ring.map((rank, r) => sumOf(rank[pass].slice(0, steps).map((does) => workOf(squares(ring, r, does)))));
  }

  /** Blocks and shares of gradients that a rank has sent up to a moment, and their bytes. */
  function sent(rank, moment, blockBytes) {
    const does = [...rank.forward, ...rank.backward].slice(0, moment + 1);
    const blocks = does.filter((one) => one.block_to !== null), shares = does.filter((one) => one.gradients_to !== null);
    const size = blocks.length + sumOf(shares.map((one) => one.keys.length / 2)); // a share may be for one chunk of two
    return { blocks: blocks.length, shares: shares.length, bytes: blockBytes * size };
  }

  const rounded = (value) => String(Math.round(value * 1000) / 1000);
  const grouped = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

  // --- words --------------------------------------------------------------------------------------

  /** What a rank computes with the block that it has. */
  function computes(rank, does) {
    const kv = `kv ${does.block}`;
    if (does.block === rank) return `Rank ${rank} computes with its own block, under the causal mask.`;
    if (!does.keys.length) return `Rank ${rank} skips ${kv}: all its keys come after the queries of rank ${rank}.`;
    const has = `Rank ${rank} has ${kv}.`;
    if (does.keys.length === 1) return `${has} Its queries attend only to the early half of these keys.`;
    if (does.queries.length === 1) return `${has} Only the late half of its queries attends to these keys.`;
    return `${has} All its queries attend to all these keys.`;
  }

  function caption(ring, moment, chosen) {
    const { pass, backward, step, done } = when(moment, ring.length);
    if (done) return "The last shares are home. Each rank has added up the gradients of its own keys and values.";
    const does = ring[chosen][pass][step], begin = backward ? "Backward" : "Forward";
    return [
      `${begin}, step ${step}. ${computes(chosen, does)}`,
      backward && step === 0 && "This block came last, so it is still there.",
      backward && does.block === chosen && "It has kept this block, so no message is needed.",
      does.block_to !== null && `Meanwhile it sends kv ${does.block} to rank ${does.block_to}.`,
      does.gradients_to !== null && `Its share of the gradient then goes straight to rank ${does.gradients_to}.`,
    ].filter(Boolean).join(" ");
  }

  function figures(ring, moment, chosen, blockBytes) {
    const { pass, backward, until } = when(moment, ring.length), whole = work(ring, pass, ring.length);
    const now = work(ring, pass, until)[chosen], { blocks, shares, bytes } = sent(ring[chosen], moment, blockBytes);
    const ratio = (Math.max(...whole) * ring.length) / sumOf(whole);
    return [
      { name: "ratio", label: "busiest rank ÷ mean", text: rounded(ratio) },
      { name: "work", label: `squares of rank ${chosen}, this pass`, text: `${rounded(now)} of ${rounded(whole[chosen])}` },
      { name: "messages", label: `messages of rank ${chosen}`, text: `${blocks} kv${backward ? `, ${shares} ∇` : ""}` },
      { name: "bytes", label: "their bytes, one layer", text: grouped(bytes) },
    ];
  }

  // --- the ring -----------------------------------------------------------------------------------

  const NODE = { w: 58, h: 46 };

  /** Ranks on a circle with their blocks; arrows to where blocks go; shares on their way home. */
  function circle(ring, moment, chosen, middle, radius) {
    const count = ring.length, { pass, backward, step, done } = when(moment, count);
    const now = ring.map((rank) => (done ? null : rank[pass][step]));

    function point(rank, r) {
      const angle = (2 * Math.PI * rank) / count;
      return { x: middle.x + r * Math.sin(angle), y: middle.y - r * Math.cos(angle) };
    }

    /** An arrow from a rank to its neighbour, from edge to edge. */
    function hop(from, to) {
      const a = point(from, radius), b = point(to, radius), length = Math.hypot(b.x - a.x, b.y - a.y);
      const ux = (b.x - a.x) / length, uy = (b.y - a.y) / length;
      const edge = 4 + Math.min(NODE.w / 2 / Math.abs(ux), NODE.h / 2 / Math.abs(uy));
      const aside = count === 2 ? 12 : 0; // two ranks send to each other on two lines
      const along = (end, sign) => [end.x + sign * ux * edge - uy * aside, end.y + sign * uy * edge + ux * aside];
      const [x, y] = along(a, 1), [x2, y2] = along(b, -1);
      return { id: `hop-${from}-${pass}`, kind: "arrow", x, y, x2, y2 };
    }

    /** Shares: each is computed in one step, travels in the next one, and is home after that. */
    function shares() {
      const lines = [], pills = [];
      ring.forEach((rank, r) => rank.backward.forEach((does, k) => {
        const age = moment - count - k, to = does.gradients_to;
        if (to === null || age < 0 || age > 2) return;
        const start = point(r, radius - 42), end = point(to, radius - 42);
        const travels = { x: start.x + 0.8 * (end.x - start.x), y: start.y + 0.8 * (end.y - start.y) };
        const { x, y } = [point(r, radius), travels, point(to, radius)][age]; // below the boxes at both ends
        if (age === 1) lines.push({ id: `way-${r}-${k}`, kind: "line", ...start, x2: end.x, y2: end.y, stroke: "line" });
        const text = `${does.keys.length === 1 ? "½" : ""}∇${does.block}`, place = { x: x - 15, y: y - 9, w: 30, h: 18 };
        pills.push({ id: `share-${r}-${k}`, kind: "rect", ...place, round: 9, fill: `rank-${does.block}`, text, size: 12 });
      }));
      return [...lines, ...pills];
    }

    function box(r) {
      const { x, y } = point(r, radius), mine = r === chosen;
      const look = { round: 8, fill: "paper", stroke: mine ? "ink" : `rank-${r}`, thick: mine ? 3 : 2 };
      const button = { choose: { rank: r }, label: `look at rank ${r}`, pressed: mine };
      return [
        { id: `node-${r}`, kind: "rect", x: x - NODE.w / 2, y: y - NODE.h / 2, ...NODE, ...look, ...button },
        { id: `node-name-${r}`, kind: "text", x, y: y - 13, text: `rank ${r}`, size: 12, bold: mine },
        ...(backward ? dots(r, x, y + 17.5) : []),
      ];
    }

    /** A dot for each share of this rank's gradient, full when the share is there. */
    function dots(r, x, y) {
      const due = ring.flatMap((rank) => rank.backward.map((does, k) => [does, k]))
        .filter(([does]) => does.block === r && does.keys.length);
      const home = due.filter(([does, k]) => moment - count - k >= (does.gradients_to === null ? 1 : 2)).length;
      return due.map((_, i) => {
        const look = i < home ? { fill: "ink", stroke: "ink" } : { fill: "paper", stroke: "dim" };
        return { id: `dot-${r}-${i}`, kind: "circle", x: x + (i - (due.length - 1) / 2) * 6.5, y, r: 2.2, ...look };
      });
    }

    /** The block that a rank has now; dashed where the rank skips it. */
    function block(r) {
      const { x, y } = point(r, radius), does = now[r], colour = `rank-${does.block}`;
      // At the end of backward a rank takes the block that it has kept: another one than the traveller.
      const id = backward && does.block === r ? `own-${r}` : `kv-${does.block}`;
      const look = does.keys.length ? { fill: colour } : { fill: "paper", stroke: colour, dashed: true };
      const place = { x: x - 20, y: y - (backward ? 5 : 2), w: 40, h: 17, round: 4 };
      return { id, kind: "rect", ...place, ...look, text: `kv ${does.block}`, size: 12 };
    }

    const ranks = ring.map((_, r) => r), busy = done ? [] : ranks;
    const hops = busy.filter((r) => now[r].block_to !== null).map((r) => hop(r, now[r].block_to));
    return [...hops, ...shares(), ...ranks.flatMap(box), ...busy.map(block)];
  }

  // --- queries × keys -----------------------------------------------------------------------------

  /** The square of all queries and keys, below its diagonal; what is computed now stands out. */
  function square(ring, moment, chosen, corner, side) {
    const { pass, step, done, until } = when(moment, ring.length), chunks = 2 * ring.length, cell = side / chunks;
    const computed = new Map(), shapes = [];
    ring.forEach((rank, r) => rank[pass].slice(0, until).forEach((does, k) => {
      for (const pair of squares(ring, r, does)) computed.set(String(pair), { rank: r, now: k === step && !done });
    }));
    ring.forEach((rank, r) => rank.chunks.forEach((chunk) => {
      const middle = (chunk + 0.5) * cell, label = { kind: "rect", w: 16, h: 15, fill: `rank-${r}`, text: r, size: 12 };
      shapes.push({ ...label, id: `row-${chunk}`, x: corner.x - 20, y: corner.y + middle - 7.5 });
      shapes.push({ ...label, id: `column-${chunk}`, x: corner.x + middle - 8, y: corner.y - 19 });
    }));
    for (let query = 0; query < chunks; query++) for (let key = 0; key <= query; key++) {
      const { rank, now } = computed.get(`${query},${key}`) ?? {}, half = query === key;
      const x = corner.x + key * cell, y = corner.y + query * cell;
      const colour = rank === undefined ? { fill: "quiet" } : { fill: `rank-${rank}`, opacity: now ? 1 : 0.4 };
      const edge = now && rank === chosen ? { stroke: "ink", thick: 2 } : {};
      const look = { id: `cell-${query}-${key}`, ...colour, ...edge };
      if (half) shapes.push({ ...look, kind: "path", d: `M${x + 0.5} ${y + 1} V${y + cell - 0.5} H${x + cell - 1} z` });
      else shapes.push({ ...look, kind: "rect", x: x + 0.5, y: y + 0.5, w: cell - 1, h: cell - 1, round: 1 });
      const place = { x: x + cell * (half ? 0.32 : 0.5), y: y + cell * (half ? 0.68 : 0.5) };
      const digit = { ...place, kind: "text", text: rank, size: 12, fill: `on-rank-${rank}`, bold: rank === chosen };
      if (now) shapes.push({ ...digit, id: `digit-${query}-${key}` });
    }
    return shapes;
  }

  // --- bars ---------------------------------------------------------------------------------------

  /** The work of each rank so far, in a frame as long as that of the whole pass; a line at the mean. */
  function bars(ring, moment, chosen, { x, y, w, high, beside }) {
    const count = ring.length, { pass, until } = when(moment, count);
    const whole = work(ring, pass, count), now = work(ring, pass, until);
    // Names stand beside the bars, or above them. A bar has its full length for the most work of all.
    const start = beside ? x + 56 : x, unit = (beside ? w - 96 : w) / (4 * count - 2);
    const shapes = ring.flatMap((_, r) => {
      const top = y + r * high, label = { kind: "text", y: top + 8, size: 12, bold: r === chosen };
      const bar = { kind: "rect", x: start, y: top + (beside ? 2 : 17), h: 12, round: 2 };
      return [
        { ...label, id: `bar-name-${r}`, x, anchor: "start", text: `rank ${r}` },
        { ...label, id: `bar-value-${r}`, x: x + w, anchor: "end", text: rounded(now[r]) },
        { ...bar, id: `bar-frame-${r}`, w: unit * whole[r], stroke: "line" },
        { ...bar, id: `bar-${r}`, w: unit * now[r], fill: `rank-${r}` },
      ];
    });
    const mean = start + (unit * sumOf(whole)) / count, bottom = y + count * high - 4;
    return [
      ...shapes,
      { id: "mean", kind: "line", x: mean, y: y + (beside ? -2 : 14), x2: mean, y2: bottom, dashed: true },
      { id: "mean-name", kind: "text", x: mean, y: bottom + 10, text: "mean", size: 12, fill: "dim" },
    ];
  }

  // --- all of it ----------------------------------------------------------------------------------

  /** Where the three parts stand: beside each other, or below each other. */
  function places(wide, count) {
    return wide
      ? {
          circle: { x: 142, y: 182, r: 112 }, square: { x: 338, y: 54, side: 280 }, height: 372,
          bars: { x: 640, y: 36, w: 112, high: Math.min(56, 296 / count), beside: false },
        }
      : {
          circle: { x: 180, y: 170, r: 116 }, square: { x: 40, y: 430, side: 308 }, height: 812 + 22 * count,
          bars: { x: 12, y: 790, w: 336, high: 22, beside: true },
        };
  }

  function scene(state, width) {
    const { block_bytes: blockBytes, ...dealings } = Book.data.ring, ring = dealings[state.dealing][state.cp];
    const count = ring.length, chosen = state.rank, wide = width > 500, place = places(wide, count);
    const text = (id, x, y, words, look = {}) => ({ id, kind: "text", x, y, text: words, size: 13, bold: true, ...look });
    const small = { size: wide ? 12 : 11, bold: false, fill: "dim" };

    /** What stands below the ring. */
    function legend(backward) {
      const lines = backward
        ? ["∇3: a share of the gradient of kv 3", "½: of half its keys; full dots: shares at home"]
        : ["kv 3: the keys and values of rank 3"];
      if (state.dealing === "contiguous" && !backward) lines.push("dashed: a block that the rank skips");
      const { x, y, r } = place.circle;
      return lines.map((line, i) => text(`legend-${line}`, x, y + r + 44 + 17 * i, line, small));
    }

    function at(moment) {
      const { pass, backward, step, done } = when(moment, count), { circle: round, square: grid, bars: side } = place;
      const shapes = [
        text("title-ring", round.x, 12, done ? "all gradients are home" : `${pass}, step ${step}: who has what`),
        ...circle(ring, moment, chosen, round, round.r),
        ...legend(backward),
        text("title-square", grid.x + grid.side / 2, grid.y - 42, "queries (down) × keys (across)"),
        text("side-rank", grid.x - 36, grid.y - 11, "rank", { ...small, anchor: "start" }),
        ...square(ring, moment, chosen, grid, grid.side),
        text("title-bars", side.x, side.y - (wide ? 24 : 20), "squares of work", { anchor: "start" }),
        ...bars(ring, moment, chosen, side),
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
