/* The planner: what a layout needs of a GPU, and what sets its pace. The formulas are those of
   plan.py and of numbers_planner.py, with the same names; tests compare them. */
"use strict";

Book.formulas.planner = (() => {
  const AXES = ["tp", "cp", "dp_cp", "pp", "ends"];

  /** Why a layout cannot run, in the words of step 9's flags.py; null where it can. c: the model's
      shape; a: the flags. */
  function problem(c, a) {
    for (const name of ["num_attention_heads", "num_key_value_heads", "intermediate_size"])
      if (c[name] % a.tp_size) return `--tp_size ${a.tp_size} with --${name} ${c[name]}: choose a divisor of it`;
    if (c.vocab_size < a.tp_size) return `--tp_size ${a.tp_size} with --vocab_size ${c.vocab_size}: lower the former`;
    if (a.sequence_parallel && Math.floor(a.seq_len / a.cp_size) % a.tp_size)
      return `--sequence_parallel with --tp_size ${a.tp_size}: --seq_len ${a.seq_len} / --cp_size ${a.cp_size} is not a multiple of it; choose one that is`;
    if (a.cp_size > 1 && a.seq_len % (2 * a.cp_size))
      return `--cp_size ${a.cp_size} with --seq_len ${a.seq_len}: choose a multiple of ${2 * a.cp_size}, two chunks for each rank`;
    if (c.num_hidden_layers < a.pp_size)
      return `--pp_size ${a.pp_size} with --num_hidden_layers ${c.num_hidden_layers}: every stage needs a layer; lower the former`;
    return null;
  }

  /** How many layers each stage holds: step 7's deal_layers. */
  function deal(c, stages) {
    const layers = c.num_hidden_layers, kv = c.num_key_value_heads * c.head_dim, width = c.num_attention_heads * c.head_dim + kv;
    const layer = c.hidden_size * (2 * width + 3 * c.intermediate_size), table = c.hidden_size * c.vocab_size;
    const cost = (stage, count) => count * layer + (stage === 0 ? table : 0) + (stage === stages - 1 ? table : 0);
    // best[stop]: how the stages so far best hold the layers before `stop`, by the largest cost.
    let best = new Map([[0, { largest: 0, dealt: [] }]]);
    for (let stage = 0; stage < stages; stage++) {
      const reached = new Map();
      for (const [start, { largest, dealt }] of best)
        for (let stop = start + 1; stop <= layers; stop++) {
          const found = Math.max(largest, cost(stage, stop - start));
          if (!reached.has(stop) || found < reached.get(stop).largest) reached.set(stop, { largest: found, dealt: [...dealt, stop - start] });
        }
      best = reached;
    }
    return best.get(layers).dealt;
  }

  /** The sizes of a rank of one pipeline stage; of tp the largest, of cp a part. */
  function stage(c, a, place, layers = deal(c, a.pp_size)[place]) {
    const tp = a.tp_size, s = { c, a, place, layers, m: a.gradient_accumulation_steps };
    s.alive = Math.min(a.pp_size - place, s.m);
    s.first = Number(place === 0);
    s.last = Number(place === a.pp_size - 1);
    s.h = c.hidden_size;
    s.vocab = Math.ceil(c.vocab_size / tp);
    s.f = Math.floor(c.intermediate_size / tp);
    s.q = Math.floor((c.num_attention_heads * c.head_dim) / tp);
    s.kv = Math.floor((c.num_key_value_heads * c.head_dim) / tp);
    s.tokens = Math.floor((a.micro_batch_size * a.seq_len) / a.cp_size);
    s.between = a.sequence_parallel ? Math.floor(s.h / tp) : s.h;
    s.columns = s.h * (s.q + 2 * s.kv + 2 * s.f);
    s.rows = s.h * (s.q + s.f);
    s.matrices = s.columns + s.rows;
    s.layer = s.matrices + 2 * s.h;
    const tied = c.tie_word_embeddings, tables = s.first + Number(s.last && !(s.first && tied));
    s.outside = tables * s.h * s.vocab + s.last * s.h;
    const table = tied ? 0 : s.h * s.vocab;
    s.embedding = s.first * table;
    s.head = s.last * table;
    s.weights = layers * s.layer + s.outside;
    s.replicas = a.dp_size * a.cp_size;
    s.zero = s.replicas > 1 && a.dp_engine.startsWith("zero") ? Number(a.dp_engine.at(-1)) : 0;
    s.shares = s.m > 1 && !a.activation_checkpointing;
    s.castsHead = tp === 1 && !(s.head && (s.zero === 3 || s.shares));
    return s;
  }

  /** Bytes that autograd keeps of a micro-batch: of a whole layer, in layers, at the end. */
  function kept(s) {
    const inner = 2 * s.q + (2 + 2 * (s.a.cp_size > 1)) * s.kv + 4 * s.f;
    const whole = 2 * s.tokens * (4 * s.between + inner) + (s.shares ? 0 : castsOfALayer(s));
    const layer = s.a.activation_checkpointing ? 2 * s.tokens * s.between : whole;
    const end = 4 * s.tokens * s.between + (s.castsHead * 2 * s.h + 4 * s.tokens) * s.vocab;
    return { whole, layers: s.layers * layer, end: s.last * end };
  }

  const castsOfALayer = (s) => 2 * (s.rows + (s.a.tp_size === 1) * s.columns) * (s.zero < 3);
  const casts = (s) => s.shares * (s.layers * castsOfALayer(s) + 2 * s.head * (s.a.tp_size === 1 && s.zero < 3));

  /** Bytes by what they are for, at the fullest moment of a step. */
  function memory(s) {
    const n = s.replicas, size = 4 * s.weights, { whole, layers, end } = kept(s), sent = Math.min(2 ** 28, size);
    const passing = { 1: sent / n, 2: sent + sent / n, 3: 10 * s.layer + 4 * (s.outside - s.embedding) - 2 * s.head }[s.zero] ?? 0;
    return {
      weights: size / (s.zero === 3 ? n : 1),
      gradients: size * (s.zero < 2) + (size / n) * (s.zero > 0),
      moments: (2 * size) / (s.zero >= 1 ? n : 1),
      activations: s.alive * layers + end + casts(s),
      "in passing": passing + Math.max(s.a.activation_checkpointing ? whole : 0, s.last * 8 * s.tokens * s.vocab),
    };
  }

  /** Rows of [axis, collective, bytes as in the ledger, bytes that the rank sends]. */
  function traffic(s) {
    const { a, m, tokens: t, replicas: n, layers } = s, x = 2 * t * s.h, size = 4 * s.weights, redo = Number(a.activation_checkpointing);
    const sums = m * x * ((4 + redo) * layers + s.last + 2 * s.first);
    const gathers = m * x * ((6 + 2 * redo) * layers + 2 * s.last + 2 * s.first);
    const dealtOut = [["reduce_scatter", sums], ["all_gather", gathers], ["all_reduce", m * 4 * s.h * (2 * layers + s.last)]];
    const tp = [["all_gather", s.last * m * 8 * t * a.tp_size], ...(a.sequence_parallel ? dealtOut : [["all_reduce", sums]])];
    const hops = (3 + redo) * (a.cp_size - 1) - 1, cp = [["send", m * layers * hops * 2 * 2 * t * s.kv]];
    const halves = (2 * layers - 1) * s.matrices + s.head, rest = s.weights - layers * s.matrices - s.head;
    const dealt = [["reduce_scatter", s.zero > 1 ? m * size : size], ["all_gather", s.zero > 2 ? m * (2 * halves + 4 * rest) : size]];
    const dp = s.zero ? dealt : [["all_reduce", size]];
    const pp = [["send", m * (2 - s.first - s.last) * 2 * t * s.between]];
    const ends = [["all_reduce", ((s.c.tie_word_embeddings ? s.first + s.last : 0) * 4 * s.h * s.vocab) / (s.zero ? n : 1)]];
    const groups = { tp: [tp, a.tp_size], cp: [cp, a.cp_size], dp_cp: [dp, n], pp: [pp, a.pp_size], ends: [ends, Math.min(2, a.pp_size)] };
    return AXES.flatMap((axis) => {
      const [rows, ranks] = groups[axis];
      const share = (kind) => ({ send: 1, all_reduce: 2 - 2 / ranks }[kind] ?? 1 - 1 / ranks);
      return ranks > 1 ? rows.map(([kind, bytes]) => [axis, kind, bytes, bytes * share(kind)]) : [];
    });
  }

  /** Operations of this rank in a step. */
  function flops(s) {
    const matrices = s.layers * s.layer + s.last * s.h * s.vocab, attention = 12 * s.layers * s.q * s.a.seq_len;
    return s.m * s.tokens * (6 * matrices + attention);
  }

  /** Whether each group of an axis is on one host: of tp, cp, dp, pp the first varies fastest. */
  function inside(a, axis, host) {
    const cp = a.tp_size * a.cp_size, world = cp * a.dp_size * a.pp_size;
    const reach = { tp: a.tp_size, cp, dp_cp: cp * a.dp_size }[axis] ?? world;
    return world <= host || host % reach === 0;
  }

  /** How long a stage computes, waits and sends in a step at best. */
  function seconds(s, gpu, host) {
    const products = flops(s) / gpu.peak, found = { products, bubble: (products * (s.a.pp_size - 1)) / s.m };
    for (const [axis, , , size] of traffic(s))
      found[axis] = (found[axis] ?? 0) + size / (inside(s.a, axis, host) ? gpu.inside : gpu.outside);
    return found;
  }

  const total = (numbers) => Object.values(numbers).reduce((a, b) => a + b, 0);

  /** All stages, each with its numbers. */
  function stages(c, a, gpu, host) {
    return deal(c, a.pp_size).map((layers, place) => {
      const s = stage(c, a, place, layers);
      return { layers, weights: s.weights, memory: memory(s), traffic: traffic(s), flops: flops(s), seconds: seconds(s, gpu, host) };
    });
  }

  return { AXES, problem, deal, stages, inside, total };
})();

