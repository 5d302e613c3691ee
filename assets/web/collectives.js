/* Collectives on real small numbers, hop by hop, and how long they take. The hops, and what real
   ranks gave for the same numbers, come from numbers_collectives.py. */
"use strict";

(() => {
  const KINDS = ["all-reduce", "all-gather", "reduce-scatter", "broadcast", "exchange", "all-to-all"];
  const ADDS = ["all-reduce", "reduce-scatter"];
  // What no rank of a tree exceeds; d: hops up or down. For a ring the lesson has the formula.
  const TREE_SENDS = { "all-reduce": "d · M", "all-gather": "d · M", "reduce-scatter": "2 M", broadcast: "d · M" };
  const numbers = () => Book.data.collectives;
  const ways = (kind) => Object.keys(numbers().hops[kind]);
  const hopsOf = (kind, way, n) => numbers().hops[kind][way][n];

  // --- formulas -----------------------------------------------------------------------------------

  /** Parts of M / n bytes that each rank sends in some hops: [rank]. */
  function sentParts(hops, n) {
    const sent = Array(n).fill(0);
    for (const [from, , parts] of hops.flat()) sent[from] += parts.length;
    return sent;
  }

  /** For each hop the parts of its largest message: all messages of a hop travel at the same time. */
  function partsInHops(hops) {
    return hops.map((hop) => Math.max(...hop.map(([, , parts]) => parts.length)));
  }

  /** Seconds of hops with these parts; M is `size` bytes, latency in ms, bandwidth in GB/s. */
  function seconds(parts, n, size, latency, bandwidth) {
    const bytes = (parts.reduce((sum, p) => sum + p, 0) * size) / n;
    return (parts.length * latency) / 1e3 + bytes / (bandwidth * 1e9);
  }

  /** The numbers on every rank before the first hop and after each one: [moment][rank][part], a cell
      {value, who: the ranks whose numbers are in it}, or null. */
  function play(kind, hops, inputs) {
    const own = (rank, part) => (kind === "all-gather" && part !== rank) || (kind === "broadcast" && rank > 0);
    let now = inputs.map((row, rank) => row.map((value, part) => (own(rank, part) ? null : { value, who: [rank] })));
    const moments = [now];
    for (const hop of hops) {
      const next = now.map((row) => [...row]);
      for (const [from, to, parts, what] of hop)
        for (const part of parts) {
          const came = now[from][part], there = next[to][part];
          const sum = () => ({ value: there.value + came.value, who: [...there.who, ...came.who] });
          next[to][place(what, from, part)] = what === "add" ? sum() : came;
        }
      moments.push((now = next));
    }
    return moments;
  }

  const place = (what, from, part) => (what === "swap" ? from : part);
  const isResult = (kind, rank, part) => kind !== "reduce-scatter" || rank === part;

  /** Which cells still count, as they will be sent or belong to the result: [moment][rank][part]. */
  function needed(kind, hops, n) {
    let now = Array.from({ length: n }, (_, rank) => Array.from({ length: n }, (_, part) => isResult(kind, rank, part)));
    const moments = [now];
    for (const hop of [...hops].reverse()) {
      now = now.map((row) => [...row]);
      for (const [from, to, parts, what] of hop) if (what !== "add") for (const part of parts) now[to][place(what, from, part)] = false;
      for (const [from, , parts] of hop) for (const part of parts) now[from][part] = true;
      moments.unshift(now);
    }
    return moments;
  }

  Book.formulas.collectives = { sentParts, partsInHops, seconds, play };

  // --- words --------------------------------------------------------------------------------------

  /** 85300000 as "85.3 MB": three digits and the unit that fits. */
  function amount(value, units) {
    const [size, unit] = units.findLast(([size]) => value >= size) ?? units[0];
    return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  const bytes = (value) => amount(value, [[1, "B"], [1e3, "kB"], [1e6, "MB"], [1e9, "GB"]]);
  const duration = (value) => amount(value, [[1e-6, "µs"], [1e-3, "ms"], [1, "s"]]);
  const share = (parts, n) => (parts % n ? `${parts}/${n} M` : parts === n ? "M" : parts ? `${parts / n} M` : "0");

  function captionOf(kind, way, hops, k, cells) {
    const n = cells[0].length;
    if (k === hops.length) return ending(kind, way, n, hops.length);
    const [from, to, parts, what] = hops[k][0], start = `Hop ${k + 1} of ${hops.length}.`;
    const came = cells[k][from][parts[0]], there = cells[k][to][parts[0]];
    const example = what === "add"
      ? `For example, rank ${from} sends ${came.value}, and rank ${to} has ${there.value}. The sum is ${cells[k + 1][to][parts[0]].value}.`
      : `For example, rank ${from} sends ${came.value} to rank ${to}.`;
    return `${start} ${sentence(kind, way, hops[k], what, k, n)} ${way === "tree" ? "" : example}`.trim();
  }

  function sentence(kind, way, hop, what, k, n) {
    if (way === "tree") {
      const many = hop.map(([from, to]) => `rank ${from} to rank ${to}`).join(", ");
      const sum = kind === "all-reduce" ? "The sums go down the tree" : "The numbers go down the tree";
      return `${what === "add" ? "The numbers go up the tree, and are added" : hop[0][0] > hop[0][1] ? "The parts go up the tree" : sum}: ${many}.`;
    }
    if (what === "add") return k ? "Each rank sends on the sum that it has just made." : "Each rank sends one part to the next rank, which adds it to its own.";
    if (kind === "all-reduce") return k === n - 1 ? "The sums are complete. Now each rank sends the one that it has to the next rank." : "Each rank sends on the sum that has just come.";
    if (kind === "all-gather") return k ? "Each rank sends on the part that has just come." : "Each rank sends its part to the next rank, which keeps it.";
    if (kind === "broadcast") return "Each rank sends on the part that has just come. So several hops happen at once.";
    if (kind === "exchange") return "Each rank sends its whole tensor to the next rank, and receives one from the rank before.";
    return `The ranks meet in pairs. Each gives the other the part with its number.${n % 2 ? " One rank has no partner." : ""}`;
  }

  function ending(kind, way, n, hops) {
    const has = {
      "all-reduce": "All ranks have the sums of all parts.",
      "all-gather": "All ranks have all parts.",
      "reduce-scatter": "Rank r has part r of the sum. The grey numbers are of no more use.",
      broadcast: "All ranks have the tensor of rank 0.",
      exchange: "Each rank has the tensor of the rank before it.",
      "all-to-all": "Part r of every rank is now on rank r.",
    }[kind];
    const most = way === "tree" ? `${TREE_SENDS[kind]}, with d = ${Math.ceil(Math.log2(n))}` : numbers().sends[kind];
    return `${has} That took ${hops} hop${hops > 1 ? "s" : ""}, and no rank has sent more than ${most}.`;
  }

  // --- picture ------------------------------------------------------------------------------------

  /** Where things stand, in a picture of a width: arrows, names of ranks, their parts, what they sent. */
  function gridOf(width, n) {
    const wide = width > 500, label = wide ? 66 : 24, x0 = wide ? 92 : 34, left = x0 + label + 10, right = wide ? 100 : 50;
    const step = Math.min(130, (width - left - right) / n), top = 28, h = wide ? 36 : 34, row = h + 10;
    return {
      n, wide, h, label, x0, left, w: step - 8, small: wide ? 13 : 11, size: wide ? 15 : 11, span: width - left - right,
      x: (part) => left + part * step, y: (rank) => top + rank * row, end: left + n * step, bottom: top + n * row,
    };
  }

  function lookOf(cell, live, n, kind) {
    if (!cell) return { stroke: "line", dashed: true };
    if (!live) return { stroke: "line", ink: "dim", text: cell.value };
    if (cell.who.length === n && ADDS.includes(kind)) return { fill: "ink", ink: "paper", text: cell.value };
    return { fill: cell.who.length > 1 ? "quiet" : `rank-${cell.who[0]}`, text: cell.value };
  }

  /** A cell at a place; below the number of a sum not yet complete a mark for each rank in it. */
  function cellAt(g, id, rank, part, look, cell, more = {}) {
    const x = g.x(part), y = g.y(rank), mark = (g.w - 10) / g.n;
    const shapes = [{ id, kind: "rect", x, y, w: g.w, h: g.h, size: g.size, mono: true, turns: 1, ...look, ...more }];
    if (look.fill === "quiet")
      for (const who of cell.who)
        shapes.push({ id: `${id} of ${who}`, kind: "rect", x: x + 5 + who * mark, y: y + g.h - 7, w: mark - 1, h: 4, round: 1, fill: `rank-${who}`, turns: 1, ...more });
    return shapes;
  }

  /** An arrow at the left of the ranks, from one to another; further out the longer it is. */
  function arc(g, from, to) {
    const far = (g.wide ? 20 : 12) + (g.wide ? 11 : 4) * Math.abs(to - from), x = g.x0 - 3;
    const a = g.y(from) + g.h / 2 + 7, b = g.y(to) + g.h / 2 - 7;
    return { id: `arrow ${from} ${to}`, kind: "path", d: `M${x} ${a} C${x - far} ${a} ${x - far} ${b} ${x} ${b}`, stroke: "accent", head: true };
  }

  const target = ([from, to, , what], part) => [to, place(what, from, part)];

  /** A name for each part that a hop sends, {"rank part": name}: that of what has just come there. */
  function namesOf(hops) {
    const all = [], came = {};
    hops.forEach((hop, k) => {
      const names = {}, next = {};
      for (const message of hop)
        for (const part of message[2]) {
          const here = `${message[0]} ${part}`;
          names[here] = came[here] ?? `packet ${k} ${here}`;
          next[target(message, part).join(" ")] = names[here];
        }
      all.push(names);
      Object.keys(came).forEach((key) => delete came[key]);
      Object.assign(came, next);
    });
    return all;
  }

  function scene(state, width) {
    const n = state.ranks, { kind } = state, way = ways(kind).includes(state.way) ? state.way : ways(kind)[0];
    const hops = hopsOf(kind, way, n), g = gridOf(width, n);
    const cells = play(kind, hops, numbers().inputs[n]), live = needed(kind, hops, n);
    const times = barsOf(state, g, way), names = namesOf(hops);

    function at(k) {
      const shapes = [], sent = sentParts(hops.slice(0, k), n);
      for (let part = 0; part < n; part++) shapes.push({ id: `part ${part}`, kind: "text", x: g.x(part) + g.w / 2, y: 14, size: g.small, fill: "dim", text: g.wide ? `part ${part}` : part });
      shapes.push({ id: "sent", kind: "text", x: g.end + 4, y: 14, anchor: "start", size: g.small, fill: "dim", text: g.wide ? "sent so far" : "sent" });
      for (let rank = 0; rank < n; rank++) {
        shapes.push({ id: `rank ${rank}`, kind: "rect", x: g.x0, y: g.y(rank), w: g.label, h: g.h, fill: `rank-${rank}`, size: g.small, bold: true, text: g.wide ? `rank ${rank}` : rank });
        cells[k][rank].forEach((cell, part) => shapes.push(...cellAt(g, `cell ${rank} ${part}`, rank, part, lookOf(cell, live[k][rank][part], n, kind), cell)));
        shapes.push({ id: `sent ${rank}`, kind: "text", x: g.end + 4, y: g.y(rank) + g.h / 2, anchor: "start", size: g.size, mono: true, text: share(sent[rank], n), turns: 1 });
      }
      for (const [from, to] of hops[k] ?? []) shapes.push(arc(g, from, to));
      shapes.push(...packets(k - 1, true), ...packets(k, false), ...times(k));
      return { shapes, caption: captionOf(kind, way, hops, k, cells) };
    }

    /** What a hop moves: at its start on the cells of the senders, at its end on those that it meets. */
    function packets(hop, arrived) {
      return (hops[hop] ?? []).flatMap((message) => message[2].flatMap((part) => {
        const [rank, column] = arrived ? target(message, part) : [message[0], part], id = names[hop][`${message[0]} ${part}`];
        if (arrived && names[hop + 1]?.[`${rank} ${column}`] === id) return []; // it moves on
        const cell = cells[arrived ? hop + 1 : hop][rank][column];
        const frame = { id: `${id} frame`, kind: "rect", x: g.x(column) - 3, y: g.y(rank) - 3, w: g.w + 6, h: g.h + 6, round: 6, stroke: "accent", thick: 2, opacity: arrived ? 0 : 1 };
        return [...cellAt(g, id, rank, column, lookOf(cell, live[arrived ? hop + 1 : hop][rank][column], n, kind), cell), frame];
      }));
    }
    return { height: times.height, steps: hops.length + 1, at, numbers: figures(state, way) };
  }

  /** The time of each way as a bar, hop by hop: latency, then bytes over bandwidth. */
  function barsOf(state, g, chosen) {
    const { kind, ranks: n, size, latency, bandwidth } = state;
    const all = ways(kind).map((way) => ({ way, parts: partsInHops(hopsOf(kind, way, n)) }));
    const total = (parts) => seconds(parts, n, size, latency, bandwidth);
    const scale = g.span / Math.max(...all.map(({ parts }) => total(parts))), top = g.bottom + (g.wide ? 42 : 62);
    const x = (parts) => g.left + scale * total(parts), y = (i) => top + i * 30;
    const still = all.flatMap(({ way, parts }, i) => {
      const bold = way === chosen, opacity = bold ? 1 : 0.4, bar = { kind: "rect", y: y(i), h: 20, round: 0 }, words = { kind: "text", y: y(i) + 10, size: g.small, bold };
      const pieces = parts.flatMap((part, hop) => {
        const begin = x(parts.slice(0, hop)), wait = (scale * latency) / 1e3, w = scale * total([part]);
        return [
          { ...bar, id: `${way} ${hop} latency`, x: begin, w: wait, fill: "line", opacity },
          { ...bar, id: `${way} ${hop} bytes`, x: begin + wait, w: w - wait, fill: "accent", opacity },
          { ...bar, id: `${way} ${hop}`, x: begin, w, stroke: "paper" },
        ];
      });
      return [
        { ...words, id: `${way} name`, x: g.left - 10, anchor: "end", text: way }, ...pieces,
        { ...words, id: `${way} time`, x: x(parts) + 6, anchor: "start", text: duration(total(parts)) },
      ];
    });
    const mine = all.findIndex(({ way }) => way === chosen);
    const times = (k) => {
      const now = x(all[mine].parts.slice(0, k));
      return [...legend(g, g.bottom + 22, linkOf(state)), ...still, { id: "now", kind: "line", x: now, x2: now, y: y(mine) - 4, y2: y(mine) + 24, stroke: "ink", thick: 3 }];
    };
    times.height = y(all.length);
    return times;
  }

  /** What a link of these numbers is, where a lesson measures or names one. */
  function linkOf({ latency, bandwidth }) {
    const { gloo, host, network, latency: measured } = numbers().links;
    if (bandwidth === gloo && latency === measured) return "link: gloo on two cores, measured";
    return { [host]: "bandwidth: between GPUs of a host", [network]: "bandwidth: between hosts" }[bandwidth];
  }

  function legend(g, y, link) {
    const below = { id: "link", kind: "text", size: g.small, fill: "dim", text: link };
    const place = g.wide ? { x: g.left + g.span, y: y + 1, anchor: "end" } : { x: g.left, y: y + 19, anchor: "start" };
    return [...(link ? [{ ...below, ...place }] : []), ...[["line", "latency", 0], ["accent", "bytes / bandwidth", g.wide ? 88 : 76]].flatMap(([fill, text, x]) => [
      { id: `legend ${fill}`, kind: "rect", x: g.left + x, y: y - 5, w: 11, h: 11, round: 0, fill },
      { id: `legend ${text}`, kind: "text", x: g.left + x + 17, y: y + 1, anchor: "start", size: g.small, fill: "dim", text },
    ])];
  }

  function figures({ kind, ranks: n, size, latency, bandwidth }, way) {
    const parts = partsInHops(hopsOf(kind, way, n)), sent = sentParts(hopsOf(kind, way, n), n), most = Math.max(...sent);
    const total = bytes((parts.reduce((sum, p) => sum + p, 0) * size) / n);
    const time = `${parts.length} × ${duration(latency / 1e3)} + ${total} / ${bandwidth} GB/s = ${duration(seconds(parts, n, size, latency, bandwidth))}`;
    return [
      { name: "sent", label: sent.every((s) => s === most) ? "each rank sends" : "the busiest rank sends", text: `${share(most, n)} = ${bytes((most * size) / n)}` },
      { name: "time", label: "hops × latency + bytes / bandwidth", text: time },
    ];
  }

  // --- options ------------------------------------------------------------------------------------

  /** 1, 2, 5, 10, ... from one number to another, and the given ones, in order. */
  function series(from, to, ...given) {
    const all = [...given];
    for (let ten = from; ten <= to; ten *= 10) all.push(...[1, 2, 5].map((digit) => Number((digit * ten).toPrecision(1))).filter((v) => v <= to));
    return [...new Set(all)].sort((a, b) => a - b);
  }
  const links = () => numbers().links;

  Book.define("collectives", {
    title: "Collectives, hop by hop",
    data: ["collectives"],
    options: {
      kind: { label: "collective", choices: KINDS, names: { exchange: "exchange (send and receive)" }, value: "all-reduce" },
      way: { label: "as a", choices: ["ring", "tree"], value: "ring", when: ({ kind }) => ways(kind).length > 1 },
      ranks: { label: "ranks, n", min: 2, max: 8, value: 3 },
      size: { label: "tensor, M", values: series(1e3, 1e10), value: 1e6, show: bytes },
      latency: {
        label: "latency", get values() { return series(0.001, 1, links().latency); }, get value() { return links().latency; },
        show: (value) => duration(value / 1e3),
      },
      bandwidth: {
        label: "bandwidth", get values() { return series(0.1, 1000, links().gloo, links().host, links().network); }, get value() { return links().gloo; },
        show: (value) => `${value} GB/s`,
      },
    },
    seconds: () => 2.4,
    scene,
  });
})();
