"""The mathematics of PopMTL: torch, numpy and pymoo; no Ray, no MLflow, no files."""
