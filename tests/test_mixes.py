"""Mixes of texts: shares, orders, held-out losses; every layout, and a run that goes on."""

import json
import math

import pytest
import workers_mixes as workers
from harness import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch import ranks_of
from test_checkpoint import SHAPE, assert_same_curve, batch, train
from test_optimizers import LAYOUTS, STEPS, slow_unless


@pytest.mark.steps(3, 3)
def test_every_share_is_met_at_every_place(step_dir, worlds):
    world = worlds(step_dir, 1)

    @settings(max_examples=20, deadline=None)
    @example([[49, 6, 25, 13, 54, 3, 49]])
    @given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1))
    def check(mixes):
        for parts, texts in zip(mixes, world.run(workers.periods, mixes)[0], strict=True):
            came = [0] * len(parts)
            bound = 1 - 1 / max(2, 2 * len(parts) - 2)  # Tijdeman's
            for place, text in enumerate(texts, 1):
                came[text] += 1
                for part, count in zip(parts, came, strict=True):
                    assert abs(count - place * part / sum(parts)) <= bound + 1e-12
            assert came == parts

    check()


@pytest.mark.steps(3, 3)
def test_each_text_keeps_its_own_order_and_its_own_held_out_part(step_dir, worlds):
    """Two texts of 640 and 320 windows, 3 : 2, over more than two epochs of the second."""
    found = worlds(step_dir, 1).run(workers.rows, [640, 320], [3, 2], 2000)[0]
    for text, size in enumerate((640, 320)):
        row = [window for which, window in found["row"] if which == text]
        training = size - size // 64
        for start in range(0, len(row) - training, training):
            assert sorted(row[start : start + training]) == list(range(training))
        assert row[:training] != sorted(row[:training])
        assert min(found["held_out"][text]) == training and max(found["held_out"][text]) < size
    assert found["jumped"] == found["row"][1234:1244]


@pytest.mark.steps(3, 3)
def test_a_mix_is_named_on_the_line_or_in_a_file(step_dir, worlds, tmp_path):
    for name in ("a.txt", "b,c.txt", "d:1.txt", "e:1"):
        (tmp_path / name).write_text(name)
    (tmp_path / "mix.json").write_text(json.dumps({str(tmp_path / "a.txt"): 0.25, "x": 0.75}))
    (tmp_path / "text.json").write_text('[{"text": "no mix"}]')
    cases = {
        f"{tmp_path}/a.txt:0.7,x:0.3": {f"{tmp_path}/a.txt": 7, "x": 3},
        f"{tmp_path}/mix.json": {f"{tmp_path}/a.txt": 1, "x": 3},
        f"{tmp_path}/text.json": {f"{tmp_path}/text.json": 1},
        f"{tmp_path}/b,c.txt": {f"{tmp_path}/b,c.txt": 1},
        f"{tmp_path}/d:1.txt": {f"{tmp_path}/d:1.txt": 1},
        f"{tmp_path}/e:1": {f"{tmp_path}/e:1": 1},
        "one:1,two:1,three:1": {"one": 1, "two": 1, "three": 1},
        "x:2": {"x": 1},
        f"{'a' * 300}:1,b:3": {"a" * 300: 1, "b": 3},  # longer than a path may be
        "~nobody at all/a:1,b:3": {"~nobody at all/a": 1, "b": 3},
        f"{tmp_path}/deep.json": {f"{tmp_path}/deep.json": 1},
        f"{tmp_path}/pairs.json": {f"{tmp_path}/pairs.json": 1},
    }
    (tmp_path / "deep.json").write_text("[" * 30000)
    (tmp_path / "pairs.json").write_text('[["a", 1], ["b", 2]]')
    found = worlds(step_dir, 1).run(workers.named, [*cases])[0]
    assert found == [*cases.values()]


@pytest.mark.steps(3, 3)
def test_a_mix_that_is_not_clear_is_an_error(step_dir, worlds, tmp_path):
    (tmp_path / "twice.json").write_text('{"a": 1, "b": 1, "a": 2}')
    (tmp_path / "tiny.json").write_text('{"a": 1, "b": 1e-300}')
    cases = {
        f"{tmp_path}/twice.json": "name each text once",
        f"{tmp_path}/tiny.json": "more than 10000 sequences: give them fewer digits",
        "a:1,b:0": "a weight above 0",
        "a:1,b": "a weight, as in",
        "a:1,:1": "a name",
    }
    for name, words in cases.items():
        error = worlds(step_dir, 1).run(workers.refused, name)[0]
        assert words in error and len(error) < len(name) + 200


@pytest.mark.steps(3, 3)
def test_random_tokens_may_be_mixed(step_dir, worlds, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    argv = f"--dataset_name random:0.5,{tmp_path}/a.txt:0.5"
    texts = worlds(step_dir, 1).run(workers.sizes, argv.split())[0]
    assert texts == [(2**22, None), (9501, 9500 / 9501)]


@pytest.mark.steps(3, 3)
def test_bits_a_byte_and_losses_by_text(step_dir, worlds):
    found, line = worlds(step_dir, 1).run(workers.reported, [2.0, 4.0], [3, 1], [4.0, 2.0])[0]
    assert found["held_out"] == 2.5 and found["held_out/a0"] == 2.0 and found["held_out/a1"] == 4.0
    assert math.isclose(found["bits_per_byte"], 2.5 / math.log(2) / 3.5, rel_tol=1e-12)
    assert line.startswith("held-out loss 2.5000 | 1.0305 bits a byte | a0 2.0000")
    found, line = worlds(step_dir, 1).run(workers.reported, [2.0], [1], [None])[0]
    assert found == {"held_out": 2.0, "bits_per_byte": None} and line == "held-out loss 2.0000"


@pytest.fixture
def mix(tmp_path):
    """The flag for a mix of two texts, of which a run reads the second one twice."""
    for name, factor in (("a", 3), ("b", 7)):
        text = "".join(f"{n * factor} {name} " for n in range(1500 if name == "a" else 220))
        (tmp_path / f"{name}.txt").write_text(text)
    return f"--dataset_name {tmp_path}/a.txt:0.6,{tmp_path}/b.txt:0.4 --tokenizer_name bytes "


@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", [slow_unless("cp" in layout, layout) for layout in LAYOUTS])
def test_a_mix_in_each_layout(step_dir, train_on, mix, layout):
    argv = SHAPE + STEPS + mix + "--dtype float64 --stride 3 "
    one = train_on(step_dir, 1, argv + batch(""), 4)
    run = train_on(step_dir, ranks_of(layout), argv + batch(layout), 4)
    run.assert_same_as(one)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "before, after", [("", ""), pytest.param(LAYOUTS[1], LAYOUTS[2], marks=pytest.mark.slow)]
)
def test_a_mix_goes_on(step_dir, worlds, mix, tmp_path, before, after):
    argv = SHAPE + STEPS + mix + "--dtype float64 "
    numbers, weights = train(worlds, step_dir, argv + batch(before))
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv + batch(before), until=3)
    rest, final = train(worlds, step_dir, argv + batch(after) + "--resume auto")
    if before == after:
        assert first + rest == numbers
        assert_close(weights, final, "final weight", tolerance=0)
    else:
        assert_same_curve(numbers, first + rest)
        assert_close(weights, final, "final weight")
