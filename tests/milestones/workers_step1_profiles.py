"""What the checks of step 1's page about traces, memory and NaNs run."""

import contextlib
import io
import json
from types import SimpleNamespace
from unittest.mock import patch


def arguments(folder, **more):
    """What check_reports reads, for a run of 9 steps."""
    given = {"use_tensorboard": None, "profile": None, "profile_dir": str(folder), "device": "cpu"}
    given |= {"memory_snapshot": None, "detect_anomaly": False, "compile": None, "total_steps": 9}
    return SimpleNamespace(**given | more)


def refused(folder):
    """Wrong calls get a UserError with these words."""
    from errors import UserError
    from profiling import check_reports

    for flags, words in (
        ({"profile": "3"}, "--profile 3"),
        ({"profile": "0:2"}, "--profile 0:2"),
        ({"profile": "3:2"}, "--profile 3:2"),
        ({"profile": "8:10"}, "from 1 to 9"),
        ({"memory_snapshot": str(folder)}, "--memory_snapshot"),
        ({"detect_anomaly": True, "compile": "aot_eager"}, "--compile"),
        ({"profile": "1:2", "profile_dir": "/dev/null"}, "--profile_dir"),
    ):
        try:
            check_reports(arguments(folder, **flags))
        except UserError as error:
            assert words in str(error), f"check_reports of {flags} says {error}, without {words}"
        else:
            raise AssertionError(f"check_reports of {flags} should raise UserError")


def events_of(trace):
    assert trace.path.is_file(), f"Trace: after its last step there is no {trace.path.name}"
    events = json.loads(trace.path.read_text())["traceEvents"]
    return [event["name"] for event in events if event["ph"] == "X"]


def traces(folder):
    """Which of four steps are in a trace, and under which names."""
    import torch

    import profiling

    args = arguments(folder, profile="2:3")
    profiling.check_reports(args)
    trace, operations = args.trace, ["sin", "cos", "exp", "tan"]

    def train_step(state):
        with profiling.span(f"span {state.step + 1}"):
            getattr(torch, operations[state.step])(torch.ones(2))
        state.step += 1
        return state.step

    state = SimpleNamespace(args=args, step=0)
    returned = [profiling.watched(train_step)(state) for _ in operations]
    assert returned == [1, 2, 3, 4], f"watched(train_step) returns {returned} in the first 4 steps"
    trace.close()  # as at the end of a run
    found = events_of(trace)
    due = ["ProfilerStep#2", "span 2", "aten::cos", "ProfilerStep#3", "span 3", "aten::exp"]
    for name in due:
        assert name in found, f"a trace of the steps 2:3 has no {name}; it has {sorted(set(found))}"
    others = {"aten::sin", "aten::tan", "span 1", "span 4"} & set(found)
    assert not others, f"a trace of the steps 2:3 has {others} of other steps"
    profiling.check_reports(arguments(folder))
    assert isinstance(profiling.span("x"), contextlib.nullcontext), (
        "span: without --profile it should cost nothing: return contextlib.nullcontext()"
    )
    ended(folder)


def ended(folder):
    """A run that ends before the last step, by an error too, leaves its trace."""
    import profiling

    for args, words in (
        (arguments(folder / "early", profile="2:5"), ""),
        (arguments(folder / "never", profile="7:8"), "none of these steps"),
    ):
        profiling.check_reports(args)

        def main(args):
            state = SimpleNamespace(args=args, step=0)
            for state.step in range(3):
                profiling.watched(lambda state: None)(state)
            raise KeyError("an end")

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(KeyError):
            profiling.reported(main)(args)
        assert words in said.getvalue(), f"Trace.close should say {words!r}; it says {said!r}"
        steps = {name for name in events_of(args.trace) if "Step" in name} if not words else set()
        due = {"ProfilerStep#2", "ProfilerStep#3"} if not words else set()
        assert steps == due, f"after an error in step 4, a trace of 2:5 has {steps}, not {due}"


FLAGS = (
    "--device cpu --dtype float64 --num_hidden_layers 3 --hidden_size 32 --num_attention_heads 4 "
    "--num_key_value_heads 2 --intermediate_size 48 --seq_len 8 --micro_batch_size 2"
)


def nans():
    """Where a NaN begins that a layer makes forward, or only in its backward pass."""
    import torch

    import train
    from errors import UserError

    def said(wrong):
        """What a step says whose second MLP computes something else."""
        state = train.setup(train.parse_args(f"{FLAGS} --detect_anomaly".split()))
        mlp = state.model.model.layers[1].mlp
        right = mlp.forward
        with patch.object(mlp, "forward", lambda x: right(x) + wrong(x)):
            try:
                train.train_step(state)
            except UserError as error:
                return str(error)
        return "nothing"

    # At 0 a root has an infinite derivative; 0 times infinity is no number.
    for wrong, words in (
        (lambda x: x / 0, ("step 1", "output of model.layers.1")),
        (lambda x: 0 * (x - x).sqrt(), ("step 1", "SqrtBackward0", "model.layers.1", "model.py")),
    ):
        found = said(wrong)
        for word in words:
            assert word in found, f"--detect_anomaly says {found!r} of a NaN, without {word!r}"
    runs = []
    for flag in ("", " --detect_anomaly"):
        state = train.setup(train.parse_args((FLAGS + flag).split()))
        losses = [train.train_step(state)["loss"] for _ in range(2)]
        hooks = [len(layer._forward_hooks) for layer in state.model.model.layers]
        runs.append((losses, hooks))
    assert runs[0] == runs[1], (
        f"losses and hooks of two steps are {runs[1]} with --detect_anomaly, {runs[0]} without; "
        "it should change no number, and take its hooks away after each step"
    )
    assert not torch.is_anomaly_enabled(), "NaNs.search: after a step autograd still looks for NaNs"


def board(folder):
    """What a reader of the folder sees, after a run and one that goes on from its step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from metrics import Board

    for first, loss in ((1, 5.0), (3, 4.0)):
        board = Board(str(folder), first)
        for step in range(first, 5):
            board.write({"step": step, "loss": loss / step, "mfu": None})
        board.close()
    reader = EventAccumulator(str(folder)).Reload()
    tags = reader.Tags()["scalars"]
    assert tags == ["loss"], f"Board.write: the curves are {tags}; due is loss, mfu is unknown"
    found = [(point.step, round(point.value, 4)) for point in reader.Scalars("loss")]
    due = [(1, 5.0), (2, 2.5), (3, 1.3333), (4, 1.0)]
    assert found == due, f"Board: the points are {found}; after a second start they should be {due}"
