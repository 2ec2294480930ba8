"""From where autograd leaves the gradients of a step, the parameters' `grad`, to the rows that everything else reads.

A parameter's `grad` is None before each backward pass, and is taken right after it. So it makes no difference whether
the problem's own code clears gradients on the way, and a parameter that no loss reaches is seen to have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from popmtl.method.flat import Layout

Rows = int | slice
"""One row, or all of them at once (`ALL`)."""
ALL = slice(None)


class GradientRows:
    """The gradients of k rows as a matrix, (k, D), and which parameters have one at this step.

    Attributes:
        matrix: 0 where a parameter has no gradient.
        views: for each row its parts, in the shapes of the parameters.
        there: for each row, whether each parameter has a gradient; None of a row that has no losses.
    """

    def __init__(self, layout: Layout, models: Sequence[nn.Module], matrix: Tensor) -> None:
        self.matrix, self.layout = matrix, layout
        self.views = [list(layout.views(row).values()) for row in matrix]
        sizes = [math.prod(shape) for shape in layout.shapes]
        columns = zip(layout.shapes, matrix.split(sizes, 1), strict=True)
        self.stacked_views = [part.view(len(matrix), *shape) for shape, part in columns]
        self.parameters: list[list[Tensor]] = []
        for model in models:
            named = dict(model.named_parameters())
            self.parameters.append([named[name] for name in layout.names])
        self.there: list[list[bool] | None] = [None] * len(matrix)
        self.all_there = [True] * len(layout.names)

    def begin(self) -> None:
        """A new step: no row has a gradient."""
        self.there = [None] * len(self.matrix)

    def clear(self) -> None:
        """Lets parameters have no gradient that other code may have left in them."""
        for of_row in self.parameters:
            for parameter in of_row:
                parameter.grad = None

    def collect(self, rows: Rows, leaves: Sequence[Tensor], which: range | None = None) -> None:
        """Takes the gradients that a backward pass has left; those of a further pass of the same step add up.

        Args:
            rows: that the pass was of.
            leaves: the tensors that have them as `grad`, in the order of the layout; it is None afterwards.
            which: of the layout's parameters; None for all.

        Raises:
            ValueError: a gradient is sparse.
        """
        first = self.there[0 if isinstance(rows, slice) else rows]
        views = self.stacked_views if isinstance(rows, slice) else self.views[rows]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None and not leaf.grad.is_sparse]
        if first is None and which is None and len(gradients) == len(leaves):  # as it nearly always is
            torch._foreach_copy_(views, gradients)
            for leaf in leaves:
                leaf.grad = None
            for i in range(len(self.matrix)) if isinstance(rows, slice) else [rows]:
                self.there[i] = self.all_there
            return
        had = first or [False] * len(views)
        has = list(had)
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        added: tuple[list[Tensor], list[Tensor]] = [], []
        for p in range(len(views)) if which is None else which:
            gradient = leaves[p].grad
            if gradient is None:
                if not had[p]:
                    views[p].zero_()
                continue
            if gradient.is_sparse:
                name = self.layout.names[p]
                raise ValueError(f"parameter {name} has a sparse gradient; give its module sparse=False")
            into, taken = added if had[p] else copied
            into.append(views[p])
            taken.append(gradient)
            has[p] = True
            leaves[p].grad = None
        if copied[0]:
            torch._foreach_copy_(*copied)
        if added[0]:
            torch._foreach_add_(*added)
        for i in range(len(self.matrix)) if isinstance(rows, slice) else [rows]:
            self.there[i] = list(has)

    def put(self, row: int, gradient: Tensor, there: Sequence[bool]) -> None:
        """Makes a gradient of shape (D,) that of a row."""
        self.matrix[row] = gradient
        self.there[row] = list(there)

    def leave_out(self, row: int) -> None:
        """A row without losses: its gradient is 0, and nothing of it has one."""
        self.matrix[row] = 0
        self.there[row] = None

    def complete(self, which: range) -> bool:
        """Whether these parameters have gradients in all rows that have losses."""
        return all(
            there is None or there is self.all_there or all(there[which.start : which.stop]) for there in self.there
        )
