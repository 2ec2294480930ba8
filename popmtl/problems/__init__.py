"""Problems: the interface for your own, and the built-in ones."""

from popmtl.method.problem import Evaluation, Problem, VectorProblem

__all__ = ["Evaluation", "Problem", "VectorProblem"]
