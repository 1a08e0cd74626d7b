"""The model on the meta device: its tensors without memory, and a training step traced on it."""
