"""The numbers that the book's widgets draw: {name of the file: function that computes them}.

Each widget has a file `numbers_….py` of its own. What a function returns is written as JSON; in a
page it is `Book.data[name]`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import book_walk  # noqa: E402
import numbers_collectives  # noqa: E402
import numbers_loops  # noqa: E402
import numbers_mesh  # noqa: E402
import numbers_mistakes  # noqa: E402
import numbers_pipelines  # noqa: E402
import numbers_planner  # noqa: E402
import numbers_ring  # noqa: E402
import numbers_tensor_parallel  # noqa: E402
import numbers_zero  # noqa: E402

DATA = {
    **book_walk.DATA,
    "collectives": numbers_collectives.collectives,
    "mesh": numbers_mesh.mesh,
    "mistakes": numbers_mistakes.mistakes,
    "pipelines": numbers_pipelines.pipelines,
    "planner": numbers_planner.numbers,
    "ring": numbers_ring.rings,
    "tensor_parallel": numbers_tensor_parallel.blocks,
    "training_step": numbers_loops.training_step,
    "windows": numbers_loops.windows,
    "zero": numbers_zero.numbers,
}
