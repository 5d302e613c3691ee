/* One training step of a model on one device: what each layer keeps, forward and backward. */
"use strict";

Book.define("training_step", {
  title: "The memory of a training step",
  data: ["training_step"],
  options: {},
  seconds: () => 1.2,
  scene(state, width) {
    const data = Book.data.training_step, narrow = width < 500, GROUP = narrow ? 8 : 4, KINDS = [["activations", "rank-3"], ["gradients", "rank-1"]];
    const groups = Math.ceil(data.layers / GROUP);
    const names = ["embed", ...Array.from({ length: groups }, (_, i) => `${i * GROUP}–${Math.min(data.layers, (i + 1) * GROUP) - 1}`), "head"];
    const kept = [data.embedding, ...Array.from({ length: groups }, () => data.layer.map((bytes) => bytes * GROUP)), data.end];
    const last = names.length - 1, gb = (bytes) => (bytes / 1e9).toFixed(bytes && bytes < 1e10 ? 1 : 0);
    const size = narrow ? 11 : 13, left = 10, gap = narrow ? 2 : 8, w = (width - 2 * left - gap * last) / names.length;
    const base = 226, tall = 110, most = Math.max(...kept.map(([a, g]) => Math.max(a, g)));

    /** Which blocks have activations and which have gradients at a moment, and what happens. */
    function moment(step) {
      const count = names.length, nothing = { activations: () => false, gradients: () => false, at: -1 };
      if (step === 0) return { ...nothing, title: "before the step", caption: "Weights and the optimizer's moments are always there." };
      if (step <= count) {
        const at = step - 1;
        return { at, activations: (i) => i <= at, gradients: () => false, title: "forward: activations are kept", caption: at ? "Forward, each layer keeps what the backward pass will need." : "The embedding looks up a row for each token." };
      }
      if (step <= 2 * count) {
        const at = 2 * count - step;
        return { at, activations: (i) => i < at, gradients: (i) => i >= at, title: "backward: activations go, gradients come", caption: "Backward, a layer uses its activations, and they go. The gradients of its weights come." };
      }
      if (step === 2 * count + 1) return { ...nothing, gradients: () => true, all: true, title: "the optimizer changes the weights", caption: "The optimizer reads all gradients and changes all weights." };
      return { ...nothing, title: "gradients are removed", caption: "The gradients are removed, and the next step can begin." };
    }

    function at(step) {
      const now = moment(step), shapes = [];
      const sum = (which, has) => kept.reduce((all, bytes, i) => all + (has(i) ? bytes[which] : 0), 0);
      shapes.push({ id: `title ${now.title}`, kind: "text", x: width / 2, y: 16, text: now.title, size: size + 2, bold: true });
      names.forEach((name, i) => {
        const x = left + i * (w + gap), active = i === now.at || now.all;
        shapes.push({ id: `block ${i}`, kind: "rect", x, y: 36, w, h: 34, fill: active ? "accent" : "quiet", text: name, size: narrow ? 11 : 12, bold: active });
        KINDS.forEach(([kind, fill], which) => {
          const h = now[kind](i) ? (tall * kept[i][which]) / most : 0;
          shapes.push({ id: `${kind} ${i}`, kind: "rect", x: x + (which * w) / 2 + 1, y: base - h, w: w / 2 - 2, h, fill, round: 1 });
        });
      });
      KINDS.forEach(([kind, fill], i) => {
        const right = width - left - (2 - i) * (narrow ? 90 : 105), y = base + 10;
        shapes.push({ id: `key ${kind}`, kind: "rect", x: right, y, w: 12, h: 12, fill, round: 1 });
        shapes.push({ id: `key ${kind} says`, kind: "text", x: right + 18, y: y + 6, anchor: "start", text: kind, size: narrow ? 11 : 12 });
      });
      shapes.push({ id: "base", kind: "line", x: left, y: base, x2: width - left, y2: base, stroke: "line" });
      shapes.push({ id: "base says", kind: "text", x: left, y: base + 16, anchor: "start", size: narrow ? 11 : 12, fill: "dim", text: narrow ? "kept" : `kept for the embedding, for ${GROUP} layers each, and for the head` });

      const parts = [["weights", "rank-0", data.weights], ["moments", "rank-2", data.moments], ["activations", "rank-3", sum(0, now.activations)], ["gradients", "rank-1", sum(1, now.gradients)]];
      const scale = (width - 2 * left) / 200e9, y = 262, h = 34;
      let x = left;
      for (const [name, fill, bytes] of parts) {
        const wide = bytes * scale, text = wide > (narrow ? 30 : 108) ? (narrow ? gb(bytes) : `${name} ${gb(bytes)} GB`) : wide > 30 ? gb(bytes) : "";
        shapes.push({ id: `all ${name}`, kind: "rect", x, y, w: wide, h, fill, text, size: narrow ? 11 : 12, round: 1 });
        x += wide;
      }
      const gpu = left + 80e9 * scale, all = parts.reduce((total, [, , bytes]) => total + bytes, 0);
      shapes.push({ id: "gpu", kind: "line", x: gpu, y: y - 6, x2: gpu, y2: y + h + 6, stroke: "ink", dashed: true, thick: 2 });
      shapes.push({ id: "gpu says", kind: "text", x: gpu, y: y + h + 16, text: "an H100: 80 GB", size: narrow ? 11 : 12 });
      shapes.push({ id: "sum", kind: "text", x: width - left, y: y + h + 16, anchor: "end", text: `in all ${gb(all)} GB`, size: size + 1, bold: true });
      shapes.push({ id: "model", kind: "text", x: left, y: y + h + 16, anchor: "start", text: narrow ? "" : `${data.model}, ${data.tokens.toLocaleString("en-US")} tokens`, size: 12, fill: "dim" });
      return { shapes, caption: now.caption };
    }
    return { height: 326, steps: 2 * names.length + 3, at };
  },
});
