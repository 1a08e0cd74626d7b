"""Rigs: tiny models, planted faults, a hub of this machine, runs that are hurt."""
