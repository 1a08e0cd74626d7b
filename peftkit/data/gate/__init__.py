"""The data gate: what is learnt, shown token by token, and checks that pass, warn or fail."""
