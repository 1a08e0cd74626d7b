"""Experiments on a training: short forks, gradients and growth, to find why quality lags."""
