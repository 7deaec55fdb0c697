"""What is wrong with this device, found by doing it: real kernels, real layers, a real model, a real broker."""
