"""What the checks of step 9's milestones run in one process: restarts from another run."""

from pathlib import Path

from same import SMALL
from step9_runs import notes, refused

STEP = 2 * 16  # tokens of one


def begun(flags):
    """The state of a small run before its first step; the one before it is over."""
    import torch.distributed as dist

    import train

    if dist.is_initialized():
        dist.destroy_process_group()
    return train.setup(train.parse_args((SMALL + flags).split()))


def trained(flags, steps):
    """The state of a run that has trained for so many steps, and saves each of them."""
    import checkpoint
    import train

    state = begun(f"--save_every 1 {flags}")
    while state.step < steps:
        train.train_step(state)
        checkpoint.save_if_due(state)
    return state


def weights_of(state):
    return {p.global_name: p.detach().clone() for p in state.parameters}


def averages_of(state):
    kept = state.optimizer.state
    return {p.global_name: kept[p]["exp_avg"].clone() for p in state.parameters if kept[p]}


def other(one, two, names=None):
    """The first name whose tensor is not the same in two dicts; None where all are."""
    for name in one if names is None else names:
        if name not in two or one[name].shape != two[name].shape or (one[name] != two[name]).any():
            return name
    return None


# --- 19. what is taken ----------------------------------------------------------------------------


def takes(folder):
    import errors

    run = f"--restart_from {folder} --seed 4 --restart"
    old = trained(f"--checkpoint_dir {folder} --max_tokens {3 * STEP}", 3)
    weights, averages, fresh = weights_of(old), averages_of(old), weights_of(begun("--seed 4 "))
    due = {"weights": (weights, {}), "optimizer": (fresh, averages)}
    for kind, (its_weights, its_averages) in due.items():
        state = begun(f"{run} {kind}")
        found = averages_of(state)
        wrong = other(its_weights, weights_of(state))
        whose = "the checkpoint's" if kind == "weights" else "as the seed draws it"
        assert wrong is None, (
            f"--restart {kind}: {wrong} should be {whose}. Does to_take give the tensors to read?"
        )
        assert found.keys() == its_averages.keys() and not other(its_averages, found), (
            f"--restart {kind}: the optimizer should have "
            f"{'the averages of the checkpoint' if its_averages else 'no averages yet'}; see "
            "to_take"
        )
        assert state.step == 0, f"--restart {kind}: it should begin with step 0, not {state.step}"

    more = "--num_hidden_layers 3 --vocab_size 260 "
    fresh = weights_of(begun(f"--seed 4 {more}"))
    try:
        found = weights_of(begun(f"{run} transfer {more}"))
    except errors.UserError as error:
        raise AssertionError(
            f"--restart transfer: shapes_of_both should name what has one name and one shape in "
            f"both models, and to_take reads only that; now it ends with: {error}"
        ) from None
    layers = [name for name in weights if ".layers." in name]
    new = [name for name in found if ".layers.2." in name or found[name].dim() == 2
           and name not in layers]  # fmt: skip
    wrong = other(weights, found, layers)
    assert wrong is None, (
        f"to_take: --restart transfer should take {wrong}, whose shape is the same"
    )
    wrong = other(fresh, found, new)
    assert wrong is None, f"shapes_of_both: {wrong} has another shape, or is new: it stays as drawn"


def chooses(folder):
    import restart

    run, own = folder / "run", folder / "own"
    trained(f"--checkpoint_dir {run} --max_tokens {2 * STEP}", 2)
    flags = f"--restart_from {run} --restart weights --max_tokens {2 * STEP} "
    state = begun(flags)
    assert state.args.resume == run / "step_00000002", (
        f"choose_restart takes {state.args.resume}; of a run's directory it should be the newest"
    )
    one = begun(flags.replace(str(run), str(run / "step_00000001"))).args.resume
    assert one == run / "step_00000001", f"choose_restart takes {one}, not the one that is named"
    flags += f"--checkpoint_dir {own} --resume auto "
    trained(flags, 1)
    with notes(restart) as said:
        args = begun(flags).args
    assert Path(args.resume) == own / "step_00000001" and args.taken == restart.KINDS["all"], (
        f"choose_restart: queued again, the run should go on from its own step 1, and take all; it "
        f"reads {args.resume}"
    )
    assert len(said) == 1, f"choose_restart: one note that {run} is not read, not {said}"
    names = {*restart.chosen(args)}
    assert {"resume", "resumed", "taken"} <= names, f"chosen: only {names} are sent to all ranks"


def tells(folder):
    import restart

    model = [f"model.layers.{n}.{name}" for n in range(4) for name in ("a", "b")] + ["lm_head"]
    remarks = {name: "" for name in model if ".2." in name or ".3." in name}
    remarks |= {"model.layers.0.b": " (other)", "model.layers.1.b": " (other)", "lm_head": ""}
    found = restart.in_few_words(remarks, model)
    due = "model.layers.0-1.b (other), model.layers.2-3, lm_head"
    assert found == due, f"in_few_words says “{found}”; it should be “{due}”"
    trained(f"--checkpoint_dir {folder} --max_tokens {STEP}", 1)
    flags = f"--restart_from {folder} --restart transfer --num_hidden_layers 3"
    with notes(restart) as said:
        begun(flags)
    words = "21 of 30 weights are taken; as initialised are model.layers.2"
    assert any(note.endswith(words) for note in said), f"say_what_changes: “{words}”, not {said}"
    flags = flags.replace("--num_hidden_layers 3", "--hidden_size 64")
    refused("say_what_changes", lambda: begun(flags), "same name and shape")


# --- 20. a cooldown -------------------------------------------------------------------------------


def cools_down(folder):
    import restart
    from learning_rate import learning_rate_at

    run, own = folder / "run", folder / "own"
    state = trained(f"--checkpoint_dir {run} --max_tokens {9 * STEP} --lr_schedule linear", 4)
    found, due = restart.rates_of(state.args, 4)["learning_rate"], learning_rate_at(4, state.args)
    assert found == due, f"rates_of: the rate of step 4 was {due}, not {found}"
    flags = f"--restart_from {run} --restart cooldown --decay_steps 4 --lr_schedule linear "
    flags += f"--checkpoint_dir {own} --resume auto "
    first = trained(flags, 5).args
    second = begun(flags).args
    for args, life in ((first, "first"), (second, "second")):
        assert args.total_steps == 8, (
            f"cool_down: 4 steps after step 4 end with step 8, not {args.total_steps}, in the "
            f"{life} life: it began where the checkpoint says"
        )
        rates = [learning_rate_at(step, args) for step in (5, 6, 7, 8)]
        apart = (rate - due * (8 - step) / 4 for step, rate in enumerate(rates, 5))
        assert max(map(abs, apart)) < 1e-12, (
            f"cool_down: in the {life} life the rates of steps 5 to 8 are {rates}; they should be "
            f"3, 2, 1 and 0 quarters of {due}"
        )
    refused("cool_down", lambda: begun(flags.replace(str(own), str(run))), "no part of a cooldown")
