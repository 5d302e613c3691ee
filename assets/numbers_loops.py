"""What the scenes made for loops draw: the memory of a training step, the order of windows."""

from recorded import record

WINDOWS, BATCH, SEED = 8, 4, 42


def training_step():
    """What plan.py says of a step of Llama 3.1 8B on one device; see `memory_by_plan`."""
    (found,) = record("step9_4d", 1, memory_by_plan)
    return found


def memory_by_plan():
    """Bytes. {"model", "tokens", "layers", "weights", "moments", and for the embedding, a layer and
    the end (the last norm, the head, the loss): [activations, gradients]}."""
    import plan

    args = plan.parse_args(["--model_name", "llama-3.1-8b"])
    stage = plan.Stage(args, 0)
    whole, _, end = stage.kept()
    memory = stage.memory()
    norm = stage.outside - stage.embedding - stage.head
    return {
        "model": "Llama 3.1 8B",
        "tokens": stage.tokens,
        "layers": stage.layers,
        "weights": memory["weights"],
        "moments": memory["moments"],
        "embedding": [0, 4 * stage.embedding],
        "layer": [whole, 4 * stage.layer],
        "end": [end, 4 * (stage.head + norm)],
    }


def windows():
    """The order of WINDOWS windows in the first epoch, as step 3 shuffles them."""
    (found,) = record("step3_dataloader", 1, order_by_step_3)
    return {"order": found, "batch": BATCH}


def order_by_step_3():
    from dataloader import Order

    batches = Order(WINDOWS, BATCH, SEED).cut(BATCH, 0)
    return [index for _ in range(WINDOWS // BATCH) for index in next(batches)]
