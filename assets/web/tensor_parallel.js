/* Step 4 on small numbers: two layers on 1 to 4 ranks, forward and backward. Every number comes from
   a run of the step's classes (assets/numbers_tensor_parallel.py); this file only places them. */
"use strict";

(() => {
  const NAMES = { all_reduce: "all-reduce", all_gather: "all-gather", reduce_scatter: "reduce-scatter" };

  /* The moments. fresh: the places whose numbers are new; flow: from where to where arrows go; about:
     what the ranks talk about, as the messages of the data say, if they talk. */
  const MOMENTS = [
    { fresh: ["x", "w1", "w2"], flow: [] },
    { fresh: ["in"], flow: ["x in"], about: "x" },
    { fresh: ["y"], flow: ["in w1", "w1 y"] },
    { fresh: ["share"], flow: ["y w2", "w2 share"] },
    { fresh: ["z"], flow: ["share z"], about: "z" },
    { fresh: ["z"], flow: [] },
    { fresh: ["share"], flow: ["z share"], about: "grad z" },
    { fresh: ["y"], flow: ["share w2", "w2 y"] },
    { fresh: ["in"], flow: ["y w1", "w1 in"], about: "x again" },
    { fresh: ["x"], flow: ["in x"], about: "grad x" },
    { fresh: ["w1", "w2"], flow: [] },
  ];
  const BACKWARD = 5; // the first moment of the backward pass

  // --- where things stand -------------------------------------------------------------------------

  /** Places of the seven matrices of each rank, from left to right, or in two lines if it is narrow. */
  function places(width, ranks, features) {
    const wide = width > 500;
    // Columns and rows; there are as many tokens as features.
    const [tokens, weights, inner] = [[2, features], [features, 2], [features, features]];
    const size = { x: tokens, in: tokens, w1: tokens, y: inner, w2: weights, share: tokens, z: tokens };
    const cell = wide ? { 2: 36, 3: 32, 4: 28 }[features] : 22, high = wide ? 22 : 20, tall = features * high;
    const left = {}, down = {};
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
      const second = 78 + tall;
      Object.assign(left, { x: 10, in: 78, w1: 134, y: 190, w2: 220 - features * cell, share: 234, z: 304 });
      Object.assign(down, { x: 50, in: 50, w1: 50, y: 50, w2: second + tall / 2 - high, share: second, z: second });
    }
    const top = wide ? 44 : 26, lane = wide ? tall + 46 : 2 * tall + 90, step = lane + 12;
    return {
      wide, cell, high, size, top, lane,
      height: top + ranks * step - 8,
      laneAt: (rank) => top + rank * step,
      at: (rank, name, row, column) => ({
        x: left[name] + column * cell,
        y: top + rank * step + down[name] + row * high,
      }),
      middle: (from, to) => (left[from] + size[from][0] * cell + left[to]) / 2,
    };
  }

  // --- what is where at a moment ------------------------------------------------------------------

  /** What stands in each place at a moment; null if nothing yet. `cut`: sequence parallelism. */
  function content(step, cut) {
    const since = (...pairs) => pairs.reduce((now, [from, what]) => (step >= from ? what : now), null);
    return {
      x: since([0, "x"], [9, "grad x"]),
      in: since([1, "all x"], [cut ? 3 : Infinity, null], [8, "share of grad x"]),
      w1: since([0, "w1"], [10, "grad w1"]),
      y: since([2, "y"], [7, "grad y"]),
      w2: since([0, "w2"], [10, "grad w2"]),
      share: since([3, "share of z"], [6, "all grad z"]),
      z: since([4, "z"], [5, "grad z"]),
    };
  }

  /** What a collective took on a rank; on one rank there is none. */
  const taken = (rank, about) => rank.messages.find((one) => one.about === about)?.took;

  /** The rows of numbers that `what` names, as a rank has them. */
  function numbersOf(block, r, what) {
    const rank = block.ranks[r];
    const others = {
      "all x": block.one.x,
      "all grad z": block.one["grad z"],
      "share of z": taken(rank, "z") ?? rank.z,
      "share of grad x": taken(rank, "grad x") ?? rank["grad x"],
    };
    return others[what] ?? rank[what];
  }

  /** Where the numbers of a rank begin in the whole matrix: [row, column]. */
  function offset(rank, what) {
    if (/w1$/.test(what)) return [rank.features[0], 0];
    if (/(w2|y)$/.test(what)) return [0, rank.features[0]];
    return /^(grad )?[xz]$/.test(what) ? [rank.tokens[0], 0] : [0, 0];
  }

  // --- words --------------------------------------------------------------------------------------

  /** a · b + c · d with the result, as a rank computes one number. */
  function product(left, right) {
    const sum = left.reduce((total, a, i) => total + a * right[i], 0);
    return `${left.map((a, i) => `${a} · ${right[i]}`).join(" + ")} = ${sum}`;
  }

  /** The first number of each product of rank 0. */
  function firstNumbers(block) {
    const rank = block.ranks[0], column = (rows) => rows.map((row) => row[0]);
    return {
      y: product(block.one.x[0], rank.w1[0]),
      share: product(rank.y[0], rank.w2[0]),
      gradY: product(block.one["grad z"][0], column(rank.w2)),
      gradShare: product(rank["grad y"][0], column(rank.w1)),
    };
  }

  /** What is said at each moment on one device. */
  function alone(block) {
    const first = firstNumbers(block), none = "There is one rank, so nothing is sent.";
    return [
      "One device has x, W₁ and W₂.",
      none,
      `y = x W₁ᵀ. The first number is ${first.y}.`,
      `z = y W₂ᵀ. The first number is ${first.share}.`,
      none,
      "Backward. The layers behind this block give the gradient of z.",
      none,
      `grad y = grad z W₂. The first number is ${first.gradY}.`,
      `grad x = grad y W₁. The first number is ${first.gradShare}.`,
      none,
      "Last come the gradients of the weights.",
    ];
  }

  /** What is said at each moment on several ranks: with sequence parallelism, without, or both. */
  function together(block, cut) {
    const first = firstNumbers(block), one = block.ranks[0];
    const sum = (about) => `${block.ranks.map((rank) => taken(rank, about)[0][0]).join(" + ")} = ${one[about][0][0]}`;
    const either = (yes, no) => (cut ? yes : no);
    return [
      `Each rank has ${either("some tokens (rows) of x", "the whole x")}, some rows of W₁, and the same columns of W₂.`,
      either(
        "Into the block: an all-gather gives each rank the tokens of all others.",
        "Into the block: each rank has the whole x already, so nothing is sent.",
      ),
      `y = x W₁ᵀ. Each rank computes its own features of y. Rank 0 begins with ${first.y}.`,
      "Each rank multiplies its features of y by its columns of W₂. The result is a share of z, as large as z. " +
        `Rank 0 begins with ${first.share}.`,
      either(
        `A reduce-scatter adds the shares up, and each rank gets the sums of its own tokens: ${sum("z")}.`,
        `An all-reduce adds the shares up, and all ranks get the same z: ${sum("z")}.`,
      ),
      either(
        "Backward. The layers behind this block give each rank the gradient of its tokens of z.",
        "Backward. The layers behind this block give the gradient of z.",
      ),
      either(
        "Back into the block: an all-gather gives each rank the gradients of all tokens.",
        "z is the sum of the shares, so each share has the gradient of z. Nothing is sent.",
      ),
      `grad y = grad z W₂. Each rank computes it for its own features of y. Rank 0 begins with ${first.gradY}.`,
      "Each rank multiplies grad y by its rows of W₁. The result is a share of grad x. " +
        `Rank 0 begins with ${first.gradShare}.` +
        either(" Meanwhile x is gathered once more, because it was not kept.", ""),
      either(
        `A reduce-scatter adds the shares up for each rank's own tokens: ${sum("grad x")}.`,
        `An all-reduce adds the shares up: ${sum("grad x")}.`,
      ),
      "While the sums travel, each rank computes the gradients of its weights. No other rank has these rows and " +
        "columns, so nothing is sent. All numbers are those of one device.",
    ];
  }

  function caption(block, step, cut) {
    const text = block.ranks.length === 1 ? alone(block) : together(block, cut);
    const byHand = step === 0 && block.one.x.length === 2;
    return text[step] + (byHand ? " The first row of x is the x of “By hand”." : "");
  }

  function figures(block, step) {
    const topics = MOMENTS.slice(0, step + 1).map(({ about }) => about);
    const done = block.ranks[0].messages.filter(({ about }) => topics.includes(about));
    const total = (key) => done.reduce((sum, one) => sum + one[key], 0);
    const counts = Object.entries(NAMES).map(([kind, name]) => [done.filter((one) => one.kind === kind).length, name]);
    const calls = counts.filter(([count]) => count).map(([count, name]) => `${count} ${name}`);
    return [
      { name: "calls", label: "collectives so far", text: calls.join(", ") || "none" },
      { name: "bytes", label: "bytes in the ledger", text: total("bytes") },
      { name: "sent", label: "bytes a rank sends", text: total("sent") },
      { name: "off", label: "off from one device by", text: block.off },
    ];
  }

  // --- the picture --------------------------------------------------------------------------------

  function scene(state, width) {
    const ranks = Number(state.ranks), cut = state.sequence === "yes";
    const block = Book.data.tensor_parallel[ranks][state.sequence];
    const place = places(width, ranks, block.one.x.length), { cell, high, size, wide } = place;
    const everyRank = Array.from({ length: ranks }, (_, rank) => rank), everyPlace = Object.keys(size);

    /** Who has a token between the blocks; without sequence parallelism all have it. */
    const owner = (token) => block.ranks.findIndex(({ tokens }) => tokens[0] <= token && token < tokens[1]);

    /** A rank's colour for what it alone has; grey for what all have. */
    function colour(rank, what, token) {
      if (!/^(all )?(grad )?[xz]$/.test(what)) return `rank-${rank}`;
      return cut ? `rank-${owner(token)}` : "quiet";
    }

    function number(id, at, fill, text) {
      return { id, kind: "rect", ...at, w: cell - 2, h: high - 2, fill, text, size: wide ? 13 : 11 };
    }

    /** A frame for a whole matrix, and in it the numbers that a rank has. */
    function matrix(rank, name, what, fresh) {
      const at = place.at(rank, name, 0, 0), [columns, lines] = size[name];
      const frame = { kind: "rect", x: at.x - 3, y: at.y - 3, w: columns * cell + 4, h: lines * high + 4, round: 5 };
      const shapes = [{ ...frame, id: `frame-${rank}-${name}`, stroke: "line", dashed: !what }];
      if (!what) return shapes;
      const [down, right] = offset(block.ranks[rank], what);
      numbersOf(block, rank, what).forEach((row, i) => row.forEach((value, j) => {
        const there = place.at(rank, name, i + down, j + right);
        shapes.push(number(`${what}-${rank}-${i}-${j}`, there, colour(rank, what, i + down), value));
      }));
      if (fresh) shapes.push({ ...frame, id: `new-${rank}-${name}`, stroke: "accent", thick: 2.5 });
      return shapes;
    }

    function heading(rank, name, what, fresh) {
      const { x, y } = place.at(rank, name, 0, size[name][0] / 2);
      let text = (what ?? "").replace("all ", "").replace("w1", "W₁").replace("w2", "W₂");
      if (ranks === 1) text = text.replace("share of ", "");
      else if (!wide) text = text.replace(/share of .*/, "share");
      const look = { size: wide ? 13 : 11, fill: fresh ? "ink" : "dim", bold: fresh };
      return { id: `name-${rank}-${name}-${text}`, kind: "text", x, y: wide ? 32 : y - 11, text, ...look };
    }

    /** Numbers on their way from a moment to the next; before and after they are below others. */
    function travellers(step) {
      const shapes = [];
      const gathered = (what, from, to, before) => {
        for (const rank of everyRank) block.one[what].forEach((row, t) => row.forEach((value, j) => {
          const at = step === before ? place.at(cut ? owner(t) : rank, from, t, j) : place.at(rank, to, t, j);
          shapes.push(number(`move-${what}-${rank}-${t}-${j}`, at, colour(rank, what, t), value));
        }));
      };
      const summed = (what, from, to, before) => {
        for (const rank of everyRank) for (const source of everyRank) {
          const [begin, end] = block.ranks[rank].tokens;
          for (let t = begin; t < end; t++) taken(block.ranks[source], what)[t].forEach((value, j) => {
            const at = step === before ? place.at(source, from, t, j) : place.at(rank, to, t, j);
            const id = `sum-${what}-${rank}-${source}-${t}-${j}`;
            shapes.push({ ...number(id, at, `rank-${source}`, value), opacity: step === before ? 1 : 0 });
          });
        }
      };
      const now = (before) => step === before || step === before + 1;
      if (now(0)) gathered("x", "x", "in", 0);
      if (now(5)) gathered("grad z", "z", "share", 5);
      if (now(3) && ranks > 1) summed("z", "share", "z", 3);
      if (now(8) && ranks > 1) summed("grad x", "in", "x", 8);
      return shapes;
    }

    /** The two places where ranks talk, a bar through all of them; bright while numbers cross it. */
    function bars(step) {
      const { flow, about } = MOMENTS[step];
      const kind = block.ranks[0].messages.find((one) => one.about === about)?.kind;
      return (ranks === 1 ? [] : ["x in", "share z"]).flatMap((way) => {
        const [from, to] = way.split(" "), x = place.middle(from, to);
        const active = kind && (flow.includes(way) || flow.includes(`${to} ${from}`));
        const bar = { kind: "rect", x: x - 4, y: place.top, w: 8, h: place.height - place.top - 4, round: 4 };
        const label = { kind: "text", x: Math.min(Math.max(x, 44), width - 50), y: 12, text: NAMES[kind], bold: true };
        return [
          { ...bar, id: `bar-${from}`, fill: active ? "accent" : "quiet" },
          ...(active ? [{ ...label, id: `talk-${from}-${kind}`, size: wide ? 13 : 12, fill: "accent" }] : []),
        ];
      });
    }

    function arrow(rank, way, step) {
      const [from, to] = way.split(" "), forward = step < BACKWARD;
      const line = { id: `flow-${rank}-${way}`, kind: "arrow", stroke: "accent", thick: wide ? 2 : 1.5 };
      if (!wide && (way === "y w2" || way === "w2 y")) { // from line to line
        const y = place.at(rank, "y", size.y[1], 0).y + 3, y2 = place.at(rank, "w2", 0, 0).y - 5;
        return { ...line, x: 212, x2: 212, y: forward ? y : y2, y2: forward ? y2 : y };
      }
      const begin = place.at(rank, from, size[from][1] / 2, forward ? size[from][0] : 0);
      const end = place.at(rank, to, size[to][1] / 2, forward ? 0 : size[to][0]);
      return { ...line, x: begin.x + (forward ? 3 : -5), y: begin.y, x2: end.x + (forward ? -5 : 4), y2: end.y };
    }

    function at(step) {
      const now = content(step, cut), { fresh, flow } = MOMENTS[step], shapes = [];
      const each = (make) => everyRank.flatMap((rank) =>
        everyPlace.flatMap((name) => make(rank, name, now[name], fresh.includes(name))));
      for (const rank of everyRank) {
        const y = place.laneAt(rank), tag = { x: 12, y: y + 7, w: wide ? 52 : 44, h: 18, round: 9, size: wide ? 12 : 11 };
        shapes.push({ id: `lane-${rank}`, kind: "rect", x: 4, y, w: width - 8, h: place.lane, round: 8, stroke: "line" });
        shapes.push({ id: `rank-${rank}`, kind: "rect", ...tag, fill: `rank-${rank}`, text: `rank ${rank}` });
      }
      shapes.push(...each(heading).filter((_, i) => !wide || i < everyPlace.length)); // once above all
      shapes.push(...bars(step), ...everyRank.flatMap((rank) => flow.map((way) => arrow(rank, way, step))));
      shapes.push(...travellers(step), ...each(matrix));
      return { shapes, caption: caption(block, step, cut), numbers: figures(block, step) };
    }
    return { height: place.height, steps: MOMENTS.length, at };
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
