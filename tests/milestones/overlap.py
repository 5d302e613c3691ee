"""What a rank computes while one of its collectives is on the way."""

from unittest.mock import patch

from workers_messages import Products


class Handle:
    """The handle of a collective, that notes when it is waited for."""

    def __init__(self, handle, events):
        self.handle, self.events = handle, events

    def wait(self):
        self.events.append("wait")
        self.handle.wait()


def events_after(kind, call):
    """What happens in call() after the last start of one kind of collective, a list.

    Each event is "product" or "wait"; a collective without async_op is waited for at once.
    """
    import process_group as pg

    events, real = [], getattr(pg, kind)

    def watched(*args, **options):
        events.clear()
        result = real(*args, **options)
        if not options.get("async_op"):
            events.append("wait")
            return result
        if isinstance(result, tuple):
            return result[0], Handle(result[1], events)
        return Handle(result, events)

    with patch.object(pg, kind, watched), Products(events):
        call()
    return events
