"""Problems whose models the tests log to MLflow; the sink finds them by name, in the run's config."""

import torch
from torch import nn

from popmtl.problems import Problem


class TwoHeadsModel(nn.Module):
    """As multi-task models are: two outputs; with buffers, and dropout that must be off in what is logged."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x):
        return torch.stack([head(self.body(x)) for head in self.heads], dim=1)


class BranchingModel(TwoHeadsModel):
    """Decides by its input's values, which cannot be exported."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class TwoHeads(Problem):
    objectives = ("left", "right digit")

    def __init__(self, sizes=(), branching=False, example=True):
        self.branching, self.example = branching, example

    def model(self):
        return BranchingModel() if self.branching else TwoHeadsModel()

    def example_input(self):
        return torch.ones(5, 4) if self.example else None

    def batches(self, seed):
        raise NotImplementedError

    def evaluation_batches(self, split):
        raise NotImplementedError

    def losses(self, model, batch):
        raise NotImplementedError
