Book.define("mesh", {
  title: "The mesh",
  options: { tp: { label: "tp", min: 1, max: 4, value: 2 }, dp: { label: "dp", min: 1, max: 4, value: 2 } },
  scene(state, width) {
    const ranks = state.tp * state.dp, size = width / 5;
    const at = (step) => ({
      caption: `Rank ${step}.`,
      shapes: Array.from({ length: ranks }, (_, rank) => ({ id: `r${rank}`, kind: "rect", x: 10 + (rank % state.tp) * size + (rank === step ? 8 : 0), y: 10 + Math.floor(rank / state.tp) * 50, w: size - 20, h: 40, fill: `rank-${rank % 8}`, text: `rank ${rank}` })),
      numbers: [{ name: "ranks", label: "ranks", text: ranks }],
    });
    return { height: 20 + 50 * state.dp, steps: ranks, at };
  },
});
