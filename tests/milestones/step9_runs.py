"""What the checks of step 9's milestones run on ranks: the files and the directory of a run."""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from same import SMALL


def world_group():
    import process_group as pg

    pg.init_processes("cpu")
    return pg.Mesh(tp=pg.dist.get_world_size()).world


def begun(flags_of_run, **changes):
    """The state of a small run, with all that step 9 asks of one; changes: of its arguments."""
    import presets

    name = "huggingface"  # flags.py asks for it, but a reader writes it later
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = SimpleNamespace(load_checked_config=presets.load_config)
    import flags
    import train

    with patch.object(flags, "load_checked_config", presets.load_config):  # it may be a stub
        args = train.parse_args((SMALL + flags_of_run).split())
    state = train.setup(args)
    state.args.data = {"tokens": 1, "held_out": None, "sha256": "0" * 64}
    vars(state.args).update(changes)
    for name in ("asked_to_stop", "stop", "not_saved"):  # that train.py will give it
        setattr(state, name, getattr(state, name, 0))
    return state


def refused(by, act, *words):
    """Demand that a call ends with a UserError that says some words; by: whose error it is."""
    from errors import UserError

    try:
        act()
    except UserError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{by}: the error should name {missing}; it says: {error}"
        return error
    raise AssertionError(f"{by}: no UserError was raised; one that names {words} should be")


# --- 1. what all ranks learn ----------------------------------------------------------------------


def all_ranks_learn():
    import torch

    import process_group as pg
    from errors import UserError
    from model import Llama, materialize
    from presets import preset

    world = world_group()
    found = pg.from_all(world, lambda: 10 * world.rank)
    every = [10 * rank for rank in range(world.size)]
    assert found == every, f"from_all returns {found}; it should be every rank's result, {every}"

    def make(kind):
        if world.is_last:
            raise kind(28, "no room") if kind is OSError else kind("no room")

    for kind in (UserError, OSError):
        try:
            pg.from_all(world, lambda kind=kind: make(kind))
        except (UserError, OSError) as error:
            marked = "no room" in str(error) and getattr(error, "on_all_ranks", False)
            assert marked, "from_all: the error is not marked as one that on_all_ranks has seen"
        else:
            raise AssertionError(f"from_all: rank {world.rank} goes on; the last one has an error")
    error = refused("from_first", lambda: pg.from_first(world, lambda: make_error(UserError)))
    assert getattr(error, "on_all_ranks", False), (
        "from_first should mark the error that it raises on all ranks, with on_all_ranks"
    )

    with torch.device("meta"):
        model = Llama(preset("debug"))
    materialize(model, None, torch.device("cpu"))
    for parameter in model.parameters():
        assert parameter.isnan().all(), (
            "materialize with seed None: each weight should be NaN until it is loaded"
        )


def make_error(kind):
    raise kind("first")


# --- 2. what a run leaves -------------------------------------------------------------------------


