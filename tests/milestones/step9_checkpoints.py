"""What the checks of step 9's milestones run on ranks: rectangles, files, a run that goes on."""

import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from same import same
from step9_runs import begun, notes, refused, world_group

# --- 10., 11. rectangles, in files ----------------------------------------------------------------


def held_part(name, rows, piece=None):
    """Rows of a weight [7, 6], or a piece of them: (a parameter, the numbers it should have)."""
    import torch

    whole = torch.arange(42.0).view(7, 6) + len(name)  # another one for each name
    numbers = whole[rows] if piece is None else whole[rows].flatten()[piece]
    part = torch.nn.Parameter(numbers.clone())
    part.global_name, part.full_shape, part.held = name, whole.shape, (rows, slice(0, 6))
    if piece is not None:
        part.piece = piece
    return part, numbers


def views():
    import torch

    from resharding import rectangles, scalars_of, tensors_of

    inside = slice(1, 3), [(2, 1, 1, 2, 0, 2)]
    across = slice(4, 15), [(2, 4, 1, 2, 0, 2), (3, 0, 1, 6, 2, 8), (4, 0, 1, 3, 8, 11)]
    for piece, due in (inside, across):
        part, _ = held_part("weight", slice(2, 5), piece)
        found = [(*offsets, *sizes, p.start, p.stop) for offsets, sizes, p in rectangles(part)]
        assert found == due, (
            f"rectangles: elements {piece.start} to {piece.stop - 1} of rows of 6 from row 2 on "
            f"are (row, column, rows, columns, start, stop) {due}; found: {found}. There may be "
            "the end of a row, whole ones, the beginning of one"
        )
    optimizer = torch.optim.AdamW([part])
    tensors = tensors_of([part], optimizer)
    names = {"weight", "weight.exp_avg", "weight.exp_avg_sq"}
    assert tensors.keys() == names, f"tensors_of has {[*tensors]}, not {names}"
    places = {((2, 3), (4, 6)), ((3, 4), (0, 6)), ((4, 5), (0, 3))}
    found = {*tensors["weight"]}
    assert found == places, f"Tensors.put enters the places {found}, not {places}"
    for view in tensors["weight"].values():
        view.fill_(5.0)
    assert (part == 5).all(), (
        "Tensors.put: what is written into the views should be in the parameter: no copies"
    )
    for name in ("exp_avg", "exp_avg_sq"):
        zero = all((view == 0).all() for view in tensors[f"weight.{name}"].values())
        assert zero, f"kept_of: {name} begins as zeros"
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        parts = tensors[f"weight.{name}"]
        optimizer.state[part][name].fill_(number)
        assert all((view == number).all() for view in parts.values()), (
            f"tensors_of: the views of {name} are of another tensor than AdamW's {name}"
        )
    optimizer.state[part]["step"].fill_(7)
    found = scalars_of(optimizer, [part])
    assert found == {"step": 7}, f"scalars_of AdamW after step 7 is {found}, not the step alone"
    momentum = torch.optim.SGD([part], momentum=0.9)
    names = {"weight", "weight.momentum_buffer"}
    found = tensors_of([part], momentum).keys()
    assert found == names, f"tensors_of with SGD with momentum has {[*found]}, not {names}"
    assert not part.grad and (part == 5).all(), "kept_of: the trial step must not touch a weight"


NAMES = ("cut", "both", "twice1", "twice2")


def write_rows(folder):
    """On two ranks: one weight in pieces, one that both hold; what write_tensors returns."""
    from resharding import tensors_of, write_tensors

    world = world_group()
    cut, _ = held_part("cut", slice(0, 7), (slice(0, 20), slice(20, 42))[world.rank])
    parts = [cut, *(held_part(name, slice(0, 7))[0] for name in NAMES[1:])]
    files = write_tensors(tensors_of(parts), Path(folder), world)
    keys = [key for file in files.values() for key in file["parts"]]
    what = "write_tensors:"
    assert len(keys) == len({*keys}), f"{what} a rectangle of both ranks should be written once"
    assert len(files) == 2, f"{what} there are {len(files)} files; each rank should write one"
    of_both = {name[:5] for name in files if any("twice" in key for key in files[name]["parts"])}
    assert len(of_both) == 2, (
        f"{what} of two weights that both ranks hold, the ranks {of_both} write all; the least "
        "busy one should write the next"
    )
    return files


