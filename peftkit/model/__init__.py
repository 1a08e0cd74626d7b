"""The base model and its adapter: found, loaded, quantized, wrapped, saved. The only home of peft."""
