"""Restarts: what each kind takes, on every layout, and once more when the job is queued again."""

import json
import shutil

import numpy as np
import pytest
import workers_restarts
import workers_runs
import workers_setup
import workers_trainer
from harness import assemble, assert_close
from launch import ranks_of
from test_checkpoint import SHAPE, batch, train

pytestmark = pytest.mark.steps(9)


def steps(count):
    """Flags for so many steps of 8 sequences of 32."""
    return f"--max_tokens {count * 8 * 32} "


# What a restart changes of the run that it begins from.
CHANGES = {
    "all": steps(5),
    "cooldown": "--decay_steps 2 --lr_schedule wsd --seed 7 --seq_len 16 ",
    "weights": steps(3) + "--seed 7 --seq_len 16 --optimizer nadam ",
    "optimizer": steps(3) + "--seed 7 ",
    "transfer": steps(3) + "--seed 7 --num_hidden_layers 6 --vocab_size 300 ",
}
LAYOUTS = [
    "--pp_size 2",
    "--dp_size 2 --dp_engine zero1",
    "--tp_size 2",
    "--dp_size 2 --dp_engine zero3",
    "--pp_size 2 --pp_engine interleaved",
    "--tp_size 2 --dp_size 2 --dp_engine zero2",
    "--pp_size 2 --dp_size 2 --dp_engine zero3 --pp_engine afab",
    "--tp_size 2 --sequence_parallel --cp_size 2 --dp_engine zero1",
    "--dp_size 4 --dp_engine bucket",
    "--pp_size 4",
]


@pytest.fixture(scope="module")
def saved(step_dir, worlds, tmp_path_factory):
    """saved(flags): a run's directory with checkpoints of steps 2 and 3, written by four ranks."""
    kept = {}

    def run(flags="--dtype float64"):
        if flags not in kept:
            kept[flags] = tmp_path_factory.mktemp("saved") / "run"
            layout = batch("--tp_size 2 --dp_size 2 --dp_engine zero3")
            argv = SHAPE + steps(3) + f"{flags} --checkpoint_dir {kept[flags]} --save_every 1 "
            train(worlds, step_dir, argv + "--keep_last 2 " + layout)
        return kept[flags]

    return run


def restarted(run, kind, flags="--dtype float64 "):
    return SHAPE + CHANGES[kind] + flags + f"--restart_from {run} --restart {kind} "


def slow_unless(now, *values):
    return pytest.param(*values, marks=() if now else pytest.mark.slow)


# Two kinds on a layout each by default; all kinds on all layouts with `-m slow`.
ROWS = [
    slow_unless(place == number and kind in ("cooldown", "transfer"), kind, layout)
    for place, kind in enumerate(CHANGES)
    for number, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize("kind, layout", ROWS)
def test_each_restart_in_each_layout(step_dir, train_on, saved, kind, layout):
    argv = restarted(saved(), kind)
    one = train_on(step_dir, 1, argv + batch(""), 2)
    run = train_on(step_dir, ranks_of(layout), argv + batch(layout), 2)
    run.assert_same_as(one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "transfer"])
@pytest.mark.parametrize("layout", LAYOUTS[:1] + LAYOUTS[-1:])
def test_tied_weights_too(step_dir, train_on, saved, kind, layout):
    tied = "--dtype float64 --tie_word_embeddings yes "
    argv = restarted(saved(tied), kind, tied).replace("--vocab_size 300", "")
    one = train_on(step_dir, 1, argv + batch(""), 2)
    train_on(step_dir, ranks_of(layout), argv + batch(layout), 2).assert_same_as(one)


# --- what is taken --------------------------------------------------------------------------------


