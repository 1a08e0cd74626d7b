"""Before the first step: facts, the data gate, predicted and measured memory, the run's context."""
