"""The artefact: adapter -> merged weights -> ONNX -> proof. Never imports MQTT."""