def begun(worlds, step_dir, argv, layout=""):
    """`workers_restarts.begun` with full tensors."""
    ranks = worlds(step_dir, ranks_of(layout)).run(workers_restarts.begun, argv + batch(layout))
    found = ranks[0] | {"weights": assemble([rank["weights"] for rank in ranks])}
    found["averages"] = {
        name: assemble([rank["averages"][name] for rank in ranks]) for name in found["averages"]
    }
    return found


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("layout", [slow_unless(not n, n) for n in ("", LAYOUTS[5])])
def test_what_each_restart_takes(step_dir, worlds, saved, subtests, layout):
    then = begun(
        worlds, step_dir, SHAPE + steps(5) + f"--dtype float64 --resume {saved()} ", layout
    )
    assert then["step"] == 3 and then["averages"].keys() == {"exp_avg", "exp_avg_sq"}
    fresh = {
        kind: begun(worlds, step_dir, SHAPE + CHANGES[kind] + "--dtype float64 ", layout)
        for kind in ("optimizer", "transfer")
    }
    for kind in CHANGES:
        found = begun(worlds, step_dir, restarted(saved(), kind), layout)
        with subtests.test(kind):
            assert found["step"] == (3 if kind in ("all", "cooldown") else 0)
            if kind in ("weights", "transfer"):
                assert not found["averages"] and not found["scalars"], "averages should be fresh"
            else:
                assert found["scalars"] == then["scalars"] == {"step": 3}
                assert all(
                    same(found["averages"][n], then["averages"][n]) for n in then["averages"]
                )
            if kind == "transfer":
                taken = {n for n in then["weights"] if "embed" not in n and "lm_head" not in n}
                expected = fresh[kind]["weights"] | {n: then["weights"][n] for n in taken}
                assert len(taken) == 4 * 9 + 1
            else:
                expected = (fresh if kind == "optimizer" else {kind: then})[kind]["weights"]
            assert same(found["weights"], expected)
    found = begun(worlds, step_dir, restarted(saved(), "weights") + "--optimizer adagrad ", layout)
    assert found["scalars"] == {"step": 0}, "Adagrad has its averages before the first step"
    assert all(not array.any() for array in found["averages"]["sum"].values())


@pytest.mark.slow
def test_the_loss_scale_goes_on_where_the_run_does(step_dir, worlds, saved):
    run, flags = saved("--dtype float16"), "--dtype float16 --optimizer adamw "
    for kind in CHANGES:
        found = begun(worlds, step_dir, restarted(run, kind, flags))["loss_scale"]
        assert found["good_steps"] == (3 if kind in ("all", "cooldown") else 0), kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_restarts_with_muon(step_dir, train_on, saved, kind):
    muon = "--dtype float64 --optimizer muon "
    argv = restarted(saved(muon), kind, muon).replace("--optimizer nadam", "")
    one = train_on(step_dir, 1, argv + batch(""), 2)
    layout = LAYOUTS[5]
    train_on(step_dir, ranks_of(layout), argv + batch(layout), 2).assert_same_as(one)


def test_a_transfer_says_what_it_leaves_out(step_dir, worlds, saved):
    run = saved()
    words = {
        "--num_hidden_layers 6 --vocab_size 300": (
            "37 of 57 weights are taken; as initialised are model.embed_tokens.weight ([257, 64] "
            "there, [300, 64] here), model.layers.4-5, lm_head.weight ([257, 64] there, [300, 64] "
            "here)"
        ),
        "--num_hidden_layers 3": "30 of 30 weights are taken; not in this model are model.layers.3",
        "--tie_word_embeddings yes": "taken; not in this model are lm_head.weight",
        "--intermediate_size 32": "model.layers.0-3.mlp.down_proj.weight ([64, 96] there, [64, 32]",
    }
    for flags, said in words.items():
        argv = SHAPE + steps(2) + batch("") + f"--restart_from {run} --restart transfer {flags}"
        found = begun(worlds, step_dir, argv)["said"]
        assert sum(line.endswith(said) or said in line for line in found) == 1, found


def test_a_restart_says_what_is_not_as_it_was(step_dir, worlds, saved):
    def notes(kind, flags):
        argv = SHAPE + CHANGES[kind] + f"--restart_from {saved()} --restart {kind} {flags}"
        found = begun(worlds, step_dir, argv)["said"]
        assert all(line.startswith("note: --restart") for line in found)
        return " ".join(found)

    said = notes("weights", "")
    assert "--seed 42, not 7; --seq_len 32, not 16; --optimizer adamw, not nadam" in said
    assert "windows are cut anew" in said and "the data are not those" in said
    assert "until now --dtype was float64" in said and "learning_rate" not in said
    said = notes("cooldown", "--micro_batch_size 8 --stride 2")
    assert "--stride 0, not 2" in said and "a step had" not in said
    assert "steps had 256 tokens; `tokens` counts 128 for each" in said
    assert "until now --dtype was float64" in said and "--max_tokens was" not in said
    assert "of step 3 to 0 at step 5" in said
    said = notes("optimizer", "")
    assert "the data are not those" not in said and "cut anew" not in said


# --- the cooldown ---------------------------------------------------------------------------------

WSD = "--lr_schedule wsd --min_lr_ratio 0 --decay_steps 2 "