(() => {
  const { AXES, problem, stages, inside, total } = Book.formulas.planner;
  const COLOURS = { weights: "rank-0", gradients: "rank-4", moments: "rank-5", activations: "rank-3", "in passing": "rank-6" };
  const NAMES = { products: "products", bubble: "pipeline waits", tp: "tp", cp: "cp", dp_cp: "dp × cp", pp: "pp", ends: "tied table" };
  const SIZES = { tp_size: "tp", cp_size: "cp", dp_size: "dp", pp_size: "pp" };
  const YES = ["sequence_parallel", "activation_checkpointing"];

  const three = (number) => (number >= 100 ? Math.round(number).toLocaleString("en") : number.toPrecision(3));
  const round = (bytes) => `${bytes / 1e9} GB`; // of a data sheet
  const gb = (bytes) => (bytes >= 1e9 || !bytes ? `${three(bytes / 1e9)} GB` : `${three(bytes / 1e6)} MB`);
  const time = (seconds) => (seconds >= 1 ? `${three(seconds)} s` : `${three(seconds * 1e3)} ms`);
  const count = (number) => Math.round(number).toLocaleString("en");

  /** The flags of a state: yes and no as true and false. */
  const flags = (state) => ({ ...state, ...Object.fromEntries(YES.map((name) => [name, state[name] === "yes"])) });

  /** All that is shown of a layout; {problem} for one that cannot run. */
  function planned(state) {
    const { models, gpus, host } = Book.data.planner, a = flags(state), c = models[a.model_name], gpu = gpus[a.gpu];
    const wrong = problem(c, a);
    if (wrong) return { a, gpu, problem: wrong };
    const every = stages(c, a, gpu, host);
    const fullest = every.reduce((best, one) => (total(one.memory) > total(best.memory) ? one : best));
    const sent = {};
    for (const [axis, , , size] of fullest.traffic) sent[axis] = (sent[axis] ?? 0) + size;
    const pace = Object.keys(fullest.seconds).reduce((best, name) => (fullest.seconds[name] > fullest.seconds[best] ? name : best));
    return { a, gpu, tied: c.tie_word_embeddings, every, fullest, sent, pace, needs: total(fullest.memory) };
  }

  /** Text in lines of at most so many characters. */
  function wrap(text, most) {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length + 1 > most) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
    }
    return lines;
  }

  // --- the picture --------------------------------------------------------------------------------

  const text = (id, x, y, words, more = {}) => ({ id, kind: "text", anchor: "start", x, y, text: words, size: 12, ...more });

  /** A bar of the memory of the fullest GPU against what the GPU has. */
  function memoryBar(plan, width, narrow) {
    const { needs, gpu, fullest } = plan, fits = needs <= gpu.memory, shapes = [], top = 52, high = 40;
    const scale = width / (1.04 * Math.max(needs, gpu.memory)), edge = gpu.memory * scale;
    shapes.push(text("verdict", 0, 14, fits ? `It fits: ${gb(needs)} of ${round(gpu.memory)}` : `It does not fit: ${gb(needs)}, and the GPU has ${round(gpu.memory)}`,
      { size: narrow ? 14 : 17, bold: true, fill: fits ? "good" : "bad" }));
    shapes.push({ id: "gpu", kind: "rect", x: 0, y: top, w: edge, h: high, fill: "quiet", round: 4 });
    let x = 0;
    Object.entries(fullest.memory).forEach(([name, bytes], i) => {
      const w = bytes * scale, label = w > 44 ? three(bytes / 1e9) : undefined;
      shapes.push({ id: name, kind: "rect", x, y: top, w, h: high, fill: COLOURS[name], text: label, size: 13, round: 0 });
      x += w;
      const columns = narrow ? 2 : 5, place = { x: (i % columns) * (width / columns), y: top + high + 20 + Math.floor(i / columns) * (narrow ? 20 : 0) };
      shapes.push({ id: `mark ${name}`, kind: "rect", x: place.x, y: place.y - 6, w: 12, h: 12, fill: COLOURS[name], round: 2 });
      shapes.push(text(`name ${name}`, place.x + 18, place.y, `${name} ${gb(bytes)}`));
    });
    if (!fits) shapes.push({ id: "beyond", kind: "rect", x: edge, y: top - 4, w: needs * scale - edge + 4, h: high + 8, stroke: "bad", dashed: true, round: 4 });
    shapes.push({ id: "edge", kind: "line", x: edge, x2: edge, y: top - 8, y2: top + high + 4, stroke: "ink", thick: 2 });
    shapes.push(text("edge name", edge - 6, top - 12, round(gpu.memory), { anchor: "end", fill: "dim" }));
    return { shapes, bottom: top + high + 20 + (narrow ? 40 : 0) };
  }

  /** A row of bars: how long the GPU computes, waits, and sends along each axis. */
  function paceRows(plan, width, narrow, top) {
    const { fullest, sent, gpu, a, pace } = plan, shapes = [];
    const rows = ["products", "bubble", ...AXES.filter((axis) => axis !== "ends" || plan.tied)];
    const high = narrow ? 44 : 28, left = narrow ? 0 : 108, barred = narrow ? width - 76 : 330, right = narrow ? width : 480;
    const longest = Math.max(...Object.values(fullest.seconds));
    shapes.push(text("pace", 0, top, "What sets the pace", { size: narrow ? 14 : 15, bold: true }));
    if (!narrow) {
      shapes.push(text("head time", left, top + 24, "time in a step, at best", { fill: "dim" }));
      shapes.push(text("head sent", right + 84, top + 24, "it sends", { anchor: "end", fill: "dim" }), text("head flop", width, top + 24, "FLOP a byte, beside its link's", { anchor: "end", fill: "dim" }));
    }
    rows.forEach((name, i) => {
      const y = top + (narrow ? 26 : 46) + i * high, time0 = fullest.seconds[name] ?? 0, active = time0 > 0, slow = name === pace;
      const line = narrow ? y + 18 : y, w = (time0 / longest) * barred;
      shapes.push(text(`row ${name}`, 0, y, NAMES[name], { fill: active ? "ink" : "dim", bold: slow, size: 13 }));
      shapes.push({ id: `bar ${name}`, kind: "rect", x: left, y: line - 7, w: active ? Math.max(w, 1) : 0, h: 14, fill: slow ? "accent" : "dim", opacity: slow ? 1 : 0.55, round: 2 });
      shapes.push(text(`time ${name}`, left + w + 6, line, active ? time(time0) : "–", { fill: active ? "ink" : "dim", bold: slow }));
      if (!sent[name]) return;
      const link = gpu.peak / (inside(a, name, Book.data.planner.host) ? gpu.inside : gpu.outside), own = fullest.flops / sent[name];
      const said = `${count(own)} ${own < link ? "<" : "≥"} ${count(link)}`;
      if (narrow) shapes.push(text(`flop ${name}`, width, y, `${gb(sent[name])} · ${said} FLOP a byte`, { anchor: "end", size: 11, fill: own < link ? "bad" : "dim" }));
      else shapes.push(text(`sent ${name}`, right + 84, y, gb(sent[name]), { anchor: "end" }), text(`flop ${name}`, width, y, said, { anchor: "end", fill: own < link ? "bad" : "ink", bold: own < link }));
    });
    const foot = top + (narrow ? 26 : 46) + rows.length * high;
    const { source, host } = Book.data.planner;
    const about = `${a.gpu.split(",")[0]}: ${gpu.peak / 1e12} TFLOP/s in bfloat16, ${round(gpu.inside)}/s to the ${host - 1} others of its host, ${round(gpu.outside)}/s beyond. From ${source}.`;
    wrap(about, narrow ? 62 : 132).forEach((line, i) => shapes.push(text(`about ${i}`, 0, foot + 8 + 16 * i, line, { size: narrow ? 11 : 12, fill: "dim" })));
    return { shapes, bottom: foot + 8 + 16 * wrap(about, narrow ? 62 : 132).length };
  }

  function wrong(plan, width, narrow) {
    const lines = wrap(`error: ${plan.problem}`, narrow ? 46 : 92);
    return [
      text("verdict", 0, 14, "This layout cannot run", { size: narrow ? 14 : 17, bold: true, fill: "bad" }),
      ...lines.map((line, i) => text(`error ${i}`, 0, 48 + 20 * i, line, { mono: true, size: narrow ? 12 : 13 })),
    ];
  }

  // --- words, numbers, a table --------------------------------------------------------------------

  function caption(plan) {
    const { a, pace, fullest, every } = plan;
    if (plan.problem) return "The program refuses this layout with one line, before any work. Choose other sizes.";
    const where = every.length > 1 ? `The fullest GPU is one of stage ${every.indexOf(fullest) + 1} of ${every.length}. ` : "";
    const said = {
      products: "The products take the longest. So overlap can hide the messages.",
      bubble: "The pipeline waits longer than it computes. More micro-batches make its bubble smaller.",
      tp: "The messages of tp take longer than the products. A smaller tp, or a faster link, helps.",
      cp: "The messages of cp take longer than the products. Longer sequences, or fewer ranks along cp, help.",
      dp_cp: a.dp_engine === "zero3" ? "zero3 gathers weights for each micro-batch. Larger micro-batches help, or zero1." : "The sums of gradients take longer than the products. More micro-batches in a step help.",
      pp: "The messages of the pipeline take longer than the products.",
      ends: "The gradients of the tied table take longer than the products.",
    }[pace];
    return `${where}${said}`;
  }

  function numbers(plan) {
    const { a, needs, every, fullest } = plan;
    const gpus = a.tp_size * a.cp_size * a.dp_size * a.pp_size;
    const tokens = a.micro_batch_size * a.gradient_accumulation_steps * a.dp_size * a.seq_len;
    const always = [{ name: "gpus", label: "GPUs", text: count(gpus) }, { name: "tokens", label: "tokens in a step", text: count(tokens) }];
    if (plan.problem) return always;
    return [{ name: "needs", label: "GB on the fullest GPU", text: (needs / 1e9).toFixed(2) }, ...always,
      { name: "weights", label: "weights on it", text: count(fullest.weights) }, { name: "layers", label: "layers of the stages", text: every.map((one) => one.layers).join(" ") }];
  }

  function tables(plan) {
    if (plan.problem || plan.every.length === 1) return [];
    const kinds = Object.keys(COLOURS), two = (bytes) => (bytes / 1e9).toFixed(2);
    return [{
      title: "Memory of a GPU of each stage, GB", head: ["stage", "layers", ...kinds, "in all, GB"],
      rows: plan.every.map((one, i) => [i + 1, one.layers, ...kinds.map((kind) => two(one.memory[kind])), two(total(one.memory))]),
    }];
  }

  const sizes = (values) => ({ values, show: (value) => value.toLocaleString("en") });

  Book.define("planner", {
    title: "The planner",
    data: ["planner"],
    get options() {
      const { models, gpus } = Book.data.planner, doubled = (from, to) => Array.from({ length: Math.log2(to / from) + 1 }, (_, i) => from * 2 ** i);
      return {
        model_name: { label: "model", choices: Object.keys(models), names: { "70.6b": "70.6 billion weights" }, value: "llama-3.1-8b" },
        gpu: { label: "GPU", choices: Object.keys(gpus), value: "H100, 80 GB" },
        dp_engine: { label: "engine", choices: ["naive", "bucket", "zero1", "zero2", "zero3"], value: "zero1" },
        activation_checkpointing: { label: "recompute layers", choices: ["no", "yes"], value: "yes" },
        tp_size: { label: "tp", ...sizes([1, 2, 3, 4, 5, 6, 8, 16, 32]), value: 2 },
        cp_size: { label: "cp", ...sizes([1, 2, 3, 4, 8, 16, 32]), value: 1 },
        dp_size: { label: "dp", ...sizes([1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256]), value: 4 },
        pp_size: { label: "pp", ...sizes([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32]), value: 1 },
        sequence_parallel: { label: "sequence parallel", choices: ["no", "yes"], value: "yes" },
        seq_len: { label: "tokens a sequence", ...sizes(doubled(512, 131072)), value: 8192 },
        micro_batch_size: { label: "micro-batch", ...sizes([1, 2, 3, 4, 6, 8, 12, 16, 32]), value: 1 },
        gradient_accumulation_steps: { label: "micro-batches a step", ...sizes([...doubled(1, 256)]), value: 16 },
      };
    },
    scene(state, width) {
      const plan = planned(state), narrow = width < 500;
      const bar = plan.problem ? null : memoryBar(plan, width, narrow), rows = bar && paceRows(plan, width, narrow, bar.bottom + 44);
      const shapes = bar ? [...bar.shapes, ...rows.shapes] : wrong(plan, width, narrow);
      return { height: rows?.bottom ?? 130, steps: 1, at: () => ({ shapes, caption: caption(plan) }), numbers: numbers(plan), tables: tables(plan) };
    },
  });
})();
