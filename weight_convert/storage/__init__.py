"""File formats: bytes on the disk to NumPy arrays and back."""