@pytest.mark.parametrize("layout", [slow_unless(n == LAYOUTS[2], n) for n in ["", *LAYOUTS[2:7]]])
def test_a_cooldown_is_the_end_of_a_shorter_run_bit_for_bit(step_dir, worlds, tmp_path, layout):
    """N6: and so it is when it is stopped in the middle, and what it began from is gone."""
    argv, whole, run = SHAPE + batch(layout), tmp_path / "long", tmp_path / "cooled"
    numbers, weights = train(worlds, step_dir, argv + steps(5) + WSD)
    long = f"--lr_schedule constant --save_every 1 --checkpoint_dir {whole} "
    first, _ = train(worlds, step_dir, argv + steps(9) + long, until=3)
    cooled = argv + f"--restart_from {whole} --restart cooldown --lr_schedule wsd --decay_steps 2 "
    cooled += "--learning_rate 1 --warmup_steps 7 "  # neither is used
    rest, final = train(worlds, step_dir, cooled)
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)

    cooled += f"--resume auto --checkpoint_dir {run} --save_every 1 "
    begin, _ = train(worlds, step_dir, cooled, until=4)
    whole.rename(tmp_path / "elsewhere")
    end, final = train(worlds, step_dir, cooled)
    assert [n[0] for n in begin + end] == [4, 5] and first + begin + end == numbers
    assert_close(weights, final, "final weight", tolerance=0)


@pytest.mark.slow
def test_a_cooldown_of_a_cooldown(step_dir, worlds, tmp_path):
    """Its rate is that of the step, not that of the flags."""
    argv = SHAPE + batch("") + "--restart cooldown --lr_schedule linear "
    train(worlds, step_dir, SHAPE + batch("") + steps(2) + f"--checkpoint_dir {tmp_path / '1'} ")
    rates = []
    for number, count in ((1, 4), (2, 2)):
        flags = f"--restart_from {tmp_path / str(number)} --decay_steps {count} --min_lr_ratio 0.5 "
        flags += f"--checkpoint_dir {tmp_path / str(number + 1)} --save_every 1 "
        found, _ = train(worlds, step_dir, argv + flags, until=2 + 2 * number)
        rates.append([n[3] for n in found])
    peak = 3e-3  # where the first run ended, after its warm-up
    assert rates == [pytest.approx([0.875 * peak, 0.75 * peak]), pytest.approx(
        [0.75 * 0.75 * peak, 0.75 * 0.5 * peak])]  # fmt: skip


# --- a job that is queued again -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, layout",
    [
        slow_unless(kind == "cooldown" and not layout, kind, layout)
        for kind in CHANGES
        for layout in ("", LAYOUTS[5])
    ],
)
def test_a_queued_job_goes_on_with_its_own(step_dir, worlds, saved, tmp_path, kind, layout):
    """N6: the same command, from a file, twice; the checkpoint it began from is not read again."""
    source = shutil.copytree(saved("--weight_decay 0.1"), tmp_path / "source")
    argv = restarted(source, kind, "") + batch(layout)
    whole, weights = train(worlds, step_dir, argv)
    flags = worlds(step_dir, 1).run(workers_trainer.parsed, argv)[0][0] if not layout else None
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 --resume auto "
    if flags:
        file = tmp_path / "flags.json"
        file.write_text(json.dumps(flags))
        argv = f"--config {file} --checkpoint_dir {tmp_path / 'run'} --save_every 1 --resume auto "
    first, _ = train(worlds, step_dir, argv, until=whole[0][0])
    shutil.rmtree(source)
    rest, final = train(worlds, step_dir, argv)
    assert len(whole) >= 2 and first + rest == whole
    assert_close(weights, final, "final weight", tolerance=0)


@pytest.mark.slow
def test_all_goes_on_bit_for_bit(step_dir, worlds, saved, tmp_path):
    argv = SHAPE + steps(5) + batch("--dp_size 2")
    numbers, weights = train(worlds, step_dir, argv)
    long = argv + f"--checkpoint_dir {tmp_path} --save_every 1 "
    first, _ = train(worlds, step_dir, long, until=3)
    rest, final = train(worlds, step_dir, argv + f"--restart_from {tmp_path} --restart all ")
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)


def test_all_ranks_begin_with_what_the_first_one_found(step_dir, worlds, saved):
    argv = SHAPE + batch("--dp_size 2") + "--restart cooldown --lr_schedule linear --decay_steps 2 "
    one, other = (f"{argv} --restart_from {saved()}/step_0000000{step}" for step in (2, 3))
    found = worlds(step_dir, 2).run(workers_restarts.found_apart, one, other)
    assert found[0] == found[1] and found[0][0] == 2 and len(found[0][1]) == 2


