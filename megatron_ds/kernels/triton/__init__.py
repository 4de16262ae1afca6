"""Triton kernels of the table's operations; imported only where Triton is installed and has a device to compile for."""
