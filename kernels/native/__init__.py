"""Native kernels: a whole forward pass in one call of a shared library in plain C++ with a C interface.

`src/` is the library, `build.py` compiles it, `library.py` loads it and says which instruction paths this machine has, `network.py` is
a decoder in it, `ops.py` the single operations for tests and measurements. Without the library torch computes (kernels/*/reference.py).

Contract: every output is one running sum over its inputs in ascending order, so a row's bits depend on that row alone, in float32 and in
bfloat16, whatever the batch, the chunking and the number of threads. They do depend on the instruction path, which is therefore
part of a worker's identity. Products of bfloat16 are summed in float32; the residual stream, norms, angles and scores are float32 always.
"""
