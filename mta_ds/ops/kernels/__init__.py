"""Triton kernels, one module for each op, and what launches them. Imported only where they run."""
