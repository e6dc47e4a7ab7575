"""Writing quantized checkpoints: one module for each library, and the folder that all of them end in."""
