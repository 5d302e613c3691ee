/* Pipelines: what each rank does when, under a schedule, and how many micro-batches are alive.
   The order of passes and messages is the code's own (assets/numbers_pipelines.py); here they get
   their times. */
"use strict";

(() => {
  const ENGINES = { afab: "AFAB", "1f1b": "1F1B", interleaved: "interleaved" };
  const TITLES = { afab: "AFAB: all forward, all backward", "1f1b": "1F1B: one forward, one backward", interleaved: "Interleaved 1F1B: several chunks a rank" };

  // --- when things happen -------------------------------------------------------------------------

  /** The program of each rank, a list of words like "F0", ">+<-" and "w1". */
  function programs(engine, p, m, v) {
    const data = Book.data.pipelines;
    const name = engine !== "interleaved" ? engine : p > 1 ? `interleaved ${v}` : "1f1b";
    return data.programs[name][`${p} ${m}`].map((place) => [...data.texts[place]].map((letter) => data.words[letter]));
  }

  /** Run the programs. cost(rank, kind, chunk) is the time of a pass, kind F or B; a message takes
      `message`, from the moment when both its ranks have posted it. A rank goes on after a post, and
      stops at a wait until all that it posted together has come and gone.
      Returns {rows: for each rank its passes {kind, chunk, micro, start, end}, messages: [{from, to, start, end}]}. */
  function run(words, cost, message) {
    const p = words.length, links = {};
    const ranks = words.map((program, rank) => ({ rank, program, at: 0, clock: 0, posts: [], passes: [], gone: {} }));

    function post(one, text) {
      const parts = text.match(/[<>][+-]/g).map(([sign, side]) => {
        const other = (one.rank + (side === "+" ? 1 : p - 1)) % p;
        const [from, to] = sign === ">" ? [one.rank, other] : [other, one.rank];
        const link = (links[`${from} ${to}`] ??= { from, to, ">": [], "<": [] });
        link[sign].push(one.clock);
        return { link, number: link[sign].length - 1 };
      });
      one.posts.push(parts);
    }
    /** When a message has arrived; undefined while one of its ranks has not posted it. */
    const arrival = ({ link, number }) => (number < link[">"].length && number < link["<"].length ? Math.max(link[">"][number], link["<"][number]) + message : undefined);

    function act(one, word) {
      if (word[0] === "w") {
        const times = one.posts.at(-1 - Number(word.slice(1))).map(arrival);
        if (times.includes(undefined)) return false;
        one.clock = Math.max(one.clock, ...times);
      } else if (/^[<>]/.test(word)) post(one, word);
      else {
        const kind = word[0], chunk = Number(word.slice(1)), micro = (one.gone[word] = (one.gone[word] ?? -1) + 1);
        const start = one.clock;
        one.clock += cost(one.rank, kind, chunk);
        one.passes.push({ kind, chunk, micro, start, end: one.clock });
      }
      return true;
    }
    for (let moved = true; moved; ) {
      moved = false;
      for (const one of ranks)
        for (; one.at < one.program.length && act(one, one.program[one.at]); one.at += 1) moved = true;
    }
    if (ranks.some((one) => one.at < one.program.length)) throw new Error("each rank waits for another one");
    const messages = Object.values(links).flatMap((link) => link[">"].map((_, number) => {
      const end = arrival({ link, number });
      return { from: link.from, to: link.to, start: end - message, end };
    }));
    return { rows: ranks.map((one) => one.passes), messages };
  }

  /** A step of the pipeline: times in forward passes of a rank's layers. ratio: backward to forward;
      head: what the last rank computes besides, in the same unit. */
  function step(engine, p, m, v, ratio, message, head) {
    const chunks = engine === "interleaved" && p > 1 ? v : 1;
    const cost = (rank, kind, chunk) => {
      const forward = 1 / chunks + (rank === p - 1 && chunk === chunks - 1 ? head : 0);
      return kind === "F" ? forward : forward * ratio;
    };
    return { chunks, ...run(programs(engine, p, m, v), cost, message) };
  }

  /** The end of the last pass, and the share of this time in which the ranks compute nothing. */
  function idle(rows) {
    const time = Math.max(...rows.map((row) => row.at(-1).end));
    const busy = rows.flat().reduce((sum, pass) => sum + pass.end - pass.start, 0);
    return { time, share: 1 - busy / (time * rows.length) };
  }

  /** [time, micro-batches alive from then on] of a rank: from the start of the pass forward to the end
      of that backward. In one of several chunks a micro-batch counts as a part. */
  function alive(row, chunks) {
    const changes = row.map((pass) => (pass.kind === "F" ? [pass.start, 1] : [pass.end, -1]));
    let count = 0;
    return changes.sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([time, change]) => [time, (count += change) / chunks]);
  }

  const bubble = (engine, p, m, v) => (p - 1) / ((engine === "interleaved" ? v : 1) * m + p - 1);

  /** What there is to compare with the code: starts and ends of each rank's passes, and what follows. */
  function summary(...given) {
    const { rows, chunks } = step(...given);
    const most = rows.map((row) => Math.max(...alive(row, chunks).map(([, count]) => count)));
    return { times: rows.map((row) => row.flatMap((pass) => [pass.start, pass.end])), most, ...idle(rows) };
  }
  Book.formulas.pipelines = { summary, bubble };

  // --- what is drawn ------------------------------------------------------------------------------

  /** All that a panel shows of a schedule. */
  function computed(id, engine, state) {
    const { p, m, v, ratio, message, head } = state;
    const { rows, messages, chunks } = step(engine, p, m, v, ratio, message, head);
    return summed({ id, engine, rows, messages, chunks, title: TITLES[engine] });
  }

  /** A recorded run, in the same unit: what a rank needs for its layers forward, on average. */
  function recorded(id, run) {
    const { engine, ranks: p, micro_batches: m, chunks } = run;
    const order = programs(engine, p, m, chunks).map((words) => words.filter((word) => /^[FB]/.test(word)));
    const all = run.rows.flat(), first = Math.min(...all.map(([, start]) => start));
    const unit = all.filter(([kind]) => kind === "F").reduce((sum, [, start, end]) => sum + end - start, 0) / (p * m);
    const back = all.filter(([kind]) => kind === "B").reduce((sum, [, start, end]) => sum + end - start, 0) / (p * m);
    const rows = run.rows.map((spans, rank) => {
      const gone = {};
      return spans.map(([kind, start, end], i) => {
        const word = order[rank][i], micro = (gone[word] = (gone[word] ?? -1) + 1);
        return { kind, chunk: Number(word.slice(1)), micro, start: (start - first) / unit, end: (end - first) / unit };
      });
    });
    return summed({ id, engine, rows, messages: [], chunks, run, unit, ratio: back / unit, title: `Measured: ${ENGINES[engine]}, ${run.on}` });
  }

  function summed(panel) {
    const curves = panel.rows.map((row) => alive(row, panel.chunks));
    const { time, share } = idle(panel.rows);
    return { ...panel, curves, time, share, most: curves.map((curve) => Math.max(...curve.map(([, count]) => count))) };
  }

  const rounded = (value) => String(Number(value.toFixed(2)));
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  /** "rank 0", "ranks 0 and 2", "ranks 1 to 3". */
  function several(ranks) {
    const [first, last] = [ranks[0], ranks.at(-1)];
    if (ranks.length === 1) return `rank ${first}`;
    if (ranks.length > 2 && last - first === ranks.length - 1) return `ranks ${first} to ${last}`;
    return `ranks ${ranks.slice(0, -1).join(", ")} and ${last}`;
  }
  const capital = (text) => text[0].toUpperCase() + text.slice(1);

  function sizes(width, p) {
    const narrow = width < 560, few = p <= 4;
    return {
      narrow, width, size: narrow ? 11 : 12, left: narrow ? 18 : 54, right: narrow ? 58 : 92,
      lane: few ? 26 : 20, drop: few ? 6 : 4, area: few ? 18 : 12, pitch: few ? 56 : 42, title: narrow ? 42 : 28,
    };
  }

  /** The height of a panel's title and rows. */
  const heightOf = (panel, look) => look.title + panel.rows.length * look.pitch;

  function drawPanel(panel, top, look, x, tallest, now) {
    const shapes = [], { size, lane, drop, area } = look;
    const name = (...parts) => [panel.id, ...parts].join(" ");
    const says = `${rounded(panel.time)} long, ${percent(panel.share)} idle`;
    const line = top + (look.narrow ? 28 : 8);
    shapes.push({ id: name("title"), kind: "text", x: 0, y: top + 8, anchor: "start", size: size + 2, bold: true, text: panel.title });
    shapes.push({ id: name("says"), kind: "text", x: look.narrow ? 0 : look.width - look.right, y: line, anchor: look.narrow ? "start" : "end", size, fill: "dim", text: says });
    shapes.push({ id: name("alive"), kind: "text", x: look.width, y: line, anchor: "end", size, fill: "dim", text: now === null ? "alive at most" : "alive" });
    panel.rows.forEach((row, rank) => {
      const y = top + look.title + rank * look.pitch, base = y + lane + area + 2;
      shapes.push({ id: name(rank, "label"), kind: "text", x: 0, y: y + lane / 2, anchor: "start", size, text: look.narrow ? rank : `rank ${rank}` });
      shapes.push({ id: name(rank, "idle"), kind: "rect", x: x(0), y, w: x(panel.time) - x(0), h: lane, fill: "quiet", round: 2 });
      row.forEach((pass, i) => {
        const w = x(pass.end) - x(pass.start), text = String(pass.micro), comes = now !== null && pass.start > now;
        const runs = now !== null && pass.start <= now && now < pass.end;
        shapes.push({
          id: name(rank, i), kind: "rect", x: x(pass.start), w, y: y + (pass.kind === "F" ? 0 : drop), h: lane - drop, round: 2, size,
          fill: `${pass.kind === "F" ? "forward" : "backward"}-${pass.chunk}`, stroke: runs ? "ink" : w > 6 ? "paper" : null,
          opacity: comes ? 0.3 : 1, bold: runs, text: !comes && w > 1 + text.length * size * 0.56 ? text : undefined,
        });
      });
      const height = (count) => (count / tallest) * area;
      const curve = panel.curves[rank].map(([time, count]) => `H${x(time).toFixed(1)}V${(base - height(count)).toFixed(1)}`).join("");
      shapes.push({ id: name(rank, "curve"), kind: "path", d: `M${x(0)} ${base}${curve}H${x(panel.time).toFixed(1)}V${base}z`, fill: "rank-2", opacity: 0.6 });
      const here = now === null ? null : panel.curves[rank].reduce((count, [time, after]) => (time <= now ? after : count), 0);
      const most = rounded(panel.most[rank]);
      shapes.push({ id: name(rank, "count"), kind: "text", x: look.width, y: base - area / 2, anchor: "end", size: size + 1, bold: here === null, text: here === null ? most : `${rounded(here)} of ${most}` });
    });
    if (now !== null) shapes.push({ id: name("now"), kind: "line", x: x(now), x2: x(now), y: top + look.title - 4, y2: top + heightOf(panel, look), stroke: "accent", thick: 2 });
    return shapes;
  }

  /** Messages that are on their way at a moment. */
  function drawMessages(panel, top, look, x, now) {
    const y = (rank) => top + look.title + rank * look.pitch + look.lane / 2;
    return panel.messages.filter((m) => m.start <= now && now < m.end).map((m) => ({
      id: `${panel.id} ${m.from} ${m.to} ${m.start}`, kind: "arrow", x: x(m.start), x2: x(m.end), y: y(m.from), y2: y(m.to), stroke: "ink", thick: 2,
    }));
  }

  function drawAxis(y, look, x, longest, now) {
    const every = Book.nice(longest, look.narrow ? 6 : 12), shapes = [];
    for (let time = 0; time <= longest + 1e-9; time += every) {
      shapes.push({ id: `tick ${time}`, kind: "line", x: x(time), x2: x(time), y, y2: y + 5, stroke: "line" });
      const hidden = now !== null && Math.abs(x(now) - x(time)) < 30;
      if (!hidden) shapes.push({ id: `time ${time}`, kind: "text", x: x(time), y: y + 14, size: look.size, fill: "dim", text: rounded(time) });
    }
    shapes.push({ id: "axis", kind: "line", x: x(0), x2: x(longest), y, y2: y, stroke: "line" });
    shapes.push({ id: "unit", kind: "text", x: x(0), y: y + 32, anchor: "start", size: look.size, fill: "dim", text: look.narrow ? "time, in forward passes of a rank" : "time; 1 is what a rank needs to go forward with a micro-batch" });
    if (now !== null) shapes.push({ id: "now is", kind: "rect", x: x(now) - 18, y: y + 3, w: 36, h: 20, fill: "accent", size: look.size, bold: true, text: rounded(now) });
    return shapes;
  }

  function drawLegend(y, look, chunks) {
    const entries = [["forward", "forward"], ["backward", "backward"]].flatMap(([kind, text]) =>
      Array.from({ length: chunks }, (_, chunk) => ({ fill: `${kind}-${chunk}`, up: kind === "forward" ? 0 : 4, text: chunks > 1 ? (chunk ? `${chunk}` : `${text}, chunk 0`) : text })));
    entries.push({ fill: "quiet", text: "idle" }, { fill: "rank-2", text: "micro-batches alive" });
    const shapes = [];
    let at = 0, line = y;
    for (const [i, { fill, up = 2, text }] of entries.entries()) {
      const w = 20 + text.length * look.size * 0.5 + 18;
      if (at + w > look.width + 16) { at = 0; line += 22; }
      shapes.push({ id: `key ${i}`, kind: "rect", x: at, y: line - 9 + up, w: 14, h: 14, fill, round: 2, opacity: fill === "rank-2" ? 0.6 : 1 });
      shapes.push({ id: `key ${i} is`, kind: "text", x: at + 20, y: line, anchor: "start", size: look.size, text });
      at += w;
    }
    return { shapes, bottom: line + 12 };
  }

  // --- what is said -------------------------------------------------------------------------------

  function overview(state, panels) {
    const [above, below] = panels, { p, m, v } = state;
    const first = {
      afab: `AFAB: all ${m} micro-batches go forward, then all go backward. Each rank keeps the activations of all of them.`,
      "1f1b": `1F1B: after a warm-up a rank goes forward and backward in turn. Rank 0 keeps at most ${above.most[0]} of the ${m} micro-batches.`,
      interleaved: `Each rank has ${v} chunks of layers, so a micro-batch goes round ${v} times. A pass is 1/${v} as long, and so is the wait for the first one.`,
    }[above.engine];
    if (!below) {
      const due = bubble(above.engine, p, m, v);
      const why = state.message || state.head ? "The formula knows neither messages nor a head" : "Ranks also wait for what they send, and the formula does not know it";
      if (Math.abs(above.share - due) > 1e-9) return `${first} ${why}: it says ${percent(due)}, and here ${percent(above.share)} is idle.`;
      return `${first} On average a rank waits for ${percent(above.share)} of the step.`;
    }
    if (below.run) {
      const { machine, date, on, ranks } = below.run, cores = Number(/^(\d+) cores/.exec(on)?.[1] ?? ranks);
      const shared = ranks > cores ? ` ${ranks} ranks share ${cores} cores, so they wait for a core, too.` : "";
      return `Below, the same schedule as it ran: ${machine}, ${date}.${shared} There 1 on the axis is ${below.unit.toFixed(1)} ms, and a pass backward took ${below.ratio.toFixed(1)} times as long as one forward.`;
    }
    const apart = below.time / above.time - 1;
    const other = Math.abs(apart) < 1e-9 ? "takes exactly as long" : `takes ${percent(Math.abs(apart))} ${apart < 0 ? "less" : "more"} time`;
    return `${first} ${capital(ENGINES[below.engine])}, below, ${other} and keeps ${rounded(Math.max(...below.most))} alive at most.`;
  }

  /** What the ranks of a panel do at a moment, after the panel's name. */
  function moment(panel, now, name) {
    const runs = [], waits = [], over = [];
    panel.rows.forEach((row, rank) => {
      if (row.some((pass) => pass.start <= now && now < pass.end)) return runs.push(rank);
      const next = row.find((pass) => pass.start > now);
      return next ? waits.push({ rank, next }) : over.push(rank);
    });
    const said = [];
    if (runs.length) said.push(runs.length === panel.rows.length && runs.length > 1 ? "all ranks compute" : `${several(runs)} ${runs.length > 1 ? "compute" : "computes"}`);
    if (waits.length === 1) {
      const { rank, next } = waits[0];
      const what = next.kind === "F" ? "activation" : "gradient";
      said.push(`rank ${rank} waits for the ${what} of micro-batch ${next.micro}`);
    } else if (waits.length) said.push(`${several(waits.map(({ rank }) => rank))} wait`);
    if (over.length) said.push(over.length === panel.rows.length ? "the step is over" : `${several(over)} ${over.length > 1 ? "are" : "is"} done`);
    return said.map((text, i) => `${capital(i ? text : name + text)}.`).join(" ");
  }

  /** What is counted of a panel. Its names end with "_below" for the second one. */
  function numbersOf(panel, state, below) {
    const { p, m } = state, v = panel.engine === "interleaved" ? state.v : 1;
    const by = panel.run ? "–" : `${p - 1} / ${v * m + p - 1} = ${percent(bubble(panel.engine, p, m, v))}`;
    return [
      { name: "idle", label: "idle", text: percent(panel.share) },
      { name: "formula", label: v > 1 ? "(p − 1) / (v m + p − 1)" : "(p − 1) / (m + p − 1)", text: by },
      { name: "time", label: "length of the step", text: panel.run ? `${Math.round(panel.time * panel.unit).toLocaleString("en")} ms` : rounded(panel.time) },
      { name: "alive", label: "alive at most", text: rounded(Math.max(...panel.most)) },
    ].map((number) => ({ ...number, name: below ? `${number.name}_below` : number.name }));
  }

  /** The numbers of two panels side by side. */
  function compared(panels, state) {
    const rows = panels.map((panel, i) => [panel.run ? "measured" : ENGINES[panel.engine], ...numbersOf(panel, state, i === 1)]);
    return { title: "side by side", head: ["schedule", "idle", "by the formula", "length of the step", "alive at most"], rows };
  }

  const measured = () => Object.keys(Book.data.pipelines?.measured ?? {});

  Book.define("pipelines", {
    title: "Pipelines",
    data: ["pipelines"],
    get options() {
      const runs = Book.data.pipelines?.measured ?? {};
      const named = Object.fromEntries(Object.entries(runs).map(([key, run]) => [key, `measured: ${ENGINES[run.engine]}, ${run.ranks} ranks, ${run.on}`]));
      return {
        above: { label: "schedule", choices: Object.keys(ENGINES), names: ENGINES, value: "1f1b" },
        below: { label: "below", choices: ["nothing", ...Object.keys(ENGINES), ...Object.keys(runs)], names: { ...ENGINES, ...named }, value: "nothing" },
        p: { label: "ranks p", min: 1, max: 8, value: 4 },
        m: { label: "micro-batches m", min: 1, max: 16, value: 8 },
        v: { label: "chunks v", min: 2, max: 4, value: 2, when: (state) => [state.above, state.below].includes("interleaved") },
        ratio: { label: "backward / forward", min: 1, max: 3, step: 0.25, value: 2 },
        message: { label: "time of a message", min: 0, max: 1, step: 0.05, value: 0, show: rounded },
        head: { label: "head, on the last rank", min: 0, max: 1, step: 0.1, value: 0, show: rounded },
      };
    },
    /** A recorded run has its own schedule and sizes; interleaved goes in groups of p, which is 2 at least. */
    settle(state) {
      const run = Book.data.pipelines.measured[state.below];
      if (run) Object.assign(state, { above: run.engine, p: run.ranks, m: run.micro_batches, v: run.chunks > 1 ? run.chunks : state.v });
      if (![state.above, state.below].includes("interleaved")) return;
      state.p = Math.max(2, state.p);
      state.m = Math.min(Math.floor(16 / state.p), Math.max(1, Math.round(state.m / state.p))) * state.p;
    },
    seconds: (at) => (at === 0 ? 2.5 : 0.7),
    scene(state, width) {
      const look = sizes(width, state.p), panels = [computed("above", state.above, state)];
      if (measured().includes(state.below)) panels.push(recorded("below", Book.data.pipelines.measured[state.below]));
      else if (state.below !== "nothing") panels.push(computed("below", state.below, state));
      const longest = Math.max(...panels.map((panel) => panel.time)), tallest = Math.max(...panels.flatMap((panel) => panel.most));
      const x = (time) => look.left + (time / longest) * (width - look.left - look.right);
      const tops = panels.map((_, i) => panels.slice(0, i).reduce((sum, panel) => sum + heightOf(panel, look) + 16, 0));
      const bottom = tops.at(-1) + heightOf(panels.at(-1), look) + 4;
      const legend = drawLegend(bottom + 56, look, Math.max(...panels.map((panel) => panel.chunks)));
      const every = Math.max(0.5, Book.nice(longest, 48)), steps = 2 + Math.ceil(longest / every);
      const numbers = panels.length > 1 ? { numbers: [], tables: [compared(panels, state)] } : { numbers: numbersOf(panels[0], state, false) };

      /** Moment 0 shows the whole step, the others a time each. */
      function at(step) {
        const now = step === 0 ? null : Math.min(longest, (step - 1) * every);
        const caption = now === null ? overview(state, panels) : panels.map((panel) => moment(panel, now, panels.length > 1 ? `${panel.run ? "measured" : ENGINES[panel.engine]}: ` : "")).join(" ");
        const rows = panels.flatMap((panel, i) => drawPanel(panel, tops[i], look, x, tallest, now));
        const sent = now === null ? [] : panels.flatMap((panel, i) => drawMessages(panel, tops[i], look, x, now));
        return { shapes: [...rows, ...legend.shapes, ...drawAxis(bottom, look, x, longest, now), ...sent], caption };
      }
      return { height: legend.bottom, steps, at, ...numbers };
    },
  });
})();
