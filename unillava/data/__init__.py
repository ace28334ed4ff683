"""From pictures and text to a batch: NumPy, Pillow and the tokenizer, no framework."""
