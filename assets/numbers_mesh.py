"""What a rank of a mesh holds, for the mesh's widget: the shape of a model, its layers dealt out.

From the code of step 9: which sizes its flags allow, and how it deals the layers to stages.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "step9_4d"))
from errors import UserError  # noqa: E402
from flags import (  # noqa: E402
    check_context_parallel,
    check_pipeline_parallel,
    check_tensor_parallel,
)
from pipeline_parallel import deal_layers  # noqa: E402
from presets import preset  # noqa: E402

MODEL, SEQ_LEN, SEQUENCES, LARGEST = "llama-3.1-8b", 8192, 24, 8


def mesh():
    """What `web/mesh.js` draws."""
    config = preset(MODEL)
    whole = {"dp": [size for size in range(1, LARGEST + 1) if SEQUENCES % size == 0]}
    checks = {
        "tp": check_tensor_parallel,
        "cp": check_context_parallel,
        "pp": check_pipeline_parallel,
    }
    sizes = whole | {axis: allowed(axis, check, config) for axis, check in checks.items()}
    return {
        "model": MODEL,
        "width": config.hidden_size,
        "rows": config.num_attention_heads * config.head_dim,  # of q_proj
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "seq_len": SEQ_LEN,
        "sequences": SEQUENCES,
        "sizes": sizes,
        "stages": {
            stages: [[dealt.start, dealt.stop] for dealt in deal_layers(config, stages)]
            for stages in sizes["pp"]
        },
    }  # fmt: skip


def allowed(axis, check, config):
    """The sizes of an axis that a check lets pass."""
    given = dict.fromkeys(("tp_size", "cp_size", "dp_size", "pp_size"), 1)
    given |= {"config": config, "seq_len": SEQ_LEN, "sequence_parallel": False, "timeline": None}

    def passes(size):
        try:
            check(SimpleNamespace(**given | {f"{axis}_size": size}))
        except UserError:
            return False
        return True

    return [size for size in range(1, LARGEST + 1) if passes(size)]
