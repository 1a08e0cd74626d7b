"""Model cards: facts of a run or an adapter, and how to use what was written."""
