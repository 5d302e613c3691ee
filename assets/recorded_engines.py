"""One training step of step 6 on a rank, written down while an engine of data parallelism runs.

figures_data_parallel.py draws the gathers of zero3 from it, the book's widget `zero` all engines.
`recorded.record` starts the world of processes in which `engine_in_a_step` runs.
"""

import collections
import functools
from unittest.mock import patch

# Of what is in memory. weights: those of the model's parameters; shards: those of this rank's part,
# where they have memory of their own; gradients: those of the parameters; in passing: gradients
# that are being sent, and what is received of them; sums: this rank's part of the summed gradients.
KINDS = ("weights", "shards", "gradients", "in passing", "sums", "moments")


def row_of(parameter, norms_apart):
    """What a parameter belongs to: "embedding", "layer 0", "norms" or "head".

    norms_apart: whether all norms are one bucket, as in zero3, and not only the last one.
    """
    outside = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    name = parameter.global_name.split(".")
    if len(parameter.full_shape) < 2 and (norms_apart or "layers" not in name):
        return "norms"
    return outside.get(parameter.global_name) or f"layer {name[2]}"


class Handle:
    """The handle of a gather that says when somebody has waited for it first."""

    def __init__(self, handle, arrived):
        self.handle, self.arrived = handle, arrived

    def wait(self):
        self.handle.wait()
        arrived, self.arrived = self.arrived, None
        if arrived:
            arrived()


class Recorder:
    """The notes of one rank, in order.

    A note is a dict. what: "zero_grad"; a row's "forward" or "backward" "begins" or "ends" (its
    last gradient is there, and the engine has not seen it yet); "send" and "summed", of gradients;
    "all summed"; "update", the optimizer's step; "gather", "arrived" and "drop", of weights;
    "ends". row; micro_batch, from 0 on; held, {row: {kind of KINDS: bytes}}; sent, {collective:
    [calls, bytes]}, what the ledger has counted in this step on the engine's axis.
    """

    def __init__(self):
        self.notes, self.on, self.micro_batch = [], False, -1
        self.sent = {}

    def note(self, what, row=None, leaving=()):
        if self.on:
            axis = self.engine.group.axis
            sent = {kind: list(count) for (of, kind), count in self.sent.items() if of == axis}
            about = {"what": what, "row": row, "micro_batch": self.micro_batch}
            self.notes.append(about | {"held": self.held(leaving), "sent": sent})

    def before_the_engine(self, model, norms_apart):
        """Hooks that must run before those of the engine: what ends."""
        self.model, self.norms_apart = model, norms_apart
        self.parameters = list(model.parameters())
        self.missing = collections.Counter(self.row(p) for p in self.parameters)
        self.counts = dict(self.missing)
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.arrived)
        for row, module in self.modules():
            module.register_forward_hook(lambda *_, row=row: self.note("forward ends", row))

    def after_the_engine(self, state):
        """Hooks that must run after those of the engine, and its methods."""
        self.engine, self.optimizer = state.engine, state.optimizer
        self.model.register_forward_pre_hook(lambda *_: self.next_micro_batch(), prepend=True)
        for row, module in self.modules():
            module.register_forward_pre_hook(lambda *_, row=row: self.note("forward begins", row))
            module.register_forward_hook(
                lambda module, inputs, output, row=row: self.backward_begins(output, row)
            )
        self.optimizer.register_step_post_hook(lambda *_: self.note("update"))
        for method in (
            "zero_grad",
            "finish_gradients",
            "reduce",
            "finish_oldest",
            "gather",
            "drop",
        ):
            if original := getattr(self.engine, method, None):
                setattr(self.engine, method, functools.partial(getattr(self, method), original))

    def next_micro_batch(self):
        self.micro_batch += 1

    def zero_grad(self, original):
        original()
        self.note("zero_grad")

    def finish_gradients(self, original):
        original()
        self.note("all summed")

    def reduce(self, original, bucket):
        sent = original(bucket)
        self.note("send", self.row(bucket.parameters[0]), leaving=[(bucket, *sent)])
        return sent

    def finish_oldest(self, original):
        bucket = self.engine.running[0][0]
        original()
        self.note("summed", self.row(bucket.parameters[0]))

    def gather(self, original, bucket):
        handle, row = original(bucket), self.row(bucket.parameters[0])
        self.note("gather", row)
        return Handle(handle, lambda: self.note("arrived", row))

    def drop(self, original, bucket):
        was_here = bucket.weights.untyped_storage().nbytes()
        original(bucket)
        if was_here:
            self.note("drop", self.row(bucket.parameters[0]))

    def sum_of_one(self, x, group, *args, original, **options):
        """`all_reduce`, that of the engine naive noted for each row."""
        result = original(x, group, *args, **options)
        found = [p for p in self.parameters if p.grad is x]
        for parameter in found if not options.get("async_op") else ():
            self.counts[row := self.row(parameter)] -= 1
            if not self.counts[row]:
                self.counts[row] = self.missing[row]
                self.note("summed", row)
        return result

    def backward_begins(self, output, row):
        if output.requires_grad:
            output.register_hook(lambda _: self.note("backward begins", row))

    def arrived(self, parameter):
        self.counts[row := self.row(parameter)] -= 1
        if not self.counts[row]:
            self.counts[row] = self.missing[row]
            self.note("backward ends", row)

    def row(self, parameter):
        return row_of(parameter, self.norms_apart)

    def modules(self):
        inside = self.model.model
        layers = [(f"layer {i}", layer) for i, layer in enumerate(inside.layers)]
        return [("embedding", inside.embed_tokens), *layers, ("head", self.model.lm_head)]

    def held(self, leaving):
        """Bytes in memory, what several tensors share only once."""
        found, seen = {row: dict.fromkeys(KINDS, 0) for row in self.missing}, set()

        def add(kind, row, tensor):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[row][kind] += storage.nbytes()

        buckets = getattr(self.engine, "buckets", [])
        for parameter in self.parameters:
            add("weights", self.row(parameter), parameter.data)
        for bucket in (bucket for bucket in buckets if hasattr(bucket, "shard")):
            add("shards", self.row(bucket.parameters[0]), bucket.shard)
            add("sums", self.row(bucket.parameters[0]), bucket.gradient_shard)
        for parameter in self.parameters:
            if parameter.grad is not None:
                add("gradients", self.row(parameter), parameter.grad)
        for bucket, sent, received, _ in [*getattr(self.engine, "running", []), *leaving]:
            add("in passing", self.row(bucket.parameters[0]), sent)
            add("in passing", self.row(bucket.parameters[0]), received)
        for parameter, moments in self.optimizer.state.items():
            for moment in moments.values():
                if moment.dim():  # the other one counts steps
                    add("moments", self.row(parameter), moment)
        return found


