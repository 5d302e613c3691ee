"""The milestones of step 2's lesson and of its further page, on two, three and four ranks."""

import itertools
import re

import pytest
import workers_step2 as workers
from harness import RankError
from launch import launch
from same import SMALL, in_one_line

pytestmark = pytest.mark.usefixtures("worlds")
AXES = ("pp", "dp", "cp", "tp")  # slowest first


@pytest.fixture
def run(step_dir, worlds):
    """run(size, function, *args): a result of each rank. Ranks that hang are ended soon."""

    def call(size, function, *args):
        try:
            return worlds(step_dir, size).run(function, *args, timeout=25)
        except RankError as error:
            if not re.match(r"deadlock|ranks .* took over", str(error)):
                raise
            hint = (
                "A rank waits for a message that never comes. Usually not all ranks of a group "
                "made the same call, or not in the same order"
            )
            raise AssertionError(in_one_line(error, hint)) from None

    return call


@pytest.mark.milestone(2, 1)
@pytest.mark.parametrize("size", [2, 3])
def test_processes_find_each_other(run, size):
    run(size, workers.join_and_leave)


@pytest.mark.milestone(2, 1)
def test_a_world_of_one(run):
    run(1, workers.join_alone)


def line(rank, sizes, axes):
    """The ranks that differ from one along some axes only, in order."""
    places = list(itertools.product(*(range(sizes.get(axis, 1)) for axis in AXES)))
    fixed = [place for place, axis in enumerate(AXES) if axis not in axes]
    return tuple(
        other
        for other, place in enumerate(places)
        if all(place[i] == places[rank][i] for i in fixed)
    )


@pytest.mark.milestone(2, 2)
@pytest.mark.parametrize(
    "sizes",
    [{"tp": 2}, {"cp": 3}, {"tp": 2, "dp": 2}, {"cp": 2, "pp": 2}],
    ids=lambda sizes: " ".join(f"{axis} {size}" for axis, size in sizes.items()),
)
def test_every_rank_finds_its_groups(run, sizes):
    axes = [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("pp", "tp")]
    count = 1
    for size in sizes.values():
        count *= size
    for rank, (groups, world, text) in enumerate(run(count, workers.groups_of, sizes, axes)):
        assert world == tuple(range(count)), f"mesh.world has the ranks {world}"
        for names, (ranks, place, after, before, first, last) in groups.items():
            due = line(rank, sizes, names)
            where = f"of rank {rank} in a mesh of {sizes}"
            assert ranks == due, f"group{names} {where} is {ranks}; it should be {due}"
            assert place == due.index(rank), f"the place {where} in group{names} is {place}"
            ring = due[(place + 1) % len(due)], due[place - 1]
            assert (after, before) == ring, (
                f"next and previous {where} are {(after, before)}; they should be {ring}"
            )
            ends = place == 0, place == len(due) - 1
            assert (first, last) == ends, (
                f"is_first and is_last {where} are {(first, last)}; they should be {ends}"
            )
        rows = [row.split("|")[1].split() for row in text.splitlines()[1:]]
        assert sum(rows, []) == [str(r) for r in range(count)], f"str(mesh) is {text}"
        assert len(rows) == count // sizes.get("tp", 1), f"a row for each tp group, not {text}"


@pytest.mark.milestone(2, 3)
def test_calls_are_counted(run):
    (left,) = run(1, workers.ledger_off)
    assert left is None, "after the block of `recorded` nothing is recorded any more"


@pytest.mark.milestone(2, 3)
@pytest.mark.parametrize("sizes", [{"dp": 3}, {"dp": 2, "tp": 2}], ids=["one line", "two lines"])
def test_collectives(run, sizes):
    size = sizes["dp"]
    one = size * 2 * 8  # bytes of the tensor, [size, 2] in float64
    due = {
        "all_reduce": [3, 2 * one + 16],
        "all_gather": [2, 2 * size * one],
        "reduce_scatter": [2, 2 * one],
        "broadcast": [1, one],
        "send": [1, 24],
    }
    for counted in run(size * sizes.get("tp", 1), workers.collectives, sizes):
        for name, value in due.items():
            found, caller = counted.get(("dp", name)), "exchange" if name == "send" else name
            assert found == value, (
                f"{caller} records {found} for {name} on dp, [calls, bytes]; it should be {value}, "
                "with the bytes of the full tensor"
            )


@pytest.mark.milestone(2, 4)
@pytest.mark.parametrize("size", [2, 3])
def test_one_rank_works_for_all(run, size):
    run(size, workers.first_works)


@pytest.mark.milestone(2, 4)
@pytest.mark.parametrize("spoiled", [None, 1, 2])
def test_replicas_are_compared_bit_for_bit(run, spoiled):
    for rank, said in enumerate(run(3, workers.replicas, spoiled)):
        due = f"second differs on rank {rank}" if rank == spoiled else None
        assert said == due, f"assert_replicas_equal says {said} on rank {rank}; it should say {due}"


@pytest.mark.milestone(2, 5)
def test_the_ledger_is_a_table(run):
    first, second = run(2, workers.ledger_of_a_step)
    assert second == ["", ""], "communication_ledger: only the first rank prints"
    assert first[1] == "", "communication_ledger that is not active (no --comm_ledger) prints"
    rows = [row.split() for row in first[0].splitlines()[1:]]
    due = [["dp", "all_gather", "0", "0", "1", "100"], ["dp", "all_reduce", "2", "96", "2", "96"]]
    assert rows == due, (
        f"ledger_table has the rows {rows}; they should be {due}: axis, collective, then calls and "
        "bytes, counted and predicted"
    )


@pytest.mark.milestone(2, 6)
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_train_like_one_process(step_dir, train_on, size):
    flags = SMALL.replace("--dataset_name random ", "") + "--device cpu"
    run = train_on(step_dir, size, flags, 3)
    run.assert_same_as(train_on(step_dir, 1, flags, 3), tolerance=0)  # bit for bit


@pytest.mark.milestone(2, 6)
def test_one_rank_reports(step_dir):
    flags = SMALL.replace("--dataset_name random ", "").replace("4096", "64")
    result = launch(step_dir, flags + "--device cpu --comm_ledger", ranks=2)
    assert result.code == 0, f"torchrun train.py ends with {result.code}: {result.errors}"
    steps = [line["step"] for line in result.metrics]
    assert steps == [1, 2], (
        f"the metrics file has the steps {steps}, not [1, 2]: is metrics.open called on the first "
        "rank only, by from_first, and metrics.log for each step?"
    )
    assert not result.others, f"in main only the first rank calls metrics.log: {result.others}"
    speed = result.metrics[0]
    ratio = speed["tokens_per_second"] / speed["tokens_per_second_per_device"]
    assert ratio == pytest.approx(2), (
        f"tokens_per_second is {ratio:.3g} times tokens_per_second_per_device, not 2 times: "
        "Metrics takes the number of devices, and Metrics.log divides by it"
    )
    for words, place in (
        ("2 ranks = pp 1 x dp 2 x cp 1 x tp 1", "by main, of the mesh that setup makes"),
        ("predicted: calls", "as the ledger of the first step, by main"),
        ("world    all_reduce             1             8", "of max_over_ranks in train_step"),
    ):
        count = result.out.count(words)
        assert count == 1, f"{words!r} is printed {count} times, not once, {place}: {result.out}"


@pytest.mark.milestone(2, 7)
def test_what_was_started(run):
    run(1, workers.started)


@pytest.mark.milestone(2, 7)
def test_a_lost_neighbour(run):
    run(1, workers.lost_neighbours)
