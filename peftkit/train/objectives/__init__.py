"""One file per task: how its trainer is built."""