def config_files(folder):
    from config_file import parse_with_file, write_config
    from errors import ArgumentParser

    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", dest="config_file")
    parser.add_argument("--tp_size", type=int, default=1)
    parser.add_argument("--dp_size", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    file = folder / "flags.json"
    file.write_text(json.dumps({"tp_size": 2, "dp_size": 0, "compile": True}))
    args = parse_with_file(parser, ["--tp_size", "4", "--config", str(file)])
    assert args.tp_size == 4, (
        f"parse_with_file: --tp_size is {args.tp_size}; what was typed, 4, should win over the file"
    )
    assert args.dp_size == 0 and args.compile, (
        f"flags_in: of the file's flags dp_size 0 and compile true there are {args.dp_size} and "
        f"{args.compile}; a 0 is given, too"
    )
    flags = {"tp_size": 4, "dp_size": 0, "compile": True}
    assert args.flags == flags, f"parse_with_file: args.flags is {args.flags}, not {flags}"
    write_config(SimpleNamespace(checkpoint_dir=str(folder), flags=flags))
    there = json.loads((folder / "config.json").read_text())
    assert there == flags, f"write_config writes {there}, not {flags}"
    file.write_text('{"tp_sise": 2}')
    wrong = ["--config", str(file)]
    refused("flags_in", lambda: parse_with_file(parser, wrong), "--config", "tp_sise")


def metrics_up_to(folder):
    import torch

    import metrics_file
    from metrics import Metrics

    path, lines = folder / "metrics.json", [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2)]
    path.write_text("".join(lines) + '{"step": 3, "loss": 1.0}')  # without its end of line
    for step, kept in ((0, 0), (1, 1), (2, 2), (3, 2)):
        found, due = metrics_file.bytes_up_to(path, step), len("".join(lines[:kept]))
        assert found == due, f"bytes_up_to(…, {step}) is {found}; {kept} whole lines have {due}"
    args = SimpleNamespace(
        metrics_file=str(path), use_wandb=False, use_tensorboard=None, flags={}, tokens_per_step=7
    )
    reports = Metrics(args, torch.device("cpu"), 1.0, 1)
    reports.open(1)
    assert reports.tokens == 7, "Metrics.open: a run that goes on from step 1 trained on its tokens"
    reports.close()
    found = path.read_text()
    assert found == lines[0], (
        f"MetricsFile.__init__ leaves {found!r}; lines after the step that goes on should go"
    )
    before, begun = reports.clock, time.perf_counter()
    with reports.paused():
        time.sleep(0.05)
    took, moved = time.perf_counter() - begun, reports.clock - before
    assert 0.05 <= moved <= took, (
        f"Metrics.paused moves the clock by {moved:.3f} s; it should be by the {took:.3f} s that "
        "it took: what was trained before still counts"
    )
    wrong = metrics_file.same_flags({"tp_size": 1}, {"tp_size": 2})
    assert not wrong, "same_flags takes --tp_size 1 and 2 for the same"
    same = metrics_file.same_flags({"resume": "auto"}, {"resume": None})
    assert same, "same_flags: --resume may differ"


# --- 7., 8. a directory ---------------------------------------------------------------------------


def written(folder, step, run=None):
    """Write a checkpoint with one file, as a save does."""
    import run_directory as rd

    aside = Path(folder) / rd.begin(folder, step)
    (aside / "0.safetensors").write_bytes(b"numbers")
    about = dict.fromkeys(rd.KEYS) | {"step": step, "run": run or rd.run_id(folder)}
    about |= {"files": {"0.safetensors": {"bytes": 7}}, "others": {}}
    rd.write_about(aside, about)
    rd.complete(aside, Path(folder), step)
    return Path(folder) / f"step_{step:08d}"


def complete_or_absent(folder):
    import run_directory as rd

    name = rd.begin(folder, 2)
    assert rd.HIDDEN.fullmatch(name), f"begin makes {name}; its name should be hidden"
    found = rd.checkpoints(folder)
    assert found == [], f"checkpoints finds {found}, which is being written and none yet"
    other = folder / ".step_00000002-mine"
    other.mkdir()
    one, two = written(folder, 2, "0" * 16), written(folder, 4, "0" * 16)
    left = [path.name for path in folder.glob(".step_*")]
    assert left == [other.name], (
        f"clean leaves the hidden directories {left}; only {other.name} is none of ours"
    )
    with patch.object(Path, "glob", lambda path, pattern: iter([two, one])):
        found = rd.checkpoints(folder)
    assert found == [one, two], "checkpoints should be sorted by step, whatever the disk's order"
    step = rd.read_about("--resume", two)["step"]
    assert step == 4, f"read_about of step 4 says step {step}"
    text = (two / "checkpoint.json").read_text()
    another = text.replace('"tokenizer": null', '"tokenizer": true')
    for changed in (another, text.replace('"step": 4', '"step": 5'), text[:-9], "", "[1]"):
        (two / "checkpoint.json").write_text(changed)
        refused("read_about", lambda: rd.read_about("--resume", two), "--resume", "damaged")
    (two / "checkpoint.json").write_text(text)
    (two / "0.safetensors").write_bytes(b"numb")
    words = "0.safetensors has 4 of 7 bytes"
    refused("read_about", lambda: rd.read_about("--resume", two), words)
    three = written(folder, 1, "0" * 16)
    with notes(rd) as said:
        path, about = rd.newest_sound("--resume auto:", rd.checkpoints(folder))
    assert path == one and about["step"] == 2, (
        f"newest_sound takes {path.name}; of {three.name}, {one.name} and {two.name}, which is "
        f"damaged, it should take {one.name}"
    )
    assert len(said) == 1, f"newest_sound: one note should name the damaged one; notes: {said}"
    found = rd.newest_sound("", [])
    assert found == (None, None), f"newest_sound of no checkpoints is {found}, not (None, None)"
    with notes(rd):
        written(folder, 4, "0" * 16)
    assert (folder / "step_00000004.damaged1").is_dir(), "complete: what is damaged stays, renamed"


