"""Draw the figures of the READMEs: `python assets/figures.py [folder]`.

Some of them show what the code of a step does, which is recorded first: see recorded.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import figures_axes  # noqa: E402
import figures_data_parallel  # noqa: E402
import figures_overview  # noqa: E402
import figures_pipeline  # noqa: E402
import figures_ring  # noqa: E402
import figures_training  # noqa: E402
from drawing import plt  # noqa: E402

FIGURES = [
    figures_overview.nine_steps,
    figures_overview.one_layer,
    figures_overview.mesh,
    figures_overview.packing,
    figures_training.learning_rates,
    figures_axes.tensor_parallel,
    figures_ring.ring,
    figures_ring.ring_backward,
    figures_data_parallel.engines,
    figures_data_parallel.backward_overlap,
    figures_data_parallel.zero3_memory,
    figures_pipeline.afab_grid,
    figures_pipeline.schedules,
    figures_pipeline.deadlock,
    figures_pipeline.interleaved_plan,
    figures_training.muon,
    figures_axes.four_axes,
    figures_axes.rectangles,
]


def draw_all(folder):
    """Write every figure into a folder; the paths."""
    paths = []
    for draw in FIGURES:
        figure = draw()
        paths.append(Path(folder) / f"{draw.__name__}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return paths


if __name__ == "__main__":
    for path in draw_all(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
