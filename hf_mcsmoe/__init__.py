"""Make sparse Mixture-of-Experts models small enough to run."""
