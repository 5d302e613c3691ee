"""Batches: which sequences make up a step, and in which order they come.

The sequences of a step are a function of the seed, the global batch size and the number of the
step, and of nothing else: not of how the batch is cut into micro-batches, nor of the workers that
load it. So the number of the step is all that has to be saved to go on later.
"""

import hashlib
import itertools

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from errors import UserError
from files import shown

# Without `--eval_tokens` an evaluation reads at most so much, or one batch where that is more.
HELD_OUT_SEQUENCES = 256
HELD_OUT_TOKENS = 2**14


class Windows(Dataset):
    """Sequences of seq_len + 1 tokens, cut from the joined documents one after the other.

    Neighbours share one token, the last target of the one and the first input of the other: each
    token is predicted once, but for the very first and a rest at the end that fills no window.
    With a stride they share so many more, which are predicted again.
    """

    def __init__(self, tokens, seq_len, stride=0):
        self.tokens, self.seq_len, self.hop = tokens, seq_len, seq_len - stride
        # So many of the windows before one share more than one token with it.
        self.overlapping = -(-seq_len // self.hop) - 1

    def __len__(self):
        return max(0, (len(self.tokens) - 1 - self.seq_len) // self.hop + 1)

    def __getitem__(self, index):  # [seq + 1]
        start = index * self.hop
        window = self.tokens[start : start + self.seq_len + 1]
        return torch.from_numpy(window.astype("int64"))


class Order:
    """All epochs in an endless row, each of `count` windows in an order of its own.

    Each step takes the next batch_size windows of the row.
    """

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch, self.shuffled = None, None

    def sequence(self, position):
        """Index of the window at a position of the endless row.

        An epoch's order is that of torch.randperm, by a generator of its own. Its seed is the first
        8 bytes of sha256("SEED epoch EPOCH"), read as a little-endian number.
        """
        epoch, place = divmod(position, self.count)
        if epoch != self.epoch:
            digest = hashlib.sha256(f"{self.seed} epoch {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            self.epoch = epoch
            self.shuffled = torch.randperm(self.count, generator=generator).numpy()
        return int(self.shuffled[place])

    def cut(self, size, step):
        """Yield lists of `size` window indices, a micro-batch each, from a step on, without end.

        Steps count from 0.
        """
        for start in itertools.count(step * self.batch_size, size):
            yield [self.sequence(start + row) for row in range(size)]


class Batches:
    """Cuts the sequences of a step into micro-batches; the last 1/64 of all windows is held out.

    positions: those of a sequence that this rank reads; group: the ranks among which the
    micro-batches of a step are dealt out.

    validation: tokens that are held out instead, where the data set has some for it.
    Raises UserError when the data set does not fill one step and its held-out part.
    """

    def __init__(self, args, tokens, device, positions, group, validation=None):
        self.device, self.group = device, group
        self.micro_batch_size = args.micro_batch_size
        self.micro_batches_a_step = args.gradient_accumulation_steps
        self.windows = Windows(tokens, args.seq_len, args.stride)
        training = first = len(self.windows)  # the first one that is held out
        if validation is None:
            held_out = max(1, first // 64)
            first -= held_out
            training = first - self.windows.overlapping
        else:
            apart = Windows(validation, args.seq_len, args.stride)
            held_out, self.windows = len(apart), ConcatDataset([self.windows, apart])
        name = f"--dataset_name {shown(args.dataset_name)}"
        if not held_out:
            raise UserError(
                f"{name}: its {len(validation)} tokens for validation do not fill one sequence of "
                f"--seq_len {args.seq_len}: lower it, or take that text away"
            )
        batch_size = self.micro_batch_size * self.micro_batches_a_step * group.size
        if training < batch_size:
            raise UserError(
                f"{name}: its {len(tokens)} tokens make "
                f"{max(training, 0)} training sequences of --seq_len {args.seq_len}, and a step "
                f"takes {batch_size}, --micro_batch_size {self.micro_batch_size} x "
                f"--gradient_accumulation_steps {self.micro_batches_a_step} x --dp_size "
                f"{group.size}: lower one of these"
            )
        self.order = Order(training, batch_size, args.seed)
        at_most = args.eval_tokens or min(HELD_OUT_SEQUENCES * args.seq_len, HELD_OUT_TOKENS)
        count = max(1, min(held_out, at_most // args.seq_len) // batch_size) * batch_size
        self.held_out = [first + row * held_out // count for row in range(count)]
        self.positions = positions.to(device)  # [seq / cp]
        workers = {"num_workers": args.num_workers}
        if args.num_workers:
            workers["multiprocessing_context"] = "fork"  # they share the mapped file: no copies
        # From pinned memory a copy to a GPU runs beside other work.
        self.options = {**workers, "pin_memory": device.type == "cuda"}
        self.next_step, self.loading, self.ahead = None, None, None

    def micro_batches(self, step):
        """The micro-batches of a step: tokens, targets [micro_batch, seq / cp] and positions.

        One more is loaded ahead: the first of `next_step`, once a step is read to its end.
        """
        if step != self.next_step:
            self.loading = iter(self.load(self.order.cut(self.micro_batch_size, step)))
            self.ahead = self.split(next(self.loading))
        # None while a step is read: a caller that stops in the middle can begin this step again.
        self.next_step = None
        for _ in range(self.micro_batches_a_step):
            yield self.ahead
            # Loads the next one while the device still works. The last belongs to the next step.
            self.ahead = self.split(next(self.loading))
        self.next_step = step + 1

    def evaluation(self):
        """Micro-batches of `held_out`, the same at every call.

        They are whole batches, spread evenly over the held-out part; where it is smaller than one
        batch, some sequences come more than once.
        """
        size = self.micro_batch_size
        cut = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        for windows in self.load(cut):
            yield self.split(windows)

    def load(self, micro_batches):
        mine = itertools.islice(micro_batches, self.group.rank, None, self.group.size)
        return DataLoader(self.windows, batch_sampler=mine, **self.options)

    def split(self, windows):  # [micro_batch, seq + 1]
        windows = windows.to(self.device, non_blocking=True)
        return windows[:, self.positions], windows[:, self.positions + 1], self.positions
