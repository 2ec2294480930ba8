"""MLflow: the population and its Pareto set, ready to browse."""
