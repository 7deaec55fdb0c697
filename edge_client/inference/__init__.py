"""Answers to pictures on a device: onnxruntime, Pillow and numpy. Nothing in here imports torch."""
