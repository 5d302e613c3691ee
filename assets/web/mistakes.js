/* Mistakes planted on purpose: curves of real runs, each beside the right run (assets/mistakes.py). */
"use strict";

(() => {
  /** What is said of each: what is wrong, why the loss hides it, what the norm does, what shows it.
      `run` has the numbers of the recorded run. */
  const MISTAKES = {
    scale_gradients: {
      name: "a factor of 2",
      where: "Two pipeline stages, two micro-batches",
      wrong: "Nobody divides by the number of micro-batches, 2. So every gradient is twice as large as it should be.",
      loss: "Adam divides each gradient by its size, so a factor changes no update. Every loss is the right one.",
      norm: "The gradient norm is twice the right one. Without a right run beside it, 14.1 looks as good as 7.0.",
      shows: "Every tensor is off by 100 %. The gradient of one device says so in the first step.",
    },
    only_the_last_micro_batch_is_summed: {
      name: "last micro-batch only",
      where: "Two data-parallel ranks, two micro-batches each",
      wrong: "The ranks sum the gradients of their last micro-batch only. Those of the first one stay where they are.",
      loss: "Each rank still learns, from three of the four micro-batches. The loss falls nearly as before.",
      norm: "The gradient norm is smaller. But nobody knows how large it should be.",
      shows: "Compared with those of one device, all gradients are far off in the first step.",
    },
    gradients_not_summed: {
      name: "no sum under cp",
      where: "Context parallelism on two ranks",
      wrong: "Each rank has half of the tokens of each sequence. Nobody sums the gradients, because dp is 1.",
      loss: "Each rank learns from its own half, and the loss that is shown is the sum over both. It falls nearly as before.",
      norm: "The gradient norm is smaller: it is that of half of the tokens.",
      shows: "Compared with those of one device, all gradients are far off in the first step. From then on the ranks have different weights.",
    },
    norm_gradients_of_own_tokens: {
      name: "no sum for the norms",
      where: "Two tensor-parallel ranks with sequence parallelism",
      wrong: "The norms of a rank see half of the tokens. Nobody sums the gradients of their weights.",
      loss: "Few weights are in norms, and they stay near 1. So the losses are nearly the same.",
      norm: "In the norm of all gradients those of the norms hardly count.",
      shows: "Compared tensor by tensor with one device, the gradients of the norms are far off, and all others are right.",
    },
    gradients_never_sent_home: {
      name: "nothing sent home",
      where: "A ring of two ranks",
      wrong: "A rank computes gradients for the keys and values of the other one, too. It never sends them home.",
      loss: "Each rank still learns from its own keys and values. The losses are nearly the same.",
      norm: "The gradient norm is a little smaller. But nobody knows how large it should be.",
      shows: "The gradients of k_proj and v_proj in the last layer are far off, and so is all that comes before them. What comes after is right.",
    },
    positions_from_zero: {
      name: "positions from zero",
      where: "A ring of two ranks",
      wrong: "Each rank counts the positions of its tokens from 0, as if they began the sequence.",
      loss: "The model is another one, but it learns as well. Here its last loss is even smaller, by a hair.",
      norm: "The gradient norm is right in three digits.",
      shows: "Compared with those of one device, all gradients are far off in the first step.",
    },
    ends_not_summed: {
      name: "tied ends not summed",
      where: "Two pipeline stages with tied embeddings",
      wrong: "The first and the last stage hold the same weight. Each keeps its own part of the gradient.",
      loss: "Both copies learn, each in its way, so the loss falls as before. But they are two weights now.",
      norm: "The gradient norm is smaller, as it counts the part of one end only. But nobody knows how large it should be.",
      shows: "One tensor is far off, the embedding. All others are right in the first step.",
    },
    weights_in_bfloat16: {
      name: "bfloat16 weights",
      where: "One process",
      wrong: "Weights are rounded to bfloat16 after each update. Just below 1 its numbers are 0.004 apart, and an update moves a weight by 0.0003.",
      loss: "Small weights have finer steps and still learn. So the loss falls, a little more slowly.",
      norm: "The gradient norm looks like that of any other run.",
      shows: "The first gradient is right to the last bit. What shows it are the weights of the norms: none has moved.",
    },
  };

  const SERIES = { right: { stroke: "rank-4", thick: 6, text: "right" }, wrong: { stroke: "bad", thick: 2, text: "with the mistake" } };

  /** A number as one would write it: 3.835, 0.75, 1.7e-14. */
  function short(value, digits = 3) {
    if (value === 0) return "0";
    return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
  }

  /** Places of a few round numbers between two, the smallest and the largest included. */
  function ticks(low, high) {
    const step = Book.nice(high - low, 4);
    const first = Math.floor(low / step), last = Math.ceil(high / step);
    return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(6)));
  }

  /** The three charts of a mistake: titles, series and the ticks of their axis. */
  function charts(data, run) {
    const right = data.right[run.more];
    const plain = (name, title, text) => {
      const all = [...right[name], ...run[name]];
      const marks = ticks(name === "loss" ? Math.min(...all) : 0, Math.max(...all));
      return { name, title, text, right: right[name], wrong: run[name], marks, label: String, scale: (v) => v };
    };
    const floor = 1e-17; // where a difference of 0 is drawn
    return [
      plain("loss", "Loss", "of each step"),
      plain("grad_norm", "Gradient norm", "before clipping"),
      {
        name: "apart", title: "Gradients: largest difference", text: "as a share of the tensor's largest element", right: run.right_apart, wrong: run.apart,
        marks: [1e-15, 1e-10, 1e-5, 1], label: (v) => (v === 1 ? "1" : v.toExponential(0)), scale: (v) => Math.log10(Math.max(v, floor)), low: -17, high: 1,
      },
    ];
  }

  /** One chart in a box; `share` is the opacity of its curves. */
  function drawChart(chart, box, size, share) {
    const { name, marks, scale } = chart, low = chart.low ?? scale(marks[0]), high = chart.high ?? scale(marks.at(-1));
    const left = box.x + 36, right = box.x + box.w, top = box.y + 46, bottom = box.y + box.h - 20, count = chart.right.length;
    const x = (i) => left + (i / (count - 1)) * (right - left), y = (value) => bottom - ((scale(value) - low) / (high - low)) * (bottom - top);
    const path = (values) => `M${values.map((value, i) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
    const text = (id, more) => ({ id: `${name} ${id}`, kind: "text", size, fill: "dim", ...more });
    return [
      text("title", { x: box.x, y: box.y + 8, anchor: "start", size: size + 1, bold: true, fill: "ink", text: chart.title }),
      text("what", { x: box.x, y: box.y + 26, anchor: "start", text: chart.text }),
      ...marks.flatMap((mark) => [
        { id: `${name} line ${mark}`, kind: "line", x: left, x2: right, y: y(mark), y2: y(mark), stroke: "quiet", opacity: share },
        text(`mark ${mark}`, { x: left - 6, y: y(mark), anchor: "end", text: chart.label(mark) }),
      ]),
      text("first", { x: left, y: bottom + 13, anchor: "start", text: "step 1" }),
      text("last", { x: right, y: bottom + 13, anchor: "end", text: count }),
      ...["right", "wrong"].map((kind) => ({ id: `${name} ${kind}`, kind: "path", d: path(chart[kind]), ...SERIES[kind], opacity: share })),
    ];
  }

  function drawLegend(y, size, width, data) {
    const where = `${data.machine.replace(/, Python.*/, "")}, float64, ${data.date}`;
    const narrow = width < 560, said = { x: narrow ? 0 : width, y: y + (narrow ? 20 : 0), anchor: narrow ? "start" : "end" };
    const keys = Object.entries(SERIES).flatMap(([kind, { stroke, thick, text }], i) => {
      const x = i * (size === 12 ? 110 : 90);
      return [
        { id: `key ${kind}`, kind: "line", x, x2: x + 26, y, y2: y, stroke, thick },
        { id: `key ${kind} is`, kind: "text", x: x + 34, y, anchor: "start", size, text },
      ];
    });
    return [...keys, { id: "where", kind: "text", size, fill: "dim", text: where, ...said }];
  }

  /** What the widget says in numbers: the last losses, the first norms and the first differences. */
  function numbersOf(data, run) {
    const right = data.right[run.more], pair = (one, other, digits) => `${short(other, digits)}, right: ${short(one, digits)}`;
    const numbers = [
      { name: "loss", label: `loss of step ${run.loss.length}`, text: pair(right.loss.at(-1), run.loss.at(-1), 5) },
      { name: "grad_norm", label: "gradient norm of step 1", text: pair(right.grad_norm[0], run.grad_norm[0], 5) },
      { name: "apart", label: "largest difference of a gradient, step 1", text: pair(run.right_apart[0], run.apart[0], 2) },
      { name: "off", label: "tensors that are off in step 1", text: `${run.off} of ${run.tensors}` },
    ];
    const moved = { name: "moved", label: "how far a weight of a norm has moved", text: pair(right.moved, run.moved, 2) };
    return run.ranks === 1 ? [...numbers, moved] : numbers;
  }

  Book.formulas.mistakes = { names: () => Object.keys(MISTAKES) };

  Book.define("mistakes", {
    title: "Gradients that are wrong, losses that look right",
    data: ["mistakes"],
    options: {
      mistake: { label: "mistake", choices: Object.keys(MISTAKES), names: Object.fromEntries(Object.entries(MISTAKES).map(([key, { name }]) => [key, name])), value: "norm_gradients_of_own_tokens" },
    },
    seconds: () => 6,
    scene(state, width) {
      const data = Book.data.mistakes, run = data.mistakes[state.mistake], says = MISTAKES[state.mistake];
      const narrow = width < 560, size = narrow ? 11 : 12, gap = narrow ? 14 : 34, high = narrow ? 170 : 230;
      const all = charts(data, run), wide = narrow ? width : (width - 2 * gap) / 3;
      const boxes = all.map((_, i) => (narrow ? { x: 0, y: i * (high + gap), w: wide, h: high } : { x: i * (wide + gap), y: 0, w: wide, h: high }));
      const bottom = boxes.at(-1).y + high + 16;
      const captions = [`${says.where}. ${says.wrong} Which of the three curves would tell you?`, says.loss, says.norm, says.shows];

      /** Moment 0 shows all charts, the others one each. */
      function at(step) {
        const shapes = all.flatMap((chart, i) => drawChart(chart, boxes[i], size, step === 0 || step === i + 1 ? 1 : 0.25));
        return { shapes: [...shapes, ...drawLegend(bottom, size, width, data)], caption: captions[step] };
      }
      return { height: bottom + (narrow ? 30 : 12), steps: captions.length, at, numbers: numbersOf(data, run) };
    },
  });
})();
