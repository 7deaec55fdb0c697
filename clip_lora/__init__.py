"""The model: CLIP towers, 4- and 8-bit base, LoRA adapters and their algebra. Never imports MQTT."""
