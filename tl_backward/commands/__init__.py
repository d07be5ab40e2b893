"""The commands of ``python -m tl_backward``, one module each."""
