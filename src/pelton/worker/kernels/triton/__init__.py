"""The GPU backend: Triton kernels over torch's tensors. On a CPU they run under Triton's interpreter, to be tested."""