def overlaps():
    """Keys of rectangles, and where two of them overlap."""
    import torch

    from resharding import overlapping, place_of, stored_key, within

    stored, (ours, apart) = ((2, 7), (1, 4)), (((0, 3), (0, 6)), ((3, 7), (4, 6)))
    key = stored_key("name", stored)
    found = place_of(key)
    assert found == ("name", stored), f"place_of({key!r}) is {found}, not {('name', stored)}"
    found = within(stored, ((3, 5), (1, 2)))
    due = slice(1, 3), slice(0, 1)
    assert found == due, f"within({stored}, ((3, 5), (1, 2))) is {found}; it should be {due}"
    whole = torch.arange(42.0).view(7, 6)
    views = {place: whole[slice(*place[0]), slice(*place[1])] for place in (ours, apart)}
    found = [(there, view.tolist()) for there, view in overlapping({"name": views}, key)]
    due = [((slice(0, 1), slice(0, 3)), whole[2:3, 1:4].tolist())]
    assert found == due, (
        f"overlapping: of {ours} and {apart} with the stored {key} it finds {found}, not {due}"
    )


def read_rows(folder, files):
    """On three ranks: rows of both weights."""
    import torch

    from resharding import all_finite, read_tensors, tensors_of

    world = world_group()
    rows = (slice(0, 2), slice(2, 5), slice(5, 7))[world.rank]
    pairs = [held_part(name, rows) for name in ("cut", "both")]
    with torch.no_grad():
        for part, _ in pairs:
            part.fill_(math.nan)
    tensors = tensors_of([part for part, _ in pairs])
    assert not all_finite(tensors), "all_finite should notice a NaN"
    read_tensors(tensors, Path(folder), files)
    for part, expected in pairs:
        what = f"read_tensors: what `overlapping` and `within` find of “{part.global_name}”"
        same(part, expected, what, "the same rows, wherever they were written")
    assert all_finite(tensors), "all_finite finds a number that is not finite in 0 to 46"
    with torch.no_grad():
        part.fill_(3e38)
    assert all_finite(tensors), "all_finite: a sum may be too large though no number is infinite"


def damaged(folder, files):
    """In one process: what is missing or changed is noticed."""
    from resharding import read_tensors, tensors_of

    parts = [held_part(name, slice(0, 7))[0] for name in NAMES]
    tensors = tensors_of(parts)
    few = {name: about for name, about in files.items() if name != min(files)}
    refused("read_tensors", lambda: read_tensors(tensors, folder, few), "are not there")
    for name in files:
        content = (folder / name).read_bytes()
        for place in (12, len(content) - 3):  # in the header, in a tensor
            changed = bytearray(content)
            changed[place] ^= 1
            (folder / name).write_bytes(changed)
            read = partial(read_tensors, tensors, folder, files)
            refused("read_file", read, f"{name}: ", "as it was written")
        (folder / name).write_bytes(content)


# --- 12. save and load ----------------------------------------------------------------------------


def trained(flags, steps, save_to=None, resume=None):
    """Train from the beginning or from a checkpoint: (numbers of each step, pieces of weights)."""
    import torch
    from harness import pieces

    import checkpoint
    from run_directory import read_about

    state = begun(flags, checkpoint_dir=save_to and str(save_to))
    import train

    if resume:
        state.args.resume, state.args.resumed = resume, read_about("--resume", resume)
        with torch.no_grad():
            for parameter in [*state.model.parameters(), *state.parameters]:
                parameter.fill_(math.nan)
        checkpoint.load(state)
        bad = [p.global_name for p in state.model.parameters() if p.isnan().any()]
        assert not bad, (
            f"load: after it {len(bad)} weights of the model are still NaN, as {bad[0]}. With ZeRO "
            "the optimizer works on shards, and finish_update brings them to the model"
        )
    numbers = []
    while state.step < steps:
        found = train.train_step(state)
        numbers.append([found["step"], found["loss"], found["grad_norm"]])
    if save_to:
        checkpoint.save(state)
    return numbers, pieces(state.parameters, lambda p: p)


