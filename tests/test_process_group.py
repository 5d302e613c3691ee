"""The mesh, its groups and the collectives, on real gloo ranks."""

import itertools
import time

import numpy as np
import pytest
import workers_process_group
from harness import RankError, World

pytestmark = pytest.mark.steps(2, 2)
AXES = ("pp", "dp", "cp", "tp")  # slowest first


def line(coordinates, sizes, axes):
    """The ranks that share all coordinates but those along axes, in order: written anew."""
    ranks = []
    for places in itertools.product(*(range(sizes[axis]) for axis in AXES)):
        if all(p == c or a in axes for a, p, c in zip(AXES, places, coordinates, strict=True)):
            rank = 0
            for axis, place in zip(AXES, places, strict=True):
                rank = rank * sizes[axis] + place
            ranks.append(rank)
    return ranks


def assert_mesh(step_dir, sizes, device):
    """Every rank of a mesh knows its groups, its neighbours and its place."""
    count = np.prod(list(sizes.values()))
    with World(step_dir, int(count)) as world:
        results = world.run(workers_process_group.mesh_of, sizes, device)
    for rank, (groups, text, first) in enumerate(results):
        coordinates = np.unravel_index(rank, [sizes[axis] for axis in AXES])
        assert first == (rank == 0)
        for axes, group in groups.items():
            ranks = line(coordinates, sizes, axes)
            place = ranks.index(rank)
            assert group == {
                "axis": "_".join(axis for axis in AXES if axis in axes),
                "ranks": tuple(ranks),
                "rank": place,
                "next": ranks[(place + 1) % len(ranks)],
                "previous": ranks[place - 1],
                "first": place == 0,
                "last": place == len(ranks) - 1,
            }
        rows = text.splitlines()[1:]
        assert len(rows) == count / sizes["tp"]
        assert [int(cell) for row in rows for cell in row.split("|")[1].split()] == [*range(count)]


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 1, "cp": 1, "dp": 1, "pp": 1},
        {"tp": 1, "cp": 1, "dp": 3, "pp": 1},
        {"tp": 2, "cp": 3, "dp": 1, "pp": 1},
        {"tp": 2, "cp": 1, "dp": 2, "pp": 2},
        {"tp": 1, "cp": 2, "dp": 4, "pp": 1},
        {"tp": 2, "cp": 2, "dp": 2, "pp": 2},
    ],
    ids=lambda sizes: "x".join(str(sizes[axis]) for axis in AXES),
)
def test_every_rank_finds_its_lines(step_dir, sizes):
    assert_mesh(step_dir, sizes, "cpu")


def assert_collectives(results, dtype):
    """What every collective gives on each rank, by definition, and what the ledger says."""
    size = len(results)
    each = [np.arange(2.0 * size).reshape(size, 2) + 10 * rank for rank in range(size)]
    for rank, (found, counted) in enumerate(results):
        expected = {
            "all_reduce": sum(each),
            "all_reduce max": each[-1],
            "all_reduce later": sum(each),
            "all_gather": np.concatenate(each),
            "all_gather later": np.concatenate(each),
            "reduce_scatter": sum(each)[rank : rank + 1],
            "reduce_scatter later": sum(each)[rank : rank + 1],
            "broadcast": each[1],
            "exchange": each[rank - 1],
            "largest": [7, size - 1],
            "from_first": 100,
        }
        assert found.keys() == expected.keys()
        for name in expected:
            words = f"{name} on rank {rank}: found {found[name]}, expected {expected[name]}"
            assert np.array_equal(found[name], expected[name]), words
        one = 2 * size * {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
        assert counted == {
            ("tp", "all_reduce"): [3, 3 * one],
            ("tp", "all_gather"): [2, 2 * size * one],
            ("tp", "reduce_scatter"): [2, 2 * one],
            ("tp", "broadcast"): [1, one],
            ("tp", "send"): [1, one],
        }


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3])
def test_collectives_and_their_ledger(step_dir, worlds, size, dtype):
    results = worlds(step_dir, size).run(workers_process_group.collectives, dtype, size, "cpu")
    assert_collectives(results, dtype)


def test_an_error_of_the_first_rank_is_everyones(step_dir, worlds):
    assert (
        worlds(step_dir, 3).run(workers_process_group.error_on_the_first_rank) == ["only here"] * 3
    )


@pytest.mark.steps(2, 3, only=True)
@pytest.mark.parametrize("spoiled", [None, 1, 2])
def test_replicas_are_compared_bit_for_bit(step_dir, worlds, spoiled):
    said = worlds(step_dir, 3).run(workers_process_group.replicas, spoiled)
    for rank, words in enumerate(said):
        assert words == (f"lm_head.weight differs on rank {rank}" if rank == spoiled else None)


@pytest.mark.parametrize(
    "how, words",
    [("raise", "this rank has had enough"), ("die", "rank 1 of 2 died"), ("hang", "took over 3 s")],
)
def test_the_harness_shows_a_failing_rank_and_never_hangs(step_dir, how, words):
    with World(step_dir, 2) as world:
        world.run(workers_process_group.fail_on, None, how)
        begun = time.monotonic()
        with pytest.raises(RankError, match=words):
            world.run(workers_process_group.fail_on, 1, how, timeout=3 if how == "hang" else 60)
        assert time.monotonic() - begun < 15
        world.run(workers_process_group.fail_on, None, how)  # it starts again by itself
