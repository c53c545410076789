"""GPU kernels in Triton and in CUDA C++.

Every operation has a file of its name. It holds the Triton kernel and a function ``launch`` that launches it. The file
of a loss also has a function ``tile_demands``, which says what its tiles must be like. ``calibration_bins.cu``,
``cross_entropy_few.cu``, ``cross_entropy_rows.cu`` and ``overlap_few.cu`` are kernels in CUDA C++, which the native
module calls.

The other files are shared by the operations: ``launch`` cuts work into tiles, and ``tile``, ``labels``, ``softmax``,
``noise``, ``gaussian``, ``reductions``, ``overlap``, ``dice`` and ``sample_statistics`` hold functions and small
kernels.

:mod:`calseg.backends.triton` calls the launches. The files import PyTorch, Triton and each other, and nothing else of
calseg. They receive the specs of :mod:`calseg.operations` as they are.
"""