@pytest.mark.parametrize("layout", [slow_unless(not n, n) for n in ("", "--tp_size 2")])
def test_damage_is_one_line_or_an_older_one_is_taken(step_dir, worlds, saved, tmp_path, layout):
    run = shutil.copytree(saved(), tmp_path / "run")
    file = run / "step_00000003" / "00000_0000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    argv = restarted(run, "cooldown").replace("--seq_len 16", "") + batch(layout)
    world = worlds(step_dir, ranks_of(layout))
    for rank in world.run(workers_runs.life, argv.replace(f"{run} ", f"{run}/step_00000003 ")):
        assert rank["said"].startswith(f"--restart_from {run / 'step_00000003'}")
        assert "damaged, name another" in rank["said"] and "\n" not in rank["said"]
    for rank in world.run(workers_runs.life, argv):
        assert rank["said"] is None and rank["steps"] == [3, 4]
        assert any("step_00000003" in n and "an older one" in n for n in rank["notes"])
    shutil.rmtree(run / "step_00000002")
    for rank in world.run(workers_runs.life, argv):
        assert rank["said"].startswith(f"--restart_from {run}: none is sound")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--restart weights", ("--restart weights", "--restart_from")),
        ("--restart_from {run}", ("--restart_from {run}", "--restart", "cooldown")),
        ("--restart_from {run} --restart some", ("--restart", "some", "transfer")),
        ("--restart_from {run} --restart all --load_hf x", ("--load_hf x", "leave one out")),
        ("--restart_from {run} --restart all --resume {run}", ("--resume {run}", "auto")),
        ("--restart_from {run}/no --restart all", ("--restart_from {run}/no", "no checkpoint")),
        ("--restart_from {run} --restart all --seed 7", ("--seed 42, not 7",)),
        ("--restart_from {run} --restart all --seq_len 16", ("--seq_len 32, not 16",)),
        ("--restart_from {run} --restart all --micro_batch_size 3", ("global batch", "8, not 3")),
        ("--restart_from {run} --restart all --optimizer sgd", ("--optimizer adamw, not sgd",)),
        ("--restart_from {run} --restart optimizer --optimizer sgd", ("adamw, not sgd",)),
        ("--restart_from {run} --restart optimizer --num_hidden_layers 3", ("num_hidden_layers",)),
        ("--restart_from {run} --restart weights --vocab_size 300", ("vocab_size 257, not 300",)),
        ("--restart_from {run} --restart transfer --hidden_size 32", ("[257, 64] there", "32")),
        ("--restart_from {run} --restart cooldown", ("--restart cooldown", "--decay_steps")),
        (
            "--restart_from {run} --restart cooldown --decay_steps 2 --lr_schedule constant",
            ("--restart cooldown", "--lr_schedule constant", "linear"),
        ),
        (
            "--restart_from {run} --restart cooldown --decay_steps 2 --optimizer sgd",
            ("--optimizer adamw, not sgd",),
        ),
        (
            "--restart_from x --restart cooldown --decay_steps 2 --resume auto "
            "--checkpoint_dir {run}",
            ("no part of a cooldown", "another --checkpoint_dir"),
        ),
    ],
)
def test_a_wrong_restart_is_refused(step_dir, worlds, saved, flags, words):
    argv = SHAPE + steps(5) + "--micro_batch_size 8 " + flags.format(run=saved())
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, 1)
    assert all(word.format(run=saved()) in said for word in words), said
    assert "\n" not in said


@pytest.mark.slow
def test_metrics_of_the_other_run_stay(step_dir, worlds, saved, tmp_path):
    """The first run's command with a restart and another directory: the same --metrics_file."""
    argv = SHAPE + batch("") + f"--metrics_file {tmp_path / 'm.jsonl'} --checkpoint_dir {tmp_path}"
    worlds(step_dir, 1).run(workers_runs.metrics_written, argv + "/1 " + steps(3))
    train(worlds, step_dir, argv + "/1 " + steps(3))
    lines = (tmp_path / "m.jsonl").read_text()
    argv += f"/2 --restart_from {tmp_path}/1 --decay_steps 2 --lr_schedule linear --restart "
    for kind in ("all", "weights", "cooldown"):
        (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv + kind, 1)
        assert "--metrics_file" in said and "a run of other flags" in said
    assert lines and (tmp_path / "m.jsonl").read_text() == lines


def test_a_checkpoint_that_says_no_rate(step_dir, worlds, saved, tmp_path):
    """As older ones: a cooldown can't begin there, and the other restarts can."""
    run = shutil.copytree(saved(), tmp_path / "run")
    worlds(step_dir, 1).run(workers_restarts.without_rate, run / "step_00000003")
    argv = restarted(run, "cooldown").replace("--seq_len 16", "") + batch("")
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, 1)
    assert "does not say its rate" in said
    (found,) = worlds(step_dir, 1).run(workers_runs.life, restarted(run, "all") + batch(""))
    assert found["said"] is None and found["steps"] == [4, 5]
