"""Processes that train together, started by the engines that people run: torchrun's own launcher on this machine."""
