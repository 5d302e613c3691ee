"""What a rank of a mesh holds, for the mesh's widget: the shape of a model, its layers dealt out.

From the code of step 9, in a process of its own: which sizes its flags allow, and how it deals the
layers to stages.
"""

from types import SimpleNamespace

from recorded import record

STEP, MODEL, SEQ_LEN, SEQUENCES, LARGEST = "step9_4d", "llama-3.1-8b", 8192, 24, 8


def mesh():
    """What `web/mesh.js` draws."""
    (model,) = record(STEP, 1, model_in_parts, MODEL)
    model["sizes"]["dp"] = [size for size in range(1, LARGEST + 1) if SEQUENCES % size == 0]
    return {"model": MODEL, "seq_len": SEQ_LEN, "sequences": SEQUENCES, **model}


def model_in_parts(name):
    """A model's shape, the sizes of tp, cp and pp that can divide it, and the layers of each stage.

    Runs in a world of step 9.
    """
    from flags import check_context_parallel, check_pipeline_parallel, check_tensor_parallel
    from pipeline_parallel import deal_layers
    from presets import preset

    config = preset(name)
    checks = {
        "tp": check_tensor_parallel,
        "cp": check_context_parallel,
        "pp": check_pipeline_parallel,
    }
    sizes = {axis: allowed(axis, check, config) for axis, check in checks.items()}
    return {
        "rows": config.num_attention_heads * config.head_dim,  # of q_proj
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "sizes": sizes,
        "stages": {
            stages: [[dealt.start, dealt.stop] for dealt in deal_layers(config, stages)]
            for stages in sizes["pp"]
        },
    }


def allowed(axis, check, config):
    """The sizes of an axis that a check lets pass."""
    from errors import UserError

    given = dict.fromkeys(("tp_size", "cp_size", "dp_size", "pp_size"), 1)
    given |= {"config": config, "seq_len": SEQ_LEN, "sequence_parallel": False, "timeline": None}

    def passes(size):
        try:
            check(SimpleNamespace(**given | {f"{axis}_size": size}))
        except UserError:
            return False
        return True

    return [size for size in range(1, LARGEST + 1) if passes(size)]
