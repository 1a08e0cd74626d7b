"""Pure judgement: evaluation losses and signals in, a verdict out. No torch."""
