"""The model: CLIP towers, 4- and 8-bit base, LoRA adapters and their algebra. Never imports MQTT."""

import logging

# bitsandbytes logs, whenever it is imported, that an optional fused kernel is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
