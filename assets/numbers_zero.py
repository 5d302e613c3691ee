"""What the book's widget `zero` draws: a step of each engine of step 6, recorded by running it."""

from numbers_planner import load
from recorded import ROOT, World
from recorded_engines import engine_in_a_step

ENGINES = ("naive", "bucket", "zero1", "zero2", "zero3")
RANKS, MICRO_BATCHES, LAYERS = (2, 4), (1, 2), 4
ARGV = (
    f"--device cpu --num_hidden_layers {LAYERS} --dataset_name random --micro_batch_size 1 "
    "--seq_len 16 --dp_size {ranks} --dp_engine {engine} --gradient_accumulation_steps {count}"
)
ROWS = ["embedding", *(f"layer {i}" for i in range(LAYERS)), "norms", "head"]
SECOND = 2  # the step that is recorded: the first one makes the optimizer's moments


def numbers():
    """{"rows": names, "bytes": of all weights, "runs": {"zero3 2 1": a run}}; see `run_of`.

    A run has the name of its engine, its ranks and its micro-batches.
    """
    recorded = {}
    for ranks in RANKS:
        with World(ROOT / "step6_data_parallel", ranks) as world:
            for engine in ENGINES:
                for count in MICRO_BATCHES:
                    argv = ARGV.format(ranks=ranks, engine=engine, count=count)
                    every = world.run(engine_in_a_step, argv, SECOND, True)
                    if any(one != every[0] for one in every):
                        raise AssertionError(f"{engine}: {ranks} ranks do not all do the same")
                    recorded[engine, ranks, count] = every[0]
    notes = recorded["naive", RANKS[0], 1]["notes"]
    sizes = {row: notes[0]["held"][row]["weights"] for row in ROWS}
    runs = {
        f"{engine} {ranks} {count}": run_of(run, engine, ranks, sizes)
        for (engine, ranks, count), run in recorded.items()
    }
    return {"rows": ROWS, "bytes": sum(sizes.values()), "runs": runs}


def run_of(run, engine, ranks, sizes):
    """What the widget shows of a run: {"moments", "curve", "predicted", "counted"}.

    moments: see `Memory.moment`. curve: points (moment, bytes of weights, of gradients, of
    moments); what happens between two moments of the widget lies evenly in between. predicted and
    counted, by step 6's formulas and in its ledger: {collective: [calls, bytes, bytes that a rank
    sends]}.
    """
    memory, moments, curve, since = Memory(sizes), [], [], []
    for note in run["notes"]:
        since.append(memory.see(note))
        if is_shown(note, engine):
            begin = len(moments) - 1
            curve += [[begin + (i + 1) / len(since), *kept] for i, kept in enumerate(since)]
            moments.append(memory.moment(note))
            since = []
    predicted = {}
    for kind, calls, size in run["predicted"]:
        before = predicted.get(kind, (0, 0))
        predicted[kind] = before[0] + calls, before[1] + calls * size
    sent = {
        name: {kind: [calls, size, size * load("plan").ring_share(kind, ranks)]
               for kind, (calls, size) in count.items()}
        for name, count in (("predicted", predicted), ("counted", run["notes"][-1]["sent"]))
    }  # fmt: skip
    return {"moments": moments, "curve": curve, **sent}


def is_shown(note, engine):
    """Whether the widget stops at a note."""
    what, row = note["what"], note["row"]
    if what in ("forward ends", "backward ends"):
        return row != "norms"
    if what == "summed":  # one message after the other
        return engine == "naive" and row != "norms"
    after = {"all summed": engine != "naive", "ends": engine in ("zero1", "zero2")}
    return what in ("zero_grad", "update") or after.get(what, False)


class Memory:
    """What is in the memory of a rank, as notes tell it, one after the other."""

    def __init__(self, sizes):
        self.sizes = sizes  # {row: bytes of its weights}
        self.coming, self.leaving, self.summed, self.old = set(), set(), set(), set()

    def see(self, note):
        """Take a note; the bytes of weights, of gradients and of moments after it."""
        what, row, held = note["what"], note["row"], note["held"]
        if what == "zero_grad":
            self.summed.clear()
        if what == "update":  # elsewhere other ranks have updated other parts
            self.old = {row for row in held if held[row]["weights"] and held[row]["sums"]}
        into, out = {
            "gather": ((self.coming,), ()),
            "arrived": ((), (self.coming, self.old)),
            "drop": ((), (self.coming, self.old)),
            "send": ((self.leaving,), ()),
            "summed": ((self.summed,), (self.leaving,)),
        }.get(what, ((), ()))
        for rows in into:
            rows.add(row)
        for rows in out:
            rows.discard(row)
        kinds = (("weights", "shards"), ("gradients", "in passing", "sums"), ("moments",))
        return [sum(held[row][kind] for row in held for kind in group) for group in kinds]

    def moment(self, note):
        """{"what", "row", "micro": micro-batch, "sent": as in the note, and of each row a letter}.

        weights: whole, coming, old (but for this rank's shard), or only the shard. own, gradients
        of this rank's sequences: here, leaving, or none. sum, of all ranks' gradients: whole,
        shard, zeros in a shard, or none. moments: whole, or shard.
        """
        rows, held = ROWS, note["held"]
        letters = {
            "weights": "".join(self.weights(row, held[row]) for row in rows),
            "own": "".join(self.own(row, held[row]) for row in rows),
            "sum": "".join(self.sum(row, held[row]) for row in rows),
            "moments": "".join(
                "w" if held[row]["moments"] == 2 * self.sizes[row] else "s" for row in rows
            ),
        }
        about = {"what": note["what"].removesuffix(" ends"), "row": note["row"]}
        return about | {"micro": note["micro_batch"], "sent": note["sent"]} | letters

    def weights(self, row, held):
        if not held["weights"]:
            return "s"
        return "c" if row in self.coming else "o" if row in self.old else "w"

    def own(self, row, held):
        if row in self.leaving:
            return "l"
        alone = held["sums"] or row not in self.summed  # else it has become the sum
        return "h" if held["gradients"] and alone else "n"

    def sum(self, row, held):
        if held["sums"]:
            return "s" if row in self.summed else "z"
        return "w" if row in self.summed else "n"
