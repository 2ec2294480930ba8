"""Problems whose batches come from loaders; Ray's workers import them by name."""

import time

import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from toy_problems import NoisyRegression


class Rows(Dataset):
    """Rows of noise, each made when it is asked for, and as slowly as is said."""

    def __init__(self, rows, seconds=0.0):
        self.rows, self.seconds = rows, seconds

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        time.sleep(self.seconds)
        x = torch.randn(6, generator=torch.Generator().manual_seed(row))
        return {"x": x, "y": (x.sum(), x[0] - x[1])}


class FromLoader(NoisyRegression):
    """Shuffled epochs of a loader: torch's, or torchdata's that has a state."""

    epochs = True

    def __init__(self, rows=22, workers=0, stateful=True, own=True, seconds=0.0, epochs=True):
        super().__init__()
        self.rows, self.workers, self.stateful, self.own, self.seconds = rows, workers, stateful, own, seconds
        self.epochs = epochs

    def batches(self, seed):
        return (StatefulDataLoader if self.stateful else DataLoader)(
            Rows(self.rows, self.seconds),
            batch_size=4,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(seed) if self.own else None,
        )


class Numbered:
    """A stream that is its own iterator, with a state; counts what it makes, and sleeps over it."""

    def __init__(self, seed, seconds=0.0, end=None, made=None):
        self.seed, self.seconds, self.end, self.at, self.made, self.file = seed, seconds, end, 0, 0, made

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.end:
            raise StopIteration
        time.sleep(self.seconds)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed((self.seed + self.at) % 2**63))
        self.at += 1
        self.made += 1
        if self.file:
            with open(self.file, "ab") as file:
                file.write(b".")
        return {"x": x, "y": (x.sum(1), x[:, 0] - x[:, 1])}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class FromNumbered(NoisyRegression):
    """Streams with a state; or, as bare iterators, without one. Each batch adds a byte to a file, if told."""

    def __init__(self, seconds=0.0, stateful=True, made=None):
        super().__init__()
        self.seconds, self.stateful, self.made = seconds, stateful, made

    def batches(self, seed):
        stream = Numbered(seed, self.seconds, made=self.made)
        return stream if self.stateful else map(dict, stream)