def what_is_the_same(folder):
    """compare, identity and listen, in one process."""
    import checkpoint
    import mixes

    state = begun("", checkpoint_dir=str(folder))
    checkpoint.listen(state)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        heard = getattr(signal.getsignal(number), "__module__", "") == "checkpoint"
        assert heard, f"listen: {number.name} should ask for a stop"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert state.asked_to_stop == signal.SIGUSR1, "listen: a signal is remembered by its number"
    abouts = ({"tokens": 5, "held_out": 1, "sha256": digit * 64} for digit in "ab")
    texts = [SimpleNamespace(part=1.0, about=about) for about in abouts]
    one, other = (mixes.identity([text]) for text in texts)
    assert one["tokens"] == 5 and one != other, "identity should tell data apart by their content"
    flags = {"seed": 3, "seq_len": 16, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    flags |= {"stride": 0, "streaming": False, "optimizer": "adamw", "optimizer_args": "{}"}
    flags |= {"dp_size": 1, **dict.fromkeys(state.args.taken.noted)}
    model = checkpoint.model_fields(state.args.config)
    about = {"flags": flags, "model": dict(model), "tokenizer": "bytes"}
    state.args.flags = {**flags, "micro_batch_size": 1, "dp_size": 2}  # the same global batch
    checkpoint.compare(state.args, about)
    for changes, words in (({"seed": 4}, "--seed"), ({"seq_len": 8}, "--seq_len 16, not 8"),
                           ({"dp_size": 4}, "global batch"),
                           ({"optimizer": "sgd"}, "--optimizer adamw, not sgd")):  # fmt: skip
        state.args.flags = flags | changes
        refused("compare", lambda: checkpoint.compare(state.args, about), words)
    state.args.flags = flags | {"learning_rate": 1.0}
    with notes(checkpoint) as said:
        checkpoint.compare(state.args, about)
    assert len(said) == 1, f"compare: another learning rate may be meant: one note, not {said}"


def places():
    """Where the shards of a stream go on: what one rank does not know another one does."""
    from types import SimpleNamespace
    from unittest.mock import patch

    import process_group as pg
    import stream_places
    from virtual_shards import START, Place

    def rank(*shards):
        """The state of a rank that has read these shards up to step 5 of 16 sequences."""
        known = [{0: START} for _ in range(64)]
        for shard in shards:
            known[shard] |= {1: Place(0, shard, 1, 0), 2: Place(0, shard, 2, 0)}
        data = SimpleNamespace(
            order=SimpleNamespace(batch_size=16), stream=SimpleNamespace(known=known)
        )
        args = SimpleNamespace(streaming=True, data={"sha256": "a"})
        mesh = SimpleNamespace(world=None)
        return SimpleNamespace(args=args, data=data, mesh=mesh, step=5)

    one, two = rank(*range(0, 64, 2)), rank(*range(1, 64, 2))
    asked = []  # what each rank has told
    with patch.object(pg, "from_all", lambda group, make: asked.append(make()) or [{}, *asked]):
        for state in (one, two):
            try:
                found = stream_places.places_after(state)
            except KeyError:
                found = None
    due = [Place(0, shard, 2 if shard < 16 else 1, 0) for shard in range(64)]
    assert found == due, (
        f"places_after step 5 of 16 sequences, on two ranks, gives {found and found[:3]} …: 80 "
        "sequences are two of shards 0 to 15 and one of the others, and what one rank does not "
        "know another one does"
    )
    for data, places in (({"sha256": "a"}, due), ({"sha256": "b"}, [START] * 64)):
        one.args.resumed = {"data": data, "stream": [list(place) for place in due]}
        stream_places.go_on(one)
        found = [own[2 if shard < 16 else 1] for shard, own in enumerate(one.data.stream.known)]
        assert found == places, (
            f"go_on: with {'the same' if places == due else 'other'} files the shards go on at "
            f"{found[:3]} …, not at {places[:3]} …"
        )