def engine_in_a_step(argv, steps=1, small_buckets=False):
    """Train on this rank; what it does in the last step, {"notes", "predicted"}.

    small_buckets: a bucket holds a layer, and as much is under way at most, as if the model were
    large. predicted: rows of (collective, calls, bytes of each call) of step 6's own formulas.
    """
    import ledger
    import process_group
    import train
    from data_parallel import Bucketed
    from traffic import predicted_traffic

    recorder, make = Recorder(), train.data_parallel

    def data_parallel(name, model, group):
        recorder.before_the_engine(model, norms_apart=name == "zero3")
        layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
        size = layer if small_buckets else Bucketed.bucket_bytes
        with patch.object(Bucketed, "bucket_bytes", size):
            engine = make(name, model, group)
        if small_buckets:
            engine.most_bytes = layer
        return engine

    with patch.object(train, "data_parallel", data_parallel):
        state = train.setup(train.parse_args(argv.split()))
    recorder.after_the_engine(state)
    for _ in range(steps - 1):
        train.train_step(state)
    recorder.on, recorder.micro_batch = True, -1
    sums = patch.object(
        process_group, "all_reduce",
        lambda *args, original=process_group.all_reduce, **options: recorder.sum_of_one(
            *args, original=original, **options
        ),
    )  # fmt: skip
    with ledger.recorded() as recorder.sent, sums:
        train.train_step(state)
        recorder.note("ends")
    rows = [row[1:] for row in predicted_traffic(state) if row[0] == state.engine.group.axis]
    return {"notes": recorder.notes, "predicted": rows}


def zero3_in_a_step(argv):
    """One training step of step 6 with --dp_engine zero3: its events on this rank, in order.

    Returns a list of (what, name of a bucket, {name: bytes of its whole weights that are here}).
    what: "gather" begins, "drop", or a layer's "forward" or "backward" "begins" or "ends".
    """
    events = []
    for note in engine_in_a_step(argv)["notes"]:
        what, name = note["what"], note["row"]
        of_a_layer = what.endswith((" begins", " ends")) and name.startswith("layer")
        # The head and the norms are dropped when their gradients are there.
        dropped_then = what == "backward ends" and name in ("head", "norms")
        if what in ("gather", "drop") or of_a_layer or dropped_then:
            here = {row: held["weights"] for row, held in note["held"].items()}
            events.append((what, name, {row: size for row, size in here.items() if size}))
    return events
