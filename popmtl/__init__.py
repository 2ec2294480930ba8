"""PopMTL trains a Pareto set of multi-task models in one run."""

__version__ = "0.1.0"