@contextlib.contextmanager
def notes(module):
    said, real = [], module.note
    module.note = said.append
    try:
        yield said
    finally:
        module.note = real


def whose(folder):
    import run_directory as rd

    here, elsewhere = folder / "here", folder / "elsewhere"
    for place in (here, elsewhere):
        place.mkdir()
        first, second = rd.run_id(place), rd.run_id(place)
        assert first == second, f"run_id of a directory is {first}, then {second}: keep it there"
    assert rd.run_id(here) != rd.run_id(elsewhere), "run_id: two directories have the same one"
    mine = [written(here, step) for step in (2, 4, 6, 8)]
    foreign = shutil.copytree(written(elsewhere, 1), here / "step_00000001")
    shutil.copytree(mine[0], here / "step_00000002_good")
    archive = shutil.move(mine[1], folder / "archive")
    mine[1].symlink_to(archive)
    found = [path.name for path in rd.own(here)]
    assert found == [path.name for path in mine], f"own finds {found}: only what has our run's id"
    rd.keep(here, 1, kept=[mine[0]])
    there = sorted(path.name for path in here.iterdir() if path.name[0] != ".")
    due = [foreign.name, mine[0].name, "step_00000002_good", mine[3].name]
    assert there == due, (
        f"after keep(…, 1, kept=[{mine[0].name}]) there are {there}; {due} should be: our own but "
        "for the last one and those in `kept` are deleted"
    )
    spaced = folder / "spaced"
    spaced.mkdir()
    rd.run_id(spaced)
    for step in range(1, 8):
        written(spaced, step)
    rd.keep(spaced, 1, 3)
    there = [int(path.name[5:]) for path in rd.own(spaced)]
    assert there == [3, 6, 7], f"after keep(…, 1, 3) of steps 1 to 7 there are {there}, not 3, 6, 7"
    content = archive / "checkpoint.json"
    assert content.exists(), "delete: of a link only the link may be deleted, not what it leads to"
    found = rd.write_tokenizer("bytes", here)
    assert found == {}, f"write_tokenizer: `bytes` has no files, not {found}"


# --- 9. the lock ----------------------------------------------------------------------------------


def locks(folder):
    import lock

    first, second = lock.Lock(folder), lock.Lock(folder)
    first.take()
    words = "--checkpoint_dir", f"process {os.getpid()}", "writes there"
    error = refused("Lock.take, of a lock that is held", second.take, *words)
    assert "\n" not in str(error), f"Lock.refusal should be one line: {error}"
    first.check()
    first.release()
    assert not first.path.exists(), "Lock.release should delete the lock"
    first.path.write_text(json.dumps({**first.own, "started": "1"}))  # its number is another's now
    gone = lock.is_gone(lock.read(first.path)[0])
    assert gone, "is_gone: a process that began at another time is not the holder, who is gone"
    begin = time.monotonic()
    second.take()
    took = time.monotonic() - begin
    assert took < 5, f"Lock.take waits {took:.0f} s for a process that is gone; its lock is free"
    second.path.write_text('{"host": "elsewhere", "process": 7}')
    refused("Lock.check", second.check, "process 7 on elsewhere")
    second.release()
    assert second.path.exists(), "Lock.release should not delete the lock of somebody else"
    lock.SILENT, silent = 0.3, lock.SILENT
    with notes(lock) as said:
        first.take()
    lock.SILENT = silent
    assert len(said) == 1, (
        f"Lock.wait_for_a_sign: of another host's lock one note says that we wait, not {said}"
    )
    first.release()
    main = lock.alone(lambda args: args.lock.path.exists())
    args = SimpleNamespace(checkpoint_dir=str(folder), lock=None, found=[])
    held, left = main(args), args.lock.path.exists()
    args.lock.release()
    assert held and not left, "alone should hold the lock while main runs, and release it then"
    args.found = ["step_00000002"]
    refused("alone", lambda: main(args), "another run has just written there")
    assert not args.lock.path.exists(), "alone should release the lock when main fails, too"
