"""The base model and its adapter: locate, load, quantize, wrap, save. The only package that imports peft."""
