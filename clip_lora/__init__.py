"""The model: CLIP towers, 4- and 8-bit base, LoRA adapters and their algebra. Never imports MQTT."""

import logging
import warnings

# Two messages that concern nobody who uses clipcast: bitsandbytes logs, whenever it is imported, that an optional fused
# kernel is not there; transformers 5.23 warns about an attribute of its own, which peft reads.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
