"""The communication ledger: how much each collective moved, beside what the formulas predict."""

import contextlib

from profiling import span

ledger = None  # while recording: {(axis, collective): [calls, bytes]}


@contextlib.contextmanager
def recorded():
    """Count every collective of this rank inside the block: {(axis, collective): [calls, bytes]}.

    Bytes are those of the full tensor: what is reduced, what a gather returns, what a
    reduce-scatter takes, what is sent.
    """
    global ledger
    ledger = {}
    try:
        yield ledger
    finally:
        ledger = None


def record(axis, collective, size):
    """Add one call of `size` bytes, if something is recording.

    Returns a context for the call, in which a trace (`--profile`) shows it by its name and axis.
    """
    if ledger is not None:
        entry = ledger.setdefault((axis, collective), [0, 0])
        entry[0] += 1
        entry[1] += size
    return span(f"{collective} {axis}")


@contextlib.contextmanager
def communication_ledger(mesh, active, predicted):
    """Print the first rank's collectives in the block, beside what the formulas predict.

    predicted: rows of (axis, collective, calls, bytes of each call).
    """
    if not active:
        yield
        return
    with recorded() as counted:
        yield
    if mesh.world.is_first:
        print(ledger_table(counted, predicted))


def ledger_table(counted, predicted):
    """Text that puts what was counted beside what a lesson's formula says."""
    due = {}
    for axis, collective, calls, size in predicted:
        calls_so_far, size_so_far = due.get((axis, collective), (0, 0))
        due[axis, collective] = calls_so_far + calls, size_so_far + calls * size
    lines = ["axis     collective         calls         bytes   predicted: calls         bytes"]
    for axis, collective in sorted({*counted, *due}):
        calls, size = counted.get((axis, collective), (0, 0))
        calls_due, size_due = due.get((axis, collective), (0, 0))
        lines.append(
            f"{axis:8} {collective:16} {calls:7,} {size:13,} {calls_due:18,} {size_due:13,}"
        )
    return "\n".join(lines)
