/* Step 4 on small numbers: two layers on 1 to 4 ranks, forward and backward. Every number comes from
   a run of the step's classes (assets/numbers_tensor_parallel.py); this file only places them. */
"use strict";

(() => {
  const FORWARD = 4, LAST = 10; // the moments: of forward the last one, of all the last one
  const NAMES = { all_reduce: "all-reduce", all_gather: "all-gather", reduce_scatter: "reduce-scatter" };

  // --- where things stand -------------------------------------------------------------------------

  /** Places of the seven matrices of each rank, from left to right, or in two lines if it is narrow. */
  function places(width, ranks, features) {
    const wide = width > 500, tokens = features;
    const cell = wide ? { 2: 36, 3: 32, 4: 28 }[features] : 22, high = wide ? 22 : 20;
    const size = { x: [2, tokens], in: [2, tokens], w1: [2, features], y: [features, tokens], w2: [features, 2], share: [2, tokens], z: [2, tokens] };
    const tall = tokens * high, left = {}, down = {};
    if (wide) {
      const names = Object.keys(size), all = names.reduce((sum, name) => sum + size[name][0] * cell, 0);
      const gap = (width - 40 - all) / (names.length - 1);
      let at = 20;
      for (const name of names) {
        left[name] = at;
        down[name] = 34 + (tall - size[name][1] * high) / 2;
        at += size[name][0] * cell + gap;
      }
    } else {
      Object.assign(left, { x: 10, in: 78, w1: 134, y: 190, w2: 220 - features * cell, share: 234, z: 304 });
      for (const name of Object.keys(size)) down[name] = { w2: 78 + tall + (tall - 2 * high) / 2, share: 78 + tall, z: 78 + tall }[name] ?? 50;
    }
    const top = wide ? 44 : 26, lane = wide ? tall + 46 : 2 * tall + 90, gap = 12;
    return {
      wide, cell, high, size, left, down, top, lane,
      height: top + ranks * (lane + gap) - gap + 4,
      laneAt: (rank) => top + rank * (lane + gap),
      at: (rank, name, row, column) => ({ x: left[name] + column * cell, y: top + rank * (lane + gap) + down[name] + row * high }),
      middle: (from, to) => (left[from] + size[from][0] * cell + left[to]) / 2,
    };
  }

  // --- what is where at a moment ------------------------------------------------------------------

  /** Of each place what stands there at a moment, as a name of the data; null if nothing yet. */
  function content(step, cut) {
    const since = (...pairs) => pairs.reduce((now, [from, what]) => (step >= from ? what : now), null);
    return {
      x: since([0, "x"], [9, "grad x"]),
      in: since([1, "all x"], [cut ? 3 : 99, null], [8, "share of grad x"]),
      w1: since([0, "w1"], [10, "grad w1"]),
      y: since([2, "y"], [7, "grad y"]),
      w2: since([0, "w2"], [10, "grad w2"]),
      share: since([3, "share of z"], [6, "all grad z"]),
      z: since([4, "z"], [5, "grad z"]),
    };
  }

  const NEW = [["x", "w1", "w2"], ["in"], ["y"], ["share"], ["z"], ["z"], ["share"], ["y"], ["in"], ["x"], ["w1", "w2"]];
  const WRITTEN = { "all x": "x", "all grad z": "grad z", w1: "W₁", w2: "W₂", "grad w1": "grad W₁", "grad w2": "grad W₂" };
  // Which way the numbers go that make what is new: pairs of places.
  const FLOWS = [[], [["x", "in"]], [["in", "w1"], ["w1", "y"]], [["y", "w2"], ["w2", "share"]], [["share", "z"]], [], [["z", "share"]], [["share", "w2"], ["w2", "y"]], [["y", "w1"], ["w1", "in"]], [["in", "x"]], []];

  /** What the collective about `about` took and gave on a rank; on one rank there is none. */
  const message = (rank, about) => rank.messages.find((one) => one.about === about);

  /** The rows of numbers that `what` names, as a rank has them. */
  function numbersOf(block, r, what) {
    const rank = block.ranks[r];
    if (what === "all x") return block.one.x;
    if (what === "all grad z") return block.one["grad z"];
    if (what === "share of z") return message(rank, "z")?.took ?? rank.z;
    if (what === "share of grad x") return message(rank, "grad x")?.took ?? rank["grad x"];
    return rank[what];
  }

  /** Where the numbers of a rank begin in the whole matrix: [row, column]. */
  function offset(rank, what) {
    if (/w1$/.test(what)) return [rank.features[0], 0];
    if (/w2$|y$/.test(what)) return [0, rank.features[0]];
    return /^(grad )?[xz]$/.test(what) ? [rank.tokens[0], 0] : [0, 0];
  }

  // --- words --------------------------------------------------------------------------------------

  /** a · b + c · d, with the result, as a rank computes one number. */
  function product(left, right) {
    return left.map((a, i) => `${a} · ${right[i]}`).join(" + ") + ` = ${left.reduce((sum, a, i) => sum + a * right[i], 0)}`;
  }

  function caption(block, step, cut) {
    const ranks = block.ranks, first = ranks[0], alone = ranks.length === 1;
    const column = (rows, j) => rows.map((row) => row[j]);
    const added = (about) => ranks.map((rank) => message(rank, about)?.took[0][0]).join(" + ") + ` = ${first[about][0][0]}`;
    const none = "There is one rank, so nothing is sent.";
    return [
      (alone ? "One device has x, W₁ and W₂." : `Each rank has ${cut ? "some tokens (rows) of x" : "the whole x"}, some rows of W₁, and the same columns of W₂.`) + (block.one.x.length === 2 ? " The first row of x is the x of “By hand”." : ""),
      alone ? none : cut ? "Into the block: an all-gather gives each rank the tokens of all others." : "Into the block: each rank has the whole x already, so nothing is sent.",
      `y = x W₁ᵀ. Each rank computes ${alone ? "all" : "its own"} features of y. Rank 0 begins with ${product(block.one.x[0], first.w1[0])}.`,
      alone ? `z = y W₂ᵀ. The first number is ${product(first.y[0], first.w2[0])}.` : `Each rank multiplies its features of y by its columns of W₂. The result is a share of z, as large as z. Rank 0 begins with ${product(first.y[0], first.w2[0])}.`,
      alone ? none : `${cut ? "A reduce-scatter adds the shares up, and each rank gets the sums of its own tokens" : "An all-reduce adds the shares up, and all ranks get the same z"}: ${added("z")}.`,
      `Backward. The layers behind this block give ${cut ? "each rank the gradient of its tokens of z" : "the gradient of z"}.`,
      alone ? none : cut ? "Back into the block: an all-gather gives each rank the gradients of all tokens." : "z is the sum of the shares, so each share has the gradient of z. Nothing is sent.",
      `grad y = grad z W₂. Each rank computes it for its own features of y. Rank 0 begins with ${product(block.one["grad z"][0], column(first.w2, 0))}.`,
      `${alone ? "grad x = grad y W₁. The first number is" : "Each rank multiplies grad y by its rows of W₁. The result is a share of grad x. Rank 0 begins with"} ${product(first["grad y"][0], column(first.w1, 0))}.${cut ? " Meanwhile x is gathered once more, because it was not kept." : ""}`,
      alone ? none : `${cut ? "A reduce-scatter adds the shares up for each rank's own tokens" : "An all-reduce adds the shares up"}: ${added("grad x")}.`,
      alone ? "Last come the gradients of the weights." : "While the sums travel, each rank computes the gradients of its weights. No other rank has these rows and columns, so nothing is sent. All numbers are those of one device.",
    ][step];
  }

  /** The collectives that have been called up to a moment. */
  function called(rank, step, cut) {
    const moment = { x: 1, z: 4, "grad z": 6, "x again": 8, "grad x": 9 };
    return rank.messages.filter((one) => moment[one.about] <= step);
  }

  function figures(block, step, cut) {
    const done = called(block.ranks[0], step, cut), counts = {};
    for (const { kind } of done) counts[kind] = (counts[kind] ?? 0) + 1;
    const total = (key) => done.reduce((sum, one) => sum + one[key], 0);
    return [
      { name: "calls", label: "collectives so far", text: Object.entries(counts).map(([kind, count]) => `${count} ${NAMES[kind]}`).join(", ") || "none" },
      { name: "bytes", label: "bytes in the ledger", text: total("bytes") },
      { name: "sent", label: "bytes a rank sends", text: total("sent") },
      { name: "off", label: "off from one device by", text: block.off },
    ];
  }

  // --- the picture --------------------------------------------------------------------------------

  function scene(state, width) {
    const ranks = Number(state.ranks), cut = state.sequence === "yes";
    const block = Book.data.tensor_parallel[ranks][state.sequence];
    const place = places(width, ranks, block.one.x.length), { cell, high, size, left, wide } = place;
    const everyRank = Array.from({ length: ranks }, (_, rank) => rank);
    /** Who has token t between the blocks; all have it without sequence parallelism. */
    const owner = (token) => block.ranks.findIndex(({ tokens }) => tokens[0] <= token && token < tokens[1]);
    const own = (what) => !/^(all )?(grad )?[xz]$/.test(what);
    const colour = (rank, what, token) => (own(what) ? `rank-${rank}` : cut ? `rank-${owner(token)}` : "quiet");
    const number = (id, rank, name, row, column, fill, text) => ({ id, kind: "rect", ...place.at(rank, name, row, column), w: cell - 2, h: high - 2, fill, text, size: wide ? 13 : 11 });

    /** The numbers of one matrix on one rank, and an outline of what the rank does not have. */
    function matrix(rank, name, what, isNew) {
      const [columns, lines] = size[name], at = place.at(rank, name, 0, 0);
      const outline = { kind: "rect", x: at.x - 3, y: at.y - 3, w: columns * cell + 4, h: lines * high + 4, round: 5 };
      const shapes = [{ id: `frame-${rank}-${name}`, ...outline, stroke: "line", dashed: !what }];
      if (what) {
        const [down, across] = offset(block.ranks[rank], what);
        numbersOf(block, rank, what).forEach((row, i) => row.forEach((value, j) =>
          shapes.push(number(`${what}-${rank}-${i}-${j}`, rank, name, i + down, j + across, colour(rank, what, i + down), value))));
      }
      if (isNew && what) shapes.push({ id: `new-${rank}-${name}`, ...outline, stroke: "accent", thick: 2.5 });
      return shapes;
    }

    function headings(rank, now, step) {
      return Object.keys(size).map((name) => {
        const what = now[name], at = place.at(rank, name, 0, size[name][0] / 2);
        const text = WRITTEN[what] ?? what ?? "";
        const short = ranks === 1 ? text.replace("share of ", "") : wide ? text : text.replace(/share of (grad )?./, "share");
        return { id: `name-${rank}-${name}-${short}`, kind: "text", x: at.x, y: wide ? 32 : at.y - 11, text: short, size: wide ? 13 : 11, fill: NEW[step].includes(name) ? "ink" : "dim", bold: NEW[step].includes(name) };
      });
    }

    /** Numbers on their way: each is below what it becomes, and moves when that begins to show. */
    function travellers(step) {
      const shapes = [];
      const gathered = (what, from, to, before) => {
        if (step !== before && step !== before + 1) return;
        for (const rank of everyRank) block.one[what].forEach((row, t) => row.forEach((value, j) => {
          const source = cut ? owner(t) : rank;
          shapes.push(number(`move-${what}-${rank}-${t}-${j}`, step === before ? source : rank, step === before ? from : to, t, j, colour(rank, what, t), value));
        }));
      };
      const summed = (what, from, to, before) => {
        if (ranks === 1 || (step !== before && step !== before + 1)) return;
        for (const rank of everyRank) for (const source of everyRank) {
          const [begin, end] = block.ranks[rank].tokens;
          for (let t = begin; t < end; t++) message(block.ranks[source], what).took[t].forEach((value, j) =>
            shapes.push({ ...number(`sum-${what}-${rank}-${source}-${t}-${j}`, step === before ? source : rank, step === before ? from : to, t, j, `rank-${source}`, value), opacity: step === before ? 1 : 0 }));
        }
      };
      gathered("x", "x", "in", 0);
      summed("z", "share", "z", 3);
      gathered("grad z", "z", "share", 5);
      summed("grad x", "in", "x", 8);
      return shapes;
    }

    /** The two places where ranks talk, a bar through all of them; bright while they do. */
    function bars(step) {
      if (ranks === 1) return [];
      const kind = { 1: cut && "all_gather", 4: cut ? "reduce_scatter" : "all_reduce", 6: cut && "all_gather", 9: cut ? "reduce_scatter" : "all_reduce" }[step];
      return [["x", "in", [1, 9]], ["share", "z", [4, 6]]].flatMap(([from, to, steps]) => {
        const x = place.middle(from, to), active = kind && steps.includes(step);
        const bar = { id: `bar-${from}`, kind: "rect", x: x - 4, y: place.top, w: 8, h: place.height - place.top - 4, round: 4, fill: active ? "accent" : "quiet" };
        const label = active && { id: `talk-${from}-${kind}`, kind: "text", x: Math.min(Math.max(x, 44), width - 50), y: 12, text: NAMES[kind], size: wide ? 13 : 12, fill: "accent", bold: true };
        return label ? [bar, label] : [bar];
      });
    }

    function arrows(rank, step) {
      return FLOWS[step].map(([from, to]) => {
        const forward = step <= FORWARD, a = place.at(rank, from, size[from][1] / 2, forward ? size[from][0] : 0), b = place.at(rank, to, size[to][1] / 2, forward ? 0 : size[to][0]);
        const line = { id: `flow-${rank}-${from}-${to}`, kind: "arrow", stroke: "accent", thick: wide ? 2 : 1.5 };
        const turn = !wide && [from, to].includes("y") && [from, to].includes("w2");
        if (!turn) return { ...line, x: a.x + (forward ? 3 : -5), y: a.y, x2: b.x + (forward ? -5 : 4), y2: b.y };
        const [above, below] = [place.at(rank, "y", size.y[1], 0).y + 3, place.at(rank, "w2", 0, 0).y - 5];
        return { ...line, x: 212, x2: 212, y: forward ? above : below, y2: forward ? below : above };
      });
    }

    function at(step) {
      const now = content(step, cut);
      const shapes = [];
      for (const rank of everyRank) {
        const y = place.laneAt(rank);
        shapes.push({ id: `lane-${rank}`, kind: "rect", x: 4, y, w: width - 8, h: place.lane, round: 8, stroke: "line" });
        shapes.push({ id: `rank-${rank}`, kind: "rect", x: 12, y: y + 7, w: wide ? 52 : 44, h: 18, round: 9, fill: `rank-${rank}`, text: `rank ${rank}`, size: wide ? 12 : 11 });
        if (!wide || rank === 0) shapes.push(...headings(rank, now, step));
      }
      shapes.push(...bars(step), ...everyRank.flatMap((rank) => arrows(rank, step)));
      shapes.push(...travellers(step));
      for (const rank of everyRank) for (const name of Object.keys(size)) shapes.push(...matrix(rank, name, now[name], NEW[step].includes(name)));
      return { shapes, caption: caption(block, step, cut), numbers: figures(block, step, cut) };
    }
    return { height: place.height, steps: LAST + 1, at };
  }

  Book.define("tensor_parallel", {
    title: "Two layers on several ranks",
    data: ["tensor_parallel"],
    options: {
      ranks: { label: "ranks (tp)", choices: ["1", "2", "3", "4"], value: "2" },
      sequence: { label: "sequence parallelism", choices: ["no", "yes"], value: "no" },
    },
    settle: (state) => { if (state.ranks === "1") state.sequence = "no"; },
    seconds: () => 3,
    scene,
  });
})();
