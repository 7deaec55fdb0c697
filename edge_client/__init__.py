"""The device: receive a plan, train, upload; and answer pictures with ONNX, without torch."""
