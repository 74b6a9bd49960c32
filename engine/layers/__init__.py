"""The parts a decoder is made of: thin callables that hold weights and call `kernels`. All of it needs torch."""
