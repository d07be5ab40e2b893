"""The commands of ``python -m tl_backward``, one file each."""
