"""Diagnosis of a run's quality as pure functions: losses and signals in, a verdict out. No torch."""
