"""GPU kernels: one file for each operation, with its Triton kernel and the launch of it.

``launch`` cuts work into tiles, and ``tile``, ``labels``, ``softmax``, ``noise``, ``gaussian``, ``reductions`` and
``sample_statistics`` are what the operations share. :mod:`calseg.backends.triton` calls the launches. Kernels import
PyTorch, Triton and each other, and take the specs of :mod:`calseg.operations` as they are. A loss is the file of its
name: its ``kind`` says what the tiles must be, its ``launch`` runs it. ``calibration_bins.cu`` is the same operation in
CUDA C++, which the native module calls.
"""
