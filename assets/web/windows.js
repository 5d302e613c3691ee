/* From documents to the micro-batches of a step: cut, shuffled, dealt. */
"use strict";

Book.define("windows", {
  title: "From documents to micro-batches",
  data: ["windows"],
  options: {},
  seconds: () => 3,
  scene(state, width) {
    const { order, batch } = Book.data.windows, count = order.length, narrow = width < 500;
    const left = 10, all = width - 2 * left, cell = all / (count + 1), gap = narrow ? 2 : 6, size = narrow ? 11 : 13;
    const documents = [7, 4, 10, 5, 8], length = documents.reduce((a, b) => a + b);
    const rows = { documents: 40, windows: 116, shuffled: 192, batches: 268 };
    const colour = (window) => `rank-${Math.floor(order.indexOf(window) / batch)}`;
    const says = [
      ["all documents in one row, an end token after each", "Packing puts all documents in one row of tokens. An end token stands after each."],
      ["cut into windows; the last ones are held out", "The row is cut into windows of equal length. The last ones are held out, to measure the loss."],
      ["shuffled: the seed and the epoch decide", "The windows are shuffled. The seed and the epoch decide the order."],
      ["two micro-batches of two windows for each step", "Each step takes the next four windows, here as two micro-batches of two."],
    ];

    /** Where a window stands at a moment: {x, y, w}. */
    function place(window, step) {
      const w = cell - gap;
      if (window === count || step === 1) return { x: left + window * cell, y: rows.windows, w };
      const turn = order.indexOf(window);
      if (step === 2) return { x: left + turn * cell, y: rows.shuffled, w };
      const pair = Math.floor(turn / 2);
      return { x: left + pair * 2 * cell, y: rows.batches + (turn % 2) * 32, w: 2 * cell - gap };
    }

    function at(step) {
      const shapes = [{ id: `title ${step}`, kind: "text", x: left, y: 16, anchor: "start", text: says[step][0], size: size + 1, bold: true }];
      let x = left;
      documents.forEach((tokens, i) => {
        const w = (tokens / length) * all;
        shapes.push({ id: `document ${i}`, kind: "rect", x, y: rows.documents, w: w - 7, h: 28, fill: "quiet", text: narrow ? String(i) : `document ${i}`, size: size - 1, round: 1 });
        shapes.push({ id: `end ${i}`, kind: "rect", x: x + w - 7, y: rows.documents, w: 6, h: 28, fill: "ink", round: 1 });
        x += w;
      });
      for (let window = 0; step > 0 && window <= count; window++) {
        const out = window === count, spot = place(window, step);
        if (step > 1) shapes.push({ id: `slot ${window}`, kind: "rect", x: left + window * cell, y: rows.windows, w: cell - gap, h: 28, stroke: "line", dashed: true });
        shapes.push({ id: `window ${window}`, kind: "rect", ...spot, h: 28, fill: out ? "rank-3" : step < 2 ? "quiet" : colour(window), text: narrow ? String(window) : out ? "held out" : `window ${window}`, size });
      }
      if (step === 3)
        for (let pair = 0; pair < count / 2; pair++)
          shapes.push({ id: `step ${pair}`, kind: "text", x: left + pair * 2 * cell, y: rows.batches - 14, anchor: "start", size: narrow ? 11 : 12,
            text: narrow ? `step ${Math.floor((2 * pair) / batch)}` : `step ${Math.floor((2 * pair) / batch)}, micro-batch ${pair % (batch / 2)}` });
      return { shapes, caption: says[step][1] };
    }
    return { height: 340, steps: says.length, at };
  },
});
