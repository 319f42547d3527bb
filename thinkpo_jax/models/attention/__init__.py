"""Kernels for causal attention over packed rows, and their memory.

`dispatch.py` selects the kernel for a device (`select_kernel`) and calls it (`packed_attention`). A token attends to
itself and to earlier tokens of its own segment.

| kernel      | devices                             | memory per row | file         |
|-------------|-------------------------------------|----------------|--------------|
| `splash`    | TPU                                 | linear         | splash.py    |
| `cudnn`     | NVIDIA GPU, compute capability >= 9 | linear         | cudnn.py     |
| `blockwise` | all (plain XLA)                     | linear         | blockwise.py |
| `reference` | all, for tests and short rows       | quadratic      | blockwise.py |
"""
